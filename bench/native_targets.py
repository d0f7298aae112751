"""`python -m bench.native_targets`: impl="native" against its targets, into a CSV.

Forward and backward through the public function; the variants of one piece of work take turns in
one process, and medians are compared. The floor is an empty autograd
Function and the two products, each timed by itself. Every loss and gradient is first compared with
the reference in float64. `--seconds` is the time for each variant of each piece of work.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import median

import torch

from bstriplet_kernels import bstriplet_loss
from bstriplet_kernels.paths import native

from .cases import Case, make_problem
from .machine import commit, device_name, versions
from .providers import EMPTY, PAIR_PRODUCTS, providers
from .timing import Budget, cpu_turn, expected_seconds, interleave

NATIVE = "native"
TIMED = (NATIVE, "naive", "compiled naive", EMPTY, PAIR_PRODUCTS)
# (N, D, C): at least x times faster than naive, than torch.compile of it; at most x times the floor
TARGETS = {
    (36, 1280, 3): (5.0, 2.5, 1.4),
    (36, 128, 3): (7.0, 3.0, 1.4),
    (256, 512, 8): (2.2, 1.5, 1.3),
    (1024, 512, 8): (2.0, 1.6, 1.3),
}
RESULTS = Path(__file__).parent / "results/cpu/native_targets.csv"


def check(x: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise unless the native loss and gradient are the reference's."""

    def evaluate(x: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        loss = bstriplet_loss(x, labels, impl=impl)
        assert isinstance(loss, torch.Tensor)
        return loss, torch.autograd.grad(loss, x)[0]

    for got, truth in zip(evaluate(x, NATIVE), evaluate(x.double(), "reference"), strict=True):
        error = (got.double() - truth).norm() / truth.norm()
        if not error <= 2e-6:
            raise RuntimeError(f"native is off by {error:.1e} of the norm")


def measure(n: int, d: int, c: int, seconds: float) -> dict[str, float]:
    """Median seconds of each variant of a forward and backward."""
    problem = make_problem(Case(n, d, c, threads=torch.get_num_threads()))
    x, labels = problem.x.requires_grad_(), problem.labels
    check(x, labels)
    every = providers()
    steps = {name: every[name].make(problem) for name in TIMED}
    calls = {name: lambda step=step: step(x, labels) for name, step in steps.items()}
    expected = {name: expected_seconds(call, "cpu") for name, call in calls.items()}
    turns = {name: cpu_turn(call) for name, call in calls.items()}
    samples = interleave(turns, expected, Budget(seconds=seconds, least=15, most=5000))
    return {name: median(values) for name, values in samples.items()}


def row(n: int, d: int, c: int, seconds: float) -> dict[str, object]:
    """One line of the table: medians in microseconds and the ratios beside their targets."""
    times = measure(n, d, c, seconds)
    over_naive, over_compiled, of_floor = TARGETS[n, d, c]
    floor = times[EMPTY] + times[PAIR_PRODUCTS]
    return {
        **{"n": n, "d": d, "c": c, "threads": torch.get_num_threads()},
        **{f"{name} us": round(seconds * 1e6, 1) for name, seconds in times.items()},
        **{"over naive": round(times["naive"] / times[NATIVE], 2), "at least": over_naive},
        **{
            "over compiled": round(times["compiled naive"] / times[NATIVE], 2),
            "at least ": over_compiled,
        },
        **{"of floor": round(times[NATIVE] / floor, 2), "at most": of_floor},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = {
        **{"instructions": native.instruction_set(), "device": device_name("cpu")},
        **{"versions": versions(), "commit": commit()},
    }
    rows = []
    for work in TARGETS:
        rows.append(row(*work, arguments.seconds) | where)
        print({name: value for name, value in rows[-1].items() if name not in where}, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(arguments.out)


if __name__ == "__main__":
    main()
