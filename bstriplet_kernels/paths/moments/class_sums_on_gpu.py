"""similarity="linear" on a GPU in Triton: eleven launches for any labels, twelve with ref_emb.

The mathematics is that of `class_sums`. Here the host does not ask how many classes there are: a
class's sum stands at its first row in class order, in a table of as many rows as there are labels.
Rows are never copied, neither into class order nor to another dtype. Sums are in float64 and have a
fixed order, so the bits are the same from run to run.

The forward sorts each side by label, adds up classes of columns (`class_sums`, `add_class_parts`,
`add_class_totals`) and takes the means. The backward adds up weighted rows by the same three
kernels. All are bound by memory: the embeddings are read four times, and the gradient is written.
Norms take a pass of their own with ref_emb, and where D is above `WIDEST`; there the gradient takes
two. The kernels are in `class_sum_kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import in_memory
from ...cost import Cost, Work, round_up
from ...spec import Rows, Spec, accumulation_dtype
from .. import gpu

SCHEDULE = "class sums triton"
MOST_ROWS, MOST_COLUMNS = 1 << 30, 1 << 20
"""The sum of two row numbers must fit 32 bits, and a grid's second side has 16."""
WIDEST = 2048
"""The most columns of a block: the largest D at which a program holds whole rows."""
FOUND = 128
"""Rows whose classes a program finds."""
SUMMED = 8
"""Rows that a program of `class_sums` reads at once."""
ADDED, ADDED_RUNS = 32, 64
"""Columns that a program has that adds up runs, and runs that it reads at once."""
_NARROWEST = 16  # columns of a block
_BLOCK_BYTES = 1 << 13  # of a block of rows in the accumulation dtype: 16 registers a thread
_WARPS = 4  # of all kernels but `class_sums`
_SUM_WARPS, _SUM_BLOCKS = 16, 4  # warps a processor, of 128 registers; blocks of the shortest run
_ROW_PROGRAMS = 64  # a processor: many, so that the last ones to end are short


def takes(work: Work, device: torch.device | None) -> bool:
    """Whether the kernels serve this work on a device; None stands for the usual GPU."""
    fits = work.vectors <= MOST_ROWS and work.d <= MOST_COLUMNS
    return fits and gpu.runs_triton(work.device, device)


@functools.cache
def kernels() -> ModuleType:
    """`class_sum_kernels`, imported when its first kernel runs."""
    from . import class_sum_kernels

    return class_sum_kernels


def block_columns(d: int) -> int:
    """Columns of a block: a power of two, at least D where it can be."""
    return min(WIDEST, max(_NARROWEST, 1 << (d - 1).bit_length()))


def block_rows(d: int, number: int) -> int:
    """Rows of a block; number: bytes of a number in the accumulation dtype."""
    return min(FOUND, max(1, _BLOCK_BYTES // (number * block_columns(d))))


def sum_warps(d: int) -> int:
    """Warps of a program of `class_sums`: four columns a thread, eight of the widest rows."""
    return min(8, max(1, block_columns(d) // 128))


def sum_run(n: int, d: int, processors: int) -> int:
    """Rows of a run of `class_sums`; up to D = `WIDEST` all runs are at work at the same time."""
    programs = processors * _SUM_WARPS // sum_warps(d)
    return round_up(max(-(-n // programs), SUMMED * _SUM_BLOCKS), SUMMED)


def row_run(n: int, rows: int, processors: int) -> int:
    """Rows of a run of `linear_means` and of `linear_gradients`; rows: those of a block."""
    return round_up(-(-n // (processors * _ROW_PROGRAMS)), rows)


def sums_find_norms(d: int, joint: bool) -> bool:
    """Whether `class_sums` finds the norms, as it holds whole rows and sums up all of them."""
    return d <= WIDEST and not joint


class ClassOrder(NamedTuple):
    """Rows or columns in class order. Without ref_emb the other side is the same one.

    order: int64, the row's index in its tensor. inverse: 1 / norm. first, last: int32, where the
    row's class begins and ends on its side. other_first, other_last: the same on the other side;
    equal where the class has no row there.
    """

    order: Tensor
    inverse: Tensor
    first: Tensor
    last: Tensor
    other_first: Tensor
    other_last: Tensor


class Sums(NamedTuple):
    """What runs of rows add up to, in float64.

    partials: [runs, 2, D], of the class that began before the run and of the one that goes on after
    it. totals: [runs, D], of the classes that begin in the run, without the middle one.
    """

    partials: Tensor
    totals: Tensor


class Weights(NamedTuple):
    """a_i = dL/dl_i [h_i > 0] of each row.

    is_active: bool [N], whether h_i > 0, in class order. upstream: dL/dl_i [N] in the given order,
    or dL/dL, a scalar.
    """

    is_active: Tensor
    upstream: Tensor

    @property
    def stride(self) -> int:
        """From one row's upstream to the next; 0 for the one of a scalar loss."""
        return self.upstream.stride(0) if self.upstream.dim() else 0


class KeptSums(NamedTuple):
    """What `backward` needs of the forward.

    table: the sums of classes of columns, each at its first row. total: [2, D], their sum without
    the middle class, then with it: see `class_sum_kernels`.
    """

    rows: ClassOrder
    columns: ClassOrder
    is_active: Tensor
    table: Tensor
    total: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in order, but no tensor twice."""
        own = self.columns is self.rows
        sides = self.rows[:4] if own else (*self.rows, *self.columns)
        return (*sides, self.is_active, self.table, self.total)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> KeptSums:
        """From such tensors."""
        *sides, is_active, table, total = tensors
        if len(sides) > 4:
            return cls(ClassOrder(*sides[:6]), ClassOrder(*sides[6:]), is_active, table, total)
        rows = ClassOrder(*sides, *sides[2:])
        return cls(rows, rows, is_active, table, total)


class Launcher:
    """Launches the kernels on n rows and m columns, with the sizes that they share."""

    def __init__(self, embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> None:
        self.embeddings = in_memory(embeddings)
        self.ref_emb = None if ref_emb is None else in_memory(ref_emb)
        self.other = self.embeddings if self.ref_emb is None else self.ref_emb
        (self.n, self.d), self.m, self.spec = embeddings.shape, len(self.other), spec
        self.dtype = accumulation_dtype(self.embeddings, self.other)
        self.processors = gpu.processors(embeddings.device)
        self.strides = *self.embeddings.stride(), *self.other.stride()
        self.blocks = {
            "ROWS": block_rows(self.d, self.dtype.itemsize),
            "BLOCK_D": block_columns(self.d),
            "num_warps": _WARPS,
        }
        self.run = row_run(max(self.n, self.m), self.blocks["ROWS"], self.processors)
        self.scale = 1 / self.n if spec.reduction == "mean" else 1.0

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor, in the accumulation dtype where none is given."""
        return self.embeddings.new_empty(shape, dtype=dtype or self.dtype)

    def programs(self, rows: int) -> int:
        """How many programs that many rows or columns have, one for each run."""
        return -(-rows // self.run)

    def sort(self, labels: Tensor, ref_labels: Tensor | None) -> tuple[ClassOrder, ClassOrder]:
        """Rows and columns in class order, the same one without ref_emb."""
        joint = ref_labels is not None
        labels, rows = self._sort(labels, joint)
        programs, columns = -(-self.n // FOUND), rows
        if ref_labels is not None:
            ref_labels, columns = self._sort(ref_labels, joint)
            programs += -(-self.m // FOUND)
        kernels().find_classes[(programs,)](
            self.embeddings, self.ref_emb, rows, columns, labels, ref_labels,
            self.n, self.m, self.d, *self.strides, self.spec.eps * self.spec.eps,
            max(self.n, self.m).bit_length(),
            BLOCK=FOUND, NORMS=not sums_find_norms(self.d, joint), **self.blocks,
        )  # fmt: skip
        return rows, columns

    def _sort(self, labels: Tensor, joint: bool) -> tuple[Tensor, ClassOrder]:
        labels, order = in_memory(labels).sort(stable=True)
        n, ends = len(order), 4 if joint else 2
        bounds = [self.new(n, dtype=torch.int32) for _ in range(ends)]
        return labels, ClassOrder(order, self.new(n), *bounds, *(() if joint else bounds))

    def sums(
        self, rows: ClassOrder, columns: ClassOrder, weights: Weights | None = None
    ) -> tuple[Tensor, Tensor]:
        """Table and total of the sums of columns, or of weighted rows: see `KeptSums`."""
        joint, weighted, d = columns is not rows, weights is not None, self.d
        if weighted:
            side, embeddings, strides = rows, self.embeddings, self.strides[:2]
            middle = columns.other_first, columns.other_last
        else:
            side, embeddings, strides = columns, self.other, self.strides[2:]
            middle = columns.first, columns.last
        n = len(side.order)
        run = sum_run(n, d, self.processors)
        runs, sizes = -(-n // run), (n, self.m, run, d)
        table, total = self.new(n, d), self.new(2, d)
        sums = Sums(*(self.new(runs, *shape, dtype=torch.float64) for shape in ((2, d), (d,))))
        width, slices = self.blocks["BLOCK_D"], -(-d // ADDED)
        kernels().class_sums[runs, -(-d // width)](
            embeddings, side, weights, *middle, table, sums, *sizes, *strides,
            0 if weights is None else weights.stride, self.spec.eps * self.spec.eps, self.scale,
            ROWS=SUMMED, BLOCK_D=width, NORMS=not weighted and sums_find_norms(d, joint),
            num_warps=sum_warps(d),
        )  # fmt: skip
        shape = {"BY_Q": weighted, "BLOCK": ADDED, "DEPTH": ADDED_RUNS, "num_warps": _WARPS}
        kernels().add_class_parts[runs, slices](side, *middle, table, sums, *sizes, **shape)
        kernels().add_class_totals[(slices,)](
            sums, columns, *middle, table, total, self.m, runs, d, **shape
        )
        return table, total


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, tuple[Tensor, ...]]:
    """The loss, the two means of Eq. 3, and the tensors of `KeptSums`."""
    with gpu.current(embeddings):
        launcher = Launcher(embeddings, ref_emb, spec)
        new, n, programs = launcher.new, launcher.n, launcher.programs(launcher.n)
        rows, columns = launcher.sort(labels, ref_labels)
        table, total = launcher.sums(rows, columns)
        by_row = spec.reduction == "none"
        means, losses = Rows(new(n), new(n)), new(n if by_row else programs)
        is_active = new(n, dtype=torch.bool)
        kernels().linear_means[(programs,)](
            launcher.embeddings, rows, columns, table, total, is_active, means, losses,
            n, launcher.m, launcher.run, launcher.d, *launcher.strides[:2],
            spec.margin, spec.sigma, launcher.scale,
            OWN=ref_emb is None, BY_ROW=by_row, **launcher.blocks,
        )  # fmt: skip
    kept = KeptSums(rows, columns, is_active, table, total)
    return losses if by_row else losses.sum(), means, kept.tensors


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    tensors: tuple[Tensor, ...],
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(embeddings), and dL/d(ref_emb) where there is one; tensors: those of `KeptSums`."""
    rows, columns, is_active, table, total = KeptSums.of(tensors)
    weights = Weights(is_active, in_memory(grad_loss))
    with gpu.current(embeddings):
        launcher = Launcher(embeddings, ref_emb, spec)
        back, back_total = launcher.sums(rows, columns, weights)
        n, m, d = launcher.n, launcher.m, launcher.d
        gradient, programs, ref_gradient = launcher.new(n, d), launcher.programs(n), None
        if ref_emb is not None:
            ref_gradient = launcher.new(m, d)
            programs += launcher.programs(m)
        kernels().linear_gradients[(programs,)](
            launcher.embeddings, launcher.ref_emb, rows, columns, weights, table, total,
            back, back_total, gradient, ref_gradient,
            n, m, launcher.run, d, *launcher.strides, weights.stride,
            spec.sigma, launcher.scale,
            WHOLE=d <= launcher.blocks["BLOCK_D"], **launcher.blocks,
        )  # fmt: skip
    return gradient, ref_gradient


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """FLOPs: a few for each number of the embeddings, and of the sums of classes. Bytes: all that
    is read and written. A kernel that reads a class's sum for each row counts it once, as caches
    serve the other rows. Launches: a sort counts as one. Memory is the same for any classes.
    """
    n, columns, vectors, d, number = work.n, work.columns, work.vectors, work.d, work.accumulated
    joint, by_row = work.m is not None, work.reduction == "none"
    row, of_classes = d * work.dtype.itemsize, len(class_sizes) * d
    ends = 16 if joint else 8  # where classes begin and end
    flops = d * (2 * vectors + 2 * columns + (6 if joint else 7) * n) + of_classes
    bytes_ = vectors * (24 + 8 + ends)  # sorting labels and finding classes
    if not sums_find_norms(d, joint):
        bytes_ += vectors * (8 + row + number)
    bytes_ += columns * (16 + number + row) + _bytes_of_runs(work, columns)
    bytes_ += n * (17 + (4 if by_row else 3) * number + row) + 2 * of_classes * number
    launches = (8 if joint else 7) - by_row
    if work.wants_gradient:
        upstream = number if by_row else 0
        flops += d * (3 * n + (11 * vectors if joint else 17 * n)) + 2 * of_classes
        bytes_ += n * (17 + number + upstream + row) + _bytes_of_runs(work, n)
        reads = 1 if d <= WIDEST else 2
        bytes_ += vectors * (8 + ends + number + reads * row) + n * (1 + upstream)
        bytes_ += 3 * of_classes * number + work.gradient_bytes + 3 * work.cast_bytes
        launches += 4 + len(work.narrow_sides)
    return Cost(flops, bytes_, launches, _extra_memory(work), SCHEDULE)


def _runs(work: Work, rows: int, processors: int) -> int:
    """How many runs of `class_sums` that many rows have."""
    return -(-rows // sum_run(rows, work.d, processors))


def _bytes_of_runs(work: Work, rows: int) -> int:
    """What runs add up to, a total and one part of a class that is in several; written and read.

    On the usual GPU.
    """
    return 2 * 2 * 8 * _runs(work, rows, gpu.USUAL_PROCESSORS) * work.d


def _extra_memory(work: Work) -> int:
    """The gradient included.

    Vectors and the columns' table are there throughout. Beside them the forward sorts, adds up
    runs, then takes means; the backward has the rows' table, with what runs add up to or with the
    gradient, at last the gradient in two dtypes.
    """
    n, columns, vectors, d, number = work.n, work.columns, work.vectors, work.d, work.accumulated
    joint, by_row = work.m is not None, work.reduction == "none"
    on_gpu = torch.cuda.is_available()
    processors = gpu.processors(torch.device("cuda")) if on_gpu else gpu.USUAL_PROCESSORS
    sides = vectors * (8 + number + (16 if joint else 8))
    of_rows = n * (1 + (3 if by_row else 2) * number)  # both means, whether h > 0, losses
    table, runs = columns * d * number, 24 * d * _runs(work, columns, processors)
    forward = sides + max(8 * vectors, table + runs, table + of_rows)
    if not work.wants_gradient:
        return forward
    of_rows += n * number if by_row else 0  # what comes from upstream
    back, back_runs = n * d * number, 24 * d * _runs(work, n, processors)
    backward = max(
        back + max(back_runs, work.gradient_bytes), work.gradient_bytes + work.cast_bytes
    )
    return max(forward, sides + table + of_rows + backward)
