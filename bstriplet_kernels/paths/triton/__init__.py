"""impl="triton": one launch for a small batch, else tiles of S; kernels are in `tiles`.

Small (at most 64 rows, own columns, scalar loss): the forward's one kernel, two in float32, gives
loss and dL/df for unit upstream gradient, and the backward is one multiply. Else: rows prepared
once, their sums by tiles, one small kernel that finishes them; the backward forms tiles anew. S is
never stored: weights are, in panels of bounded size, where D is large, by predicted time. See
`pairs`. Prepared rows, as many bytes as the embeddings, are kept for the backward.

Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import in_memory
from ...calibration import CONSTANTS
from ...cost import Constants, Operations, Work, round_up
from ...spec import Gradients, Path, Rows, Spec, State, accumulation_dtype
from . import pairs
from .pairs import Blocks, Side, Weights, kernels

SMALL, TILES, PANELS = "triton small", "triton tiles", "triton panels"
"""The schedules, by the names under which their measured speeds stand."""
SMALL_ROWS = 64
_HALF_BYTES = 2  # of a similarity that is kept
_FINISHED = 32  # rows whose sums one program finishes
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FIRST_CAPABILITY = 8  # the first with bfloat16 and tf32 products


def small_blocks(n: int, dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.loss_and_gradient`, and of `tiles.batch_products`, for at most `SMALL_ROWS` rows.

    As deep as registers allow. Hopper multiplies 64 rows from shared memory; other GPUs hold both
    operands of a step in registers.
    """
    rows, warps = (32, 4) if n <= 32 else (64, 8)
    if dtype == torch.float64:
        return Blocks(rows, rows, 32, 32, warps, 2)
    if dtype == torch.float32:
        return Blocks(rows, rows, 64 if hopper else 2048 // rows, 32, warps, 3)
    return Blocks(rows, rows, 128, 32, warps, 3)


def products_are_apart(dtype: torch.dtype) -> bool:
    """Whether the small schedule forms products in a launch of their own: of exact float32."""
    return dtype == torch.float32 and precision(dtype) == "tf32x3"


class Rates(NamedTuple):
    """FLOPs a second of products, by the precision of the operands."""

    half: float
    tf32: float
    float32: float
    float64: float


# Of an H200, rounded; measured speeds come before them. They decide between tiles and panels, and
# nothing else.
_TILES = Rates(4e14, 4e14, 5e14, 2e13)
_PANELS = Rates(3.9e14, 3.9e14, 4.6e14, 3e13)
_BYTES_A_SECOND = 4e12  # panels lie in the second-level cache in part
_LAUNCH_SECONDS = 3e-6


def operations(work: Work, class_sizes: Sequence[int]) -> Operations:
    """Counted as launched on an H100, whole blocks and recomputed tiles included.

    The three products of an exact float32 one are three. Of the small schedule the blocks are those
    that suit any GPU.
    """
    n, m, d, dtype, reduction, wants_gradient, device = work
    if m is None and reduction != "none" and n <= SMALL_ROWS:
        found = _small_operations(work)
    else:
        found = _pair_operations(n, m, d, dtype, wants_gradient, by_panels(n, m, d, dtype))
        casts = (1 if m is None else 2) if wants_gradient and work.casts else 0
        rows = reduction == "none"  # no reduction, but weights of each row's own
        launches = found.launches + casts - (rows and not wants_gradient)
        found = found._replace(launches=launches)
    return found._replace(launches=0) if device == "cpu" else found


def _small_operations(work: Work) -> Operations:
    blocks = small_blocks(work.n, work.dtype, False)
    slices = _tiles_of(work.d, blocks.v) if work.wants_gradient else 1
    steps, summed = _tiles_of(work.d, blocks.d), products_are_apart(work.dtype)
    pairs_ = 2 * blocks.n * blocks.n
    flops = pairs_ * steps * blocks.d * (4 if summed else slices)  # four products make an exact one
    moved = work.embedding_bytes + 2 * work.gradient_bytes
    if work.wants_gradient:
        flops += slices * pairs_ * blocks.v
        moved += work.cast_bytes or work.gradient_bytes  # one launch multiplies and casts
    if summed:
        moved += 2 * _part_bytes(work, blocks)
    return Operations(flops, moved, 1 + summed + work.wants_gradient, SMALL)


def _part_bytes(work: Work, blocks: Blocks) -> int:
    """Of the products of a batch, as `tiles.batch_products` writes them."""
    return (
        _tiles_of(work.d, blocks.d) * blocks.n * blocks.n * 4
        if products_are_apart(work.dtype)
        else 0
    )


def by_panels(n: int, m: int | None, d: int, dtype: torch.dtype) -> bool:
    """Whether panels are predicted to be faster than tiles, forward and backward together."""
    return _compare(n, m, d, dtype, pairs.products_are_exact())


@functools.lru_cache(maxsize=4096)
def _compare(n: int, m: int | None, d: int, dtype: torch.dtype, exact: bool) -> bool:
    tiles, panels = (
        constants.seconds(_pair_operations(n, m, d, dtype, True, panels), dtype)
        for constants, panels in zip(_speeds(dtype, exact), (False, True), strict=True)
    )
    return panels < tiles


def _speeds(dtype: torch.dtype, exact: bool) -> tuple[Constants, Constants]:
    """Of tiles and of panels: measured, where both were in this precision, else assumed."""
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


class _Sizes(NamedTuple):
    """Padded sizes of a side's rows, of its columns and of D; and a product's parts."""

    rows: int
    columns: int
    width: int
    split: bool

    def halved(self, tile: int) -> int:
        """Pairs in the tiles on and below the diagonal."""
        tiles = self.rows // tile
        return tile * tile * tiles * (tiles + 1) // 2

    def flops(self, pairs_: int) -> int:
        """Of a product of depth D' for so many pairs."""
        return 2 * pairs_ * self.width * (3 if self.split else 1)


def _sizes(n: int, m: int | None, d: int, dtype: torch.dtype) -> tuple[_Sizes, ...]:
    """Of each side whose gradient is wanted."""
    rows, columns = (round_up(size, pairs.ROWS) for size in (n, n if m is None else m))
    width, split = pairs.padded_width(d), pairs.is_split(dtype)
    sides = (_Sizes(rows, columns, width, split), _Sizes(columns, rows, width, split))
    return sides[: 1 if m is None else 2]


def _pair_operations(
    n: int, m: int | None, d: int, dtype: torch.dtype, wants_gradient: bool, panels: bool
) -> Operations:
    """Of a scalar loss by tiles or by panels, on the GPU that is usual."""
    sides = _sizes(n, m, d, dtype)
    accumulated, element = max(4, dtype.itemsize), pairs.operand_dtype(dtype).itemsize
    element *= 2 if sides[0].split else 1
    tiles = _half_tiles(sides[0], m is None, dtype, True)
    own = sides[0].halved(sides[0].rows // tiles) if tiles else sides[0].rows * sides[0].columns
    prepared = sum(side.rows * side.width * element for side in sides)
    flops = sides[0].flops(own)
    moved = (n if m is None else n + m) * d * dtype.itemsize + 2 * prepared
    moved += 2 * _slot_bytes(sides[0], dtype, tiles, pairs.USUAL_PROCESSORS, True)
    launches = len(sides) + 3
    for side, size in zip(sides, (n, m), strict=False) if wants_gradient else ():
        pairs_ = side.rows * side.columns
        parts = _gradient_parts(side, dtype, panels, pairs.USUAL_PROCESSORS, True)
        moved += prepared + 2 * parts * side.rows * side.width * accumulated
        moved += (size or 0) * d * accumulated
        if panels:
            step = pairs.panel_rows(side.rows, side.columns, dtype, side.split)
            mirrored = m is None and step == side.rows
            tile = pairs.weight_blocks(side.width, dtype, True).n
            flops += side.flops(pairs_)
            if pairs.keeps_similarities(side.rows, m is None, dtype):
                moved += 2 * side.halved(tile) * _HALF_BYTES  # written and read
            else:
                flops += side.flops(side.halved(tile) if mirrored else pairs_)
            moved += 2 * pairs_ * element
            launches += 1 + 2 * _tiles_of(side.rows, step)
        else:
            slices = side.width // pairs.gradient_blocks(side.width, dtype, True).v
            flops += side.flops(pairs_ * (slices + 1))
            launches += 2
    if wants_gradient:
        launches += len(sides) - 1  # the weights of columns' losses, which are 0
    return Operations(flops, moved, launches, PANELS if panels else TILES)


def _half_tiles(side: _Sizes, own: bool, dtype: torch.dtype, hopper: bool) -> int:
    return pairs.half_tiles(side.rows, own, side.width, dtype, hopper)


def _slot_bytes(
    side: _Sizes, dtype: torch.dtype, half_tiles: int, processors: int, hopper: bool
) -> int:
    """Of the partial sums of rows, of half of S or of all."""
    blocks = pairs.sum_blocks(side.width, dtype, hopper)
    parts = half_tiles or pairs.parts(side.rows // blocks.n, side.columns // blocks.m, processors)
    return 2 * side.rows * parts * max(4, dtype.itemsize)


def _gradient_parts(
    side: _Sizes, dtype: torch.dtype, panels: bool, processors: int, hopper: bool
) -> int:
    """In how many parts a side's gradient comes."""
    if not panels:
        blocks = pairs.gradient_blocks(side.width, dtype, hopper)
        programs = side.rows // blocks.n * (side.width // blocks.v)
        return pairs.parts(programs, side.columns // blocks.m, processors)
    if not side.split:
        return 1
    step = pairs.panel_rows(side.rows, side.columns, dtype, True)
    return pairs.product_parts(step, side.columns, side.width, hopper, processors)


def precision(dtype: torch.dtype) -> str:
    """How the small schedule multiplies float32: by what torch's own products are allowed to do.

    Half-precision embeddings are multiplied as they are; the word is then for their weights, which
    cost nothing to multiply exactly.
    """
    if dtype == torch.float64 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if dtype == torch.float32 and not pairs.products_are_exact() else "tf32x3"


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, State]:
    """Eqs. 2-4; the state is dL/df for unit upstream gradient, or norms and the rows' weights."""
    embeddings, ref_emb, labels, ref_labels = _in_memory(embeddings, ref_emb, labels, ref_labels)
    if _fits_one_launch(embeddings, ref_emb, spec):
        loss, positive, negative, gradient = _loss_and_gradient(embeddings, labels, spec)
        state = Gradients((gradient,)) if spec.wants_gradient else ()
        return loss, Rows(positive, negative), state
    with on_device_of(embeddings):
        return _rows(*_sides(embeddings, ref_emb), labels, ref_labels, spec)


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows,
    state: State,
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """dL/df of both sides, from the tiles of S anew, or by one multiply."""
    embeddings, ref_emb, labels, ref_labels = _in_memory(embeddings, ref_emb, labels, ref_labels)
    grad_loss = in_memory(grad_loss)
    if _fits_one_launch(embeddings, ref_emb, spec):
        spec = spec._replace(wants_gradient=True)
        gradient = state[0] if state else _loss_and_gradient(embeddings, labels, spec)[3]
        return gradient * grad_loss, None
    dtype = _sides(embeddings, ref_emb)[0].dtype
    (n, d), m = embeddings.shape, None if ref_emb is None else ref_emb.shape[0]
    with on_device_of(embeddings):
        return _gradients(grad_loss, n, d, m, dtype, state, spec)


def _gradients(
    upstream: Tensor, n: int, d: int, m: int | None, dtype: torch.dtype, state: State, spec: Spec
) -> tuple[Tensor, Tensor | None]:
    """dL/df of rows [n, d], and of m columns where they are others, from what `_rows` kept."""
    pull, scale, *kept = state
    side, weights = _side_of(kept[:4], dtype), Weights(pull, scale)
    if spec.reduction == "none":
        weights = pairs.weights_of(side, pull, upstream)
    similarities = kept[4:] if m is None else ()
    way = pairs.by_panels if similarities or by_panels(n, m, d, dtype) else pairs.by_tiles
    own = side, weights
    if m is None:
        partial = way(*own, *own, True, spec.signed, *similarities)
        return pairs.normalised(side, partial, weights.scale, upstream, (n, d)), None
    columns = _side_of(kept[4:], dtype)
    others = columns, Weights(pull.new_zeros(2, columns.rows), weights.scale)
    partial = way(*own, *others, False, spec.signed)
    gradient = pairs.normalised(side, partial, weights.scale, upstream, (n, d))
    del partial
    partial = way(*others, *own, False, spec.signed)
    return gradient, pairs.normalised(columns, partial, weights.scale, upstream, (m, d))


def _side_of(kept: Sequence[Tensor], dtype: torch.dtype) -> Side:
    high, low, scales, classes = kept
    return Side(high, low, scales, classes, dtype)


def _in_memory(*tensors: Any) -> Any:
    """`in_memory` for what kernels take by its pointer; None stays None."""
    return tuple(None if t is None else in_memory(t) for t in tensors)


def _fits_one_launch(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> bool:
    return ref_emb is None and spec.reduction != "none" and embeddings.shape[0] <= SMALL_ROWS


def _sides(embeddings: Tensor, ref_emb: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and columns in one dtype, since products take one."""
    if ref_emb is None:
        return embeddings, embeddings
    if ref_emb.dtype == embeddings.dtype:
        return embeddings, ref_emb
    dtype = accumulation_dtype(embeddings, ref_emb)
    return embeddings.to(dtype), ref_emb.to(dtype)


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _HAS_TRITON


def missing() -> str | None:
    """What is not here that the kernels need: Triton, and a GPU or Triton's interpreter."""
    if not _HAS_TRITON:
        return "Triton is not installed (on Linux: pip install triton; on Windows: triton-windows)"
    if not (torch.cuda.is_available() or interpreted()):
        return "it needs a GPU (on a CPU, TRITON_INTERPRET=1 runs the kernels slowly, for tests)"
    return None


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """Tensors that lie where no kernel runs."""
    device = embeddings.device
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"its kernels run on GPUs, and the embeddings are on {device}"
    if torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(device)[0] < _FIRST_CAPABILITY:
        return f"its kernels need compute capability {_FIRST_CAPABILITY}.0 or later"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "yes", "t", "true", "on")


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _tiles_of(size: int, block: int) -> int:
    return -(-size // block)


def _empty_rows(embeddings: Tensor, loss_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and Eq. 3's two means, to be written."""
    n = embeddings.shape[0]
    dtype = accumulation_dtype(embeddings)
    return (
        embeddings.new_empty(loss_shape, dtype=dtype),
        embeddings.new_empty(n, dtype=dtype),
        embeddings.new_empty(n, dtype=dtype),
    )


def _loss_and_gradient(embeddings: Tensor, labels: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    """(loss, positive, negative, dL/df [N, D] for unit upstream gradient, or [0, D])."""
    n, d = embeddings.shape
    rows = _empty_rows(embeddings, ())
    gradient = rows[0].new_empty(n if spec.wants_gradient else 0, d)
    blocks = small_blocks(n, embeddings.dtype, pairs.is_hopper(embeddings.device))
    summed = products_are_apart(embeddings.dtype)
    parts = _tiles_of(d, blocks.d) if summed else 0
    partial = rows[0].new_empty(parts, blocks.n, blocks.n)
    grid = (_tiles_of(d, blocks.v) if spec.wants_gradient else 1,)
    with on_device_of(embeddings):
        if summed:
            kernels().batch_products[(parts,)](
                embeddings,
                partial,
                n,
                d,
                *embeddings.stride(),
                BLOCK_N=blocks.n,
                BLOCK_D=blocks.d,
                num_warps=blocks.warps,
            )
        kernels().loss_and_gradient[grid](
            embeddings,
            labels,
            partial,
            *rows,
            gradient,
            n,
            d,
            parts,
            *embeddings.stride(),
            labels.stride(0),
            spec.margin,
            spec.eps * spec.eps,
            spec.sigma,
            int(spec.signed),
            int(spec.reduction == "mean"),
            int(spec.wants_gradient),
            PRECISION=precision(embeddings.dtype),
            SUMMED=summed,
            BLOCK_N=blocks.n,
            BLOCK_D=blocks.d,
            BLOCK_V=blocks.v,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return *rows, gradient


def _rows(
    rows: Tensor,
    columns: Tensor,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, State]:
    """The loss, Eq. 3's means, and what the backward needs: the rows' pulls and prepared sides."""
    own = ref_labels is None
    n, m = rows.shape[0], columns.shape[0]
    side = pairs.prepare(rows, labels, ref_labels, spec.eps)
    other = side if ref_labels is None else pairs.prepare(columns, ref_labels, None, spec.eps)
    kept = spec.wants_gradient and pairs.keeps_similarities(side.rows, own, side.dtype)
    kept = kept and by_panels(n, None, rows.shape[1], side.dtype)
    hopper = pairs.is_hopper(side.high.device)
    if pairs.half_tiles(side.rows, own, side.width, side.dtype, hopper):
        slots, similarities = pairs.own_row_sums(side, spec.signed, kept)
    else:
        slots = pairs.row_sums(side, other, own, spec.signed)
    row_loss, positive, negative = (slots.new_empty(n) for _ in range(3))
    pull, scale = slots.new_empty(2, side.rows), slots.new_empty(())
    mean = int(spec.reduction == "mean")
    kernels().finish_rows[(side.rows // _FINISHED,)](
        slots,
        side.classes[0],
        other.classes[1],
        row_loss,
        positive,
        negative,
        pull,
        n,
        m,
        slots.shape[1],
        int(own),
        mean,
        spec.margin,
        spec.sigma,
        PHI_SCALE=side.scale**-4,
        BLOCK_N=_FINISHED,
        BLOCK_T=16,
        num_warps=4,
    )
    loss = row_loss
    if spec.reduction != "none":
        loss = row_loss.new_empty(())
        kernels().reduce_losses[(1,)](
            row_loss,
            pull,
            loss,
            scale,
            n,
            side.rows,
            mean,
            LARGEST=pairs.largest_weight(side),
            BLOCK_N=2048,
            num_warps=8,
        )
    more = (similarities,) if kept else () if own else other[:4]
    return loss, Rows(positive, negative), (pull, scale, *side[:4], *more)


def extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """Peak bytes beyond the inputs, the gradient included: by one launch, tiles or panels."""
    n, number = work.n, work.accumulated
    if work.m is None and work.reduction != "none" and n <= SMALL_ROWS:
        blocks = small_blocks(n, work.dtype, pairs.is_hopper(torch.device(work.device)))
        forward = work.gradient_bytes + _part_bytes(work, blocks)
        return (2 * n + 1) * number + max(forward, work.gradient_bytes + work.cast_bytes)
    panels = by_panels(n, work.m, work.d, work.dtype)
    return _pair_memory(work, panels)


def _pair_memory(work: Work, panels: bool) -> int:
    """Prepared rows of both sides, and partial sums, parts of a gradient or a panel of weights."""
    dtype, number = work.dtype, work.accumulated
    device = torch.device(work.device)
    processors, hopper = pairs.processors(device), pairs.is_hopper(device)
    sides = _sizes(work.n, work.m, work.d, dtype)
    element = pairs.operand_dtype(dtype).itemsize * (2 if sides[0].split else 1)
    tiles = _half_tiles(sides[0], work.m is None, dtype, hopper)
    kept = sum(side.rows * (side.width * element + 2 * (number + 4)) for side in sides)
    kept += 5 * work.n * number
    forward = _slot_bytes(sides[0], dtype, tiles, processors, hopper)
    if not work.wants_gradient:
        return kept + forward
    if panels and pairs.keeps_similarities(sides[0].rows, work.m is None, dtype):
        kept += sides[0].rows ** 2 * _HALF_BYTES
    backward, waiting = 0, 2 * sum(side.rows for side in sides) * number
    for side, size in zip(sides, (work.n, work.columns), strict=False):
        parts = _gradient_parts(side, dtype, panels, processors, hopper)
        panel = 0
        if panels:
            step = pairs.panel_rows(side.rows, side.columns, dtype, side.split)
            panel = step * side.columns * element
        partial, gradient = parts * side.rows * side.width * number, size * work.d * number
        backward = max(backward, waiting + partial + max(panel, gradient))
        waiting += gradient
    return kept + max(forward, backward, waiting + work.cast_bytes)


PATH = Path(forward, backward, operations, extra_memory, missing, refuses)
