"""Second moments on a GPU in Triton: thirteen launches for any labels, fifteen with losses by row.

The host never waits for the device, so no shape may depend on the labels. A class of `Sizes.least`
members or more is large: it has moment matrices, and buffers hold as many matrices as there can be
large classes. The members of smaller classes meet each other in a band
around the diagonal of S, whose rows and columns are in class order. Sums have a fixed order, so the
bits are the same from run to run.

Other columns (`ref_emb`) join the rows in one batch, sorted by class: one launch more. The kernels
are in `kernels`. Where D is above `NARROW_DEPTH`, numbers are float64 or the batch is joint, all
that follow `class_moments` and `add_totals`, but for `band_sums`, are in `wide_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
NARROW_DEPTH = {"hopper": 256, "other": 128}
"""The largest D whose rows fit registers; wider rows have kernels of their own."""
_MULTIPLE = 64  # a run has a multiple of this many rows: whole blocks
WHOLE_DEPTH = 128  # the largest D' at which Hopper holds two matrices and a block of rows
_TILE = 128  # one program adds up so many rows and columns of a moment
_MATRIX_ROWS = 16
_SCALED = {"hopper": 64, "other": 32}  # columns of a block of a wide matrix that shares a scale
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


HOPPER = Cuts(
    class_moments=Cut(64, 0, 8, 3),
    row_means=Cut(128, 64, 8, 2),
    row_gradients=Cut(128, 64, 8, 2),
    band_sums=Cut(64, 64, 4, 3),
    band_gradient=Cut(64, 64, 4, 3),
)
WIDE_HOPPER = Cuts(
    class_moments=Cut(64, 0, 8, 3),
    row_means=Cut(128, 64, 8, 3),
    row_gradients=Cut(128, 64, 8, 3),
    band_sums=Cut(64, 64, 4, 3),
    band_gradient=Cut(64, 128, 8, 3),
)
"""The fastest of those tried on an H200. Cuts for other GPUs are not measured: their blocks fit the
least shared memory there, and spill little."""
BLACKWELL = Cuts(
    class_moments=Cut(32, 0, 8, 2),
    row_means=Cut(64, 32, 8, 2),
    row_gradients=Cut(64, 32, 8, 2),
    band_sums=Cut(64, 64, 4, 2),
    band_gradient=Cut(64, 64, 8, 2),
)
AMD = BLACKWELL._replace(row_means=Cut(64, 32, 4, 2), row_gradients=Cut(64, 32, 4, 2))
OTHER = BLACKWELL._replace(
    class_moments=Cut(16, 0, 8, 2),
    row_means=Cut(32, 32, 8, 2),
    row_gradients=Cut(32, 32, 8, 2),
    band_gradient=Cut(32, 64, 4, 2),
)
FLOAT64 = Cuts(
    class_moments=Cut(16, 0, 8, 2),
    row_means=Cut(32, 16, 8, 2),
    row_gradients=Cut(32, 16, 8, 2),
    band_sums=Cut(32, 32, 4, 2),
    band_gradient=Cut(32, 64, 4, 2),
)
"""For the wide kernels on NVIDIA's GPUs, not measured."""
AMD_FLOAT64 = FLOAT64._replace(row_means=Cut(32, 16, 4, 2), row_gradients=Cut(32, 16, 4, 2))
SPLIT_ROWS = Cut(32, 0, 4, 1)
BAND_PARTS = 4
"""So many programs share the blocks of a run."""
TOTALS = Cut(64, 32, 4, 1)
"""Numbers of the total and addends at a time."""


def takes(work: Work, device: torch.device | None) -> bool:
    """Whether the kernels serve this work on a device; None stands for the usual GPU.

    They have no D above `MAX_DEPTH` and row numbers of 32 bits, and are not worth while against few
    columns.
    """
    fits = work.d <= MAX_DEPTH and work.vectors <= MOST_ROWS and not has_few_columns(work)
    return fits and gpu.runs_triton(work.device, device)


def has_few_columns(work: Work) -> bool:
    """Whether there are fewer than 2 D' columns: fewer numbers than the two matrices of a row."""
    return work.columns < 2 * sizes_of(work).depth


class Sizes(NamedTuple):
    """How a batch of n rows of d numbers is cut up.

    m: other columns, or None; with other columns the batch is joint. float64: whether numbers are.
    processors: those of the GPU. kind: see `gpu.kind`.
    """

    n: int
    m: int | None
    d: int
    float64: bool
    processors: int
    kind: str = "hopper"

    @property
    def joint(self) -> bool:
        """Whether the batch holds rows and the other columns that they are compared with."""
        return self.m is not None

    @property
    def every(self) -> int:
        """Rows of the batch in class order, those of both sides."""
        return self.n + (self.m or 0)

    @property
    def wide(self) -> bool:
        """Whether `wide_kernels` serve it: no program holds a whole matrix."""
        narrow = NARROW_DEPTH["hopper" if self.kind == "hopper" else "other"]
        return self.joint or self.float64 or self.d > narrow

    @property
    def depth(self) -> int:
        """D': columns of the kernels' matrices.

        They are whole tiles, or a power of two, at least the 16 that a product needs.
        """
        if self.wide and self.d > _TILE:
            return round_up(self.d, _TILE)
        return max(16, 1 << (self.d - 1).bit_length())

    @property
    def tile(self) -> int:
        """Rows and columns of a moment that one program adds up."""
        return min(self.depth, _TILE)

    @property
    def scaled(self) -> int:
        """Columns of a block of a wide matrix that shares a scale."""
        large = self.kind == "hopper" and not self.float64
        return min(self.tile, _SCALED["hopper" if large else "other"])

    @property
    def numbers(self) -> int:
        """Numbers of a moment that are added up. Wide moments stop at the diagonal's tiles."""
        parts = self.depth // self.tile
        return parts * (parts + 1) // 2 * self.tile**2 if self.wide else self.depth**2

    @property
    def least(self) -> int:
        """Members of the smallest large class.

        A class of half of the columns is large, or T - T_c would cancel digits of what is left. One
        of fewer than D' rows is not: a row's own term, which is 1, would cancel digits of what its
        others add up to. Many rows against few columns have many matrices: up to D' numbers a row
        in each of `Matrices`.
        """
        columns = self.n if self.m is None else self.m
        return min(smallest_moment(self.depth), max(self.depth, columns // 2))

    @property
    def classes(self) -> int:
        """How many numbers large classes can have.

        A class's number is the first multiple of `least` among its rows, over it.
        """
        return -(-self.every // self.least)

    @property
    def run(self) -> int:
        """Rows of a run. There is one run for each processor.

        Several programs share a run of wide rows, one for each tile of its moment. Fewer runs then
        keep the processors busy: as many as fill their last round.
        """
        if not self.wide:
            return round_up(-(-self.every // self.processors), _MULTIPLE)
        tiles = self.numbers // self.tile**2
        rounds = max(1, min(_MOST_ROUNDS, _MOST_RUNS * tiles // self.processors))
        runs = max(1, rounds * self.processors // tiles)
        return round_up(max(4 * _MULTIPLE, min(-(-self.every // runs), _LONGEST_RUN)), _MULTIPLE)

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return -(-self.every // self.run)


def smallest_moment(depth: int) -> int:
    """Members of a class whose matrices of so many columns cost little beside its rows."""
    return max(128, 6 * depth)


def sizes_of(work: Work) -> Sizes:
    """The sizes of a batch of this work on the usual GPU."""
    return Sizes(work.n, work.m, work.d, work.dtype == torch.float64, gpu.USUAL_PROCESSORS)


def sizes_here(sizes: Sizes, device: torch.device) -> Sizes:
    """The sizes of that batch on this GPU."""
    return sizes._replace(processors=gpu.processors(device), kind=gpu.kind(device))


def splits(dtype: torch.dtype) -> bool:
    """Whether numbers are stored as two float16 parts.

    One part loses digits of float16 and float32. It is enough for bfloat16, and for float32 where
    torch is allowed to multiply in tf32, which has as many digits.
    """
    return dtype == torch.float16 or (dtype == torch.float32 and gpu.products_are_exact())


def cuts_of(sizes: Sizes) -> Cuts:
    """How kernels work on a batch of these sizes."""
    if sizes.float64:
        return AMD_FLOAT64 if sizes.kind == "amd" else FLOAT64
    if sizes.kind == "hopper":
        return WIDE_HOPPER if sizes.wide else HOPPER
    return {"blackwell": BLACKWELL, "amd": AMD}.get(sizes.kind, OTHER)


def flag_dtype(accumulated: torch.dtype) -> torch.dtype:
    """The dtype of flags that kernels read.

    Triton's compiler fails on a float64 product whose operand is masked by flags of eight bits.
    """
    return torch.int32 if accumulated == torch.float64 else torch.bool


class Matrices(NamedTuple):
    """Matrices [count, D', D'] in parts as those of `SortedRows`.

    scale: of each row, or of each block of a wide matrix.
    """

    high: Tensor
    low: Tensor
    scale: Tensor


class SortedRows(NamedTuple):
    """Rows in class order, N of D' numbers.

    high, low: unit rows times 2^8 in two float16 parts, [N, D']; low is empty where one part does.
    float64 numbers are one part, in float64. inverse: 1 / norm. order: the row's index in the
    batch. first, last: where its class begins and ends.
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

    of_rows: flags in class order, which rows count; or weights [N] in the given order. Kernels do
    not read those of a joint batch's columns. largest: scalar. With weights the largest of them:
    kernels divide by it first and multiply the gradient by it last. With flags dL/dL, which
    multiplies the gradient alone.
    """

    of_rows: Tensor
    largest: Tensor


class KeptMoments(NamedTuple):
    """What `backward` needs of the forward.

    active: flags, whether h > 0, in class order, but in the given order for losses by row. own: T_c
    of each large class. others: T - T_c of each, then T. before: int32, how many columns stand
    before each row of a joint batch, and in all; None for other batches.
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
    """Launches the kernels on one batch, with the sizes and constants that they share.

    dtype: that of what is accumulated.
    """

    def __init__(self, sizes: Sizes, split: bool) -> None:
        from . import kernels, wide_kernels

        self.kernels: ModuleType = kernels
        self.wide_kernels: ModuleType = wide_kernels
        self.n, self.d, self.wide = sizes.every, sizes.d, sizes.wide
        self.split, self.size = split, sizes.numbers
        self.depth, self.tile = sizes.depth, sizes.tile
        self.dtype = torch.float64 if sizes.float64 else torch.float32
        self.stored = torch.float64 if sizes.float64 else torch.float16
        self.least, self.classes = sizes.least, sizes.classes
        self.run, self.runs = sizes.run, sizes.runs
        self.of_runs = self.n, self.run, self.least
        """Sizes for the kernels that walk runs of rows."""
        run = () if self.wide else (self.run,)
        self.of_rows = self.n, *run, self.least, self.classes
        """Sizes for the kernels that multiply rows with matrices."""
        self.scaled, self.cuts = sizes.scaled, cuts_of(sizes)
        self.blocks = self.depth**2 // (self.tile * self.scaled)
        self.whole = sizes.kind == "hopper" and self.depth <= WHOLE_DEPTH

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
        high = like.new_empty((count, self.depth, self.depth), dtype=self.stored)
        low = high.new_empty(high.shape if self.split else 0)
        scales = self.blocks if self.wide else self.depth
        return Matrices(high, low, like.new_empty((count, scales), dtype=self.dtype))

    def sort(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        eps: float,
    ) -> tuple[SortedRows, Tensor | None]:
        """Rows in class order, and how many columns stand before each in a joint batch."""
        every, n, new = self.n, len(embeddings), embeddings.new_empty
        m, ref_order, before, ref_strides = 0, None, None, [0, 0]
        labels, order = labels.sort(stable=True)
        if ref_emb is not None and ref_labels is not None:
            ref_labels, ref_order = ref_labels.sort(stable=True)
            before = new(every + 1, dtype=torch.int32)
            m, ref_strides = len(ref_emb), list(ref_emb.stride())
        high = new((every, self.depth), dtype=self.stored)
        batch = SortedRows(
            high,
            high.new_empty(high.shape if self.split else 0),
            new(every, dtype=self.dtype),
            order if ref_emb is None else new(every, dtype=torch.int64),
            new(every, dtype=torch.int32),
            new(every, dtype=torch.int32),
        )
        width = self.tile if self.wide else self.depth
        cut = SPLIT_ROWS._replace(rows=max(1, SPLIT_ROWS.rows * 128 // width))
        self.kernels.split_rows[(-(-n // cut.rows) - (-m // cut.rows),)](
            embeddings, labels, ref_emb, ref_labels, ref_order, batch, order, before,
            n, m, self.d, *embeddings.stride(), *ref_strides, eps * eps, max(n, m).bit_length(),
            WIDTH=width, **self.options(cut),
        )  # fmt: skip
        return batch, before

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


def launcher_of(embeddings: Tensor, m: int | None, dtype: torch.dtype, split: bool) -> Launcher:
    """A launcher for these rows, and m other columns where there are some."""
    n, d = embeddings.shape
    sizes = Sizes(n, m, d, dtype == torch.float64, gpu.USUAL_PROCESSORS)
    return Launcher(sizes_here(sizes, embeddings.device), split)


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, tuple[Tensor, ...]]:
    """The loss, the two means of Eq. 3, and the tensors of `KeptMoments`.

    In T_c of a joint batch a column weighs 1 and a row 0; in A_c a column weighs 0 and row i a_i.
    """
    n, m, dtype = len(embeddings), None, embeddings.dtype
    embeddings, labels = in_memory(embeddings), in_memory(labels)
    if ref_emb is not None and ref_labels is not None:
        ref_emb, ref_labels = in_memory(ref_emb), in_memory(ref_labels)
        m, dtype = len(ref_emb), torch.promote_types(dtype, ref_emb.dtype)
    launcher = launcher_of(embeddings, m, dtype, splits(dtype))
    new = partial(embeddings.new_empty, dtype=launcher.dtype)
    with gpu.current(embeddings):
        batch, before = launcher.sort(embeddings, labels, ref_emb, ref_labels, spec.eps)
        sums = launcher.sums(batch, before, None, uniform=True, by_q=False)
        own = launcher.matrices(embeddings, launcher.classes)
        others = launcher.matrices(embeddings, launcher.classes + 1)
        launcher.make_matrices("moment_matrices", sums, batch, own, others, *launcher.of_runs)
        in_band = new(launcher.n)
        launcher.kernels.band_sums[launcher.runs, launcher.band_parts(launcher.cuts.band_sums)](
            batch, before, sums.small_rows, in_band, *launcher.of_runs,
            BLOCK_D=min(launcher.scaled, launcher.cuts.band_sums.depth),
            **launcher.options(launcher.cuts.band_sums),
        )  # fmt: skip
        rows = Rows(new(n), new(n))
        by_row = spec.reduction == "none"
        cut = launcher.cuts.row_means
        losses = new(n if by_row else launcher.row_programs(cut))
        flag = torch.bool if by_row else flag_dtype(launcher.dtype)
        active = new(n if by_row else launcher.n, dtype=flag)
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
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    tensors: tuple[Tensor, ...],
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(embeddings), and dL/d(ref_emb) where there is one; tensors: those of `KeptMoments`."""
    n, d = embeddings.shape
    grad_loss = in_memory(grad_loss)
    batch, is_active, own, others, before = KeptMoments.of(tensors)
    every, joint, split = len(batch.order), ref_emb is not None, batch.low.numel() > 0
    launcher = launcher_of(embeddings, every - n if joint else None, batch.inverse.dtype, split)
    uniform, scale = spec.reduction != "none", 1.0
    if uniform:
        weights = Weights(is_active, grad_loss)
        scale = 1 / n if spec.reduction == "mean" else 1.0
    else:
        of_rows = torch.where(is_active, grad_loss.to(launcher.dtype), 0.0)
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
        gradient = embeddings.new_empty((every, d), dtype=launcher.dtype)
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
    sizes = sizes_of(work)
    n, d, joint, wide, least = work.vectors, sizes.depth, sizes.joint, sizes.wide, sizes.least
    class_sizes = [s * n // work.columns for s in class_sizes]  # with as large a share of rows
    symmetric, each = 2 * sizes.numbers, 2 * d * d  # FLOPs; wide forms stop at the diagonal
    products = 3 if splits(work.dtype) else 1
    large = [s for s in class_sizes if s >= least]
    small = n - sum(large)
    number = _stored_bytes(work.dtype)
    stored, matrix = n * d * number, d * d * number
    slots = (sizes.runs + len(large)) * sizes.numbers * work.accumulated
    totals = 2 * sizes.runs * sizes.numbers * 8  # written and read
    cuts = cuts_of(sizes)
    slices = 1 if wide else -(-d // cuts.band_gradient.depth)  # each forms S anew
    in_band = _band_pairs(class_sizes, least, cuts.band_sums.rows)
    whole = not wide or d == sizes.tile  # a row is held at once
    scalar = work.reduction != "none"
    forms = (2 * sum(large) + small) * work.n // n  # of rows alone; moments meet both sides
    flops = products * (symmetric * (n + forms) + 2 * d * in_band)
    bytes_ = (
        work.embedding_bytes * (1 if whole else 2) + stored  # split
        + (1 if joint else 2) * stored  # sums of columns, forms of rows
        + 2 * slots + totals + 2 * (2 * len(large) + 1) * matrix
        + n * _ROW_BYTES
    )  # fmt: skip
    launches = (8 if scalar else 7) + joint
    memory = _extra_memory(work)
    if not work.wants_gradient:
        return Cost(flops, bytes_, launches, memory, SCHEDULE)
    of_large, of_small = 1 if scalar or joint else 2, 1 if joint else 2
    made = each * (of_large * sum(large) + of_small * small)
    flops += products * (symmetric * n + made + 2 * d * (slices + 1) * in_band)
    bytes_ += stored * work.n // n + stored  # sums of rows, then all
    bytes_ += 2 * slots + totals + 2 * (4 * len(large) + 2) * matrix
    bytes_ += work.gradient_bytes * (1 if whole else 3)  # v, before it is projected
    bytes_ += n * _ROW_BYTES_BACK + 3 * work.cast_bytes
    launches += (5 if scalar else 8) + len(work.narrow_sides)
    return Cost(flops, bytes_, launches, memory, SCHEDULE)


_ROW_BYTES = 72  # labels, sorted labels, order, first, last, norm, both means
_ROW_BYTES_BACK = 16  # order, norm, active


def _stored_bytes(dtype: torch.dtype) -> int:
    """Bytes of a stored number, in all its parts."""
    return 8 if dtype == torch.float64 else 4 if splits(dtype) else 2


def _band_pairs(class_sizes: Sequence[int], least: int, block: int) -> int:
    """Pairs that the band multiplies, in whole blocks.

    A row of a class of s members meets s columns and, on average, one and a half blocks more:
    blocks are whole, and at a class's ends they hold neighbours too. It meets two blocks at least.
    """
    return sum(s * max(2 * block, s + 3 * block // 2) for s in class_sizes if 1 < s < least)


def _extra_memory(work: Work) -> int:
    """The gradient included.

    The rows in parts and the forward's matrices are there throughout. Beside them the backward
    first holds slots with totals or with its own matrices, then these matrices with the gradient,
    at last the gradient in two dtypes.
    """
    sizes = sizes_of(work)
    if torch.cuda.is_available():
        sizes = sizes_here(sizes, torch.device("cuda"))
    n, d, number, of_sum = sizes.every, sizes.depth, _stored_bytes(work.dtype), work.accumulated
    runs, classes, scales = sizes.runs, sizes.classes, of_sum * d
    kept = n * (d * number + 17 + 3 * of_sum)  # order, first, last, active; norm, both means
    kept += n * of_sum * (2 if work.reduction == "none" else 0) + 4 * n * sizes.joint
    slots, total = (runs + classes) * sizes.numbers * of_sum, sizes.numbers * 8
    matrices, made = ((2 * classes + extra) * (d * d * number + scales) for extra in (1, 2))
    forward = slots + total + max(runs * total, matrices + of_sum * n)
    if not work.wants_gradient:
        return kept + forward
    of_gradient = work.gradient_bytes + max(made, work.cast_bytes)
    backward = max(slots + total + max(runs * total, made), of_gradient)
    return kept + max(forward, matrices + backward)
