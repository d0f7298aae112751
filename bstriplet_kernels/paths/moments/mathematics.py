"""The mathematics of the second-moment path, shared by its schedules.

For phi(s) = s^2 the sums of Eq. 3 over a class c are quadratic forms of its moment matrix
T_c = sum_{j in c} f^_j f^_j^T. So a row u of class c needs T_c and the sum of the others, T - T_c,
alone. With p_c and q_c, one over the number of its positives and of its negatives:

    positive = p_c (u^T T_c u - |u|^4)        negative = q_c u^T (T - T_c) u

The gradient is dL/df^ = K_c (a u) + B_c u with a = dL/dl [h > 0]. K_c comes from the row's own
loss, B_c from the losses in which u is a column. With A_c = sum_{j in c} a_j f^_j f^_j^T:

    K_c = 2 (sigma q_c (T - T_c) - p_c T_c)   B_c = 2 (sigma (sum of the other q A) - p_c A_c)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BYTES_A_ROW = 96  # order, inverse norms, means, a and the vectors that make them
_BLOCK = 64  # columns of a symmetric matrix computed at once, down to its diagonal block
_ROWS_WORTH_HALVING = 1024  # from so many rows of one matrix on, cutting it up saves time


def inverse_norms(embeddings: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """1 / |f_i|, [N]; 0 for a zero row (norm <= eps), NaN where |f_i|^2 overflows `dtype`."""
    norms = torch.linalg.vector_norm(embeddings, dim=1, dtype=dtype)
    inverse = norms.reciprocal().masked_fill(norms <= eps, 0.0)
    return inverse.masked_fill(norms.isinf(), torch.nan)


def class_weights(positives: Tensor, columns: int, own: bool) -> tuple[Tensor, Tensor]:
    """p_c and q_c of Eq. 3 (0 where a mean is over nothing), float64, shaped as `positives`.

    positives: members of each class among the columns. own: the columns are the rows themselves,
    and a row is not its own positive.
    """
    others = columns - positives
    positives = positives - 1 if own else positives
    weights = [1.0 / n.double() for n in (positives, others)]
    p, q = (w.masked_fill(n <= 0, 0.0) for w, n in zip(weights, (positives, others), strict=True))
    return p, q


def add_moment(total: Tensor, weighted: Tensor, unit: Tensor) -> None:
    """Add weighted^T unit to `total` [D, D], on and above its diagonal blocks; both [n, D].

    The product is symmetric, so 3/4 of it is computed at D = 128, 9/16 at 512.
    """
    for start in range(0, unit.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        total[block, start:] += weighted[:, block].T @ unit[:, start:]


def mirror(total: Tensor) -> Tensor:
    """`total` [D, D] of `add_moment`, its blocks below the diagonal filled in place."""
    for start in range(_BLOCK, total.shape[0], _BLOCK):
        block = slice(start - _BLOCK, start)
        total[start:, block] = total[block, start:].T
    return total


def half_matrices(matrices: tuple[Tensor, ...], rows: int) -> list[Tensor]:
    """Symmetric [D, D] matrices as column blocks down to the diagonal, for `quadratic_forms`.

    Block j is [end_j, len(matrices) * width_j]. Numbers above its diagonal block are doubled, since
    they stand for those below it too. For few rows one block holds all: cutting would cost more.
    """
    stacked = torch.stack(matrices, dim=1)
    if rows < _ROWS_WORTH_HALVING:
        return [stacked.flatten(1)]
    blocks = []
    for start in range(0, stacked.shape[2], _BLOCK):
        block = stacked[: start + _BLOCK, :, start : start + _BLOCK].clone()
        block[:start] *= 2
        blocks.append(block.flatten(1))
    return blocks


def quadratic_forms(unit: Tensor, halves: list[Tensor], count: int) -> Tensor:
    """u^T M u, [n, count], for each row u of `unit` [n, D] and each of `count` matrices M."""
    parts = []
    for half in halves:
        end, width = half.shape[0], half.shape[1] // count
        product = (unit[:, :end] @ half).unflatten(1, (count, width))
        columns = unit[:, None, end - width : end]
        parts.append(product.mul_(columns).sum(2))
    return parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0])


def own_share(
    own: Tensor, others: Tensor, p: float | Tensor, q: float | Tensor, sigma: float
) -> Tensor:
    """K_c, from a row's own loss. own: T_c; others: T - T_c."""
    return others * (2 * sigma * q) - own * (2 * p)


def others_share(own: Tensor, others: Tensor, p: float | Tensor, sigma: float) -> Tensor:
    """B_c, from the losses in which a row is a column. own: A_c; others: sum of the other q A."""
    return others * (2 * sigma) - own * (2 * p)


def split_sizes(
    class_sizes: Sequence[int], columns: int, smallest: int
) -> tuple[list[int], Counter[int]]:
    """Members of each class that has a moment matrix; of the others, how many have each size.

    A class of more than half of the columns has one whatever its size: T - T_c would cancel.
    """
    large = [s for s in class_sizes if s >= smallest or 2 * s > columns]
    return large, Counter(s for s in class_sizes if s < smallest and 2 * s <= columns)


def moment_fraction(d: int, columns: int = _BLOCK) -> float:
    """The share of a symmetric [D, D] product that is computed, `columns` of them at once."""
    blocks = -(-d // columns)
    return (blocks + 1) / (2 * blocks)


def form_fraction(d: int, rows: int) -> float:
    """The share of a product with a matrix that `quadratic_forms` of so many rows computes."""
    return 1.0 if rows < _ROWS_WORTH_HALVING else moment_fraction(d)


def product_flops(
    n: int,
    d: int,
    large: Sequence[int],
    small: Counter[int],
    moment: float,
    form: Callable[[int], float],
    block_products: int,
    one_weight: bool,
) -> int:
    """FLOPs of the products of forward and backward on the CPU, class by class.

    large, small: as `split_sizes` returns them. moment: the share of a moment that is computed.
    form(rows): that of a form of so many rows. block_products: products of a small class's members
    with each other. one_weight: the rows of each class share one weight, as where all have h > 0
    and the reduction is a scalar; otherwise weighted moments and a second product are added.
    """
    rows = sum(size * count for size, count in small.items())
    forms = sum(2 * s * form(s) for s in large) + rows * form(n)
    pairs = sum(size * size * count for size, count in small.items() if size > 1)
    products = (n * moment + forms + n) * d * d + block_products * pairs * d
    if not one_weight:
        products += (n * moment + n) * d * d
    return int(2 * products)


def traffic(n: int, d: int, itemsize: int) -> int:
    """Bytes to and from memory on the CPU: the rows read for their norms and three times more, the
    gradient written.

    Writing a row of the gradient out of order reads its cache lines first.
    """
    return n * (6 * d * itemsize + _BYTES_A_ROW)
