"""The hand-written backward, in one place, whatever path computes it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import reference
from .paths import PATHS
from .spec import Gradients, Rows, Spec

_N_INPUTS = 6  # embeddings, ref_emb, labels, ref_labels, spec, path
_Others = tuple[Tensor, Tensor | None, Spec, str]  # of these, what has no gradient


def batch_similarity(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
    path: str,
) -> tuple[Tensor, Rows | None]:
    """The differentiable loss, by the cheapest way in, and the rows where spec wants them."""
    others = labels, ref_labels, spec, path
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        loss, positive, negative, *_ = BatchSimilarity.apply(embeddings, ref_emb, *others)
    elif spec.wants_rows:
        loss, positive, negative = EagerBatchSimilarity.apply(embeddings, ref_emb, others)
    else:
        return EagerBatchSimilarity.apply(embeddings, ref_emb, others), None
    return loss, Rows(positive, negative)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products of a loss stay in its accumulation dtype, whatever autocast would choose."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class BatchSimilarity(torch.autograd.Function):
    """(embeddings, ref_emb, labels, ref_labels, spec, path name) -> (loss, rows, path's state).

    Differentiable in `embeddings` and `ref_emb`; of the outputs, in the loss alone. Keeps the
    inputs, Eq. 3's two means for each row and what the path asks for.
    """

    @staticmethod
    def forward(
        embeddings: Tensor,
        ref_emb: Tensor | None,
        labels: Tensor,
        ref_labels: Tensor | None,
        spec: Spec,
        path: str,
    ) -> tuple[Tensor, ...]:
        with _without_autocast(embeddings.device):
            loss, rows, state = PATHS[path].forward(
                embeddings, ref_emb, labels, ref_labels, spec._replace(wants_rows=True)
            )
        assert rows is not None
        return loss, *rows, *state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.spec, ctx.path = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * _N_INPUTS
        saved = ctx.saved_tensors
        # Grad mode is on where a second derivative may follow. Without one the plain function does,
        # and so it must in a traced backward.
        differentiable = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        compute = Gradient.apply if differentiable else _gradient
        if torch.compiler.is_compiling():
            compute = _gradient
        elif differentiable and torch._C._functorch.is_legacy_batchedtensor(grad_loss):
            compute = _reference_gradient  # of a Function, is_grads_batched would lose the graph
        grad, grad_ref = compute(grad_loss, *saved[:4], ctx.spec, ctx.path, *saved[4:])
        return (grad, grad_ref, *(None,) * (_N_INPUTS - 2))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _map_over_batch(BatchSimilarity, info.batch_size, in_dims, args)


class EagerBatchSimilarity(torch.autograd.Function):
    """`BatchSimilarity` without what only torch.func needs, a third of the time at N_b = 36.

    A Function with a separate setup_context has its arguments bound to their names on every call,
    and each argument and output costs a part of a microsecond: what has no gradient is one, and
    the rows are outputs only where spec wants them.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, ref_emb: Tensor | None, others: _Others
    ) -> Tensor | tuple[Tensor, ...]:
        labels, ref_labels, spec, name = others
        path = PATHS[name]
        if path.heeds_autocast and torch._C._is_any_autocast_enabled():
            with _without_autocast(embeddings.device):
                loss, rows, state = path.forward(embeddings, ref_emb, labels, ref_labels, spec)
        else:
            loss, rows, state = path.forward(embeddings, ref_emb, labels, ref_labels, spec)
        ctx.spec, ctx.path, ctx.has_gradients = spec, name, type(state) is Gradients
        kept = (None, None) if rows is None else rows
        ctx.save_for_backward(embeddings, ref_emb, labels, ref_labels, *kept, *state)
        if rows is None or not spec.wants_rows:
            return loss
        ctx.mark_non_differentiable(*rows)
        ctx.set_materialize_grads(False)
        return loss, *rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if (
            grad_loss is None
            or not ctx.has_gradients
            or torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or is_dynamo_compiling()
        ):
            return (*BatchSimilarity.backward(ctx, grad_loss)[:2], None)
        saved = ctx.saved_tensors
        grad = _scaled(saved[6], grad_loss, saved[0].dtype)
        grad_ref = None if saved[1] is None else _scaled(saved[7], grad_loss, saved[1].dtype)
        return grad, grad_ref, None


def _scaled(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved gradient times the upstream number; in its own memory where this is its last use."""
    last = not torch._C._autograd._get_current_graph_task_keep_graph()
    if not last or torch._C._functorch.is_legacy_batchedtensor(grad_loss):  # is_grads_batched
        grad = grad * grad_loss
    # Elsewhere to look at the number is to wait for it; here tolist() is faster than item().
    elif not grad_loss.is_cpu or grad_loss.tolist() != 1:
        grad = grad.mul_(grad_loss)
    return grad if grad.dtype == dtype else grad.to(dtype)


def _gradient(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
    path: str,
    *kept: Tensor,
) -> tuple[Tensor, Tensor | None]:
    positive, negative, *state = kept
    with _without_autocast(embeddings.device):
        return PATHS[path].backward(
            grad_loss,
            embeddings,
            ref_emb,
            labels,
            ref_labels,
            Rows(positive, negative),
            tuple(state),
            spec,
        )


def _reference_gradient(
    grad_loss: Tensor, embeddings: Tensor, *others: Any
) -> tuple[Tensor, Tensor | None]:
    """`_gradient` by the reference, which needs neither a path nor what one kept."""
    with _without_autocast(embeddings.device):
        return reference.gradient(grad_loss, embeddings, *others[:4])


class Gradient(torch.autograd.Function):
    """dL/df by the path that computed L. Its own derivative is the reference's, by autograd."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor | None]:
        return _gradient(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_loss, embeddings, ref_emb, labels, ref_labels, ctx.spec, _, *kept = inputs
        ctx.n_kept = len(kept)
        ctx.save_for_backward(grad_loss, embeddings, ref_emb, labels, ref_labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, embeddings, ref_emb, labels, ref_labels = ctx.saved_tensors
        sides = (embeddings,) if ref_emb is None else (embeddings, ref_emb)

        def gradient(grad_loss: Tensor, rows: Tensor, columns: Tensor | None = None) -> Any:
            grads = reference.gradient(grad_loss, rows, columns, labels, ref_labels, ctx.spec)
            return grads[: len(sides)]

        with _without_autocast(embeddings.device):
            pull_back = torch.func.vjp(gradient, grad_loss, *sides)[1]
            second = pull_back(upstream[: len(sides)])
        return (*second, *(None,) * (7 + ctx.n_kept - len(second)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _map_over_batch(Gradient, info.batch_size, in_dims, args)


def _map_over_batch(
    function: type[torch.autograd.Function],
    batch_size: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """`torch.vmap` of a Function: one call for each batch, since a batch is what the loss is of."""
    results = [
        function.apply(
            *(
                a.select(d, b) if isinstance(d, int) else a
                for a, d in zip(args, in_dims, strict=True)
            )
        )
        for b in range(batch_size)
    ]
    stacked = tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True)
    )
    return stacked, tuple(None if column is None else 0 for column in stacked)
