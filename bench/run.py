"""`python -m bench.run [SUITE ...]`: measure, case by case, and write a CSV for each suite.

A suite's rows are in SUITE.partial.csv after each of its cases, and in SUITE.csv when complete.
"""

from __future__ import annotations

import argparse
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from . import machine, steps, table
from .cases import Case
from .forecast import TimeLimit
from .measure import OUT_OF_MEMORY, Job, failed_row
from .providers import Provider, providers
from .suites import DEFAULT, Suite, suites
from .table import GRAPH, RESULTS, Row
from .worker import Lost, Worker

_INTERRUPTED = 130
_OUT_OF_TIME = 124  # as of `timeout`


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a row of ours is wrong; 124 where the limit left cases out; 130 interrupted."""
    options = _parse(arguments)
    known = suites(options.device)
    names = options.suites or [name for name in DEFAULT if name in known]
    folder = options.results / machine.device_slug(options.device)
    worker = Worker(options.device)
    limit = TimeLimit(options.limit)
    wrong, unfinished, begin = 0, [], time.monotonic()
    try:
        for name in names:
            start, path = time.monotonic(), folder / f"{name}.csv"
            draft, begun = table.partial(path), list[Row]()
            if options.missing:
                if path.exists():
                    print(f"{path}: kept")
                    continue
                begun = _begun(draft, options.device)
            suite = _budgeted(known[name], options.seconds)
            keep = functools.partial(table.write, draft)
            rows, left_out = run_suite(suite, worker, keep, begun, limit)
            seconds = f"{time.monotonic() - start:.0f} s"
            if left_out:
                unfinished.append(name)
                print(f"{draft}: {len(rows)} rows in {seconds}, {left_out} cases left out")
            else:
                table.write(path, rows)
                draft.unlink(missing_ok=True)
                print(f"{path}: {len(rows)} rows in {seconds}", flush=True)
            wrong += sum(row.status.startswith("wrong") and row.group == "ours" for row in rows)
    except KeyboardInterrupt:
        print(f"interrupted: finished cases are in {folder}; --missing goes on with the others")
        return _INTERRUPTED
    finally:
        worker.stop()
    print(f"{len(names)} suites in {time.monotonic() - begin:.0f} s")
    if unfinished:
        print(f"out of time, not complete: {', '.join(unfinished)}; --missing goes on with them")
    return 1 if wrong else _OUT_OF_TIME if unfinished else 0


def _budgeted(suite: Suite, seconds: float | None) -> Suite:
    """The suite with other seconds for each provider, and one sample at least."""
    if seconds is None:
        return suite
    budget = replace(suite.budget, seconds=seconds, least=1)
    parts = tuple(part._replace(budget=None) for part in suite.parts)
    return replace(suite, parts=parts, budget=budget)


def _begun(path: Path, device: str) -> list[Row]:
    """The rows of a partial file, if they are of this code, device and versions."""
    if not path.exists():
        return []
    commit = machine.commit()
    here = machine.device_name(device), commit, machine.versions()
    try:
        rows = table.read(path)
    except ValueError:  # of other columns
        rows = []
    same = all((row.device, row.commit, row.versions) == here for row in rows)
    if not rows or not same or commit.endswith("+"):
        print(f"{path}: not of this device, commit and versions for certain: begun again")
        return []
    print(f"{path}: {len(rows)} rows kept")
    return rows


def jobs(suite: Suite) -> Iterator[Job]:
    """The jobs of a suite, in the order in which they run."""
    for case, wanted, budget in suite.work():
        names = tuple(p.name for p in _known(case).values() if {p.group, p.name} & {*wanted})
        yield Job(suite.name, case, names, {}, budget)


def run_suite(
    suite: Suite,
    worker: Worker,
    keep: Callable[[list[Row]], object] = lambda rows: None,
    begun: Iterable[Row] = (),
    limit: TimeLimit | None = None,
) -> tuple[list[Row], int]:
    """All rows of a suite, in the order of its cases, and how many jobs the limit left out.

    keep: is given all rows so far after each job. begun: rows that need not be measured again.
    """
    print(f"{suite.name}: {suite.purpose}", flush=True)
    commit, limit, limits, left_out = machine.commit(), limit or TimeLimit(), _Limits(), 0
    found: dict[Case, list[Row]] = {case: [] for case in suite.cases}
    by_identity = {_identity(case): case for case in suite.cases}
    for row in begun:
        if case := by_identity.get(_identity(row)):  # None: measured with other threads
            found[case].append(row)
    for case, rows in found.items():
        limits.learn(case, rows)
    for job in jobs(suite):
        case, before = job.case, found[job.case]
        present = {row.provider for row in before}
        if present.issuperset(job.names):
            continue
        if (needed := limit.predict(job)) > limit.left():
            left_out += 1
            print(f"  {case}: left out, takes about {needed:.0f} s", flush=True)
            continue
        start = time.monotonic()
        job = job._replace(skip=limits.known(case, job.names))
        rows = [replace(r, commit=commit) for r in _run_job(job, _known(case), worker)]
        limit.learn(job, time.monotonic() - start)
        limits.learn(case, rows)
        if not any(row.is_measured for row in rows):  # then what was measured before stands
            rows = before + [row for row in rows if row.provider not in present]
        found[case] = rows
        keep([row for of_case in found.values() for row in of_case])
        print(f"  {case}, {time.monotonic() - start:.1f} s: {_summary(rows)}", flush=True)
    return [row for of_case in found.values() for row in of_case], left_out


def _known(case: Case) -> dict[str, Provider]:
    return steps.providers() if case.backbone else providers()


def _identity(of: Case | Row) -> tuple[object, ...]:
    """The values that tell the cases of a suite apart."""
    return (
        of.operation, of.dtype, of.n, of.d, of.c, of.threads, of.balance, of.backbone, of.active
    )  # fmt: skip


def _run_job(job: Job, known: dict[str, Provider], worker: Worker) -> list[Row]:
    """The job's rows. A provider that ends the process gets a row and is left out.

    One that does so in a CUDA graph is measured again without the graph.
    """
    lost: dict[str, Row] = {}
    while True:
        result = worker.run(job)
        if not isinstance(result, Lost):
            return [lost.get(row.provider, row) for row in result]
        if result.mode == GRAPH:
            job = job._replace(uncaptured=(*job.uncaptured, (result.provider, result.status)))
            continue
        culprits = (result.provider,) if result.provider else job.names
        for name in culprits:
            lost[name] = failed_row(job, name, known[name].group, result.status)
        if not result.provider:
            return list(lost.values())
        job = job._replace(skip={**job.skip, result.provider: result.status})


class _Limits:
    """The N at which a provider ran out of time or memory: no larger N is tried."""

    def __init__(self) -> None:
        self._reached: dict[tuple[object, ...], tuple[int, str]] = {}

    def known(self, case: Case, names: tuple[str, ...]) -> dict[str, str]:
        """The providers that need not be tried, and what their rows say."""
        reached = {name: self._reached.get(_kind(case, name), (case.n, "")) for name in names}
        return {name: f"{why} at N = {n}" for name, (n, why) in reached.items() if n < case.n}

    def learn(self, case: Case, rows: list[Row]) -> None:
        """Remember who failed for time or memory."""
        for row in rows:
            if row.status == OUT_OF_MEMORY or row.status.startswith("over "):
                self._reached.setdefault(_kind(case, row.provider), (case.n, row.status))


def _kind(case: Case, provider: str) -> tuple[object, ...]:
    return (provider, case.operation, case.dtype, case.d, case.threads, case.backbone)


def _summary(rows: list[Row]) -> str:
    """Each provider's time and, on a GPU, that of its graph's replay; or why there is none."""
    texts: dict[str, str] = {}
    for row in rows:
        found = f"{row.ms:.3g} ms" if row.is_measured else row.status
        if row.mode == GRAPH:
            texts[row.provider] += f" (replay {found})"
        else:
            found = found if row.is_measured else f"[{found}]"
            texts[row.provider] = f"{row.provider} {found}"
    return ", ".join(texts.values())


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    known = suites()
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        epilog="suites: " + "; ".join(f"{s.name} ({s.purpose})" for s in known.values()),
    )
    parser.add_argument("suites", nargs="*", help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU where there is one",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="measure only suites that have no complete file yet, and of these only cases that "
        "the partial file lacks, if it is of this device, commit and versions",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin no case that would not end in this time; exit status 124 where one is left out",
    )
    parser.add_argument(
        "--seconds", type=float, help="for each provider on each case, instead of the suite's own"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name}/")
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in suites(options.device):
            parser.error(f"unknown suite {name!r}; known are {', '.join(suites(options.device))}")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker too
    sys.exit(main())
