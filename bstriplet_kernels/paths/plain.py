"""impl="reference": the reference's own forward and analytic backward as a path. Keeps nothing."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..spec import Path, Rows, Spec, State


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, State]:
    """N x M matrices in plain torch; see `reference.forward`."""
    loss, rows = reference.forward(embeddings, ref_emb, labels, ref_labels, spec)
    return loss, rows, ()


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows | None,
    state: State,
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.gradient`."""
    return reference.gradient(grad_loss, embeddings, ref_emb, labels, ref_labels, spec)


PATH = Path(forward, backward, keeps=False)
