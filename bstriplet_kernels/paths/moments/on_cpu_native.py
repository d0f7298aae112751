"""The second-moment path by the native operators of csrc/, on the CPU, without `ref_emb`.

The same classes, moments and weights as `on_cpu`, and the same state between forward and
backward; rows are read where they lie instead of being moved in class order first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._torch import below_autograd
from ...cost import Work, round_up
from .. import native
from . import on_cpu

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
    with below_autograd():
        return list(native.CALLS["moment_means"](embeddings, labels, eps, smallest))


def gradients(
    a: Tensor, embeddings: Tensor, ref_emb: None, state: list[Tensor], sigma: float
) -> list[Tensor]:
    """[dL/d(embeddings)] for a = dL/dl [h > 0], [N]."""
    with below_autograd():
        return [native.CALLS["moment_gradient"](a, embeddings, *state, sigma)]


_BLOCK_BYTES = 1 << 17  # of unit rows in a thread's scratch; csrc/moments/ has the same
_FEWEST_ROWS = 96  # of a block
_PART_ROWS = 4096  # the most rows of one sum in the accumulation dtype
_PACKED_NUMBERS = 1 << 21  # of the matrices that are packed at once
_WIDEST_PANEL = 32  # numbers: rows of a block are padded to whole panels


def extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """Peak bytes beyond the inputs. Includes the gradient and the operators' own arrays.

    A class whose rows differ in weight needs a matrix A_c, known only when it runs: counted for
    half of the classes.
    """
    n, d, number = work.n, work.d, work.accumulated
    large, small = on_cpu.split_sizes(class_sizes, n, smallest_moment(d))
    matrix, width = d * d * number, round_up(d, _WIDEST_PANEL)

    runs = [*large, *(size * count for size, count in small.items())]
    members = max(small, default=0)
    rows = max(_FEWEST_ROWS, min(n // 32, _BLOCK_BYTES // (width * number)), members)
    part = max(d, _FEWEST_ROWS, min(n // 32, _PART_ROWS))
    blocks, parts = (sum(-(-run // most) for run in runs) for most in (rows, part))
    threads = max(native.threads(blocks, rows * d * d), native.threads(parts, part * d * d // 2))
    block = 2 * rows * (width + 1) + members * (members + 32)  # unit rows, results, S of a class
    kept = n * (8 + 3 * number) + 24 * len(set(class_sizes)) + (2 + len(large)) * matrix
    kept += threads * block * number

    sums = parts * d * width * number
    packed = round_up(d, native.panel_columns(work)) * d * number
    at_once = min(max(1, _PACKED_NUMBERS * number // (2 * packed)), len(large))
    packing = 2 * packed * max(at_once, bool(small))
    complements = 2 * d * d * 8  # all classes together and all but a dominating one, in double

    forward = max(sums, complements + packing, 3 * n * number)  # at least the hinge
    if not work.wants_gradient:
        return kept + forward
    weighted = (1 + len(large) // 2) * matrix
    backward = weighted + max(sums // 2, 2 * complements + packing)
    weights = 2 * n * number  # of the rows, in both orders
    return kept + max(forward, work.gradient_bytes + max(weights + backward, work.cast_bytes))
