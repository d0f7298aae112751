"""S in panels through torch.mm, for impl="triton" where D is large; `fused` decides where.

`tiles.tile_gradient` forms a tile of S anew for every slice of D. Here a panel of rows of S is one
product, a kernel makes of it, in one sweep, its row sums or its weights, and one more product by
torch.mm serves all of D. S is symmetric: where the columns are the rows themselves a panel begins
at its diagonal block, and what stands beyond it counts for its columns as well. S twice, once for
each direction, then costs little more than keeping it would, and nothing of size N x M is kept.

Rows are scaled by the power of two next to 1 / n_i, which rounds nothing and lets the weights of a
pair serve both its rows, whatever their norms are. Half embeddings are multiplied as they are, into
float32; float32 ones as `torch.get_float32_matmul_precision` says. The host does not know which
rows are active, so that products are never passed over: only the sweep is, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .second_moments import through_normalisation

PANEL_NUMBERS = 1 << 23  # entries of S at once: 32 MiB of float32, what a second-level cache holds
_FEWEST_ROWS = 128  # of a panel, however long its rows are
BLOCK_N, BLOCK_M, WARPS = 64, 64, 8
_LARGEST_WEIGHT = 13  # as a power of two: four of them are below float16's largest number


class Side(NamedTuple):
    """Rows or columns of S, padded with zeros to multiples of 16.

    scaled: [N', D'], f_i times a power of two so that 1 < |f_i| <= 2. rest, power: [N], the two
    factors of 1 / n_i, where 1/2 <= rest < 1; both 0 for a zero row.
    """

    scaled: Tensor
    rest: Tensor
    power: Tensor
    labels: Tensor


def make_side(embeddings: Tensor, labels: Tensor, inverse: Tensor) -> Side:
    """The side of embeddings [N, D] with norms 1 / inverse [N]."""
    rest = torch.frexp(inverse).mantissa
    power = (inverse / rest).masked_fill(inverse == 0, 0.0)  # exact, as no power function is
    scaled = (embeddings.to(inverse.dtype) * power[:, None]).to(embeddings.dtype)
    n, d = embeddings.shape
    scaled = torch.nn.functional.pad(scaled, (0, -d % 16, 0, -n % 16))
    return Side(scaled, rest, power, labels.contiguous())


def panel_rows(n: int, m: int) -> int:
    """Rows of a panel of S [n, m], a multiple of BLOCK_N."""
    rows = min(max(PANEL_NUMBERS // m, _FEWEST_ROWS), n)
    return -(-rows // BLOCK_N) * BLOCK_N


def pairs(n: int, m: int, own: bool) -> int:
    """Entries of S that its panels hold: little more than half of it where the rows are `own`."""
    if not own:
        return n * m
    rows = panel_rows(n, m)
    before = -(-n // rows) - 1  # panels before the last
    left_out = rows * rows * before * (before - 1) // 2 + rows * before * (n - rows * before)
    return n * m - left_out


def row_sums(rows: Side, columns: Side, own: bool, signed: bool) -> Tensor:
    """[3, N]: sums of phi(s_ij) over P_i and over Q_i, and |P_i|."""
    from . import tiles

    n = len(rows.rest)
    sums = rows.rest.new_zeros(3, n)
    for panel in _panels(rows, columns, own):
        here, there = slice(panel.start, panel.stop), slice(panel.first, None)
        raw = _product(rows.scaled[here], columns.scaled[there].T, sums.dtype)
        height, width = len(rows.rest[here]), len(columns.rest[there])
        grid = (-(-height // BLOCK_N), -(-width // BLOCK_M))
        by_row = sums.new_empty(3, grid[1], height)
        by_column = sums.new_empty(3, grid[0], width if own else 0)
        tiles.panel_sums[grid](
            raw,
            rows.labels[here],
            columns.labels[there],
            rows.rest[here],
            columns.rest[there],
            by_row,
            by_column,
            height,
            width,
            raw.stride(0),
            int(own),
            int(signed),
            BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M,
            num_warps=WARPS,
        )
        sums[:, here].add_(by_row.sum(1))
        if panel.stop < n and own:
            sums[:, panel.stop :].add_(by_column[:, :, height:].sum(1))
    return sums


def gradient(
    rows: Side, row_pull: Tensor, columns: Side, column_pull: Tensor, own: bool, signed: bool
) -> Tensor:
    """dL/df of the rows, [N', D'] in the accumulation dtype.

    Pulls, [2, N] and [2, M]: what a row's pairs weigh in dL/dS (see `tiles.finish_rows`).
    """
    from . import tiles

    power = rows.power
    if rows.scaled.dtype == torch.float16:
        scale = _weight_scale(row_pull, column_pull)
        row_pull, column_pull, power = row_pull * scale, column_pull * scale, power / scale
    dtype = rows.rest.dtype
    total = rows.scaled.new_zeros(rows.scaled.shape, dtype=dtype)
    for panel in _panels(rows, columns, own):
        here, there = slice(panel.start, panel.stop), slice(panel.first, None)
        raw = _product(rows.scaled[here], columns.scaled[there].T, dtype)
        in_place = raw.dtype == rows.scaled.dtype
        weights = raw if in_place else torch.empty_like(raw, dtype=rows.scaled.dtype)
        height, width = raw.shape
        tiles.panel_weights[-(-height // BLOCK_N), -(-width // BLOCK_M)](
            raw,
            weights,
            rows.labels[here],
            columns.labels[there],
            rows.rest[here],
            columns.rest[there],
            row_pull[:, here],
            column_pull[:, there],
            len(rows.rest[here]),
            len(columns.rest[there]),
            height,
            raw.stride(0),
            row_pull.stride(0),
            column_pull.stride(0),
            int(own),
            int(signed),
            BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M,
            num_warps=WARPS,
        )
        _add_product(total[here], weights, columns.scaled[there])
        if own:
            _add_product(total[panel.stop :], weights[:, height:].T, rows.scaled[here])
    n = len(rows.rest)
    unit = rows.scaled[:n].to(dtype) * rows.rest[:, None]
    return through_normalisation(total[:n], unit, power)


class _Panel(NamedTuple):
    """Rows start ... stop against the columns from `first` on."""

    start: int
    stop: int
    first: int


def _panels(rows: Side, columns: Side, own: bool) -> Iterator[_Panel]:
    n, m = len(rows.scaled), len(columns.scaled)
    step = panel_rows(n, m)
    for start in range(0, n, step):
        yield _Panel(start, min(start + step, n), start if own else 0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, of what a and b hold: half-precision products are exact in float32."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b, total.dtype)


def _weight_scale(*pulls: Tensor) -> Tensor:
    """The power of two that brings weights into float16's range, scalar."""
    largest = torch.stack([pull.abs().amax() for pull in pulls]).amax()
    power = torch.where(largest == 0, 1.0, torch.frexp(largest).mantissa / largest)
    return 2.0**_LARGEST_WEIGHT * power
