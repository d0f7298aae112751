"""What `pairs` costs by tiles and by panels, and which of the two is faster."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ...calibration import CONSTANTS
from ...cost import Constants, Cost, Work, round_up
from .. import gpu
from . import blocks

TILES, PANELS = "triton tiles", "triton panels"
"""The schedules, by their names in `CONSTANTS`."""
_MOST_COLUMNS = 1 << 24  # offsets in 128 rows of a panel then fit 32 bits
_HALF_BYTES = 2  # of a similarity that is kept


class Rates(NamedTuple):
    """FLOPs a second of products, by the precision of the operands."""

    half: float
    tf32: float
    float32: float
    float64: float


# Rates of an H200, rounded, for want of measured ones. They decide between tiles and panels, and
# nothing else.
_TILES = Rates(4e14, 4e14, 5e14, 2e13)
_PANELS = Rates(3.9e14, 3.9e14, 4.6e14, 3e13)
_BYTES_A_SECOND = 4e12  # panels are partly in the second-level cache
_LAUNCH_SECONDS = 3e-6


def by_panels(n: int, m: int | None, d: int, dtype: torch.dtype) -> bool:
    """Whether panels are predicted to be faster than tiles, forward and backward together."""
    if max(n, m or 0) > _MOST_COLUMNS:
        return False
    return _compare(n, m, d, dtype, _speeds(dtype, gpu.products_are_exact()))


@functools.lru_cache(maxsize=4096)
def _compare(
    n: int, m: int | None, d: int, dtype: torch.dtype, speeds: tuple[Constants, Constants]
) -> bool:
    work = Work(n, m, d, dtype)
    tiles, panels = (
        constants.seconds(_cost(work, panels, None), dtype)
        for constants, panels in zip(speeds, (False, True), strict=True)
    )
    return panels < tiles


def _speeds(dtype: torch.dtype, exact: bool) -> tuple[Constants, Constants]:
    """Speeds of tiles and panels: measured, if both were in this precision, else assumed."""
    measured = CONSTANTS.get("cuda", {})
    if TILES in measured and PANELS in measured:
        found = measured[TILES], measured[PANELS]
        if dtype == torch.float32 and exact:
            return found
        if dtype.itemsize < 4 and None not in (found[0].half, found[1].half):
            return found
    return _assumed(_TILES, dtype, exact), _assumed(_PANELS, dtype, exact)


def _assumed(rates: Rates, dtype: torch.dtype, exact: bool) -> Constants:
    if dtype == torch.float32:
        rate = rates.float32 if exact else rates.tf32
    else:
        rate = rates.float64 if dtype == torch.float64 else rates.half
    return Constants(0.0, 1 / rate, 1 / _BYTES_A_SECOND, _LAUNCH_SECONDS)


def cost(work: Work, device: torch.device | None) -> Cost:
    """The cost of the faster way. Memory is counted for `device`, or the usual GPU if None.

    The rest is counted as launched on an H100, with whole blocks and recomputed tiles. An exact
    float32 product counts as three. Bytes: each launch reads and writes a number once, the numbers
    of a row that do not grow with D left out.
    """
    found = _cost(work, by_panels(work.n, work.m, work.d, work.dtype), device)
    by_row = work.reduction == "none"  # no `reduce_losses`, but `weigh_rows` in a backward
    if not work.wants_gradient:
        return found._replace(launches=found.launches - by_row)
    cast = sum(work.narrow_sides) * work.d * work.accumulated + work.cast_bytes
    launches = found.launches + len(work.narrow_sides)
    return found._replace(launches=launches, bytes=found.bytes + cast)


class _Sizes(NamedTuple):
    """A side's padded rows and columns, and how they are multiplied.

    n: rows with a loss, without padding. own: whether the rows are the columns.
    """

    n: int
    rows: int
    columns: int
    own: bool
    form: blocks.Form

    @property
    def pairs(self) -> int:
        """Pairs of a row and a column."""
        return self.rows * self.columns

    def halved(self, tile: int) -> int:
        """Pairs in the tiles on and below the diagonal."""
        tiles = self.rows // tile
        return tile * tile * tiles * (tiles + 1) // 2

    def weighed(self, tile: int, mirrored: bool) -> int:
        """Pairs in the tiles of weights that a row with a loss is in; others are not multiplied."""
        tiles, active = self.rows // tile, -(-self.n // tile)
        if not self.own:
            return active * tile * self.columns
        below = active * tiles - active * (active - 1) // 2
        both = tiles * tiles - (tiles - active) ** 2
        return tile * tile * (below if mirrored else both)

    def flops(self, count: int) -> int:
        """FLOPs of a product of depth D' for `count` pairs."""
        return 2 * count * self.form.width * (3 if self.form.split else 1)

    @property
    def element(self) -> int:
        """Bytes of a number of prepared rows, and of a weight."""
        return self.form.operand.itemsize * (2 if self.form.split else 1)

    @property
    def prepared_bytes(self) -> int:
        """Bytes of the side's prepared rows."""
        return self.rows * self.form.width * self.element

    @property
    def half_tiles(self) -> int:
        """See `blocks.half_tiles`."""
        return blocks.half_tiles(self.form, self.rows, self.own)

    @property
    def keeps_similarities(self) -> bool:
        """See `blocks.keeps_similarities`."""
        return blocks.keeps_similarities(self.form, self.rows, self.own)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the partial sums of rows, over half of S or all of it."""
        cut = blocks.sum_blocks(self.form)
        tiles = self.rows // cut.n, self.columns // cut.m
        parts = self.half_tiles or blocks.parts(*tiles, self.form.processors)
        return 2 * self.rows * parts * max(4, self.form.dtype.itemsize)

    @property
    def panel_rows(self) -> int:
        """See `blocks.panel_rows`."""
        return blocks.panel_rows(self.form, self.rows, self.columns)

    def gradient_parts(self, panels: bool) -> int:
        """How many parts add up to the side's gradient."""
        if panels:
            return blocks.product_parts(self.form, self.panel_rows, self.columns)
        cut = blocks.gradient_blocks(self.form)
        programs = self.rows // cut.n * (self.form.width // cut.v)
        return blocks.parts(programs, self.columns // cut.m, self.form.processors)


def _sides(work: Work, device: torch.device | None = None) -> tuple[_Sizes, ...]:
    """The rows' side and, with `ref_emb`, the columns'."""
    form = blocks.form_of(work.d, work.dtype, blocks.is_split(work.dtype), device)
    rows, columns = (round_up(size, blocks.ROWS) for size in (work.n, work.columns))
    first = _Sizes(work.n, rows, columns, work.m is None, form)
    return (first,) if first.own else (first, first._replace(rows=columns, columns=rows))


def _cost(work: Work, panels: bool, device: torch.device | None) -> Cost:
    """The cost of a scalar loss by tiles or by panels."""
    sides = _sides(work)
    first = sides[0]
    sizes, accumulated = (work.n, work.columns), work.accumulated
    prepared = sum(side.prepared_bytes for side in sides)
    tiles = first.half_tiles
    flops = first.flops(first.halved(first.rows // tiles) if tiles else first.pairs)
    moved = work.embedding_bytes + 2 * prepared + 2 * first.slot_bytes
    launches = len(sides) + 3
    for side, size in zip(sides, sizes, strict=False) if work.wants_gradient else ():
        if panels:
            n_panels = -(-side.rows // side.panel_rows)
            of_columns = prepared if side.own else prepared - side.prepared_bytes
            flops += side.flops(side.pairs)
            if side.keeps_similarities:
                read = first.weighed(blocks.weight_blocks(side.form, kept=True).n, True)
                moved += (first.halved(first.rows // tiles) + read) * _HALF_BYTES
            else:
                tile = blocks.weight_blocks(side.form).n
                flops += side.flops(first.weighed(tile, mirrored=n_panels == 1))
                moved += prepared + (n_panels - 1) * of_columns
            moved += 2 * side.pairs * side.element + n_panels * of_columns
            launches += 1 + 2 * n_panels
        else:
            slices = side.form.width // blocks.gradient_blocks(side.form).v
            flops += side.flops(side.pairs * (slices + 1))
            moved += prepared
            launches += 2
        # parts are written and, with the prepared rows, read for the gradient
        sums = side.gradient_parts(panels) * (side.rows + size) * side.form.width * accumulated
        moved += sums + size * (side.form.width * side.element + work.d * accumulated)
    if work.wants_gradient:
        launches += len(sides) - 1  # zeros for the weights of columns
    schedule = PANELS if panels else TILES
    return Cost(flops, moved, launches, _extra_memory(work, panels, device), schedule)


def _extra_memory(work: Work, panels: bool, device: torch.device | None) -> int:
    """Prepared rows of both sides, and partial sums or a gradient with its parts and a panel."""
    sides, number = _sides(work, device), work.accumulated
    first = sides[0]
    kept = sum(side.prepared_bytes + side.rows * 2 * (number + 4) for side in sides)
    kept += 5 * work.n * number
    if not work.wants_gradient:
        return kept + first.slot_bytes
    if panels and first.keeps_similarities:
        kept += first.pairs * _HALF_BYTES
    backward, waiting = 0, 2 * sum(side.rows for side in sides) * number
    for side, size in zip(sides, (work.n, work.columns), strict=False):
        parts = side.gradient_parts(panels)
        panel = side.panel_rows * side.columns * side.element if panels else 0
        partial, gradient = parts * side.rows * side.form.width * number, size * work.d * number
        backward = max(backward, waiting + partial + max(panel, gradient))
        waiting += gradient
    return kept + max(first.slot_bytes, backward, waiting + work.cast_bytes)
