"""Second moments on a GPU in Triton: thirteen launches for any labels, fifteen with losses by row.

The host never waits for the device, so no shape may depend on the labels. A class of
`smallest_moment(d)` members or more is large: it has moment matrices, and buffers hold as many
matrices as there can be large classes. The members of smaller classes meet each other in a band
around the diagonal of S, whose rows and columns are in class order. Sums have a fixed order, so the
bits are the same from run to run.

Other columns (`ref_emb`) join the rows in one batch, sorted by class: six launches more, seven with
losses by row. The kernels are in `kernels`. Where D is above `NARROW_DEPTH`, or the batch is joint,
all that follow `class_moments` and `add_totals`, but for `band_sums`, are in `wide_kernels`.
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
"""The largest D whose rows fit registers; wider rows have kernels of their own."""
_MULTIPLE = 64  # a run has a multiple of this many rows: whole blocks
WHOLE_DEPTH = 128  # the largest D' at which Hopper holds two matrices and a block of rows
_TILE = 128  # one program adds up so many rows and columns of a moment
_MATRIX_ROWS = 16
_SCALED = 64  # columns of a block of a wide matrix that shares one scale
_LONGEST_RUN = 16_384  # the most rows of a wide run, whose blocks are added up in float32
_MOST_RUNS, _MOST_ROUNDS = 40, 8  # wide runs, and rounds of the programs that add them up
BLOCK_NUMBERS = 16_384  # the most numbers of a block of rows: what registers hold


class Cut(NamedTuple):
    """How a kernel works: rows and columns of embeddings at a time, warps, pipeline stages."""

    rows: int
    depth: int
    warps: int
    stages: int


class Cuts(NamedTuple):
    """How each kernel with products works; `band_gradient` takes columns of the gradient."""

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
"""For the 99 KB of shared memory that a program may use on most GPUs."""
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
"""So many programs share the blocks of a run."""
TOTALS = Cut(64, 32, 4, 1)
"""Numbers of the total and addends at a time."""


def takes(work: Work, device: torch.device | None) -> bool:
    """Whether the kernels serve this work on a device; None stands for the usual GPU.

    They have no float64 and no D above `MAX_DEPTH`. A class of more than half of the columns must
    be large, and row numbers must fit 32 bits.
    """
    if work.device != "cuda" or torch.version.hip is not None or not gpu.has_triton():
        return False
    least = 2 * smallest_moment(work.d, work.m is not None)
    fits = least <= work.columns and work.vectors <= MOST_ROWS and work.d <= MAX_DEPTH
    may_run = device is None or gpu.refuses(device) is None
    return fits and work.dtype != torch.float64 and may_run


def is_wide(d: int, joint: bool = False) -> bool:
    """Whether no program holds a whole row or a whole matrix.

    joint: the batch holds rows and the other columns they are compared with. Only the wide kernels
    tell the two apart.
    """
    return joint or d > NARROW_DEPTH


def padded(d: int, joint: bool = False) -> int:
    """D': columns of the kernels' matrices. Wide ones have whole tiles; others a power of two, at
    least the 16 that a product needs.
    """
    return round_up(d, _TILE) if is_wide(d, joint) else max(16, 1 << (d - 1).bit_length())


def matrix_numbers(d: int, joint: bool = False) -> int:
    """Numbers of a moment that are added up. Wide moments stop at the diagonal's tiles."""
    depth = padded(d, joint)
    parts = depth // _TILE
    return parts * (parts + 1) // 2 * _TILE**2 if is_wide(d, joint) else depth**2


def smallest_moment(d: int, joint: bool = False) -> int:
    """Members of the smallest large class: its matrices cost little beside its rows."""
    return max(128, 6 * padded(d, joint))


def class_count(n: int, d: int, joint: bool = False) -> int:
    """How many numbers large classes can have.

    A class's number is the first multiple of `smallest_moment` among its rows, over it.
    """
    return -(-n // smallest_moment(d, joint))


def run_length(n: int, d: int, processors: int, joint: bool = False) -> int:
    """Rows of a run. There is one run for each processor.

    Several programs share a run of wide rows, one for each tile of its moment. Fewer runs then keep
    the processors busy: as many as fill their last round.
    """
    if not is_wide(d, joint):
        return round_up(-(-n // processors), _MULTIPLE)
    tiles = matrix_numbers(d, joint) // _TILE**2
    rounds = max(1, min(_MOST_ROUNDS, _MOST_RUNS * tiles // processors))
    runs = max(1, rounds * processors // tiles)
    return round_up(max(4 * _MULTIPLE, min(-(-n // runs), _LONGEST_RUN)), _MULTIPLE)


def splits(dtype: torch.dtype) -> bool:
    """Whether numbers are stored as two float16 parts.

    One part loses digits of float16 and float32. It is enough for bfloat16, and for float32 where
    torch is allowed to multiply in tf32, which has as many digits.
    """
    return dtype == torch.float16 or (dtype == torch.float32 and gpu.products_are_exact())


class Matrices(NamedTuple):
    """Matrices [count, D', D'] in two float16 parts; low is empty where one part does.

    scale: of each row, or of each block of a wide matrix.
    """

    high: Tensor
    low: Tensor
    scale: Tensor


class SortedRows(NamedTuple):
    """Rows in class order, N of D' numbers.

    high, low: unit rows times 2^8 in two float16 parts, [N, D']; low is empty where one part does.
    inverse: 1 / norm. order: the row's index in the batch. first, last: where its class begins and
    ends.
    """

    high: Tensor
    low: Tensor
    inverse: Tensor
    order: Tensor
    first: Tensor
    last: Tensor


class Sums(NamedTuple):
    """What runs of rows add up to.

    slots: a sum for each run and class, [runs + classes, size]. total: float64, first a sum for
    each run, [runs, size], then of all runs, [size]. small_rows: int32, how many rows of each run
    belong to small classes.
    """

    slots: Tensor
    total: Tensor
    small_rows: Tensor


class Weights(NamedTuple):
    """What rows weigh in a sum over them.

    of_rows: bool [N] in class order, which rows count; or float32 weights [N] in the given order.
    largest: scalar. With float32 weights the largest of them: kernels divide by it first and
    multiply the gradient by it last. With bool ones dL/dL, which multiplies the gradient alone.
    """

    of_rows: Tensor
    largest: Tensor


class KeptMoments(NamedTuple):
    """What `backward` needs of the forward.

    active: bool [N], whether h > 0, in class order, but in the given order for losses by row. own:
    T_c of each large class. others: T - T_c of each, then T. before: int32 [N + 1], how many
    columns stand before each row of a joint batch; None for other batches.
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
        """From such tensors."""
        batch, (active, *more) = SortedRows(*tensors[:6]), tensors[6:]
        before = more[6] if len(more) > 6 else None
        return cls(batch, active, Matrices(*more[:3]), Matrices(*more[3:6]), before)


class Launcher:
    """Launches the kernels on one batch, with the sizes and constants that they share."""

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
        """Sizes for the kernels that walk runs of rows."""
        run = () if self.wide else (self.run,)
        self.of_rows = n, *run, self.least, self.classes
        """Sizes for the kernels that multiply rows with matrices."""
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
        """Room for that many matrices."""
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
        """Moments of the rows, weighted where weights are given.

        before: see `KeptMoments`. by_q: whether the total weighs each class by q_c.
        """
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
        """Run a kernel that turns sums into matrices: those of each large class, and one of T."""
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
        """How many programs the rows have: one for each run, or for each block of wide rows."""
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
        """Run `band_gradient`, the narrow or the wide one."""
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
        """How many programs share the blocks of a run."""
        return -(-self.run // cut.rows) if self.wide else BAND_PARTS


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, tuple[Tensor, ...]]:
    """The loss, the two means of Eq. 3, and the tensors of `KeptMoments`.

    Other columns are appended to the rows. In T_c a column weighs 1 and a row 0; in A_c a column
    weighs 0 and row i a_i.
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
            active.zero_()  # columns are not active
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
    """FLOPs: products on tensor cores, three for each where numbers are split. Bytes: all that is
    read and written, with the matrices of these classes. Launches: a sort counts as one. Memory is
    the same for any classes.
    """
    joint = work.m is not None
    n, d = work.vectors, padded(work.d, joint)
    wide, size, each = is_wide(work.d, joint), matrix_numbers(work.d, joint), 2 * d * d
    least = smallest_moment(work.d, joint)
    class_sizes = [s * n // work.columns for s in class_sizes]  # with as large a share of rows
    symmetric = 2 * size  # FLOPs of a form or a moment; wide ones stop at the diagonal
    products = 3 if splits(work.dtype) else 1
    large = [s for s in class_sizes if s >= least]
    small = n - sum(large)
    runs = -(-n // run_length(n, work.d, gpu.USUAL_PROCESSORS, joint))
    stored = n * d * 2 * (2 if products == 3 else 1)
    slots, matrix = (runs + len(large)) * size * 4, d * d * 4
    totals = 2 * runs * size * 8  # written and read
    slices = 1 if wide else -(-d // HOPPER.band_gradient.depth)  # each forms S anew
    in_band = _band_pairs(class_sizes, least)
    scalar = work.reduction != "none"
    forms = (2 * sum(large) + small) * work.n // n  # of rows alone; moments meet both sides
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


_ROW_BYTES = 72  # labels, sorted labels, order, first, last, norm, both means
_ROW_BYTES_BACK = 16  # order, norm, active


def _band_pairs(class_sizes: Sequence[int], least: int) -> int:
    """Pairs of rows that the band multiplies, in whole blocks."""
    block = HOPPER.band_sums.rows
    return sum(s * (s + block) for s in class_sizes if 1 < s < least)


def _extra_memory(work: Work) -> int:
    """The gradient included.

    The rows in parts and the forward's matrices are there throughout. Beside them the backward
    first holds slots with totals or with its own matrices, then these matrices with the gradient,
    at last the gradient in two dtypes.
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


_KEPT_BYTES = 29  # a row: order, first, last, norm, both means, active
