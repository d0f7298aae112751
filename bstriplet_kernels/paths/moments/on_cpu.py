"""Second moments on the CPU in plain torch, class by class.

Rows and columns are sorted by class, and classes by size. Consecutive classes form a run: either
one large class, served by its moment matrix, or small classes of equal size, served by their blocks
of S in one batched product. Each row also meets the moments of all other classes. Rows stream
through panels that stay in cache. Beyond the inputs and the gradient, memory is O(N) and the moment
matrices of large classes: at most as much as the embeddings, half of that at D <= 128.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...cost import Cost, Work
from ...spec import Rows, accumulation_dtype, denormalise_gradient
from .mathematics import (
    add_moment,
    class_weights,
    form_fraction,
    half_matrices,
    inverse_norms,
    mirror,
    moment_fraction,
    others_share,
    own_share,
    product_flops,
    quadratic_forms,
    split_sizes,
    traffic,
)

SCHEDULE = "gram torch"
"""Its name in `CONSTANTS`, where nobody has measured it yet; "gram" there is `on_cpu_native`."""
PANEL_BYTES = 1 << 20  # of unit rows, which stay in the second-level cache with their products
BLOCK_PRODUCTS = 3  # of the members of a small class: S forward, S and its weights backward
SMALLEST_MOMENT = 256  # below it a block costs less than the operator calls for a matrix


class ClassRun(NamedTuple):
    """Consecutive classes, in class order: `classes` of them, each with n rows and m columns.

    row, column: the first ones. p, q: weights of Eq. 3 for a row. slot: the number of the moment
    matrix of the one class, or None for blocks.
    """

    row: int
    n: int
    column: int
    m: int
    classes: int
    p: float
    q: float
    slot: int | None

    def swapped(self) -> ClassRun:
        """The run with its rows and columns exchanged."""
        return self._replace(row=self.column, n=self.m, column=self.row, m=self.n)


class SortedSide(NamedTuple):
    """Embeddings [N, D] in class order: row k of the side is embeddings[order[k]].

    inverse: 1 / norm in class order, in the accumulation dtype.
    """

    embeddings: Tensor
    order: Tensor
    inverse: Tensor

    def units(self, start: int, stop: int) -> Tensor:
        """Unit rows [stop - start, D], a fresh tensor."""
        rows = self.embeddings.index_select(0, self.order[start:stop])
        return rows.to(self.inverse.dtype).mul_(self.inverse[start:stop, None])

    def panels(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows from start to stop, each a panel."""
        step = panel_rows(self.embeddings.shape[1])
        return ((k, min(k + step, stop)) for k in range(start, stop, step))


class Moments(NamedTuple):
    """Moment matrices of the columns in the accumulation dtype.

    small: [2, D, D], the sum of T_c over the classes without a slot, and of q_c T_c.
    slots: [S, D, D], T_c of the classes that have a slot, in class order.
    """

    small: Tensor
    slots: Tensor


def panel_rows(d: int) -> int:
    """How many rows of D numbers a panel has."""
    return max(256, PANEL_BYTES // (4 * d))


def smallest_moment(d: int) -> int:
    """How many columns a class must have for a moment matrix to cost less than its block."""
    return max(d, SMALLEST_MOMENT)


def class_order(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(order [N] of the rows, order [M] of the columns, table [K, 3]); int64.

    A line (n, m, k) of the table says that the next k classes have n rows and m columns each.
    Classes are sorted by m, then n; within a class, rows keep their order.
    """
    sorted_rows, row_order = labels.sort(stable=True)
    if ref_labels is None:
        n = m = torch.unique_consecutive(sorted_rows, return_counts=True)[1]
    else:
        sorted_columns, column_order = ref_labels.sort(stable=True)
        values = torch.unique(torch.cat((sorted_rows, sorted_columns)))
        n, m = (
            torch.searchsorted(s, values, right=True) - torch.searchsorted(s, values)
            for s in (sorted_rows, sorted_columns)
        )
    by_size = n.argsort(stable=True)
    by_size = by_size[m[by_size].argsort(stable=True)]
    row_order = reorder_classes(row_order, n, by_size)
    column_order = row_order if ref_labels is None else reorder_classes(column_order, m, by_size)
    sizes = torch.stack((n[by_size], m[by_size]), dim=1)
    sizes, k = torch.unique_consecutive(sizes, dim=0, return_counts=True)
    return row_order, column_order, torch.cat((sizes, k[:, None]), dim=1)


def reorder_classes(order: Tensor, sizes: Tensor, classes: Tensor) -> Tensor:
    """`order` [N] with its segments, of `sizes` [C], in the order `classes` [C]."""
    starts, moved = sizes.cumsum(0) - sizes, sizes[classes]
    shift = starts[classes] - (moved.cumsum(0) - moved)
    positions = torch.repeat_interleave(shift, moved, output_size=len(order))
    return order[positions.add_(torch.arange(len(order)))]


def make_runs(table: Tensor, d: int, own: bool) -> list[ClassRun]:
    """The runs of a class table.

    A class with most of the columns always has a slot: T - T_c would cancel for it, so the others
    are summed without it.
    """
    columns = int((table[:, 1] * table[:, 2]).sum())
    p, q = (w.tolist() for w in class_weights(table[:, 1], columns, own))
    runs, row, column, slot = [], 0, 0, 0
    for i, (n, m, k) in enumerate(table.tolist()):
        has_slot = m >= smallest_moment(d) or 2 * m > columns
        for _ in range(k if has_slot else 1):
            classes = 1 if has_slot else k
            runs.append(
                ClassRun(row, n, column, m, classes, p[i], q[i], slot if has_slot else None)
            )
            row, column, slot = row + n * classes, column + m * classes, slot + has_slot
    return runs


def means(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    eps: float,
) -> tuple[Rows, tuple[Tensor, ...]]:
    """The two means of Eq. 3, and what `gradients` needs."""
    own = ref_emb is None
    row_order, column_order, table = class_order(labels, ref_labels)
    if ref_emb is None:
        dtype = accumulation_dtype(embeddings)
        rows = columns = make_side(embeddings, row_order, eps, dtype)
        sides: tuple[SortedSide, ...] = (rows,)
    else:
        dtype = accumulation_dtype(embeddings, ref_emb)
        rows = make_side(embeddings, row_order, eps, dtype)
        columns = make_side(ref_emb, column_order, eps, dtype)
        sides = (rows, columns)
    runs = make_runs(table, embeddings.shape[1], own)
    moments = column_moments(columns, runs)
    kept = (table, *moments, *(t for side in sides for t in (side.order, side.inverse)))
    return means_by_runs(rows, columns, runs, moments, own), kept


def make_side(embeddings: Tensor, order: Tensor, eps: float, dtype: torch.dtype) -> SortedSide:
    """The side of these embeddings in this order."""
    return SortedSide(embeddings, order, inverse_norms(embeddings, eps, dtype)[order])


def column_moments(columns: SortedSide, runs: list[ClassRun]) -> Moments:
    """T_c of each class with a slot; over the other classes, the sums of T_c and of q_c T_c."""
    d = columns.embeddings.shape[1]
    small = torch.zeros(2, d, d, dtype=torch.float64)
    slots = columns.inverse.new_empty(sum(run.slot is not None for run in runs), d, d)
    for run in runs:
        moment = range_moment(columns, run.column, run.column + run.m * run.classes)
        if run.slot is not None:
            slots[run.slot] = moment
        else:
            small[0].add_(moment)
            small[1].add_(moment, alpha=run.q)
    return Moments(small.to(slots.dtype), slots)


def range_moment(side: SortedSide, start: int, stop: int, weights: Tensor | None = None) -> Tensor:
    """sum_j w_j u_j u_j^T over a range of a side, [D, D]; weights [N] None: ones.

    Panels are multiplied in the accumulation dtype. Several are added up in float64, the result's
    dtype then, so that the error does not grow with their number.
    """
    d = side.embeddings.shape[1]
    several = stop - start > panel_rows(d)
    total = torch.zeros(d, d, dtype=torch.float64 if several else side.inverse.dtype)
    for a, b in side.panels(start, stop):
        unit = side.units(a, b)
        add_moment(total, unit if weights is None else unit * weights[a:b, None], unit)
    return mirror(total)


class Complements:
    """Sums of matrices over all classes but one, without cancellation, in the dtype of `small`.

    rest: the sum without the dominating class, the one with most of the columns. total: with it.
    Subtracting any other class from the total takes away no more than stays.
    """

    def __init__(
        self, small: Tensor, slots: list[tuple[Tensor, float]], dominating: int | None
    ) -> None:
        rest = small.to(torch.float64, copy=True)
        for slot, (matrix, scale) in enumerate(slots):
            if slot != dominating:
                rest.add_(matrix, alpha=scale)
        self.dominating = dominating
        self.rest = self.total = rest.to(small.dtype)
        if dominating is not None:
            matrix, scale = slots[dominating]
            self.total = rest.add(matrix, alpha=scale).to(small.dtype)

    def without(self, slot: int, matrix: Tensor, scale: float = 1.0) -> Tensor:
        """The sum over all classes but that of a slot, whose addend is matrix times scale."""
        if slot == self.dominating:
            return self.rest
        return torch.sub(self.total, matrix, alpha=scale)


def dominating_slot(runs: list[ClassRun], columns: int) -> int | None:
    """The slot of the class with more than half of the columns, if there is one."""
    return next((r.slot for r in runs if 2 * r.m > columns), None)


def means_by_runs(
    rows: SortedSide, columns: SortedSide, runs: list[ClassRun], moments: Moments, own: bool
) -> Rows:
    """The two means of Eq. 3 for each row, in the rows' given order."""
    dtype = rows.inverse.dtype
    complements = moment_complements(moments, runs, len(columns.order))
    total = half_matrices((complements.total,), len(rows.order))
    positive, negative = torch.empty_like(rows.inverse), torch.empty_like(rows.inverse)
    self_sums = (rows.inverse != 0).to(dtype) if own else torch.zeros_like(rows.inverse)  # |u|^4
    for run in runs:
        if run.slot is None:
            for tile in tiles(run, rows, columns):
                own_sums = block_sums(tile, columns, own)
                all_sums = quadratic_forms(tile.unit, total, 1)[:, 0]
                positive[tile.rows] = run.p * own_sums
                negative[tile.rows] = run.q * (all_sums - own_sums - self_sums[tile.rows])
            continue
        matrix = moments.slots[run.slot]
        pair = half_matrices((matrix, complements.without(run.slot, matrix)), run.n)
        for tile in tiles(run, rows, columns):
            own_sums, other_sums = quadratic_forms(tile.unit, pair, 2).unbind(1)
            positive[tile.rows] = run.p * (own_sums - self_sums[tile.rows])
            negative[tile.rows] = run.q * other_sums
    return Rows(*(torch.empty_like(t).index_copy_(0, rows.order, t) for t in (positive, negative)))


class Tile(NamedTuple):
    """Rows of whole classes of a run, or of a part of one class.

    unit: unit rows [classes * n, D]. rows: their range. column: the first column of the first
    class. m: columns of each class.
    """

    unit: Tensor
    rows: slice
    classes: int
    column: int
    m: int


def tiles(run: ClassRun, rows: SortedSide, columns: SortedSide) -> Iterator[Tile]:
    """The rows of a run, as many whole classes at once as fit a panel."""
    count = max(1, panel_rows(rows.embeddings.shape[1]) // max(run.n, run.m))
    for first in range(0, run.classes, count):
        classes = min(count, run.classes - first)
        start = run.row + first * run.n
        for a, b in rows.panels(start, start + classes * run.n):
            column = run.column + first * run.m
            yield Tile(rows.units(a, b), slice(a, b), classes, column, run.m)


def column_blocks(tile: Tile, columns: SortedSide, own: bool) -> Iterator[tuple[slice, Tensor]]:
    """The columns of a tile's classes by panels: (their range, unit rows [classes, m, D]).

    There are several panels only where the tile has a single class. There is none where a class has
    no columns, or only the row itself.
    """
    if tile.m <= own:
        return
    for a, b in columns.panels(tile.column, tile.column + tile.classes * tile.m):
        shared = own and tile.rows == slice(a, b)
        unit = tile.unit if shared else columns.units(a, b)
        yield slice(a, b), unit.unflatten(0, (tile.classes, -1))


def block_sums(tile: Tile, columns: SortedSide, own: bool) -> Tensor:
    """[rows]: sum of s_ij^2 over the columns j of row i's class, without the row itself."""
    unit = tile.unit.unflatten(0, (tile.classes, -1))
    sums = unit.new_zeros(unit.shape[:2])
    for at, members in column_blocks(tile, columns, own):
        similarity = unit @ members.mT
        if own and at == tile.rows:
            similarity.diagonal(dim1=1, dim2=2).zero_()
        sums += similarity.square_().sum(2)
    return sums.flatten()


def moment_complements(moments: Moments, runs: list[ClassRun], columns: int) -> Complements:
    """Sums of T_c over all classes but one."""
    used = [(moments.slots[run.slot], 1.0) for run in runs if run.slot is not None]
    return Complements(moments.small[0], used, dominating_slot(runs, columns))


def gradients(
    a: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    kept: tuple[Tensor, ...],
    sigma: float,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(embeddings), and dL/d(ref_emb) where given, for a = dL/dl [h > 0], [N]."""
    own = ref_emb is None
    table, small, slots, *orders = kept
    moments = Moments(small, slots)
    rows = SortedSide(embeddings, *orders[:2])
    columns = rows if ref_emb is None else SortedSide(ref_emb, *orders[2:])
    runs = make_runs(table, embeddings.shape[1], own)
    a = a[rows.order]
    of_columns = moment_complements(moments, runs, len(columns.order))
    served = weighted_moments(rows, a, runs, moments if own else None)
    qs = [run.q for run in runs if run.slot is not None]
    weighted = [(m, q * scale) for q, (m, scale) in zip(qs, served.slots, strict=True)]
    of_rows = Complements(served.small, weighted, dominating_slot(runs, len(columns.order)))

    def row_share(run: ClassRun) -> Tensor:
        if run.slot is None:
            return 2 * sigma * run.q * of_columns.total
        matrix = slots[run.slot]
        return own_share(matrix, of_columns.without(run.slot, matrix), run.p, run.q, sigma)

    def column_share(run: ClassRun) -> Tensor:
        if run.slot is None:
            return 2 * sigma * of_rows.total
        matrix, scale = served.slots[run.slot]
        others = of_rows.without(run.slot, matrix, run.q * scale)
        return others_share(matrix, others, run.p * scale, sigma)

    if own:
        weights = Weights(a, a)
        return side_gradient(rows, rows, runs, weights, row_share, column_share, sigma), None
    swapped = [run.swapped() for run in runs]
    return (
        side_gradient(rows, columns, runs, Weights(a, None), row_share, None, sigma),
        side_gradient(columns, rows, swapped, Weights(None, a), None, column_share, sigma),
    )


class Weighted(NamedTuple):
    """Moment matrices of the rows, weighted with a.

    slots: for each class with a slot (matrix, scale) with A_c = scale * matrix, in class order.
    small: [D, D], the sum of q_c A_c over the other classes.
    """

    small: Tensor
    slots: list[tuple[Tensor, float]]


def weighted_moments(
    rows: SortedSide, a: Tensor, runs: list[ClassRun], moments: Moments | None
) -> Weighted:
    """A_c for a in class order. moments: T_c, where the columns are the rows; else None.

    Where all rows of a class have one weight, A_c is that weight times T_c and costs no product.
    """
    small = torch.zeros(rows.embeddings.shape[1], rows.embeddings.shape[1], dtype=torch.float64)
    slots: list[tuple[Tensor, float]] = []
    blocks = [run for run in runs if run.slot is None]
    level = common_value(a[: sum(run.n * run.classes for run in blocks)])
    if moments is not None and level is not None:
        small.add_(moments.small[1], alpha=level)
        blocks = []
    for run in blocks:
        moment = range_moment(rows, run.row, run.row + run.n * run.classes, a)
        small.add_(moment, alpha=run.q)
    for run in runs:
        if run.slot is None:
            continue
        level = common_value(a[run.row : run.row + run.n])
        if moments is not None and level is not None:
            slots.append((moments.slots[run.slot], level))
        else:
            moment = range_moment(rows, run.row, run.row + run.n, a)
            slots.append((moment.to(a.dtype), 1.0))
    return Weighted(small.to(a.dtype), slots)


def common_value(a: Tensor) -> float | None:
    """The one value of all entries of `a`, or None where they differ; 0 where there are none."""
    if not len(a):
        return 0.0
    low, high = a.aminmax()
    return low.item() if bool(low == high) else None


class Weights(NamedTuple):
    """a in class order, of a side's rows and of the columns that they meet; None: no share.

    w_ij of a pair is the sum of both.
    """

    rows: Tensor | None
    columns: Tensor | None

    def of_pairs(self, rows: slice, columns: slice, classes: int) -> Tensor:
        """The weights of the blocks' pairs, to be broadcast over [classes, n, m]."""
        parts = []
        if self.rows is not None:
            parts.append(self.rows[rows].view(classes, -1, 1))
        if self.columns is not None:
            parts.append(self.columns[columns].view(classes, 1, -1))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


Share = Callable[[ClassRun], Tensor]


def side_gradient(
    rows: SortedSide,
    columns: SortedSide,
    runs: list[ClassRun],
    weights: Weights,
    row_share: Share | None,
    column_share: Share | None,
    sigma: float,
) -> Tensor:
    """dL/d(embeddings of `rows`), [N, D] in the accumulation dtype and given order."""
    gradient = rows.inverse.new_empty(rows.embeddings.shape)
    for run in runs:
        if not run.n:
            continue
        span = slice(run.row, run.row + run.n * run.classes)
        level = 0.0 if weights.rows is None else common_value(weights.rows[span])
        operator = run_operator(run, level, row_share, column_share)
        for tile in tiles(run, rows, columns):
            a = None if level is not None or weights.rows is None else weights.rows[tile.rows]
            v = apply_operator(tile.unit, operator, a)
            if run.slot is None:
                add_blocks(v, tile, columns, weights, -2 * (run.p + sigma * run.q))
            v = denormalise_gradient(v, tile.unit, rows.inverse[tile.rows])
            gradient.index_copy_(0, rows.order[tile.rows], v)
    return gradient


def run_operator(
    run: ClassRun, level: float | None, row_share: Share | None, column_share: Share | None
) -> Tensor:
    """level K + B, [D, D], where all rows of a run weigh level; else K and B, [D, 2 D]."""
    shares = [share(run) for share in (row_share, column_share) if share is not None]
    if level is None:
        return torch.cat(shares, dim=1)
    if row_share is not None:
        shares[0] = level * shares[0]
    return shares[0] if len(shares) == 1 else shares[0] + shares[1]


def apply_operator(unit: Tensor, operator: Tensor, a: Tensor | None) -> Tensor:
    """dL/df^ of rows, [n, D], by what `run_operator` returns: (level K + B) u, or K (a u) + B u."""
    v = unit @ operator
    if a is None:
        return v
    row_share, *column_share = v.split(unit.shape[1], dim=1)
    row_share.mul_(a[:, None])
    return torch.add(row_share, column_share[0]) if column_share else row_share


def add_blocks(v: Tensor, tile: Tile, columns: SortedSide, weights: Weights, scale: float) -> None:
    """v_i += scale * sum of w_ij s_ij u_j over the columns j of row i's class; v is [rows, D]."""
    own = weights.rows is not None and weights.columns is not None
    unit = tile.unit.unflatten(0, (tile.classes, -1))
    target = v.unflatten(0, (tile.classes, -1))
    for at, members in column_blocks(tile, columns, own):
        similarity = (unit @ members.mT).mul_(weights.of_pairs(tile.rows, at, tile.classes))
        target.baddbmm_(similarity, members, alpha=scale)


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """FLOPs of products, where all rows have h > 0, and bytes that cross memory.

    class_sizes: members of each class among the columns; the rows are taken to be shared out alike.
    """
    n, d = max(work.n, work.columns), work.d

    def form(rows: int) -> float:
        return form_fraction(d, rows)

    sizes = split_sizes(class_sizes, n, smallest_moment(d))
    one_weight = work.reduction != "none"
    return Cost(
        flops=product_flops(n, d, *sizes, moment_fraction(d), form, BLOCK_PRODUCTS, one_weight),
        bytes=traffic(n, d, work.dtype.itemsize),
        launches=0,
        extra_memory=_extra_memory(work, class_sizes),
        schedule=SCHEDULE,
    )


def _extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """The gradient included.

    A class whose rows differ in weight needs a matrix A_c. Only the run shows which do: half of the
    large classes are counted, with other columns all of them.
    """
    n, m, d, number = work.n, work.columns, work.d, work.accumulated
    large, small = split_sizes(class_sizes, m, smallest_moment(d))
    if m < n:  # with few columns, classes of as many columns differ in how many rows they have
        small = Counter({size: (count + 1) // 2 for size, count in small.items()})
    longer, shorter = max(n, m), min(n, m)
    panel = panel_rows(d)
    runs = [*large, *(size * count for size, count in small.items())]
    rows = min(panel, max(runs) * longer // m)
    held = 2 if rows >= longer else 3  # unit rows, their products, the previous panel
    blocks = [
        min(panel, size * count * longer // m) * (size * shorter // m)
        for size, count in small.items()
    ]
    block = max(blocks, default=0)  # of S

    sorting = 5 * 8 * work.vectors
    widened = max(n, m) * d * number if work.casts else 0  # half rows, for their norms
    kept = work.vectors * (8 + number) + 4 * n * number
    if work.wants_gradient:
        # T, q T and A of all classes, their complements, a run's operator and its terms
        matrices = 11 if large else 8
        matrices += len(large) if work.m is not None else len(large) // 2  # A_c
        panels = held * rows * d + (2 if work.m is None else 1) * block  # and weights of its size
    else:
        matrices = 7
        panels = (held if large else held - 1) * rows * d + block
    read = rows * d * work.dtype.itemsize if work.casts else 0
    working = ((len(large) + matrices) * d * d + panels) * number + read
    return max(sorting, kept + max(widened, work.gradient_bytes + max(working, work.cast_bytes)))
