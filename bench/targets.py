"""The targets, and what the results say about each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from bstriplet_kernels import plan
from bstriplet_kernels.paths import PATHS

from .cases import DTYPES, Case
from .providers import EMPTY, HALF, MOMENT_PRODUCTS, PAIR_PRODUCTS, SCHEDULE
from .providers import OURS as OURS_GROUP
from .suites import suites
from .table import EAGER, GRAPH, Row

OURS = "auto"
SUITES = ("targets", "sweep")
_NAIVE, _COMPILED = "naive", "compiled naive"


@dataclass(frozen=True)
class Verdict:
    """work and claim in words; the measured figure, None where a row that it needs has no time."""

    work: str
    claim: str
    figure: float | None
    bound: float
    is_ceiling: bool

    @property
    def is_met(self) -> bool | None:
        """None where it was not measured."""
        if self.figure is None:
            return None
        return self.figure <= self.bound if self.is_ceiling else self.figure >= self.bound


@dataclass(frozen=True)
class Results:
    """Rows of one device, found by case and provider."""

    rows: tuple[Row, ...]

    def row(self, case: Case, provider: str, mode: str = EAGER) -> Row | None:
        """The measured row of the first of the suites that hold the targets' work, or None."""
        key = (provider, mode, case.n, case.d, case.c, case.dtype, case.operation)
        for row in self.rows:
            found = (row.provider, row.mode, row.n, row.d, row.c, row.dtype, row.operation)
            if row.suite in SUITES and found == key and row.is_measured:
                return row
        return None

    def ratio(
        self, case: Case, above: Iterable[str], below: str, mode: str = EAGER
    ) -> float | None:
        """Summed time of some providers over the time of one."""
        over = [self.row(case, name, mode) for name in above]
        under = self.row(case, below, mode)
        if under is None or None in over:
            return None
        return sum(row.ms for row in over if row is not None) / under.ms


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """What the rows of one device say about its targets."""
    results = Results(tuple(rows))
    on_gpu = any(row.mode == GRAPH for row in results.rows)
    return _on_gpu(results) if on_gpu else _on_cpu(results)


def worst_choice(rows: Iterable[Row]) -> tuple[float, Row] | None:
    """The largest time of `auto` over the fastest single path's in a point of the grid, and where.

    It is a maximum over 60 noisy quotients: see `mean_choice` beside it.
    """
    ratios = _choices(rows)
    return max(ratios, key=lambda found: found[0]) if ratios else None


def mean_choice(rows: Iterable[Row]) -> float | None:
    """The geometric mean of the same ratio over the grid."""
    ratios = [ratio for ratio, _ in _choices(rows)]
    return geometric_mean(ratios) if ratios else None


def planned_choices(rows: Iterable[Row], kind: str) -> list[tuple[float, Row]]:
    """The time of what the plan takes today over the fastest path's, for each point of the grid.

    kind: of device. The plan chooses among what was timed there; infinite where a schedule that it
    takes has no time. With each ratio a row of the point.
    """
    ratios = []
    for at in _points(rows):
        first = at[0]
        times = {row.path: row.ms for row in at if row.provider != OURS}
        takers = tuple(path for path in PATHS if any(name.split()[0] == path for name in times))
        work = plan.Work(first.n, None, first.d, DTYPES[first.dtype], device=kind)
        path = plan.fastest(takers, work)
        sizes = [first.n // first.c] * first.c
        chosen = PATHS[path].cost(work, sizes).schedule or path
        ratios.append((times.get(chosen, math.inf) / min(times.values()), first))
    return ratios


def _points(rows: Iterable[Row]) -> list[list[Row]]:
    """Eager rows of ours, together where they are of one point of the grid; some single path's."""
    points: dict[tuple[int, int, int, str], list[Row]] = {}
    for row in rows:
        is_ours = row.suite == "crossover" and row.group in (OURS_GROUP, SCHEDULE)
        if is_ours and row.is_measured and row.mode == EAGER:
            points.setdefault((row.n, row.d, row.c, row.dtype), []).append(row)
    return [at for at in points.values() if any(row.provider != OURS for row in at)]


def _choices(rows: Iterable[Row]) -> list[tuple[float, Row]]:
    ratios = []
    for at in _points(rows):
        chosen = next((row for row in at if row.provider == OURS), None)
        single = [row.ms for row in at if row.provider != OURS]
        if chosen is not None:
            ratios.append((chosen.ms / min(single), chosen))
    return ratios


def _on_cpu(results: Results) -> list[Verdict]:
    found = []
    for (n, d, c), naive, compiled, floor in (
        ((36, 1280, 3), 5, 2.5, 1.4),
        ((36, 128, 3), 7, 3, 1.4),
        ((256, 512, 8), 2.2, 1.5, 1.3),
        ((1024, 512, 8), 2, 1.6, 1.3),
        ((1024, 128, 3), 6, 4, None),
        ((4096, 128, 3), 100, None, None),
        ((16384, 128, 10), 500, None, None),
    ):
        case = Case(n, d, c)
        found.append(_faster(results, case, _NAIVE, naive))
        if compiled is not None:
            found.append(_faster(results, case, _COMPILED, compiled))
        if floor is not None:
            floors = (EMPTY, PAIR_PRODUCTS)
            found.append(_within(results, case, floors, floor))
    few_classes, many_classes = Case(1 << 20, 128, 10), Case(1 << 16, 128, 8192)
    found.append(_within(results, few_classes, (MOMENT_PRODUCTS,), 1.5))
    found.append(_memory(results, few_classes, 3))
    found.append(_within_count(results, many_classes, MOMENT_PRODUCTS, 1.5))
    found.append(_memory(results, many_classes, 3))
    linear = Case(1 << 18, 128, 10)
    share = results.ratio(linear, (HALF,), OURS)
    growth = None if share is None else 1 / share
    found.append(Verdict(_work(linear), "time, over that of half the rows", growth, 2.2, True))
    worst, points = worst_choice(results.rows), len(suites()["crossover"].cases)
    grid = f"{points} points (N, D, C)"
    ratio = worst[0] if worst and len(_choices(results.rows)) == points else None
    found.append(Verdict(grid, "auto over the best single path, at worst", ratio, 1.2, True))
    return found


def _on_gpu(results: Results) -> list[Verdict]:
    small, half = Case(36, 1280, 3), Case(4096, 512, 8, "bfloat16")
    middle, many_classes = Case(1 << 16, 128, 10), Case(1 << 16, 128, 8192)
    large = Case(1 << 20, 128, 10)
    found = [_milliseconds(results, small, 8e-3)]
    for mode in (EAGER, GRAPH):
        found.append(_faster(results, small, _NAIVE, 10, mode))
        found.append(_faster(results, small, _COMPILED, 3, mode))
    found.append(_within(results, small, (EMPTY,), 1.5))
    rate = results.ratio(half, (PAIR_PRODUCTS,), OURS, GRAPH)
    claim = f"rate of the same products alone, {GRAPH}"
    found.append(Verdict(_work(half), claim, rate, 0.77, False))
    found.append(_milliseconds(results, middle, 0.4))
    found.append(_within_count(results, many_classes, MOMENT_PRODUCTS, 2, GRAPH))
    found.append(_milliseconds(results, large, 5))
    found.append(_memory(results, large, 3))
    worst = worst_choice(results.rows)
    ratio = worst[0] if worst else None
    found.append(Verdict("the grid", "auto over the best single path, at worst", ratio, 1.2, True))
    return found


def _milliseconds(results: Results, case: Case, bound: float) -> Verdict:
    row = results.row(case, OURS, GRAPH)
    time = None if row is None or "H200" not in row.device else row.ms
    return Verdict(_work(case), f"milliseconds (on an H200), {GRAPH}", time, bound, True)


def _work(case: Case) -> str:
    dtype = "" if case.dtype == "float32" else f", {case.dtype}"
    return f"N = {case.n:,}, D = {case.d:,}, C = {case.c:,}{dtype}"


def _faster(results: Results, case: Case, than: str, bound: float, mode: str = EAGER) -> Verdict:
    names = {_NAIVE: "the naive form", _COMPILED: "`torch.compile` of it"}
    claim = f"times faster than {names[than]}" + ("" if mode == EAGER else f", {mode}")
    return Verdict(_work(case), claim, results.ratio(case, (than,), OURS, mode), bound, False)


def _within(results: Results, case: Case, floors: tuple[str, ...], bound: float) -> Verdict:
    inverse = results.ratio(case, floors, OURS)
    claim = f"time, over {' + '.join(floors)}"
    return Verdict(_work(case), claim, None if inverse is None else 1 / inverse, bound, True)


def _within_count(
    results: Results, case: Case, products: str, bound: float, mode: str = EAGER
) -> Verdict:
    """Our time over that of the FLOPs the plan counts, at the rate of the products alone."""
    ours, floor = results.row(case, OURS, mode), results.row(case, products, mode)
    figure = None
    if ours is not None and floor is not None and ours.flops and floor.flops:
        figure = (ours.ms / ours.flops) / (floor.ms / floor.flops)
    claim = f"time, over that of the FLOPs the plan counts at the rate of {products}"
    return Verdict(_work(case), claim, figure, bound, True)


def _memory(results: Results, case: Case, bound: float) -> Verdict:
    """The larger of the allocator's and the process's figure, results included."""
    row = results.row(case, OURS)
    figure = None
    if row is not None and row.peak_bytes is not None:
        figure = max(row.peak_bytes, row.resident_bytes or 0) / case.embedding_bytes
    return Verdict(_work(case), "peak extra memory, over the embeddings", figure, bound, True)
