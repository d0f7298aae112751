"""torch.ops.bstriplet.loss and loss_gradient: the loss as operators, for tracers and torch.func.

torch.compile, torch.export, make_fx, torch.func, torch.jit.trace, meta, fake and wrapper tensors
see two operators with their own shapes, rule for vmap, and derivatives of every order in forward
and reverse mode. The path is chosen when an operator runs, where sizes are numbers: one graph
serves every batch, each by its best path.

    loss(f, y)              ->  L, the two means of Eq. 3, and dL/df for an upstream of 1
    loss_gradient(g, f, y)  ->  dL/df for an upstream g, one number or one for each row

A scalar L comes with dL/df, so a training graph keeps those N x D numbers and computes nothing
twice: its backward passes them to `loss_gradient` as `known`, which multiplies them by g. With
reduction="none" the backward starts from the embeddings. Paths compute first derivatives in
reverse mode; the reference, in plain torch, computes all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._torch import (
    call_below_autograd,
    function_for_kernels,
    have_tangents,
    is_traced,
    register_autograd_kernel,
    require_grad,
    without_autocast,
)
from .checks import Options, check_similarity
from .paths import PATHS
from .plan import checked_plan
from .spec import Kept, Path, Spec, accumulation_dtype

_PROBLEM = (
    "Tensor embeddings, Tensor labels, Tensor? ref_emb=None, Tensor? ref_labels=None, "
    "float margin=0.9, float sigma=1.0, str similarity='square', str reduction='mean', "
    "float eps=1e-12, str impl='auto'"
)
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(
    "bstriplet::loss",
    f"({_PROBLEM}, bool gradient=True) "
    "-> (Tensor loss, Tensor means, Tensor grad, Tensor grad_ref)",
    tags=_TAG,
)
torch.library.define(
    "bstriplet::loss_gradient",
    f"(Tensor grad_loss, {_PROBLEM}, Tensor? known=None, Tensor? known_ref=None) "
    "-> (Tensor grad, Tensor grad_ref)",
    tags=_TAG,
)
_LOSS = torch.ops.bstriplet.loss.default
_LOSS_GRADIENT = torch.ops.bstriplet.loss_gradient.default


class Problem(NamedTuple):
    """The arguments of both operators; torch omits from a call those that equal the default.

    labels and ref_labels: any integer dtype or bool. impl: "auto" or a path's name. gradient:
    whether `loss` returns the gradient with a scalar loss.
    """

    embeddings: Tensor
    labels: Tensor
    ref_emb: Tensor | None = None
    ref_labels: Tensor | None = None
    margin: float = 0.9
    sigma: float = 1.0
    similarity: str = "square"
    reduction: str = "mean"
    eps: float = 1e-12
    impl: str = "auto"
    gradient: bool = True

    @property
    def spec(self) -> Spec:
        """The options of the loss as paths take them."""
        wants_gradient = self.gradient and self.reduction != "none"
        numbers = (
            self.margin,
            self.sigma,
            check_similarity(self.similarity),
            self.reduction,
            self.eps,
        )
        return Spec(*numbers, wants_gradient=wants_gradient, wants_rows=True)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Its tensors, in order; the other fields are `options`."""
        return self.embeddings, self.labels, self.ref_emb, self.ref_labels

    @property
    def options(self) -> tuple[Any, ...]:
        """Its numbers and words, in order."""
        return self[4:]

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """The differentiable inputs: the embeddings and, if given, ref_emb."""
        return (self.embeddings,) if self.ref_emb is None else (self.embeddings, self.ref_emb)

    def planned(self) -> tuple[Spec, Path]:
        """The spec and the path to run; raises if an argument is wrong."""
        spec = self.spec
        options = Options(spec, self.impl, group=None, return_stats=True)  # means are outputs
        spec, name = checked_plan(*self.tensors, options, spec.wants_gradient)
        return spec, PATHS[name]

    @property
    def path_inputs(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The tensors as the functions of a path take them."""
        ref_labels = None if self.ref_labels is None else self.ref_labels.to(torch.int64)
        return self.embeddings, self.ref_emb, self.labels.to(torch.int64), ref_labels


_N_PROBLEM = len(Problem._fields) - 1
"""How many arguments both operators have; `gradient` belongs to `loss` alone."""


def _numbers(spec: Spec) -> tuple[float, float, str, str, float]:
    """The options of a spec as the operators take them."""
    return spec.margin, spec.sigma, spec.similarity.name, spec.reduction, spec.eps


def loss_and_means(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    spec: Spec,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The loss and Eq. 3's two means for each row, [2, N], through the operator."""
    options = (*_numbers(spec), impl, spec.wants_gradient)
    # Inside the operator this comes too late: torch.func restores autocast level by level.
    with without_autocast(embeddings.device):
        loss, means, *_ = _LOSS(embeddings, labels, ref_emb, ref_labels, *options)
    return loss, means


def gradients(
    grad_loss: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    spec: Spec,
    impl: str,
    known: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """dL/df of each side for an upstream of `grad_loss`, through the operator.

    In the accumulation dtype, and differentiable in grad_loss and both sides. known: the gradients
    that `loss` returned for an upstream of 1.
    """
    inputs = embeddings, labels, ref_emb, ref_labels, *_numbers(spec), impl
    with without_autocast(embeddings.device):
        grad, grad_ref = _LOSS_GRADIENT(grad_loss, *inputs, *known)
    return grad, None if ref_emb is None else grad_ref


def _pair(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors, as the schema demands; [0] stands for a gradient that does not exist."""
    grads = [g for g in gradients if g is not None]
    grads += [like.new_empty(0) for _ in range(2 - len(grads))]
    return grads[0], grads[1]


# What the operators run: one path, on tensors of one device.


def _run_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(*args)
    (spec, path), inputs = problem.planned(), problem.path_inputs
    with without_autocast(problem.embeddings.device):
        loss, rows, kept = path.forward(*inputs, spec)
        assert rows is not None
        grads: Sequence[Tensor | None] = ()
        if kept.is_gradient:
            grads = kept.tensors
        elif spec.wants_gradient:
            grads = path.backward(torch.ones_like(loss), *inputs, rows, kept.tensors, spec)
    return loss, torch.stack(rows), *_pair(grads, loss)


def _run_loss_gradient(grad_loss: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*args[:_N_PROBLEM])._replace(gradient=True)
    (spec, path), inputs = problem.planned(), problem.path_inputs
    _check_upstream(grad_loss, problem)
    known = args[_N_PROBLEM:]
    if any(gradient is not None for gradient in known):
        known = known[: len(problem.sides)]
        _check_known(known, problem)
        return _pair([gradient * grad_loss for gradient in known], grad_loss)
    grad_loss = grad_loss.to(accumulation_dtype(*problem.sides))
    with without_autocast(problem.embeddings.device):
        rows, kept = path.forward(*inputs, spec)[1:] if path.keeps else (None, Kept())
        if kept.is_gradient:
            return _pair([gradient * grad_loss for gradient in kept.tensors], grad_loss)
        grads = path.backward(grad_loss, *inputs, rows, kept.tensors, spec)
    return _pair(grads, grads[0])


def _check_upstream(grad_loss: Tensor, problem: Problem) -> None:
    """Raise unless grad_loss has the shape of the reduced loss."""
    n = problem.embeddings.shape[0]
    expected = (n,) if problem.reduction == "none" else ()
    if grad_loss.shape != expected:
        raise ValueError(
            f"grad_loss must have shape {list(expected)}, as the loss has with "
            f"reduction={problem.reduction!r}, got shape {list(grad_loss.shape)}"
        )


def _check_known(known: Sequence[Tensor | None], problem: Problem) -> None:
    """Raise unless these have the shapes of what `loss` returns for a scalar."""
    shapes = [None if gradient is None else list(gradient.shape) for gradient in known]
    expected = [list(side.shape) for side in problem.sides]
    if problem.reduction == "none" or shapes != expected:
        raise ValueError(
            "known and known_ref must be what loss returned for a scalar, gradients of shapes "
            f"{expected}, got shapes {shapes} with reduction={problem.reduction!r}"
        )


# What tracers see: shapes and dtypes.


def _shapes_of_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(*args)
    n = problem.embeddings.shape[0]
    like = problem.embeddings.new_empty(0, dtype=accumulation_dtype(*problem.sides))
    loss = like.new_empty((n,) if problem.reduction == "none" else ())
    grads = _empty_gradients(problem) if problem.spec.wants_gradient else ()
    return loss, like.new_empty((2, n)), *_pair(grads, like)


def _shapes_of_loss_gradient(grad_loss: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    grads = _empty_gradients(Problem(*args[:_N_PROBLEM]))
    return _pair(grads, grads[0])


def _empty_gradients(problem: Problem) -> list[Tensor]:
    dtype = accumulation_dtype(*problem.sides)
    return [side.new_empty(side.shape, dtype=dtype) for side in problem.sides]


# The same in plain torch, which every transform of torch can differentiate.


def _plain_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(*args)
    spec, inputs = problem.spec, problem.path_inputs
    with without_autocast(problem.embeddings.device):
        loss, rows, _ = reference.forward(*inputs, spec)
        grads: Sequence[Tensor | None] = ()
        if spec.wants_gradient:
            grads = reference.backward(torch.ones_like(loss), *inputs, None, (), spec)
    return loss, torch.stack(rows), *_pair(grads, loss)


def _plain_loss_gradient(grad_loss: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*args[:_N_PROBLEM])
    with without_autocast(problem.embeddings.device):
        grads = reference.backward(grad_loss, *problem.path_inputs, None, (), problem.spec)
    return _pair(grads, grads[0])


# Their derivatives.


class _Loss(torch.autograd.Function):
    """(keyset, *arguments of loss) -> its outputs, each differentiable in both sides."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        outputs = call_below_autograd(_LOSS, keyset, *args)
        problem = Problem(*args)
        ctx.save_for_backward(*problem.tensors, *outputs[2:])
        ctx.options, ctx.n_inputs = problem.options, 1 + len(args)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        *tensors, grad, grad_ref = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.options)
        grads: tuple[Tensor | None, ...] = (None, None)
        if grad_loss is not None:
            spec = problem.spec
            # Eager autograd can differentiate the saved outputs; a traced graph needs the operator.
            if spec.wants_gradient and not is_traced():
                grads = grad * grad_loss, grad_ref * grad_loss
            else:
                known = (grad, grad_ref) if spec.wants_gradient else ()
                grads = gradients(grad_loss, *problem.tensors, spec, problem.impl, known)
        if any(upstream is not None for upstream in others):
            more = _pull_back(_plain_loss, (), problem, (None, *others))
            grads = tuple(m if g is None else g + m for g, m in zip(grads, more, strict=False))
        return _in_place_of_inputs((None,), grads, problem, ctx.n_inputs)


class _LossGradient(torch.autograd.Function):
    """(keyset, *arguments of loss_gradient) -> its outputs, differentiable in g and both sides."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
        problem = Problem(*args[:_N_PROBLEM])
        ctx.save_for_backward(grad_loss, *problem.tensors)
        ctx.options, ctx.n_inputs = problem.options, 2 + len(args)
        ctx.set_materialize_grads(False)
        return call_below_autograd(_LOSS_GRADIENT, keyset, grad_loss, *args)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        grad_loss, *tensors = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.options)
        seconds = _pull_back(_plain_loss_gradient, (grad_loss,), problem, upstream)
        return _in_place_of_inputs((None, seconds[0]), seconds[1:], problem, ctx.n_inputs)


def _pull_back(
    function: Callable[..., tuple[Tensor, ...]],
    before: tuple[Tensor, ...],
    problem: Problem,
    upstream: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The vjp of `function(*before, *problem)`: gradients of `before`, then of the sides."""

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        first, sides = inputs[: len(before)], inputs[len(before) :]
        ref_emb = sides[1] if len(sides) == 2 else None
        return function(*first, *problem._replace(embeddings=sides[0], ref_emb=ref_emb))

    with without_autocast(problem.embeddings.device):
        values, pull = torch.func.vjp(outputs, *before, *problem.sides)[:2]
        return pull(
            tuple(
                torch.zeros_like(value) if given is None else given
                for value, given in zip(values, upstream, strict=True)
            )
        )


def _in_place_of_inputs(
    before: tuple[Tensor | None, ...],
    grads: Sequence[Tensor | None],
    problem: Problem,
    n_inputs: int,
) -> tuple[Tensor | None, ...]:
    """A gradient for each input: `before`, those of the sides in their dtypes, else None."""
    cast = [
        None if grad is None else grad.to(side.dtype)
        for side, grad in zip(problem.sides, grads, strict=False)
    ]
    grad, grad_ref = cast if len(cast) == 2 else (cast[0], None)
    return (*before, grad, None, grad_ref, None, *(None,) * n_inputs)[:n_inputs]


def _derivative(
    operator: Any, function: type[torch.autograd.Function], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """The autograd kernel of `operator`: `plain` in forward mode, `function` in reverse mode."""
    apply = function_for_kernels(function)
    differentiable = [
        k
        for k, argument in enumerate(operator._schema.arguments)
        if argument.name in ("embeddings", "ref_emb", "grad_loss")
    ]

    def kernel(keyset: Any, *args: Any) -> Any:
        numbers = [args[k] for k in differentiable if k < len(args)]
        if have_tangents(*numbers):
            return plain(*args)
        if require_grad(*numbers):
            return apply(keyset, *args)
        return call_below_autograd(operator, keyset, *args)

    return kernel


def _map_over_batch(operator: Any, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for vmap: one call for each batch, since the loss is defined over one batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        given = list(zip(args, in_dims, strict=True))
        if info.batch_size == 0:
            one = shapes(*(a if d is None else a.sum(d).to(a.dtype) for a, d in given))
            stacked = tuple(output.new_empty((0, *output.shape)) for output in one)
        else:
            results = [
                operator(*(a if d is None else a.select(d, b) for a, d in given))
                for b in range(info.batch_size)
            ]
            stacked = tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


for _operator, _run, _shapes, _function, _plain in (
    (_LOSS, _run_loss, _shapes_of_loss, _Loss, _plain_loss),
    (
        _LOSS_GRADIENT,
        _run_loss_gradient,
        _shapes_of_loss_gradient,
        _LossGradient,
        _plain_loss_gradient,
    ),
):
    _name = _operator._schema.name
    torch.library.impl(_name, "CompositeExplicitAutograd", _run)
    torch.library.register_fake(_name, _shapes)
    torch.library.register_vmap(_name, _map_over_batch(_operator, _shapes))
    register_autograd_kernel(_operator, _derivative(_operator, _function, _plain))
