"""impl="gram": exact, in time linear in the batch, by second moments. Nothing is N x M."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Path, Rows, Spec, State, accumulation_dtype, reduce_losses, row_gradient
from . import gram_host
from .gram_host import slot_capacity, table_capacity


@torch.library.custom_op("bstriplet::gram_means", mutates_args=())
def _means(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    eps: float,
) -> list[Tensor]:
    return gram_host.forward(embeddings, ref_emb, labels, ref_labels, eps)


@_means.register_fake
def _(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    eps: float,
) -> list[Tensor]:
    sides = (embeddings,) if ref_emb is None else (embeddings, ref_emb)
    dtype = accumulation_dtype(*sides)
    (n, d), m = embeddings.shape, sides[-1].shape[0]
    vectors = [embeddings.new_empty(n, dtype=dtype) for _ in range(2)]
    table = labels.new_empty(table_capacity(n, None if ref_emb is None else m), 3)
    small = embeddings.new_empty(2, d, d, dtype=dtype)
    slots = embeddings.new_empty(slot_capacity(m, d), d, d, dtype=dtype)
    orders = [
        t
        for side in sides
        for t in (labels.new_empty(side.shape[0]), side.new_empty(side.shape[0], dtype=dtype))
    ]
    return [*vectors, table, small, slots, *orders]


@torch.library.custom_op("bstriplet::gram_gradients", mutates_args=())
def _gradients(
    a: Tensor, embeddings: Tensor, ref_emb: Tensor | None, state: list[Tensor], sigma: float
) -> list[Tensor]:
    return gram_host.gradients(a, embeddings, ref_emb, state, sigma)


@_gradients.register_fake
def _(
    a: Tensor, embeddings: Tensor, ref_emb: Tensor | None, state: list[Tensor], sigma: float
) -> list[Tensor]:
    sides = (embeddings,) if ref_emb is None else (embeddings, ref_emb)
    return [side.new_empty(side.shape) for side in sides]


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, State]:
    """Moments of the columns, then two quadratic forms a row; see `second_moments`."""
    positive, negative, *state = _means(embeddings, ref_emb, labels, ref_labels, spec.eps)
    rows = Rows(positive, negative)
    return reduce_losses(rows, spec), rows, tuple(state)


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows,
    state: State,
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """One matrix a class where its rows share one weight, else two; see `second_moments`."""
    a = row_gradient(grad_loss.to(rows.positive.dtype), rows, spec)
    gradient, *ref_gradient = _gradients(a, embeddings, ref_emb, list(state), spec.sigma)
    return gradient, ref_gradient[0] if ref_gradient else None


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """Only squares are quadratic forms of second moments."""
    return 'similarity="signed_square" has no second-moment form' if spec.signed else None


PATH = Path(forward, backward, refuses=refuses)
