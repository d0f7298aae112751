"""Second moments on the CPU by the native operators of csrc/moments, without `ref_emb`.

Classes, moments, weights and what is kept for the backward are as in `on_cpu`, but smaller classes
have moment matrices. Each thread gathers rows into its cache, a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._torch import below_autograd
from ...cost import Cost, Work, round_up
from ...spec import Rows
from .. import native
from .mathematics import moment_fraction, product_flops, split_sizes, traffic

SMALLEST_MOMENT = 64
BLOCK_PRODUCTS = 2  # of the members of a small class: half of S twice, and its weights
PANEL = 16  # columns of a symmetric matrix computed at once, with AVX2 in float32


def smallest_moment(d: int) -> int:
    """Rows that a class needs for a moment matrix. All matrices then have at most N D numbers."""
    return max(d, SMALLEST_MOMENT)


def means(
    embeddings: Tensor,
    ref_emb: None,
    labels: Tensor,
    ref_labels: None,
    eps: float,
) -> tuple[Rows, tuple[Tensor, ...]]:
    """The two means of Eq. 3, and what `gradients` needs."""
    smallest = smallest_moment(embeddings.shape[1])
    with below_autograd():
        positive, negative, *kept = native.CALLS["moment_means"](embeddings, labels, eps, smallest)
    return Rows(positive, negative), tuple(kept)


def gradients(
    a: Tensor, embeddings: Tensor, ref_emb: None, kept: tuple[Tensor, ...], sigma: float
) -> tuple[Tensor, None]:
    """dL/d(embeddings) for a = dL/dl [h > 0], [N]."""
    with below_autograd():
        return native.CALLS["moment_gradient"](a, embeddings, *kept, sigma), None


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """FLOPs of products, where all rows have h > 0, and bytes that cross memory."""
    n, d = work.n, work.d
    half = moment_fraction(d, PANEL)
    sizes = split_sizes(class_sizes, n, smallest_moment(d))
    one_weight = work.reduction != "none"
    return Cost(
        flops=product_flops(n, d, *sizes, half, lambda _: half, BLOCK_PRODUCTS, one_weight),
        bytes=traffic(n, d, work.dtype.itemsize),
        launches=0,
        extra_memory=_extra_memory(work, class_sizes),
    )


_BLOCK_BYTES = 1 << 17  # of unit rows in a thread's scratch; csrc/moments/ has the same
_FEWEST_ROWS = 96  # of a block
_PART_ROWS = 4096  # the most rows of one sum in the accumulation dtype
_PACKED_NUMBERS = 1 << 21  # of the matrices that are packed at once
_WIDEST_PANEL = 32  # numbers: rows of a block are padded to whole panels


def _extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """The gradient, and the operators' own arrays.

    A class whose rows differ in weight needs a matrix A_c. Only the run shows which do: half of the
    large classes are counted.
    """
    n, d, number = work.n, work.d, work.accumulated
    large, small = split_sizes(class_sizes, n, smallest_moment(d))
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
