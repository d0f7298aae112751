"""`python -m bench.run [SUITE ...]`: measure, and write a CSV for each suite that is complete."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import machine, steps, table
from .cases import Case
from .measure import Job, failed_row
from .providers import Provider, providers
from .suites import DEFAULT, Suite, suites
from .table import OK, RESULTS, Row
from .worker import Lost, Worker

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """0 where every row of ours that was written is right; 1 where one is not."""
    options = _parse(arguments)
    known = suites(options.device)
    names = options.suites or [name for name in DEFAULT if name in known]
    folder = options.results / machine.device_slug(options.device)
    worker = Worker(options.device)
    wrong, begin = 0, time.monotonic()
    try:
        for name in names:
            start, path = time.monotonic(), folder / f"{name}.csv"
            if options.missing and path.exists():
                print(f"{path}: kept")
                continue
            rows = run_suite(_budgeted(known[name], options.seconds), worker)
            table.write(path, rows)
            print(f"{path}: {len(rows)} rows in {time.monotonic() - start:.0f} s", flush=True)
            wrong += sum(row.status.startswith("wrong") and row.group == "ours" for row in rows)
    except KeyboardInterrupt:
        print(f"interrupted: finished suites are in {folder}; --missing goes on with the others")
        return _INTERRUPTED
    finally:
        worker.stop()
    print(f"{len(names)} suites in {time.monotonic() - begin:.0f} s")
    return 1 if wrong else 0


def _budgeted(suite: Suite, seconds: float | None) -> Suite:
    """The suite with another time for each provider, and as few samples as fit it."""
    if seconds is None:
        return suite
    budget = replace(suite.budget, seconds=seconds, least=1)
    parts = tuple(part._replace(budget=None) for part in suite.parts)
    return replace(suite, parts=parts, budget=budget)


def run_suite(suite: Suite, worker: Worker) -> list[Row]:
    """All rows of a suite, in the order of its cases."""
    print(f"{suite.name}: {suite.purpose}", flush=True)
    commit, rows = machine.commit(), []
    limits = _Limits()
    for case, wanted, budget in suite.work():
        start = time.monotonic()
        known = steps.providers() if case.backbone else providers()
        names = tuple(p.name for p in known.values() if {p.group, p.name} & {*wanted})
        job = Job(suite.name, case, names, limits.known(case, names), budget)
        found = [replace(row, commit=commit) for row in _run_job(job, known, worker)]
        limits.learn(case, found)
        rows += found
        print(f"  {case}, {time.monotonic() - start:.1f} s: {_summary(found)}", flush=True)
    return rows


def _run_job(job: Job, known: dict[str, Provider], worker: Worker) -> list[Row]:
    """The job's rows; a provider that takes the process with it gets a row and is left out."""
    lost: dict[str, Row] = {}
    while True:
        result = worker.run(job)
        if not isinstance(result, Lost):
            return [lost.get(row.provider, row) for row in result]
        culprits = (result.provider,) if result.provider else job.names
        for name in culprits:
            lost[name] = failed_row(job, name, known[name].group, result.status)
        if not result.provider:
            return list(lost.values())
        job = job._replace(skip={**job.skip, result.provider: result.status})


class _Limits:
    """At which N a provider ran out of time or memory: no larger N is tried."""

    def __init__(self) -> None:
        self._reached: dict[tuple[str, ...], tuple[int, str]] = {}

    def known(self, case: Case, names: tuple[str, ...]) -> dict[str, str]:
        """What the rows of providers say that need not be tried."""
        reached = {name: self._reached.get(_kind(case, name)) for name in names}
        return {
            name: f"{limit[1]} at N = {limit[0]}"
            for name, limit in reached.items()
            if limit is not None and limit[0] < case.n
        }

    def learn(self, case: Case, rows: list[Row]) -> None:
        """Remember who failed for time or memory."""
        for row in rows:
            if row.status == "out of memory" or row.status.startswith("over "):
                self._reached.setdefault(_kind(case, row.provider), (case.n, row.status))


def _kind(case: Case, provider: str) -> tuple[str, ...]:
    return (provider, case.operation, case.dtype, str(case.d), str(case.threads), case.backbone)


def _summary(rows: list[Row]) -> str:
    return ", ".join(
        f"{row.provider} {row.ms:.3g} ms" if row.is_measured else f"{row.provider} [{row.status}]"
        for row in rows
        if row.mode == table.EAGER or row.status != OK
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    known = suites()
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        epilog="suites: " + "; ".join(f"{s.name} ({s.purpose})" for s in known.values()),
    )
    parser.add_argument("suites", nargs="*", help="default: all but smoke and million")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU where there is one",
    )
    parser.add_argument(
        "--missing", action="store_true", help="measure only suites that have no file yet"
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
    sys.exit(main())
