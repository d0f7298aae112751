"""The targets, and what the results say about each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cases import Case
from .providers import EMPTY, HALF, MOMENT_PRODUCTS, PAIR_PRODUCTS, SCHEDULE
from .providers import OURS as OURS_GROUP
from .suites import suites
from .table import EAGER, GRAPH, Row, where

OURS = "auto"
SUITES = ("targets", "sweep")
_NAIVE, _COMPILED = "naive", "compiled naive"


@dataclass(frozen=True)
class Verdict:
    """A target in words, and the measured figure, None where a row that it needs has no time."""

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


class Results:
    """Rows of one device, found by case and provider."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)

    def row(self, case: Case, provider: str, mode: str = EAGER) -> Row | None:
        """The measured row of the first of the suites that hold the targets' work, or None."""
        size = {"n": case.n, "d": case.d, "c": case.c, "dtype": case.dtype}
        found = where(
            self.rows,
            provider=provider,
            mode=mode,
            operation=case.operation,
            is_measured=True,
            **size,
        )
        return next((row for row in found if row.suite in SUITES), None)

    def ratio(
        self, case: Case, above: Iterable[str], below: str, mode: str = EAGER
    ) -> float | None:
        """Summed time of some providers over the time of one."""
        *over, under = (self.row(case, name, mode) for name in (*above, below))
        if under is None or None in over:
            return None
        return sum(row.ms for row in over) / under.ms


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """What the rows of one device say about its targets."""
    results = Results(rows)
    return _on_gpu(results) if where(results.rows, mode=GRAPH) else _on_cpu(results)


def choices(rows: Iterable[Row]) -> list[tuple[float, Row]]:
    """At each point of the grid the time of `auto` over the fastest single path's, and its row."""
    return [
        (auto.ms / min(row.ms for row in at if row.provider != OURS), auto)
        for at in points(rows)
        for auto in where(at, provider=OURS)
    ]


def points(rows: Iterable[Row]) -> list[list[Row]]:
    """Our eager rows for each point of the grid at which a single path was measured."""
    found: dict[tuple[int, int, int, str], list[Row]] = {}
    for row in where(rows, suite="crossover", mode=EAGER, is_measured=True):
        if row.group in (OURS_GROUP, SCHEDULE):
            found.setdefault((row.n, row.d, row.c, row.dtype), []).append(row)
    return [at for at in found.values() if any(row.provider != OURS for row in at)]


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
            found.append(_within(results, case, (EMPTY, PAIR_PRODUCTS), floor))
    few_classes, many_classes = Case(1 << 20, 128, 10), Case(1 << 16, 128, 8192)
    found.append(_within(results, few_classes, (MOMENT_PRODUCTS,), 1.5))
    found.append(_memory(results, few_classes, 3))
    found.append(_within_count(results, many_classes, MOMENT_PRODUCTS, 1.5))
    found.append(_memory(results, many_classes, 3))
    linear = Case(1 << 18, 128, 10)
    found.append(_at_most(linear, "time, over that of half the rows", results, (HALF,), 2.2))
    grid = len(suites()["crossover"].cases)
    whole = len(choices(results.rows)) == grid
    found.append(_worst_choice(f"{grid} points (N, D, C)", results if whole else Results(())))
    return found


def _on_gpu(results: Results) -> list[Verdict]:
    small, half = Case(36, 1280, 3), Case(4096, 512, 8, "bfloat16")
    middle, many_classes = Case(1 << 16, 128, 10), Case(1 << 16, 128, 8192)
    large = Case(1 << 20, 128, 10)
    rate = results.ratio(half, (PAIR_PRODUCTS,), OURS, GRAPH)
    return [
        _milliseconds(results, small, 8e-3),
        *(
            _faster(results, small, than, bound, mode)
            for mode in (EAGER, GRAPH)
            for than, bound in ((_NAIVE, 10), (_COMPILED, 3))
        ),
        _within(results, small, (EMPTY,), 1.5),
        Verdict(_work(half), f"rate of the same products alone, {GRAPH}", rate, 0.77, False),
        _milliseconds(results, middle, 0.4),
        _within_count(results, many_classes, MOMENT_PRODUCTS, 2, GRAPH),
        _milliseconds(results, large, 5),
        _memory(results, large, 3),
        _worst_choice("the grid", results),
    ]


def _worst_choice(grid: str, results: Results) -> Verdict:
    """The worst of noisy ratios."""
    worst = max((ratio for ratio, _ in choices(results.rows)), default=None)
    return Verdict(grid, "auto over the best single path, at worst", worst, 1.2, True)


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
    return _at_most(case, f"time, over {' + '.join(floors)}", results, floors, bound)


def _at_most(
    case: Case, claim: str, results: Results, providers: tuple[str, ...], bound: float
) -> Verdict:
    """Our time over the summed time of these."""
    inverse = results.ratio(case, providers, OURS)
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
