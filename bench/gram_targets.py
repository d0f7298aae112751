"""The targets of the second-moment path, each measured beside what it is compared with.

    python bench/gram_targets.py [--threads 2] [--rounds 9] [--out FILE.csv]

Forward and backward in float32. The variants of a row take turns in one process; a ratio is the
median over the turns of the two times in one turn, so that a busy machine slows both. Nothing is
timed before its loss and gradient agree with float64 on rows drawn at random.

The products that the path cannot avoid are timed alone, on panels that lie ready: for large classes
the halves of the symmetric U^T U and of two quadratic forms, and U M; for small ones one form, and
the blocks. They are what the path executes, so the strictest floor; `full products` is the same
without the saving of symmetry, and `products and moves` adds the reading of rows in class order and
the writing of a new gradient.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from bstriplet_kernels import bstriplet_loss
from bstriplet_kernels.paths.gram_host import panel_rows, smallest_moment
from bstriplet_kernels.paths.second_moments import add_moment, half_matrices
from bstriplet_kernels.reference import naive_loss

MARGIN = 0.9
FIELDS = [
    *("work", "provider", "N", "D", "C", "p20_ms", "p50_ms", "p80_ms", "against", "ratio"),
    *("target", "met", "extra_memory_MiB", "extra_over_embeddings", "torch", "device", "threads"),
]


class Work(NamedTuple):
    """A batch, the providers to beat and the least ratio (their time over ours) for each.

    `floor`: the greatest ratio of our time over that of the products alone, or None.
    """

    n: int
    d: int
    classes: int
    beat: dict[str, float]
    floor: float | None = None
    memory: float | None = None


WORKS = (
    Work(1024, 128, 3, {"naive": 6, "compiled naive": 4, "reference": 1}),
    Work(4096, 128, 3, {"naive": 100, "reference": 1}),
    Work(16384, 128, 10, {"naive": 500}),
    Work(65536, 128, 8192, {}, floor=1.5, memory=3),
    Work(1048576, 128, 10, {}, floor=1.5, memory=3),
)


def batch(work: Work) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] that lean towards their class, and labels [N]."""
    generator = torch.Generator().manual_seed(work.n)
    labels = torch.randint(0, work.classes, (work.n,), generator=generator)
    centres = torch.randn(work.classes, work.d, generator=generator)
    x = torch.randn(work.n, work.d, generator=generator).add_(centres[labels], alpha=0.5)
    return x.requires_grad_(), labels


def gram(x: Tensor, labels: Tensor) -> Tensor:
    """The path under test."""
    return bstriplet_loss(x, labels, margin=MARGIN, impl="gram")


def step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    x.grad = None
    loss(x, labels).backward()


def check(x: Tensor, labels: Tensor, rows: int = 64) -> None:
    """Stop unless loss rows and gradient rows agree with float64 by Eqs. 1-4, pair by pair."""
    n = len(x)
    step(gram, x, labels)
    losses = bstriplet_loss(x.detach(), labels, margin=MARGIN, impl="gram", reduction="none")
    assert bool((losses > 0).all()), "the check below is for rows that are all active"
    unit = torch.nn.functional.normalize(x.detach().double(), dim=1)
    sizes = torch.bincount(labels)[labels].double()
    p = 1 / (sizes - 1).clamp_min(1) * (sizes > 1)
    q = 1 / (n - sizes)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:rows]
    s = unit[chosen] @ unit.T
    same = labels[chosen, None] == labels[None, :]
    weights = torch.where(same, -(p[chosen, None] + p), q[chosen, None] + q) / n
    v = 2 * (weights * s) @ unit
    own = unit[chosen]
    truth = (v - (v * own).sum(1, keepdim=True) * own) / x.detach()[chosen].double().norm(
        dim=1, keepdim=True
    )
    positive = ((s.square() * same).sum(1) - 1) * p[chosen]
    negative = (s.square() * ~same).sum(1) * q[chosen]
    for what, got, exact in (
        ("losses", losses[chosen], MARGIN - positive + negative),
        ("gradient", x.grad[chosen], truth),
    ):
        error = ((got.double() - exact).norm() / exact.norm()).item()
        print(f"    {what} off float64 by {error:.1e} of the norm")
        if not error < 5e-6:
            raise SystemExit(f"{what} of N = {n} are wrong: nothing was timed")


def products(x: Tensor, labels: Tensor, halves: bool) -> Callable[[], None]:
    """The matrix products of forward and backward alone, on panels that lie ready."""
    d = x.shape[1]
    unit = x.detach()
    sizes = torch.bincount(labels)
    large = sizes >= smallest_moment(d)
    n_large = int(sizes[large].sum())
    count = torch.bincount(sizes[~large & (sizes > 1)])
    matrix = torch.randn(d, d)
    rows = len(x) // len(sizes) if n_large else len(x)
    forms = {k: half_matrices((matrix,) * k, rows) for k in (1, 2)}
    moment = torch.zeros(d, d)

    def dense(rows: Tensor, n_forms: int) -> None:
        for panel in rows.split(panel_rows(d)):
            if halves:
                add_moment(moment, panel, panel)
                for half in forms[n_forms]:
                    panel[:, : half.shape[0]] @ half
            else:
                panel.T @ panel
                for _ in range(n_forms):
                    panel @ matrix
            panel @ matrix

    def blocks() -> None:
        for size in count.nonzero().flatten().tolist():
            classes = int(count[size])
            for panel in unit[: size * classes].split(max(1, panel_rows(d) // size) * size):
                members = panel.unflatten(0, (-1, size))
                for _ in range(2):
                    similarity = members @ members.mT
                similarity @ members

    def run() -> None:
        dense(unit[:n_large], 2)
        dense(unit[n_large:], 1)
        blocks()

    return run


def with_moves(x: Tensor, labels: Tensor) -> Callable[[], None]:
    """The products, and what brings rows to them: three readings in class order, and the gradient.

    The gradient's memory is new in each turn, and its rows are written where they belong.
    """
    multiply = products(x, labels, halves=True)
    order = labels.argsort(stable=True)
    rows = x.detach()
    panel = torch.empty(panel_rows(x.shape[1]), x.shape[1])

    def run() -> None:
        multiply()
        gradient = torch.empty_like(rows)
        for last in (False, False, True):
            for part in order.split(len(panel)):
                torch.index_select(rows, 0, part, out=panel[: len(part)])
                if last:
                    gradient.index_copy_(0, part, panel[: len(part)])

    return run


def turns(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, after one round that is not counted.

    With one thread its processor time: what other processes took meanwhile is left out.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if turn:
                times[name].append(1e3 * (clock() - start))
    return times


def extra_memory(work: Work) -> int:
    """Bytes of resident memory that one forward and backward need, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", str(WORKS.index(work))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_extra_memory(work: Work) -> None:
    """In the fresh process: peak resident memory over what it was with the inputs in place."""
    x, labels = batch(work)
    small = Work(2048, work.d, 2, {})
    step(gram, *batch(small))  # thread pools and library buffers
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(gram, x, labels)
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def device() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def spread(times: list[float]) -> dict[str, str]:
    """p20, p50 and p80."""
    fifths = quantiles(times, n=5, method="inclusive")
    return {
        "p20_ms": f"{fifths[0]:.3f}",
        "p50_ms": f"{median(times):.3f}",
        "p80_ms": f"{fifths[3]:.3f}",
    }


def measure(work: Work, rounds: int) -> list[dict[str, object]]:
    """The CSV lines of a work."""
    x, labels = batch(work)
    print(f"N = {work.n:,}, D = {work.d}, {work.classes:,} classes", flush=True)
    check(x, labels)
    runs: dict[str, Callable[[], None]] = {"gram": lambda: step(gram, x, labels)}
    compiled = torch.compile(naive_loss)
    others = {
        "naive": naive_loss,
        "compiled naive": compiled,
        "reference": lambda x, labels: bstriplet_loss(x, labels, margin=MARGIN, impl="reference"),
    }
    for name in work.beat:
        runs[name] = lambda loss=others[name]: step(loss, x, labels)
    for name, halves in (("products", True), ("full products", False)):
        runs[name] = products(x, labels, halves)
    runs["products and moves"] = with_moves(x, labels)
    times = turns(runs, 2 if work.n >= 16384 and work.beat else rounds)
    memory = {}
    if work.memory is not None:
        extra = extra_memory(work)
        ratio = extra / (4 * work.n * work.d)
        memory = {
            "extra_memory_MiB": f"{extra / 2**20:.1f}", "extra_over_embeddings": f"{ratio:.2f}",
        }  # fmt: skip
        print(f"    extra memory {ratio:.2f}x the embeddings, target <= {work.memory}x")
    lines = []
    for name, taken in times.items():
        line: dict[str, object] = {"provider": name, **spread(taken)}
        if name == "gram":
            line |= memory
        else:
            is_floor = name.endswith(("products", "moves"))
            target = work.beat.get(name, work.floor if name.endswith("products") else None)
            ratio = median(
                g / t if is_floor else t / g for g, t in zip(times["gram"], taken, strict=True)
            )
            line |= {
                "against": "gram / this" if is_floor else "this / gram", "ratio": f"{ratio:.2f}",
            }  # fmt: skip
            if target is not None:
                met = ratio <= target if is_floor else ratio >= target
                line |= {"target": target, "met": "yes" if met else "no"}
        lines.append(line)
    return [{"work": "loss and gradient", "N": work.n, "D": work.d, "C": work.classes} | line
            for line in lines]  # fmt: skip


def measure_doubling(rounds: int) -> list[dict[str, object]]:
    """Twice the batch: the time over that of the half."""
    sizes = (131072, 262144)
    works = [Work(n, 128, 10, {}) for n in sizes]
    runs = {}
    for work in works:
        x, labels = batch(work)
        runs[str(work.n)] = lambda x=x, labels=labels: step(gram, x, labels)
    print("N = 131,072 and 262,144, D = 128, 10 classes", flush=True)
    times = turns(runs, rounds)
    ratio = median(b / a for a, b in zip(*times.values(), strict=True))
    lines = [
        {"work": "doubling", "provider": "gram", "N": w.n, "D": w.d, "C": w.classes, **spread(t)}
        for w, t in zip(works, times.values(), strict=True)
    ]
    lines[1] |= {
        "against": "this / half of it", "ratio": f"{ratio:.2f}", "target": 2.2,
        "met": "yes" if ratio <= 2.2 else "no",
    }  # fmt: skip
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/gram_targets.csv"))
    parser.add_argument("--only", type=int, nargs="*", help="these N alone")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print_extra_memory(WORKS[arguments.memory_of])
        return
    works = [w for w in WORKS if not arguments.only or w.n in arguments.only]
    common = {"torch": torch.__version__, "device": device(), "threads": arguments.threads}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = []
    for measured in (
        *(lambda w=w: measure(w, arguments.rounds) for w in works),
        lambda: measure_doubling(arguments.rounds),
    ):
        for line in measured():
            lines.append(line | common)
            print("    " + "  ".join(
                str(line[k]) for k in FIELDS[1:13] if k in line and k not in ("N", "D", "C")
            ), flush=True)  # fmt: skip
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
