"""How kernels over pairs of rows are cut into blocks, by the form of their operands."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...cost import round_up
from .. import gpu

ROWS = 128
"""Prepared rows are padded with zeros to a multiple of this: the largest tile."""
PANEL_BYTES = 1 << 26
"""Bytes of a panel of weights. Those of 4,096 float32 rows fit, and half of S is then enough."""
MAX_PARTS = 16
"""The most programs that share the columns of one tile of rows."""
MOST_HALVED_TILES = 256
"""S is halved up to so many tiles of rows, since each row has two sums from each tile: 2 KiB a row
at most in float32."""
_SCALE = 256.0  # of unit float32 rows, which brings their rounding errors into float16's range
_DEPTH = 64  # of one step of a product
_WHOLE = 128  # up to this width a tile of S is one step
_FEW_ROWS, _MANY_ROWS = 512, 2048  # tiles of half of S: small up to, large from so many


class Form(NamedTuple):
    """How rows of D numbers are prepared and multiplied.

    dtype: the embeddings', or the accumulation dtype where two sides differ. width: D', which is D
    rounded up to 16, 32 or a multiple of 64. split: whether numbers are multiplied in two
    parts. processors, hopper: of the GPU.
    """

    dtype: torch.dtype
    width: int
    split: bool
    processors: int
    hopper: bool

    @property
    def operand(self) -> torch.dtype:
        """The dtype in which rows are multiplied."""
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    @property
    def accumulated(self) -> torch.dtype:
        """The dtype in which products and sums are accumulated."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_unit(self) -> bool:
        """Whether prepared rows have norm 1, times `scale`."""
        return self.dtype.itemsize >= 4

    @property
    def scale(self) -> float:
        """The factor of unit rows."""
        return _SCALE if self.dtype == torch.float32 else 1.0

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that kernels are compiled for."""
        return {"UNIT": self.is_unit, "SPLIT": self.split}

    @property
    def is_whole(self) -> bool:
        """Whether a tile of S is formed in one step."""
        return self.width <= _WHOLE and self.dtype != torch.float64

    @property
    def slice(self) -> int:
        """Columns of a gradient computed at once; D' is a multiple of them."""
        return _WHOLE if self.width % _WHOLE == 0 else min(self.width, _DEPTH)


@functools.lru_cache(maxsize=256)
def form_of(d: int, dtype: torch.dtype, split: bool, device: torch.device | None = None) -> Form:
    """The form of rows of d numbers on a device; None: on the usual GPU, for predictions."""
    width = max(16, 1 << (d - 1).bit_length()) if d <= _DEPTH else round_up(d, _DEPTH)
    if device is None:
        return Form(dtype, width, split, gpu.USUAL_PROCESSORS, True)
    return Form(dtype, width, split, gpu.processors(device), gpu.is_hopper(device))


def is_split(dtype: torch.dtype) -> bool:
    """Whether rows of that dtype are multiplied as two parts of each number."""
    return dtype == torch.float32 and gpu.products_are_exact()


class Blocks(NamedTuple):
    """How a kernel is cut: rows, columns, depth of one step, gradient columns; warps and stages."""

    n: int
    m: int
    d: int
    v: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The constants that kernels with these blocks are compiled for; a kernel takes some."""
        return {"BLOCK_N": self.n, "BLOCK_M": self.m, "BLOCK_D": self.d, "BLOCK_V": self.v}

    def options(self, *names: str) -> dict[str, int]:
        """Constants of those names, and the launch's options."""
        constants = self.constants
        found = {name: constants[name] for name in names}
        return {**found, "num_warps": self.warps, "num_stages": self.stages}


def sum_blocks(form: Form) -> Blocks:
    """Blocks of `tile_sums`.

    Several programs of four warps share a processor: while one adds up a tile, another multiplies.
    """
    if form.dtype == torch.float64:
        return Blocks(32, 32, min(form.width, 32), 0, 4, 2)
    if not form.hopper:
        return Blocks(64, 32, min(form.width, 32), 0, 4, 2)
    if form.is_whole:
        return Blocks(64, 64, form.width, 0, 4, 2)
    return Blocks(64, 64, _DEPTH, 0, 4, 3 if form.dtype == torch.float32 else 4)


def half_blocks(form: Form, rows: int) -> Blocks:
    """Blocks of `half_tile_sums`, squares: the larger they are, the fewer times a row is read."""
    if form.dtype == torch.float64:
        return Blocks(32, 32, min(form.width, 16), 0, 4, 2)
    if not form.hopper:
        return Blocks(64, 64, min(form.width, 32), 0, 4, 2)
    if form.dtype.itemsize == 2 and rows >= _MANY_ROWS:
        return Blocks(128, 128, min(form.width, _DEPTH), 0, 4, 2)
    if rows <= _FEW_ROWS:
        return Blocks(32, 32, min(form.width, _DEPTH), 0, 4, 3)
    if form.is_whole:
        return Blocks(64, 64, form.width, 0, 4, 1)
    return Blocks(64, 64, _DEPTH, 0, 4, 3)


def gradient_blocks(form: Form) -> Blocks:
    """Blocks of `tile_gradient`."""
    if form.dtype == torch.float64:
        return Blocks(32, 32, min(form.width, 32), min(form.width, 32), 4, 2)
    if form.is_whole and form.hopper:
        return Blocks(64, 64, form.width, form.width, 4, 2)
    slice_ = form.slice if form.hopper else min(form.width, _DEPTH)
    return Blocks(64, 32, min(form.width, 32), slice_, 4, 2)


def weight_blocks(form: Form, kept: bool = False) -> Blocks:
    """Blocks of `tile_weights`, squares; kept: whether the forward kept S."""
    if kept:
        return Blocks(32, 32, 0, 0, 2, 1)
    if form.dtype == torch.float64:
        return Blocks(32, 32, min(form.width, 32), 0, 4, 2)
    if not form.hopper:
        return Blocks(64, 64, min(form.width, 32), 0, 4, 2)
    if form.dtype == torch.float32:
        return Blocks(64, 64, min(form.width, _DEPTH), 0, 4, 3)
    return Blocks(128, 128, min(form.width, _DEPTH), 0, 8, 3)


def product_blocks(form: Form) -> Blocks:
    """Blocks of `weighted_rows`."""
    slice_ = form.slice if form.hopper else min(form.width, _DEPTH)
    return Blocks(64, 32, 0, slice_, 4, 3 if form.hopper else 2)


def row_blocks(form: Form) -> Blocks:
    """Blocks of `normalise_gradient`, and the depth of a step of `prepare_rows`."""
    depth = min(256, 1 << (form.width - 1).bit_length())
    return Blocks(512 // depth, 0, depth, 0, 4, 3)


def parts(programs: int, tiles: int, processors: int) -> int:
    """How many programs share `tiles` of columns: so many that each processor gets about two."""
    return max(1, min(MAX_PARTS, tiles, 2 * processors // programs))


def half_tiles(form: Form, rows: int, own: bool) -> int:
    """How many tiles wide S is if sums are taken over half of it; else 0."""
    tiles = rows // half_blocks(form, rows).n
    return tiles if own and tiles <= MOST_HALVED_TILES else 0


def keeps_similarities(form: Form, rows: int, own: bool) -> bool:
    """Whether S of N' rows may be kept in half precision for a backward by panels."""
    return own and form.dtype.itemsize == 2 and rows * rows * 2 <= PANEL_BYTES


def panel_rows(form: Form, rows: int, columns: int) -> int:
    """Rows of a panel of weights, a multiple of `ROWS`."""
    weight = form.operand.itemsize * (2 if form.split else 1)
    return min(rows, max(ROWS, PANEL_BYTES // (columns * weight) // ROWS * ROWS))


def product_parts(form: Form, step: int, columns: int) -> int:
    """How many programs share the columns of a panel in `weighted_rows`."""
    if not form.split:
        return 1
    blocks = product_blocks(form)
    programs = step // blocks.n * (form.width // blocks.v)
    return parts(programs, columns // blocks.m, form.processors)
