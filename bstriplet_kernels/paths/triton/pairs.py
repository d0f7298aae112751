"""Row sums and gradients over pairs of rows, for impl="triton"; `fused` makes a loss of them.

Both sides are prepared once: rows of one scale, in the dtype in which they are multiplied. A tile
of S then needs no norms and no masks. The forward turns tiles into sums of rows. The backward forms
S anew and goes one of two ways: `by_tiles` multiplies each tile of weights with its columns at once
and stores nothing of size N x M, at the price of S anew for each slice of D; `by_panels` writes
weights in half precision, a bounded panel at a time, and one product serves all of D. Where half
precision is enough and all of S fits a panel, the forward keeps it, and nothing is formed anew.

float32 is multiplied as high + low, two float16 numbers that hold 22 bits of rows of one scale:
three products, exact to float32's own rounding, on units that take half precision. Where torch is
allowed to round products (`torch.set_float32_matmul_precision("high")`), high alone has tf32's
bits, and one product does. Half-precision rows are multiplied as they are, and float64 ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...cost import round_up
from ...spec import accumulation_dtype

ROWS = 128
"""Prepared rows are padded with zeros to a multiple of this: the largest tile."""
PREPARED = 8
"""Rows that one program prepares."""
PANEL_BYTES = 1 << 26
"""Of weights at once: 64 MiB, all of 4,096 rows in float32, when half of S is enough."""
MAX_PARTS = 16
"""Among how many programs the columns of one tile of rows are shared out at most."""
MOST_HALVED_TILES = 256
"""S is halved up to so many tiles of rows, since each row has a sum from each tile: 2 KiB a row at
most."""
_SCALE = 256.0  # of unit float32 rows, so that what rounding leaves is in float16's range
_DEPTH = 64  # of one step of a product
_WHOLE = 128  # up to this width a tile of S is one step
_MANY_ROWS = 2048  # from which large tiles of half of S are enough programs
_LARGEST_WEIGHT = 13  # as a power of two: four of them are below float16's largest number
_INTERPRETER_PROCESSORS = 6  # so that small inputs share columns out there too
USUAL_PROCESSORS = 132  # for predictions: an H100


class Blocks(NamedTuple):
    """How a kernel is cut: rows, columns, depth of one step, gradient columns; warps and stages."""

    n: int
    m: int
    d: int
    v: int
    warps: int
    stages: int


class Side(NamedTuple):
    """Rows or columns of S, padded with zeros to whole blocks; N' and D' are the padded sizes.

    high: [N', D']. Of float32 and float64 unit rows, float32's times 256 and rounded to float16; of
    half precision f_i times the power of two next to 1 / n_i, which rounds nothing.
    low: what the rounding left, or [0] where one product does.
    scales: [2, N']: what makes unit rows of half precision's, and what f_i was multiplied by.
    classes: [2, N'] int32: the first column with the row's label, M where there is none; and where
    the side's rows are columns, at the first of each class, how many it has.
    dtype: the embeddings'.
    """

    high: Tensor
    low: Tensor
    scales: Tensor
    classes: Tensor
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """N', a multiple of `ROWS`."""
        return self.high.shape[0]

    @property
    def width(self) -> int:
        """D', see `padded_width`."""
        return self.high.shape[1]

    @property
    def is_split(self) -> bool:
        """Whether products are of two parts of each number."""
        return self.low.numel() > 0

    @property
    def is_unit(self) -> bool:
        """Whether rows are of norm 1, times `scale`."""
        return self.dtype.itemsize >= 4

    @property
    def scale(self) -> float:
        """What unit rows are multiplied by."""
        return _SCALE if self.dtype == torch.float32 else 1.0

    @property
    def form(self) -> dict[str, bool]:
        """What kernels are compiled for."""
        return {"UNIT": self.is_unit, "SPLIT": self.is_split}


def products_are_exact() -> bool:
    """Whether torch multiplies float32 on a GPU as it is, by whichever of its settings was used.

    `torch.get_float32_matmul_precision` raises where the newer one was.
    """
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which rows of that dtype are multiplied."""
    return torch.float16 if dtype == torch.float32 else dtype


def padded_width(d: int) -> int:
    """D': a power of two up to one step's depth, then a multiple of it."""
    return max(16, 1 << (d - 1).bit_length()) if d <= _DEPTH else round_up(d, _DEPTH)


def _is_whole(width: int, dtype: torch.dtype) -> bool:
    return width <= _WHOLE and dtype != torch.float64


def sum_blocks(width: int, dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.tile_sums`.

    Several programs of four warps share a processor: while one adds up a tile, another multiplies.
    """
    if dtype == torch.float64:
        return Blocks(32, 32, min(width, 32), 0, 4, 2)
    if not hopper:
        return Blocks(64, 32, min(width, 32), 0, 4, 2)
    if _is_whole(width, dtype):
        return Blocks(64, 64, width, 0, 4, 2)
    return Blocks(64, 64, _DEPTH, 0, 4, 3 if dtype == torch.float32 else 4)


def half_blocks(rows: int, width: int, dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.half_tile_sums`: squares, the larger the fewer times a row is read."""
    if dtype == torch.float64:
        return Blocks(32, 32, min(width, 16), 0, 4, 2)
    if not hopper:
        return Blocks(64, 64, min(width, 32), 0, 4, 2)
    if dtype.itemsize == 2 and rows >= _MANY_ROWS:
        return Blocks(128, 128, min(width, _DEPTH), 0, 4, 2)
    if width <= _WHOLE:
        return Blocks(64, 64, width, 0, 4, 1)
    return Blocks(64, 64, _DEPTH, 0, 4, 3)


def gradient_blocks(width: int, dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.tile_gradient`."""
    if dtype == torch.float64:
        return Blocks(32, 32, min(width, 32), min(width, 32), 4, 2)
    if _is_whole(width, dtype) and hopper:
        return Blocks(64, 64, width, width, 4, 2)
    depth = min(width, 32)
    return Blocks(64, 32, depth, _slice(width) if hopper else min(width, _DEPTH), 4, 2)


def weight_blocks(width: int, dtype: torch.dtype, hopper: bool, kept: bool = False) -> Blocks:
    """Of `tiles.tile_weights`; kept: from S as the forward kept it."""
    if kept:
        return Blocks(32, 32, 0, 0, 2, 1)
    if dtype == torch.float64:
        return Blocks(32, 32, min(width, 32), 0, 4, 2)
    if not hopper:
        return Blocks(64, 64, min(width, 32), 0, 4, 2)
    if dtype == torch.float32:
        return Blocks(64, 64, min(width, _DEPTH), 0, 4, 3)
    return Blocks(128, 128, min(width, _DEPTH), 0, 8, 3)


def product_blocks(width: int, hopper: bool) -> Blocks:
    """Of `tiles.weighted_rows`."""
    slice_ = _slice(width) if hopper else min(width, _DEPTH)
    return Blocks(64, 32, 0, slice_, 4, 3 if hopper else 2)


def row_blocks(width: int) -> Blocks:
    """Of `tiles.normalise_gradient`, and the depth of a step of `tiles.prepare_rows`."""
    depth = min(256, 1 << (width - 1).bit_length())
    return Blocks(512 // depth, 0, depth, 0, 4, 3)


def _slice(width: int) -> int:
    """Columns of a gradient at once, of which D' is a multiple."""
    return _WHOLE if width % _WHOLE == 0 else min(width, _DEPTH)


def parts(programs: int, tiles: int, processors: int) -> int:
    """Among how many programs tiles of columns are shared out: two for each processor."""
    return max(1, min(MAX_PARTS, tiles, 2 * processors // programs))


@functools.cache
def kernels() -> ModuleType:
    """`tiles`, imported when its first kernel runs."""
    from . import pair_kernels as tiles

    return tiles


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at once."""
    if device.type == "cpu":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether tensor cores read their operands from shared memory, as blocks assume there."""
    if device.type == "cpu" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def prepare(embeddings: Tensor, labels: Tensor, column_labels: Tensor | None, eps: float) -> Side:
    """The side of embeddings [N, D] with labels [N] against columns with `column_labels` [M].

    None: the rows are the columns.
    """
    are_columns, labels = column_labels is None, labels.contiguous()
    column_labels = labels if column_labels is None else column_labels.contiguous()
    n, d = embeddings.shape
    dtype, accumulated = embeddings.dtype, accumulation_dtype(embeddings)
    rows, width = round_up(n, ROWS), padded_width(d)
    high = embeddings.new_empty((rows, width), dtype=operand_dtype(dtype))
    side = Side(
        high,
        high.new_empty((rows, width) if is_split(dtype) else 0),
        embeddings.new_empty((2, rows), dtype=accumulated),
        labels.new_empty((2, rows), dtype=torch.int32),
        dtype,
    )
    kernels().prepare_rows[(rows // PREPARED,)](
        embeddings,
        labels,
        column_labels,
        *side[:2],
        *side.scales,
        *side.classes,
        n,
        column_labels.shape[0],
        d,
        width,
        *embeddings.stride(),
        eps * eps,
        SCALE=side.scale,
        **side.form,
        COLUMNS=are_columns,
        BLOCK_N=PREPARED,
        BLOCK_M=256,
        BLOCK_D=row_blocks(width).d,
        num_warps=4,
    )
    return side


def half_tiles(rows: int, own: bool, width: int, dtype: torch.dtype, hopper: bool) -> int:
    """How many tiles wide S is where sums are taken of half of it; else 0."""
    tiles = rows // half_blocks(rows, width, dtype, hopper).n
    return tiles if own and tiles <= MOST_HALVED_TILES else 0


def keeps_similarities(rows: int, own: bool, dtype: torch.dtype) -> bool:
    """Whether S of N' rows may be kept in half precision for a backward by panels."""
    return own and dtype.itemsize == 2 and rows * rows * 2 <= PANEL_BYTES


def row_sums(rows: Side, columns: Side, own: bool, signed: bool) -> Tensor:
    """Sums of phi over P_i and Q_i, times scale^4: [2, parts, N'], to be added up."""
    device = rows.high.device
    blocks = sum_blocks(rows.width, rows.dtype, is_hopper(device))
    row_tiles, column_tiles = rows.rows // blocks.n, columns.rows // blocks.m
    shares = parts(row_tiles, column_tiles, processors(device))
    slots = rows.scales.new_empty(2, shares, rows.rows)
    kernels().tile_sums[row_tiles, shares](
        *_operands(rows, columns),
        slots,
        rows.width,
        column_tiles,
        int(signed),
        OWN=own,
        **rows.form,
        BLOCK_N=blocks.n,
        BLOCK_M=blocks.m,
        BLOCK_D=blocks.d,
        WHOLE=blocks.d == rows.width,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return slots


def own_row_sums(side: Side, signed: bool, kept: bool) -> tuple[Tensor, Tensor]:
    """As `row_sums` of rows with themselves, from half of S; and S in float16, [N', N'].

    kept: whether it is wanted; it is written up to the diagonal's tiles. Else it is empty.
    """
    blocks = half_blocks(side.rows, side.width, side.dtype, is_hopper(side.high.device))
    tiles = side.rows // blocks.n
    slots = side.scales.new_empty(2, tiles, side.rows)
    similarities = side.high.new_empty((side.rows,) * 2 if kept else 0, dtype=torch.float16)
    kernels().half_tile_sums[(tiles * (tiles + 1) // 2,)](
        side.high,
        side.low,
        side.scales[0],
        side.classes[0],
        slots,
        similarities,
        tiles,
        side.width,
        SIGNED=signed,
        **side.form,
        KEPT=kept,
        BLOCK_N=blocks.n,
        BLOCK_D=blocks.d,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return slots, similarities


def _operands(rows: Side, columns: Side) -> tuple[Tensor, ...]:
    """What kernels over tiles take first."""
    return (
        rows.high,
        rows.low,
        columns.high,
        columns.low,
        rows.scales[0],
        columns.scales[0],
        rows.classes[0],
        columns.classes[0],
    )


class Weights(NamedTuple):
    """What rows' pairs weigh in dL/dS for what comes from upstream.

    of_rows: [2, N'], on a row's positives and on its negatives, 0 where a row is not active.
    scale: scalar, the power of two that brings weights into float16's range.
    """

    of_rows: Tensor
    scale: Tensor


def largest_weight(side: Side) -> int:
    """What `Weights.scale` raises the largest weight to, as a power of two."""
    return _LARGEST_WEIGHT - 2 * (int(side.scale).bit_length() - 1)  # for scale^2, see `tiles`


def weights_of(side: Side, pull: Tensor, upstream: Tensor) -> Weights:
    """Pulls [2, N'] times dL/dl_i [N]."""
    weight, scale = torch.empty_like(pull), pull.new_empty(())
    kernels().weigh_rows[(1,)](
        pull,
        upstream,
        weight,
        scale,
        upstream.shape[0],
        side.rows,
        upstream.stride(0),
        LARGEST=largest_weight(side),
        BLOCK_N=2048,
        num_warps=8,
    )
    return Weights(weight, scale)


def by_tiles(
    rows: Side,
    row_weights: Weights,
    columns: Side,
    column_weights: Weights,
    own: bool,
    signed: bool,
) -> Tensor:
    """Weighted sums of columns, [parts, N', D'], to be added up: see `tiles.tile_gradient`."""
    device = rows.high.device
    blocks = gradient_blocks(rows.width, rows.dtype, is_hopper(device))
    row_tiles, slices = rows.rows // blocks.n, rows.width // blocks.v
    column_tiles = columns.rows // blocks.m
    shares = parts(row_tiles * slices, column_tiles, processors(device))
    partial = rows.scales.new_empty(shares, rows.rows, rows.width)
    kernels().tile_gradient[row_tiles, slices, shares](
        *_operands(rows, columns),
        row_weights.of_rows,
        *column_weights,
        partial,
        rows.width,
        column_tiles,
        int(signed),
        OWN=own,
        **rows.form,
        BLOCK_N=blocks.n,
        BLOCK_M=blocks.m,
        BLOCK_D=blocks.d,
        BLOCK_V=blocks.v,
        WHOLE=blocks.d == blocks.v == rows.width,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return partial


def is_split(dtype: torch.dtype) -> bool:
    """Whether rows of that dtype are multiplied as two parts of each number."""
    return dtype == torch.float32 and products_are_exact()


def panel_rows(rows: int, columns: int, dtype: torch.dtype, split: bool) -> int:
    """Rows of weights at once, a multiple of `ROWS`."""
    weight = operand_dtype(dtype).itemsize * (2 if split else 1)
    return min(rows, max(ROWS, PANEL_BYTES // (columns * weight) // ROWS * ROWS))


def panels(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each panel."""
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def by_panels(
    rows: Side,
    row_weights: Weights,
    columns: Side,
    column_weights: Weights,
    own: bool,
    signed: bool,
    similarities: Tensor | None = None,
) -> Tensor:
    """As `by_tiles`, through panels of weights; similarities: S, where the forward kept it."""
    device, kept = rows.high.device, similarities is not None
    hopper = is_hopper(device)
    step = panel_rows(rows.rows, columns.rows, rows.dtype, rows.is_split)
    blocks = weight_blocks(rows.width, rows.dtype, hopper, kept)
    high = rows.high.new_empty(step, columns.rows)
    low = torch.empty_like(high) if rows.is_split else rows.low
    shares = 1
    if rows.is_split:
        shares = product_parts(step, columns.rows, rows.width, hopper, processors(device))
    partial = rows.scales.new_empty(shares, rows.rows, rows.width)
    mirrored = own and step == rows.rows
    column_tiles = columns.rows // blocks.m
    for first, last in panels(rows.rows, step):
        row_tiles = (last - first) // blocks.n
        tiles = row_tiles * column_tiles
        if mirrored:
            tiles = blocks.n // blocks.m * row_tiles * (row_tiles + 1) // 2
        kernels().tile_weights[(tiles,)](
            *_operands(rows, columns),
            row_weights.of_rows,
            *column_weights,
            similarities,
            high,
            low,
            rows.rows,
            rows.width,
            first,
            column_tiles,
            int(signed),
            OWN=own,
            MIRRORED=mirrored,
            KEPT=kept,
            **rows.form,
            BLOCK_N=blocks.n,
            BLOCK_M=blocks.m,
            BLOCK_D=blocks.d,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        if rows.is_split:
            _add_products(partial, high[: last - first], low, columns, first)
        else:
            _multiply(high[: last - first], columns.high, partial[0, first:last])
    return partial


def product_parts(step: int, columns: int, width: int, hopper: bool, processors: int) -> int:
    """Among how many programs `tiles.weighted_rows` shares columns out."""
    blocks = product_blocks(width, hopper)
    return parts(step // blocks.n * (width // blocks.v), columns // blocks.m, processors)


def _add_products(partial: Tensor, high: Tensor, low: Tensor, columns: Side, first: int) -> None:
    blocks = product_blocks(columns.width, is_hopper(high.device))
    kernels().weighted_rows[high.shape[0] // blocks.n, columns.width // blocks.v, partial.shape[0]](
        high,
        low,
        columns.high,
        columns.low,
        partial,
        partial.shape[1],
        columns.rows // blocks.m,
        columns.width,
        first,
        SPLIT=True,
        BLOCK_N=blocks.n,
        BLOCK_M=blocks.m,
        BLOCK_V=blocks.v,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b: of half precision as it is, accumulated in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and torch.version.hip is None:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def normalised(
    side: Side, partial: Tensor, scale: Tensor, upstream: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """dL/df [N, D] in the accumulation dtype, from what `by_tiles` or `by_panels` returned.

    upstream: dL/dL, to be multiplied in, or [N], which weights have already.
    """
    n, d = shape
    gradient = partial.new_empty(n, d)
    blocks = row_blocks(side.width)
    kernels().normalise_gradient[(-(-n // blocks.n),)](
        partial,
        side.high,
        side.low,
        *side.scales,
        scale,
        upstream,
        gradient,
        n,
        d,
        side.width,
        side.rows,
        partial.shape[0],
        int(upstream.dim() == 0),
        SCALE=side.scale,
        **side.form,
        BLOCK_N=blocks.n,
        BLOCK_D=blocks.d,
        num_warps=blocks.warps,
    )
    return gradient
