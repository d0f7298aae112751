"""impl="reference": the reference's own forward and analytic backward as a path. Keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..cost import Operations, Work
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


def operations(work: Work, class_sizes: Sequence[int]) -> Operations:
    """Dense matrices in plain torch; the backward computes S anew.

    Each sweep over N x M numbers is an operator of its own, and so is each launch on a GPU.
    """
    pairs, side = work.n * work.columns, work.vectors * work.d * work.accumulated
    own = work.m is None
    casts = work.casts * (1 if own else 2)
    products, sweeps = 1, 12
    launches = (31 if own else 40) + casts
    if work.wants_gradient:
        products, sweeps = (3 if own else 4), 30
        launches += (48 if own else 62) + 2 * casts
    return Operations(
        products * 2 * pairs * work.d + sweeps * pairs,
        sweeps * pairs * work.accumulated + (3 if work.wants_gradient else 1) * side,
        0 if work.device == "cpu" else launches,
    )


def extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """Peak bytes beyond the inputs: N x M matrices, unit rows and columns, O(N).

    The forward ends with S, phi(S), two masks and phi(S) under each. The backward has S, two masks,
    the slope, two shares and the two terms of dL/dS; or, where D is large, S, the masks and dL/dS
    are still there beside the last three temporaries of a side's gradient.
    """
    number = work.accumulated
    pairs, vectors = work.n * work.columns * number, work.n * number
    rows, columns = vectors * work.d, (work.m or 0) * work.d * number
    units = rows + columns
    if not work.wants_gradient:
        widened = units if work.casts else 0  # half rows, before there is anything else
        return units + max(6 * pairs, widened) + 3 * vectors
    forming = 8 * pairs
    ending = 4 * pairs + max(3 * rows, rows + 3 * columns)
    return units + max(forming, ending) + 6 * vectors


PATH = Path(forward, backward, operations, extra_memory, keeps=False)
