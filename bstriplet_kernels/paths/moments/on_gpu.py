"""The second-moment path on a GPU in thirteen launches (fifteen by row), whatever the labels are.

Kernels are in `kernels`; those that meet whole matrices are others where embeddings are
wide, in `wide_kernels`. No shape depends on the labels and nothing is asked of the device:
large classes are those of `smallest_moment(d)` members or more, and buffers have room for as many
as there can be. Smaller classes meet in a band around the diagonal of S in class order. Sums have a
fixed order: the same bits from run to run. Other columns (`ref_emb`) stand in one batch with the
rows, by class: six launches more, seven by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import in_memory
from ...cost import Cost, Work, round_up
from ...spec import Rows, Spec
from .. import gpu

SCHEDULE = "gram triton"
"""The schedule, by the name under which its measured speed stands."""
MAX_DEPTH, MOST_ROWS = 2048, 1 << 30
NARROW_DEPTH = 256
"""Up to it registers hold rows as a whole; wider ones have kernels of their own."""
_MULTIPLE = 64  # rows of a run are whole blocks
WHOLE_DEPTH = 128  # up to it Hopper holds two matrices, and a block of rows, as a whole
_TILE = 128  # rows and columns of a moment that one program adds up
_MATRIX_ROWS = 16
_SCALED = 64  # columns of a block of a wide matrix that shares one scale
_LONGEST_RUN = 16_384  # rows of a wide run: as many float32 sums, over the rows of a block
_MOST_RUNS, _MOST_ROUNDS = 40, 8  # of wide runs, and of the programs that share their matrices out
BLOCK_NUMBERS = 16_384  # of a block of rows at most: what registers hold


class Cut(NamedTuple):
    """How a kernel is cut: rows, columns of embeddings at a time; its warps and stages."""

    rows: int
    depth: int
    warps: int
    stages: int


class Cuts(NamedTuple):
    """The blocks of each kernel that multiplies; the last depth is of columns of the gradient."""

    class_moments: Cut
    row_means: Cut
    row_gradients: Cut
    band_sums: Cut
    band_gradient: Cut


# The fastest of those tried on an H200.
HOPPER = Cuts(
    class_moments=Cut(64, 0, 8, 3),
    row_means=Cut(128, 64, 8, 2),
    row_gradients=Cut(128, 64, 8, 2),
    band_sums=Cut(64, 64, 4, 3),
    band_gradient=Cut(64, 64, 4, 3),
)
OTHERS = Cuts(
    class_moments=Cut(32, 0, 8, 2),
    row_means=Cut(64, 32, 8, 2),
    row_gradients=Cut(64, 32, 8, 2),
    band_sums=Cut(64, 64, 4, 2),
    band_gradient=Cut(64, 64, 4, 2),
)
"""For the 99 KB that a program may take on most GPUs."""
WIDE_HOPPER = Cuts(
    class_moments=Cut(64, 0, 8, 3),
    row_means=Cut(128, 64, 8, 3),
    row_gradients=Cut(128, 64, 8, 3),
    band_sums=Cut(64, 64, 4, 3),
    band_gradient=Cut(64, 128, 8, 3),
)
WIDE_OTHERS = Cuts(
    class_moments=Cut(32, 0, 8, 2),
    row_means=Cut(64, 32, 8, 3),
    row_gradients=Cut(64, 32, 8, 3),
    band_sums=Cut(64, 64, 4, 2),
    band_gradient=Cut(64, 64, 8, 2),
)
SPLIT_ROWS = Cut(32, 0, 4, 1)
BAND_PARTS = 4
"""Programs among which the blocks of a run are shared out."""
TOTALS = Cut(64, 32, 4, 1)
"""Numbers of the total, and addends, at a time."""


def takes(work: Work, device: torch.device | None) -> bool:
    """Whether the kernels serve this on a device, or on the usual GPU where that is None.

    Not float64. A class of more than half of the columns must be large. Numbers of rows have 32
    bits.
    """
    least = 2 * smallest_moment(work.d, work.m is not None)
    fits = least <= work.columns and work.vectors <= MOST_ROWS and work.d <= MAX_DEPTH
    runs = work.device == "cuda" and torch.version.hip is None and gpu.has_triton()
    may = device is None or gpu.refuses(device) is None
    return fits and work.dtype != torch.float64 and runs and may


def is_wide(d: int, joint: bool = False) -> bool:
    """Whether no program holds a row, or a matrix, as a whole.

    joint: the batch is rows and the other columns that these are compared with; wide kernels alone
    tell them apart.
    """
    return joint or d > NARROW_DEPTH


def padded(d: int, joint: bool = False) -> int:
    """Columns of the kernels' matrices: whole tiles of wide ones, else a power of two, and what a
    product takes at least.
    """
    return round_up(d, _TILE) if is_wide(d, joint) else max(16, 1 << (d - 1).bit_length())


def matrix_numbers(d: int, joint: bool = False) -> int:
    """Numbers of a moment that are added up: of wide ones down to the diagonal tiles."""
    depth = padded(d, joint)
    parts = depth // _TILE
    return parts * (parts + 1) // 2 * _TILE**2 if is_wide(d, joint) else depth**2


def smallest_moment(d: int, joint: bool = False) -> int:
    """Members from which a class has matrices of its own: these take little beside its rows."""
    return max(128, 6 * padded(d, joint))


def class_count(n: int, d: int, joint: bool = False) -> int:
    """More than any number of a large class, which is a multiple of `smallest_moment` over it."""
    return -(-n // smallest_moment(d, joint))


def run_length(n: int, d: int, processors: int, joint: bool = False) -> int:
    """Rows of a run: one run for each processor. Programs share wide matrices out, so that fewer
    runs do, as many as fill the processors' last round.
    """
    if not is_wide(d, joint):
        return round_up(-(-n // processors), _MULTIPLE)
    tiles = matrix_numbers(d, joint) // _TILE**2
    rounds = max(1, min(_MOST_ROUNDS, _MOST_RUNS * tiles // processors))
    runs = max(1, rounds * processors // tiles)
    return round_up(max(4 * _MULTIPLE, min(-(-n // runs), _LONGEST_RUN)), _MULTIPLE)


def splits(dtype: torch.dtype) -> bool:
    """Whether numbers are two float16 parts: one has fewer digits than float16's own rule allows,
    but more than bfloat16's, and as many as tf32, where torch may multiply float32 so.
    """
    return dtype == torch.float16 or (dtype == torch.float32 and gpu.products_are_exact())


class Matrices(NamedTuple):
    """[count, D', D'] in two float16 parts (low is empty where there is one); scales of rows, or of
    blocks of a wide matrix.
    """

    high: Tensor
    low: Tensor
    scale: Tensor


class SortedRows(NamedTuple):
    """Rows in class order, N of D' numbers.

    high, low: unit rows times 2^8 in two float16 parts, [N, D'] (low is empty where there is one).
    inverse: 1 / norm. order: the given index. first, last: where the row's class begins and ends.
    """

    high: Tensor
    low: Tensor
    inverse: Tensor
    order: Tensor
    first: Tensor
    last: Tensor


class Sums(NamedTuple):
    """What runs of rows add up to.

    slots: of each run and class, [runs + classes, size]. total: float64, of each run, [runs, size],
    then of all of them, [size]. small_rows: int32, how many rows of each run are of small classes.
    """

    slots: Tensor
    total: Tensor
    small_rows: Tensor


class Weights(NamedTuple):
    """What rows weigh in a sum over them.

    of_rows: bool, which of them count, in class order; or float32 weights, in the given order.
    largest: scalar. The largest of float32 weights: kernels divide by it first and multiply the
    gradient by it last. Of bool ones dL/dL, for the gradient alone.
    """

    of_rows: Tensor
    largest: Tensor


class KeptMoments(NamedTuple):
    """What `backward` needs of the forward.

    active: bool, which rows have h > 0, in class order. own: T_c of the large classes. others:
    T - T_c of them, and T. before: int32 [N + 1], how many columns stand before each row where the
    batch has rows and other columns, else None.
    """

    batch: SortedRows
    active: Tensor
    own: Matrices
    others: Matrices
    before: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        before = () if self.before is None else (self.before,)
        return (*self.batch, self.active, *self.own, *self.others, *before)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> KeptMoments:
        """Of such `tensors`."""
        batch, (active, *more) = SortedRows(*tensors[:6]), tensors[6:]
        before = more[6] if len(more) > 6 else None
        return cls(batch, active, Matrices(*more[:3]), Matrices(*more[3:6]), before)


class Launcher:
    """The kernels, with what all of them are told of a batch."""

    def __init__(
        self, n: int, d: int, split: bool, device: torch.device, joint: bool = False
    ) -> None:
        from . import kernels, wide_kernels

        self.wide, self.joint = is_wide(d, joint), joint
        self.kernels: ModuleType = kernels
        self.wide_kernels: ModuleType = wide_kernels
        self.n, self.d, self.depth, self.split = n, d, padded(d, joint), split
        self.least, self.classes = smallest_moment(d, joint), class_count(n, d, joint)
        self.run = run_length(n, d, gpu.processors(device), joint)
        self.runs = -(-n // self.run)
        self.of_runs = n, self.run, self.least
        """Sizes for kernels that walk runs of rows."""
        run = () if self.wide else (self.run,)
        self.of_rows = n, *run, self.least, self.classes
        """Sizes for kernels that multiply rows with matrices."""
        self.tile, self.size = min(self.depth, _TILE), matrix_numbers(d, joint)
        self.scaled = min(self.tile, _SCALED)
        self.blocks = self.depth**2 // (self.tile * self.scaled)
        hopper = gpu.is_hopper(device)
        if self.wide:
            self.cuts = WIDE_HOPPER if hopper else WIDE_OTHERS
        else:
            self.cuts = HOPPER if hopper else OTHERS
        self.whole = hopper and self.depth <= WHOLE_DEPTH

    def options(self, cut: Cut) -> dict[str, object]:
        """Constants of a kernel that walks blocks of rows."""
        return {
            "DP": self.depth,
            "BLOCK": cut.rows if self.wide else min(cut.rows, BLOCK_NUMBERS // self.depth),
            "SPLIT": self.split,
            "num_warps": cut.warps,
            "num_stages": cut.stages,
        }

    def matrices(self, like: Tensor, count: int) -> Matrices:
        """Room for so many."""
        high = like.new_empty((count, self.depth, self.depth), dtype=torch.float16)
        low = high.new_empty(high.shape if self.split else 0)
        scales = self.blocks if self.wide else self.depth
        return Matrices(high, low, like.new_empty((count, scales), dtype=torch.float32))

    def sort(self, embeddings: Tensor, labels: Tensor, eps: float) -> SortedRows:
        """Rows in class order."""
        n, new = self.n, embeddings.new_empty
        labels, order = labels.sort(stable=True)
        high = new((n, self.depth), dtype=torch.float16)
        batch = SortedRows(
            high,
            high.new_empty(high.shape if self.split else 0),
            new(n, dtype=torch.float32),
            order,
            new(n, dtype=torch.int32),
            new(n, dtype=torch.int32),
        )
        width = self.tile if self.wide else self.depth
        cut = SPLIT_ROWS._replace(rows=max(1, SPLIT_ROWS.rows * 128 // width))
        self.kernels.split_rows[(-(-n // cut.rows),)](
            embeddings, labels, batch,
            n, self.d, *embeddings.stride(), eps * eps, n.bit_length(),
            WIDTH=width, **self.options(cut),
        )  # fmt: skip
        return batch

    def sums(
        self,
        batch: SortedRows,
        before: Tensor | None,
        weights: Weights | None,
        uniform: bool,
        by_q: bool,
    ) -> Sums:
        """Moments of the rows, or weighted ones; by_q: in their total by q_c."""
        size, new = self.size, batch.inverse.new_empty
        sums = Sums(
            new(self.runs + self.classes, size),
            new((self.runs, size), dtype=torch.float64),
            new(self.runs, dtype=torch.int32),
        )
        self.kernels.class_moments[self.runs, size // self.tile**2](
            batch, weights, before, sums, *self.of_runs,
            TILE=self.tile, UNIFORM=uniform, BY_Q=by_q, HALVED=self.wide,
            **self.options(self.cuts.class_moments),
        )  # fmt: skip
        total = sums.total.new_empty(size)
        self.kernels.add_totals[(size // TOTALS.rows,)](
            sums.total, total, self.runs,
            SIZE=size, BLOCK=TOTALS.rows, DEPTH=TOTALS.depth, num_warps=TOTALS.warps,
        )  # fmt: skip
        return sums._replace(total=total)

    def make_matrices(self, kernel: str, *arguments: object, **constants: object) -> None:
        """Run a kernel that makes matrices of sums: parts of matrices of each number, and of T."""
        count = self.classes + 1
        shape = {"DP": self.depth, "SPLIT": self.split, "num_warps": 4} | constants
        if self.wide:
            shape |= {"TILE": self.tile, "SCALED": self.scaled}
            shape["num_warps"] = 8
            getattr(self.wide_kernels, kernel)[count, self.blocks](*arguments, **shape)
        else:
            grid = count, self.depth // _MATRIX_ROWS
            getattr(self.kernels, kernel)[grid](*arguments, ROWS=_MATRIX_ROWS, **shape)

    def row_programs(self, cut: Cut) -> int:
        """How many programs share out the rows: one for each run, or for each block if wide."""
        return -(-self.n // cut.rows) if self.wide else self.runs

    def multiply_rows(self, kernel: str, cut: Cut, *arguments: object, **constants: object) -> None:
        """Run a kernel that multiplies rows with the matrices of their classes."""
        shape = self.options(cut) | constants
        grid = (self.row_programs(cut),)
        if self.wide:
            shape |= {"TILE": self.tile, "SCALED": self.scaled}
            shape["BLOCK_K"] = min(self.scaled, cut.depth)
            getattr(self.wide_kernels, kernel)[grid](*arguments, **shape)
        else:
            shape["BLOCK_K"] = self.depth if self.whole else min(self.depth, cut.depth)
            getattr(self.kernels, kernel)[grid](*arguments, **shape)

    def multiply_band(self, cut: Cut, *arguments: object, **constants: object) -> None:
        """Run `band_gradient`, which wide rows have of their own."""
        shape = self.options(cut) | constants
        shape |= {
            "BLOCK_D": min(self.scaled, cut.depth),
            "BLOCK_V": min(self.tile, cut.depth),
        }
        grid = self.runs, self.band_parts(cut)
        if self.wide:
            self.wide_kernels.band_gradient[grid](*arguments, **shape)
        else:
            slices = -(-self.d // min(self.tile, cut.depth))
            self.kernels.band_gradient[(*grid, slices)](*arguments, **shape)

    def band_parts(self, cut: Cut) -> int:
        """Among how many programs a run's blocks of rows are shared out."""
        return -(-self.run // cut.rows) if self.wide else BAND_PARTS


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, tuple[Tensor, ...]]:
    """The loss, the two means of Eq. 3, and the tensors of `KeptMoments`.

    Other columns stand in the batch behind the rows: of weight 1 in T_c, 0 in A_c; rows 0 and a.
    """
    n, joint = len(embeddings), ref_emb is not None
    embeddings, labels = in_memory(embeddings), in_memory(labels)
    if ref_emb is not None and ref_labels is not None:
        embeddings = torch.cat((embeddings, ref_emb))
        labels = torch.cat((labels, ref_labels))
    new = embeddings.new_empty
    every, d = embeddings.shape
    launcher = Launcher(every, d, splits(embeddings.dtype), embeddings.device, joint)
    with gpu.current(embeddings):
        batch = launcher.sort(embeddings, labels, spec.eps)
        before = weights = None
        if joint:
            is_column = batch.order >= n
            before = new(every + 1, dtype=torch.int32).zero_()
            torch.cumsum(is_column, 0, dtype=torch.int32, out=before[1:])
            weights = Weights(is_column, new((), dtype=torch.float32))  # there is no dL/dL yet
        sums = launcher.sums(batch, before, weights, uniform=True, by_q=False)
        own = launcher.matrices(embeddings, launcher.classes)
        others = launcher.matrices(embeddings, launcher.classes + 1)
        launcher.make_matrices("moment_matrices", sums, batch, own, others, *launcher.of_runs)
        in_band = new(every, dtype=torch.float32)
        launcher.kernels.band_sums[launcher.runs, launcher.band_parts(launcher.cuts.band_sums)](
            batch, before, sums.small_rows, in_band, *launcher.of_runs,
            BLOCK_D=min(launcher.scaled, launcher.cuts.band_sums.depth),
            **launcher.options(launcher.cuts.band_sums),
        )  # fmt: skip
        rows = Rows(new(n, dtype=torch.float32), new(n, dtype=torch.float32))
        by_row = spec.reduction == "none"
        cut = launcher.cuts.row_means
        losses = new(n if by_row else launcher.row_programs(cut), dtype=torch.float32)
        active = new(every, dtype=torch.bool)
        if joint:
            active.zero_()  # of columns
        launcher.multiply_rows(
            "row_means", cut,
            batch, before if launcher.wide else sums.small_rows, in_band, own, others,
            active, rows, losses, *launcher.of_rows,
            spec.margin, spec.sigma, 1 / n if spec.reduction == "mean" else 1.0,
            BY_ROW=by_row,
        )  # fmt: skip
    kept = KeptMoments(batch, active, own, others, before)
    return losses if by_row else losses.sum(), rows, kept.tensors


def backward(
    grad_loss: Tensor, embeddings: Tensor, tensors: tuple[Tensor, ...], spec: Spec
) -> tuple[Tensor, Tensor | None]:
    """dL/d(embeddings), and dL/d(ref_emb) where there is one; tensors: those of `KeptMoments`."""
    n, d = embeddings.shape
    grad_loss = in_memory(grad_loss)
    batch, is_active, own, others, before = KeptMoments.of(tensors)
    every, joint = len(batch.order), before is not None
    launcher = Launcher(every, d, batch.low.numel() > 0, embeddings.device, joint)
    uniform, scale = spec.reduction != "none", 1.0
    if uniform:
        weights = Weights(is_active, grad_loss)
        scale = 1 / n if spec.reduction == "mean" else 1.0
    else:
        grad_loss = torch.nn.functional.pad(grad_loss, (0, every - n)) if joint else grad_loss
        of_rows = torch.where(is_active, grad_loss.to(torch.float32), 0.0)
        weights = Weights(of_rows, torch.linalg.vector_norm(of_rows, float("inf")))
    with gpu.current(embeddings):
        sums = launcher.sums(batch, before, weights, uniform, by_q=True)
        active, back = (launcher.matrices(embeddings, launcher.classes + 1) for _ in range(2))
        of_columns = (before,) if launcher.wide else ()
        launcher.make_matrices(
            "gradient_matrices", sums, batch, *of_columns, own, others, active, back,
            *launcher.of_runs, spec.sigma, UNIFORM=uniform,
        )  # fmt: skip
        small_rows = sums.small_rows
        del sums  # slots make room for the gradient
        gradient = embeddings.new_empty((every, d), dtype=torch.float32)
        launcher.multiply_band(
            launcher.cuts.band_gradient, batch, *of_columns, small_rows, weights, gradient,
            *launcher.of_runs, d, d, spec.sigma, UNIFORM=uniform,
        )  # fmt: skip
        launcher.multiply_rows(
            "row_gradients", launcher.cuts.row_gradients,
            batch, before if launcher.wide else small_rows, weights, active, back,
            gradient, *launcher.of_rows, d, d, scale, UNIFORM=uniform,
        )  # fmt: skip
    return (gradient[:n], gradient[n:]) if joint else (gradient, None)


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """FLOPs of products on tensor cores, three for each where numbers are split; bytes of all that
    is read and written, the matrices of the classes that there are among it.

    A sort counts as one launch. Memory is the same whatever the classes are.
    """
    joint = work.m is not None
    n, d = work.vectors, padded(work.d, joint)
    wide, size, each = is_wide(work.d, joint), matrix_numbers(work.d, joint), 2 * d * d
    least = smallest_moment(work.d, joint)
    class_sizes = [s * n // work.columns for s in class_sizes]  # with as large a share of rows
    symmetric = 2 * size  # of a form or a moment: a wide one is computed down to its diagonal
    products = 3 if splits(work.dtype) else 1
    large = [s for s in class_sizes if s >= least]
    small = n - sum(large)
    runs = -(-n // run_length(n, work.d, gpu.USUAL_PROCESSORS, joint))
    stored = n * d * 2 * (2 if products == 3 else 1)
    slots, matrix = (runs + len(large)) * size * 4, d * d * 4
    totals = 2 * runs * size * 8  # written and read
    slices = 1 if wide else -(-d // HOPPER.band_gradient.depth)  # S is formed anew for each
    in_band = _band_pairs(class_sizes, least)
    scalar = work.reduction != "none"
    forms = (2 * sum(large) + small) * work.n // n  # of rows; sums meet columns in the same blocks
    flops = products * (symmetric * (n + forms) + 2 * d * in_band)
    bytes_ = (
        n * work.d * work.dtype.itemsize * (2 if wide else 1) + stored  # split
        + 2 * stored + 2 * slots + totals + 2 * (2 * len(large) + 1) * matrix
        + n * _ROW_BYTES
    )  # fmt: skip
    launches = (8 if scalar else 7) + (6 if joint else 0)
    memory = _extra_memory(work)
    if not work.wants_gradient:
        return Cost(flops, bytes_, launches, memory, SCHEDULE)
    of_large, of_small = 1 if scalar or joint else 2, 1 if joint else 2
    made = each * (of_large * sum(large) + of_small * small)
    flops += products * (symmetric * n + made + 2 * d * (slices + 1) * in_band)
    bytes_ += 2 * stored + 2 * slots + totals + 2 * (4 * len(large) + 2) * matrix
    bytes_ += work.gradient_bytes * (3 if wide else 1)  # v, before it is projected
    bytes_ += n * _ROW_BYTES_BACK + 3 * work.cast_bytes
    launches += (5 if scalar else 9 if joint else 8) + work.casts * (2 if joint else 1)
    return Cost(flops, bytes_, launches, memory, SCHEDULE)


_ROW_BYTES = 72  # labels, sorted; order, place of the class, norm, both means
_ROW_BYTES_BACK = 16  # order, norm, whether it is active


def _band_pairs(class_sizes: Sequence[int], least: int) -> int:
    """Pairs of rows whose products the band forms, in whole blocks."""
    block = HOPPER.band_sums.rows
    return sum(s * (s + block) for s in class_sizes if 1 < s < least)


def _extra_memory(work: Work) -> int:
    """The gradient included.

    Rows in parts and the matrices of the forward are there throughout. Beside them the backward has
    slots, and totals or its own matrices; then these and the gradient; then that as it is cast.
    """
    joint = work.m is not None
    n, d, size = work.vectors, padded(work.d, joint), matrix_numbers(work.d, joint)
    part = 4 if splits(work.dtype) else 2
    on_gpu = torch.cuda.is_available()
    processors = gpu.processors(torch.device("cuda")) if on_gpu else gpu.USUAL_PROCESSORS
    runs = -(-n // run_length(n, work.d, processors, joint))
    classes = class_count(n, work.d, joint)
    kept = n * (d * part + _KEPT_BYTES + (8 if work.reduction == "none" else 0))
    slots, totals = (runs + classes) * size * 4, (runs + 1) * size * 8
    matrices, made = ((2 * classes + extra) * (d * d * part + 4 * d) for extra in (1, 2))
    forward = max(slots + totals, slots + matrices + 4 * n)
    if joint:
        kept += 5 * n  # which are columns, and how many before each
        forward += work.embedding_bytes  # both sides together
    if not work.wants_gradient:
        return kept + forward
    of_gradient = work.gradient_bytes + max(made, work.cast_bytes)
    return kept + max(forward, matrices + slots + max(totals, made), matrices + of_gradient)


_KEPT_BYTES = 29  # order, place of the class, norm, both means, and whether the row is active
