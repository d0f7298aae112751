"""The loss for eager autograd: a path's forward, then its backward from what the forward kept.

Tracers, torch.func, forward mode and higher derivatives go through `operators`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators
from ._torch import is_batched_upstream, is_traced, keeps_graph, without_autocast
from .paths import PATHS
from .spec import Rows, Spec

_Others = tuple[Tensor, Tensor | None, Spec, str]  # labels, ref_labels, spec, path
_N_SAVED = 6  # both sides, their labels and the rows; then what the path keeps


class BatchSimilarity(torch.autograd.Function):
    """(embeddings, ref_emb, others) -> loss, followed by the rows if spec wants them.

    Only the loss is differentiable, in `embeddings` and `ref_emb`. Saves the inputs and what the
    path keeps. Each argument and output of a Function costs a fraction of a microsecond: inputs
    without a gradient are therefore one tuple, and rows are outputs only if spec wants them.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, ref_emb: Tensor | None, others: _Others
    ) -> Tensor | tuple[Tensor, ...]:
        labels, ref_labels, spec, name = others
        path = PATHS[name]
        if path.heeds_autocast:  # otherwise skip the guard, which takes 0.25 us
            with without_autocast(embeddings.device):
                loss, rows, kept = path.forward(embeddings, ref_emb, labels, ref_labels, spec)
        else:
            loss, rows, kept = path.forward(embeddings, ref_emb, labels, ref_labels, spec)
        ctx.spec, ctx.path, ctx.has_gradients = spec, name, kept.is_gradient
        means = (None, None) if rows is None else rows
        ctx.save_for_backward(embeddings, ref_emb, labels, ref_labels, *means, *kept.tensors)
        if rows is None or not spec.wants_rows:
            return loss
        ctx.mark_non_differentiable(*rows)
        ctx.set_materialize_grads(False)
        return loss, *rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None
        grads: Any
        saved = ctx.saved_tensors
        embeddings, ref_emb = saved[:2]
        if (
            torch.is_grad_enabled()  # a second derivative may follow
            or is_traced()
            or type(grad_loss) is not Tensor
            or grad_loss._is_zerotensor()  # it has no number to read
            or is_batched_upstream(grad_loss)  # many upstreams come at once
        ):
            tensors = embeddings, saved[2], ref_emb, saved[3]
            grads = operators.gradients(grad_loss, *tensors, ctx.spec, ctx.path)
        elif ctx.has_gradients:
            gradient = _scaled(saved[_N_SAVED], grad_loss, embeddings.dtype)
            if ref_emb is None:
                return gradient, None, None
            return gradient, _scaled(saved[_N_SAVED + 1], grad_loss, ref_emb.dtype), None
        else:
            rows, kept = Rows(*saved[4:_N_SAVED]), saved[_N_SAVED:]
            with without_autocast(embeddings.device):
                backward = PATHS[ctx.path].backward
                grads = backward(grad_loss, *saved[:4], rows, kept, ctx.spec)
        gradient = grads[0].to(embeddings.dtype)
        return gradient, None if ref_emb is None else grads[1].to(ref_emb.dtype), None


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved gradient times the upstream number; in place if this is its last use."""
    if gradient.is_cuda and gradient.dtype != dtype:
        # One launch multiplies and casts. A CPU would cast a copy of the product.
        return torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=dtype))
    if keeps_graph():
        gradient = gradient * grad_loss
    # Only on the CPU can the number be read without waiting; tolist() is faster than item().
    elif not grad_loss.is_cpu or grad_loss.tolist() != 1:
        gradient = gradient.mul_(grad_loss)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)
