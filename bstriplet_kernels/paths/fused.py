"""impl="triton": one launch for a small batch, else tiles or panels; kernels are in `tiles`.

Small (at most 64 rows, own columns, scalar loss): the forward's one kernel gives loss and dL/df for
unit upstream gradient, and the backward is one multiply. Else: norms, row sums by tiles, one small
kernel that finishes them; the backward recomputes tiles. O(N) numbers are kept, N x M never stored.
Where D is large the products of both go through `panels` instead, by predicted time.

Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import in_memory
from ..calibration import CONSTANTS
from ..cost import Constants, Operations, Work, round_up
from ..spec import Gradients, Path, Rows, Spec, State, accumulation_dtype
from . import panels

SMALL, TILES, PANELS = "triton small", "triton tiles", "triton panels"
"""The schedules, by the names under which their measured speeds stand."""
SMALL_ROWS = 64
MAX_PARTS = 8
"""Among how many programs the columns of one tile of rows are shared out at most."""
USUAL_PROCESSORS = 132  # for predictions: an H100
_INTERPRETER_PROCESSORS = 6  # so that small inputs share columns out there too
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FIRST_CAPABILITY = 8  # the first with bfloat16 and tf32 products


class Blocks(NamedTuple):
    """How a kernel is cut: rows, columns, depth of one product, gradient columns; and its warps."""

    n: int
    m: int
    d: int
    v: int
    warps: int
    stages: int


def small_blocks(n: int, dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.loss_and_gradient`, for at most `SMALL_ROWS` rows.

    As deep as registers allow. Hopper multiplies 64 rows from shared memory; other GPUs hold both
    operands of a step in registers, where exact float32 ones take twice the room.
    """
    rows, warps = (32, 4) if n <= 32 else (64, 8)
    if dtype == torch.float64:
        return Blocks(rows, rows, 32, 32, warps, 2)
    depth = 2048 // rows if dtype == torch.float32 and not hopper else 128
    return Blocks(rows, rows, depth, 32, warps, 3)


def row_blocks(dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.row_sums`. Hopper's tensor cores take 64 rows for each four warps."""
    if dtype == torch.float64:
        return Blocks(32, 32, 32, 0, 4, 2)
    return Blocks(128 if hopper else 64, 64, 32 if dtype == torch.float32 else 64, 0, 8, 3)


def gradient_blocks(dtype: torch.dtype, hopper: bool) -> Blocks:
    """Of `tiles.tile_gradient`."""
    if dtype == torch.float64:
        return Blocks(32, 32, 32, 32, 4, 2)
    if dtype == torch.float32:
        return Blocks(64, 32, 32, 128, 8, 2)
    return Blocks(128 if hopper else 64, 64, 64, 128, 8, 3)


class Rates(NamedTuple):
    """FLOPs a second of products, by the precision of the operands."""

    half: float
    tf32: float
    float32: float
    float64: float


# Not measured: what an H100 may be expected to do. Where nothing is, they decide between tiles and
# panels, and nothing else.
_TILES = Rates(3.5e14, 1.6e14, 8e13, 3e13)
_PRODUCTS = Rates(6e14, 3e14, 4.5e13, 5e13)
_BYTES_A_SECOND = 4e12  # panels lie in the second-level cache in part
_LAUNCH_SECONDS = 3e-6


def operations(work: Work, class_sizes: Sequence[int]) -> Operations:
    """Counted as launched, whole blocks and recomputed tiles included.

    The blocks are those that suit any GPU, and columns are shared out as on an H100.
    """
    n, m, d, dtype, reduction, wants_gradient, device = work
    if m is None and reduction != "none" and n <= SMALL_ROWS:
        blocks = small_blocks(n, dtype, False)
        slices = _tiles_of(d, blocks.v) if wants_gradient else 1
        pairs = 2 * blocks.n * blocks.n
        depth = _tiles_of(d, blocks.d) * blocks.d
        gradient = slices * pairs * blocks.v if wants_gradient else 0
        scaled = work.cast_bytes or work.gradient_bytes  # one launch multiplies and casts
        bytes_ = work.embedding_bytes + 2 * work.gradient_bytes + scaled
        flops, launches = slices * pairs * depth + gradient, 2 if wants_gradient else 1
        found = Operations(flops, bytes_, launches, SMALL)
    else:
        of = _panels_operations if by_panels(n, m, d, dtype) else _tiles_operations
        found = of(n, m, d, dtype, wants_gradient)
        casts = (1 if m is None else 2) if wants_gradient and work.casts else 0
        found = found._replace(launches=found.launches + casts)
    return found._replace(launches=0) if device == "cpu" else found


def by_panels(n: int, m: int | None, d: int, dtype: torch.dtype) -> bool:
    """Whether panels are predicted to be faster than tiles, forward and backward together."""
    return _compare(n, m, d, dtype, _products_are_exact())


def _products_are_exact() -> bool:
    """Whether torch multiplies float32 as it is."""
    return torch.get_float32_matmul_precision() == "highest"


@functools.lru_cache(maxsize=4096)
def _compare(n: int, m: int | None, d: int, dtype: torch.dtype, exact: bool) -> bool:
    tiles, panels_ = _speeds(dtype, exact)
    return panels_.seconds(_panels_operations(n, m, d, dtype, True), dtype) < tiles.seconds(
        _tiles_operations(n, m, d, dtype, True), dtype
    )


def _speeds(dtype: torch.dtype, exact: bool) -> tuple[Constants, Constants]:
    """Of tiles and of panels: measured, where both were in this precision, else assumed."""
    measured = CONSTANTS.get("cuda", {})
    if TILES in measured and PANELS in measured:
        found = measured[TILES], measured[PANELS]
        if dtype == torch.float32 and exact:
            return found
        if dtype.itemsize < 4 and None not in (found[0].half, found[1].half):
            return found
    return _assumed(_TILES, dtype, exact), _assumed(_PRODUCTS, dtype, exact)


def _assumed(rates: Rates, dtype: torch.dtype, exact: bool) -> Constants:
    if dtype == torch.float32:
        rate = rates.float32 if exact else rates.tf32
    else:
        rate = rates.float64 if dtype == torch.float64 else rates.half
    return Constants(0.0, 1 / rate, 1 / _BYTES_A_SECOND, _LAUNCH_SECONDS)


def _tiles_operations(
    n: int, m: int | None, d: int, dtype: torch.dtype, wants_gradient: bool
) -> Operations:
    """Tiles of S, for the sums and for each side's gradient; unaligned rows are copied."""
    sides = 1 if m is None else 2
    columns = n if m is None else m
    vectors = n if m is None else n + m
    accumulated = max(4, dtype.itemsize)
    copied = d % 16 != 0
    size = vectors * round_up(d, 16) * dtype.itemsize
    copies = 2 * size if copied else 0
    flops = _tile_flops(n, columns, d, row_blocks(dtype, False))
    moved = 2 * size + copies
    launches = 2 + sides + (sides if copied else 0)
    if not wants_gradient:
        return Operations(flops, moved, launches, TILES)
    blocks = gradient_blocks(dtype, False)
    launches += sides - 1  # the columns' pull, which is 0
    for own, others in ((n, columns), (columns, n))[:sides]:
        flops += _tile_flops(own, others, d, blocks)
        programs = _tiles_of(own, blocks.n) * _tiles_of(d, blocks.v)
        parts = _parts(programs, _tiles_of(others, blocks.m), USUAL_PROCESSORS)
        passes = 1 if parts == 1 else 2 * parts + 1  # each part written and read, the sum written
        moved += size + copies + own * d * accumulated * (passes + (2 if copied else 0))
        launches += 1 + (parts > 1) + (1 + sides if copied else 0)
    return Operations(flops, moved, launches, TILES)


def _panels_operations(
    n: int, m: int | None, d: int, dtype: torch.dtype, wants_gradient: bool
) -> Operations:
    """Products of panels, and the sweeps that read and write them."""
    sides = 1 if m is None else 2
    columns = n if m is None else m
    size = (n if m is None else n + m) * d * dtype.itemsize
    accumulated = max(4, dtype.itemsize)
    held = panels.pairs(n, columns, m is None)
    half = dtype.itemsize < 4
    count = _tiles_of(n, panels.panel_rows(n, columns))
    total = Operations(
        flops=2 * held * d,
        bytes=3 * size + 2 * held * accumulated,
        launches=4 + (9 if half else 7) * sides + 4 * count + (2 * (count - 1) if m is None else 0),
        schedule=PANELS,
    )
    if not wants_gradient:
        return total
    weights = accumulated + 2 * dtype.itemsize
    backward = sides * 2 * d * (held + n * columns)
    swept = sides * held * (accumulated + weights)
    if m is None:
        launches = 20 + 4 * count + (3 + 2 * count if half else 0)
    else:
        count += _tiles_of(columns, panels.panel_rows(columns, n))
        launches = 53 + 3 * count + (10 + count if half else 0)
    if dtype == torch.float16:
        launches += 15 * sides  # weights are brought into its range
    if d % 16:
        launches += sides  # padding is cut off
    return Operations(
        total.flops + backward,
        total.bytes + (6 + 2 * sides) * size + swept,
        total.launches + launches,
        PANELS,
    )


def _tile_flops(n: int, m: int, d: int, blocks: Blocks) -> int:
    """2 D for each pair, and, where a gradient is formed, that again for each slice of it."""
    pairs = 2 * _tiles_of(n, blocks.n) * blocks.n * _tiles_of(m, blocks.m) * blocks.m
    depth = _tiles_of(d, blocks.d) * blocks.d
    if blocks.v == 0:
        return pairs * depth
    return pairs * _tiles_of(d, blocks.v) * (depth + blocks.v)


def precision(dtype: torch.dtype, small: bool = False) -> str:
    """How Triton multiplies float32: by what torch's own products are allowed to do.

    Half-precision embeddings are multiplied as they are; the word is then for their weights, which
    `tiles` raises to tf32 where the batch is large, and to float32 where it costs nothing.
    """
    if dtype == torch.float64 or torch.version.hip is not None:
        return "ieee"
    exact = _products_are_exact()
    return "tf32x3" if (exact if dtype == torch.float32 else small) else "tf32"


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
    rows, columns = _sides(embeddings, ref_emb)
    inverse = _inverse_norms(rows, spec.eps)
    others = () if ref_emb is None else (_inverse_norms(columns, spec.eps),)
    inverses = (inverse, *others)
    loss, positive, negative, pull = _rows(
        rows,
        columns,
        labels,
        labels if ref_labels is None else ref_labels,
        inverse,
        inverses[-1],
        ref_emb is None,
        spec,
    )
    return loss, Rows(positive, negative), (pull, *inverses)


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
    pull, inverse, *rest = state
    f, columns = _sides(embeddings, ref_emb)
    side = (f, labels, inverse, pull)
    if ref_emb is None:
        return _gradient(*side, *side, grad_loss, True, spec.signed), None
    assert ref_labels is not None
    other = (columns, ref_labels, rest[0], pull.new_zeros(2, ref_emb.shape[0]))
    return (
        _gradient(*side, *other, grad_loss, False, spec.signed),
        _gradient(*other, *side, grad_loss, False, spec.signed),
    )


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


@functools.cache
def _tiles() -> ModuleType:
    from . import tiles

    return tiles


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may take; in the interpreter as much as a Hopper GPU gives."""
    if device.type == "cpu":
        return 232_448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 49_152))


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    if device.type == "cpu" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _aligned(embeddings: Tensor) -> Tensor:
    """The same rows as tiles want them: see `tiles`. Most are already; else a padded copy."""
    d = embeddings.shape[1]
    row, column = embeddings.stride()
    if column == 1 and row % 16 == 0 and d % 16 == 0 and embeddings.data_ptr() % 16 == 0:
        return embeddings
    return torch.nn.functional.pad(embeddings, (0, -d % 16)).contiguous()


def _aligned_sides(rows: Tensor, columns: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    rows = _aligned(rows)
    return rows, rows if own else _aligned(columns)


def _parts(programs: int, column_tiles: int, processors: int) -> int:
    """Among how many programs columns are shared out, so that few rows still fill the GPU."""
    return max(1, min(MAX_PARTS, column_tiles, 2 * processors // programs))


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
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
    blocks = small_blocks(n, embeddings.dtype, _is_hopper(embeddings.device))
    grid = (_tiles_of(d, blocks.v) if spec.wants_gradient else 1,)
    with _on_device_of(embeddings):
        _tiles().loss_and_gradient[grid](
            embeddings,
            labels,
            *rows,
            gradient,
            n,
            d,
            *embeddings.stride(),
            labels.stride(0),
            spec.margin,
            spec.eps * spec.eps,
            spec.sigma,
            int(spec.signed),
            int(spec.reduction == "mean"),
            int(spec.wants_gradient),
            PRECISION=precision(embeddings.dtype, small=True),
            BLOCK_N=blocks.n,
            BLOCK_D=blocks.d,
            BLOCK_V=blocks.v,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return *rows, gradient


def _inverse_norms(embeddings: Tensor, eps: float) -> Tensor:
    """1 / n_i, [N]: 0 for a zero row, NaN where n_i^2 overflows."""
    n, d = embeddings.shape
    inverse = embeddings.new_empty(n, dtype=accumulation_dtype(embeddings))
    with _on_device_of(embeddings):
        _tiles().inverse_norms[(_tiles_of(n, 16),)](
            embeddings, inverse, n, d, *embeddings.stride(), eps * eps, BLOCK_N=16, BLOCK_D=128
        )
    return inverse


def _rows(
    rows: Tensor,
    columns: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    row_inverse: Tensor,
    column_inverse: Tensor,
    own: bool,
    spec: Spec,
) -> tuple[Tensor, ...]:
    """(loss, positive, negative, pull [2, N]); `own`: the columns are the rows themselves."""
    n = rows.shape[0]
    finished = _empty_rows(rows, (n,) if spec.reduction == "none" else ())
    pull = finished[0].new_empty(2, n)
    with _on_device_of(rows):
        if by_panels(n, None if own else columns.shape[0], rows.shape[1], rows.dtype):
            side = panels.make_side(rows, row_labels, row_inverse)
            other = side if own else panels.make_side(columns, column_labels, column_inverse)
            *sums, counts = panels.row_sums(side, other, own, spec.signed)
            partial = torch.stack(sums).unsqueeze(1), counts.to(torch.int32)[None]
        else:
            partial = _tiled_row_sums(
                *_aligned_sides(rows, columns, own),
                row_labels.contiguous(),
                column_labels.contiguous(),
                row_inverse,
                column_inverse,
                own,
                spec.signed,
            )
        _tiles().finish_rows[(1,)](
            *partial,
            *finished,
            pull,
            n,
            columns.shape[0],
            partial[0].shape[1],
            int(own),
            spec.margin,
            spec.sigma,
            REDUCTION=spec.reduction,
            MAX_PARTS=MAX_PARTS,
            BLOCK_N=512,
            num_warps=8,
        )
    return *finished, pull


def _tiled_row_sums(
    rows: Tensor,
    columns: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    row_inverse: Tensor,
    column_inverse: Tensor,
    own: bool,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """Partial sums of phi over P_i and Q_i, [2, parts, N], and |P_i|, [parts, N]."""
    n, d = rows.shape
    m = columns.shape[0]
    blocks = row_blocks(rows.dtype, _is_hopper(rows.device))
    row_tiles = _tiles_of(n, blocks.n)
    parts = _parts(row_tiles, _tiles_of(m, blocks.m), processors(rows.device))
    sums = row_inverse.new_empty(2, parts, n)
    counts = rows.new_empty((parts, n), dtype=torch.int32)
    _tiles().row_sums[row_tiles, parts](
        rows,
        columns,
        row_labels,
        column_labels,
        row_inverse,
        column_inverse,
        sums,
        counts,
        n,
        m,
        d,
        rows.stride(0),
        columns.stride(0),
        int(own),
        int(signed),
        PRECISION=precision(rows.dtype),
        BLOCK_N=blocks.n,
        BLOCK_M=blocks.m,
        BLOCK_D=blocks.d,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return sums, counts


def _gradient(
    rows: Tensor,
    row_labels: Tensor,
    row_inverse: Tensor,
    row_pull: Tensor,
    columns: Tensor,
    column_labels: Tensor,
    column_inverse: Tensor,
    column_pull: Tensor,
    upstream: Tensor,
    own: bool,
    signed: bool,
) -> Tensor:
    """The gradient of `rows`, [N, D] in the accumulation dtype.

    upstream: dL/dL or, for each row, dL/dl_i.
    """
    n, width = rows.shape
    m = columns.shape[0]
    if by_panels(n, None if own else m, width, rows.dtype):
        with _on_device_of(rows):
            side = panels.make_side(rows, row_labels, row_inverse)
            other = side if own else panels.make_side(columns, column_labels, column_inverse)
            pulls = _times(row_pull, upstream), _times(column_pull, upstream)
            gradient = panels.gradient(side, pulls[0], other, pulls[1], own, signed)
            return gradient[:, :width].contiguous()
    rows, columns = _aligned_sides(rows, columns, own)
    d = rows.shape[1]
    blocks = gradient_blocks(rows.dtype, _is_hopper(rows.device))
    row_tiles, slices = _tiles_of(n, blocks.n), _tiles_of(d, blocks.v)
    parts = _parts(row_tiles * slices, _tiles_of(m, blocks.m), processors(rows.device))
    partial = row_inverse.new_empty((parts, n, d))
    with _on_device_of(rows):
        _tiles().tile_gradient[row_tiles, slices, parts](
            rows,
            columns,
            row_labels.contiguous(),
            column_labels.contiguous(),
            row_inverse,
            column_inverse,
            row_pull,
            column_pull,
            upstream,
            partial,
            n,
            m,
            d,
            rows.stride(0),
            columns.stride(0),
            upstream.stride(0) if upstream.dim() else 0,
            int(own),
            int(signed),
            PRECISION=precision(rows.dtype),
            BLOCK_N=blocks.n,
            BLOCK_M=blocks.m,
            BLOCK_D=blocks.d,
            BLOCK_V=blocks.v,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    gradient = partial[0] if parts == 1 else partial.sum(dim=0)
    return gradient if width == d else gradient[:, :width].contiguous()


def _times(pull: Tensor, upstream: Tensor) -> Tensor:
    """Pull [2, N] times dL/dL, or dL/dl_i [N]; exactly 0 where it is 0. Zeros pull nothing."""
    if upstream.dim() and upstream.shape[0] != pull.shape[1]:
        return pull  # the side that has no losses of its own
    return torch.where(pull == 0, 0.0, pull * upstream)


def extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """Peak bytes beyond the inputs, the gradient included: by one launch, tiles or panels."""
    n, number = work.n, work.accumulated
    if work.m is None and work.reduction != "none" and n <= SMALL_ROWS:
        return (2 * n + 1) * number + work.gradient_bytes + work.cast_bytes
    kept = (6 * n + 3 * (work.m or 0)) * number  # norms, means, pulls
    of = _panels_memory if by_panels(n, work.m, work.d, work.dtype) else _tiles_memory
    return kept + max(of(work), work.gradient_bytes + work.cast_bytes)


def _tiles_memory(work: Work) -> int:
    """Copies of rows that tiles cannot read, and each program's part of sums and gradient."""
    itemsize, number = work.dtype.itemsize, work.accumulated
    device = torch.device(work.device)
    d = round_up(work.d, 16)
    copies = work.vectors * d * itemsize if d != work.d else 0
    blocks = row_blocks(work.dtype, _is_hopper(device))
    row_tiles = _tiles_of(work.n, blocks.n)
    parts = _parts(row_tiles, _tiles_of(work.columns, blocks.m), processors(device))
    forward = copies + parts * work.n * (2 * number + 4)
    if not work.wants_gradient:
        return forward
    blocks = gradient_blocks(work.dtype, _is_hopper(device))

    def gradient(n: int, m: int) -> int:
        programs = _tiles_of(n, blocks.n) * _tiles_of(d, blocks.v)
        parts = _parts(programs, _tiles_of(m, blocks.m), processors(device))
        written = n * d * number * (1 if parts == 1 else parts + 1)
        return written + (n * work.d * number if copies else 0)

    backward = gradient(work.n, work.columns)
    if work.m is not None:  # the gradient of the rows waits for that of the columns
        backward = max(backward, work.n * work.d * number + gradient(work.m, work.n))
    return max(forward, copies + backward)


def _panels_memory(work: Work) -> int:
    """Scaled rows of both sides, panels of S, a side's gradient, its unit rows and their product.

    One panel is still there when the next is made; half weights stand beside the panel.
    """
    itemsize, number = work.dtype.itemsize, work.accumulated
    n, m, d = (round_up(size, 16) for size in (work.n, work.columns, work.d))
    scaled = (n if work.m is None else n + m) * d * itemsize
    rows = min(panels.panel_rows(work.n, work.columns), n)
    panel = rows * m * (number + (itemsize if work.casts else 0)) * (1 if rows == n else 2)
    if not work.wants_gradient:
        return 2 * scaled + panel
    waiting = 0 if work.m is None else work.n * work.d * number
    return scaled + panel + waiting + 3 * max(n, m) * d * number


PATH = Path(forward, backward, operations, extra_memory, missing, refuses)
