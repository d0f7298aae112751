"""FLOPs and bytes of our paths, whose operators no counter looks into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bstriplet_kernels import plan
from bstriplet_kernels.paths import fused, gram, gram_host

from .cases import DTYPES, FORWARD, Case


class Cost(NamedTuple):
    """flops: multiplications and additions. bytes: what must move to and from memory."""

    flops: int
    bytes: int


def eq8_flops(case: Case) -> int:
    """Eq. 8 as printed, for the forward alone, with l = D."""
    return plan.eq8_flops(case.n, case.d, case.c)


def path_cost(path: str, case: Case, labels: Tensor, active_share: float) -> Cost | None:
    """What the path itself counts; None where it counts nothing and nothing is known."""
    if path == "gram":
        return _second_moments(case, labels.bincount().tolist(), active_share in (0, 1))
    if path == "triton":
        wants_gradient = case.operation != FORWARD
        return Cost(
            *fused.cost(case.n, None, case.d, DTYPES[case.dtype], "mean", wants_gradient)[:2]
        )
    return _native(case) if path == "native" else None


def _native(case: Case) -> Cost:
    """S and, with a backward, W F, 2 N^2 D FLOPs each; a sweep over S for each of the two.

    S stays in cache at the sizes that the path is for: embeddings are read once a product, the
    gradient is written.
    """
    pairs, products = case.n * case.n, 1 if case.operation == FORWARD else 2
    moved = products * case.embedding_bytes
    if case.operation != FORWARD:
        moved += case.embedding_bytes
    return Cost(products * 2 * pairs * case.d + products * 7 * pairs, moved)


def _second_moments(case: Case, sizes: Sequence[int], one_weight: bool) -> Cost:
    """The path counts forward and backward together; for the forward alone take the backward off.

    That is a D x D product a row, two of the three products of a small class's block, and of six
    passes over the embeddings the last four.
    """
    n, d = case.n, case.d
    moved = gram.traffic(n, d, DTYPES[case.dtype].itemsize)
    if case.operation != FORWARD:
        return Cost(gram.flops(n, d, sizes, one_weight), moved)
    smallest = gram_host.smallest_moment(d)
    pairs = sum(s * s for s in sizes if 1 < s < smallest and 2 * s <= n)
    backward = 2 * (n * d * d + 2 * pairs * d)
    return Cost(gram.flops(n, d, sizes) - backward, moved - 4 * case.embedding_bytes)
