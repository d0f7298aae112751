"""FLOPs and bytes of our paths, for operators whose inside no counter sees."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .cases import DTYPES, FORWARD, Case


class Cost(NamedTuple):
    """flops: multiplications and additions. bytes: what must move to and from memory."""

    flops: int
    bytes: int


def eq8_flops(case: Case) -> int:
    """Eq. 8 as printed, for the forward alone, with l = D."""
    n, d, c = case.n, case.d, case.c
    return (d * d + c * c + d + c + 3) * n * n + (2 * d + 5) * n


def path_cost(path: str, case: Case, labels: Tensor) -> Cost | None:
    """The products of a path and the sweeps over what is as large as they are; None: not known."""
    if path == "gram":
        return _moments(case, labels)
    if path in ("native", "triton"):
        return _pairs(case, 3 if path == "triton" and case.n > 128 else 2)
    return None


def _pairs(case: Case, products_in_all: int) -> Cost:
    """S, its weights, W F: `products_in_all` of 2 N^2 D FLOPs; embeddings read once a product."""
    products = 1 if case.operation == FORWARD else products_in_all
    sweeps = 6 if case.operation == FORWARD else 14
    pairs = case.n * case.n
    gradient = 0 if case.operation == FORWARD else case.embedding_bytes
    return Cost(
        flops=products * 2 * pairs * case.d + sweeps * pairs,
        bytes=products * case.embedding_bytes + gradient,
    )


def _moments(case: Case, labels: Tensor) -> Cost:
    """A class of N_c > D rows: T_c and three products more; smaller ones: blocks and two with T."""
    d = case.d
    large = small = pairs = 0
    for size in labels.bincount().tolist():
        if size > d:
            large += size
        else:
            small += size
            pairs += size * size
    only_forward = case.operation == FORWARD
    flops = 2 * d * d * large * (3 if only_forward else 4)
    flops += 2 * d * d * small * (2 if only_forward else 4) + 2 * d * pairs * (
        1 if only_forward else 2
    )
    panel_passes = 2 if only_forward else 3
    item = DTYPES[case.dtype].itemsize
    written = 0 if only_forward else case.embedding_bytes
    return Cost(flops, panel_passes * case.embedding_bytes + written + 4 * item * case.n)
