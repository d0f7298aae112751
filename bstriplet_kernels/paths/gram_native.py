"""The second-moment path by the native operators of csrc/, on the CPU, without `ref_emb`.

The same classes, moments and weights as `gram_host`, and the same state between forward and
backward; rows are read where they lie instead of being moved in class order first.
"""

from __future__ import annotations

from torch import Tensor

from . import native

SMALLEST_MOMENT = 64
BLOCK_PRODUCTS = 2  # of the members of a small class: half of S twice, and its weights
PANEL = 16  # columns of a symmetric matrix computed at once, with AVX2 in float32


def takes(embeddings: Tensor, ref_emb: Tensor | None) -> bool:
    """Whether the operators are there and take this input."""
    return native.missing() is None and embeddings.is_cpu and ref_emb is None


def smallest_moment(d: int) -> int:
    """Rows from which a class is served by its moment matrix; smaller, it would be N D numbers."""
    return max(d, SMALLEST_MOMENT)


def forward(
    embeddings: Tensor,
    ref_emb: None,
    labels: Tensor,
    ref_labels: None,
    eps: float,
) -> list[Tensor]:
    """[positive [N], negative [N], *state]: the two means of Eq. 3, and what `gradients` wants."""
    smallest = smallest_moment(embeddings.shape[1])
    return list(native.KERNELS["moment_means"](embeddings, labels, eps, smallest))


def gradients(
    a: Tensor, embeddings: Tensor, ref_emb: None, state: list[Tensor], sigma: float
) -> list[Tensor]:
    """[dL/d(embeddings)] for a = dL/dl [h > 0], [N]."""
    return [native.KERNELS["moment_gradient"](a, embeddings, *state, sigma)]
