"""What a training run makes Triton compile, and how long that takes: no GPU is needed.

    python -m bench.first_use            print the table and write results/compile/first_use.csv
    python -m bench.first_use --check    compile nothing; fail where the table is out of date, or a
                                         last batch wants a kernel of its own

A run has batches of one size and, at the end of an epoch, a smaller one. Its calls are real, on CPU
tensors in place of a GPU's. Triton binds the arguments of each launch and looks for the kernel in
its cache as on an H100; a kernel that is not there is compiled, and nothing is launched.

The table has a row for the first batch of each run and one for each size of its last batch, with
the kernels that the first did not want. Seconds are of processors, the compiler's children
included, in an empty cache; kernels of cuBLAS and torch are not in them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from bstriplet_kernels import bstriplet_loss, explain
from bstriplet_kernels.paths import PATHS, gpu, moments
from bstriplet_kernels.spec import work_of

from .machine import device_name

RESULTS = Path(__file__).parent / "results" / "compile" / "first_use.csv"
TARGET = GPUTarget("cuda", 90, 32)
CLASSES = 3
FIRST, LAST, SMALL = "first", "last", "small last"


class Run(NamedTuple):
    """A training run: batches of n rows of d numbers, against m rows of `ref_emb` if not None.

    impl: "auto" is the path that an H200 takes. same: sizes of a last batch that must want no
    kernel of its own. other: sizes so small that faster blocks or another schedule take over.
    """

    impl: str
    n: int
    d: int
    same: tuple[int, ...]
    other: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    m: int | None = None
    reduction: str = "mean"
    similarity: str = "square"


RUNS = (
    Run("auto", 36, 1280, (35, 20, 2)),
    Run("triton", 36, 1280, (35, 20, 2)),
    Run("triton", 36, 1280, (35, 20, 2), dtype=torch.bfloat16),
    Run("triton", 36, 1280, (35, 33, 20, 4, 2), reduction="none"),
    Run("triton", 36, 1280, (35, 33, 20, 4, 1), m=1024),
    Run("triton", 256, 1280, (255, 100, 65), (64, 20)),
    Run("triton", 1024, 128, (1023, 700, 600), (300, 40)),
    Run("auto", 4096, 512, (4095, 3000), (2000, 300)),
    Run("auto", 4096, 512, (4095, 3900), (3000, 2000, 300), torch.bfloat16),
    Run("triton", 4096, 512, (4095, 3000), (100, 1), m=4096),
    Run("auto", 65_536, 128, (65_535, 40_001, 16_385), (10_000, 300)),
    Run("gram", 65_536, 128, (65_535, 40_001, 2000, 300)),
    Run("gram", 65_536, 128, (65_535, 40_001, 2000, 300), reduction="none"),
    Run("gram", 65_536, 128, (65_535, 40_001, 2000, 300), dtype=torch.bfloat16),
    Run("gram", 4096, 128, (4095, 300, 1), m=65_536),
    Run("gram", 65_536, 128, (65_535, 40_001, 2000, 300), dtype=torch.float64),
    Run("gram", 16_384, 512, (16_383, 10_001, 1100), (300,)),
    Run("gram", 65_536, 128, (65_535, 2000, 36), similarity="linear"),
    Run("gram", 4096, 128, (4095, 300, 1), m=65_536, similarity="linear"),
)


class Driver:
    """What the just-in-time compiler asks of a GPU's driver before it launches."""

    def get_current_device(self) -> int:
        return -1  # no GPU has this number, so what is cached for it is no GPU's

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@contextlib.contextmanager
def launches_on_h100(hook: Callable[..., bool]) -> Iterator[None]:
    """While entered, paths take CPU tensors for those of an H100, and a launch calls `hook`.

    The hook gets, by keyword, the `key` in Triton's cache, `fn` and `compile`; while it returns
    True, Triton itself neither compiles nor launches.
    """

    def on_gpu(*tensors_and_spec: Any) -> Any:
        return work_of(*tensors_and_spec)._replace(device="cuda")

    h100 = {
        "interpreted": lambda: True,  # which lets kernels take CPU tensors
        "kind": lambda device: "hopper",
        "processors": lambda device: gpu.USUAL_PROCESSORS,
    }
    with (
        mock.patch.multiple(gpu, **h100),
        mock.patch.object(moments, "work_of", on_gpu),
        mock.patch.object(torch.cuda, "is_available", return_value=False),  # whatever is here
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook),
    ):
        yield


class Wanted:
    """A hook of `launches_on_h100` that collects the kernels (name, key) that launches want.

    seconds: of compiling each, or 0 where they are only counted.
    """

    def __init__(self, compiles: bool) -> None:
        self.compiles = compiles
        self.kernels: set[tuple[str, str]] = set()
        self.seconds: dict[tuple[str, str], float] = {}

    def __call__(self, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.name.rpartition(".")[2], key
        self.kernels.add(kernel)
        if kernel not in self.seconds:
            self.seconds[kernel] = _compile(fn.jit_function, compile) if self.compiles else 0.0
        return True


def _compile(function: Any, wanted: dict[str, Any]) -> float:
    """Compile as Triton would after the hook; return the seconds."""
    source = ASTSource(function, wanted["signature"], wanted["constants"], wanted["configs"][0])
    before = os.times()
    triton.compile(
        source, target=TARGET, options={name: wanted[name] for name in ("num_warps", "num_stages")}
    )
    return sum(after - begun for begun, after in zip(before[:4], os.times()[:4], strict=True))


def batch(run: Run, n: int) -> None:
    """Forward and backward of n rows; the numbers mean nothing."""
    path, _ = _planned(run, n)
    if path == "native":  # compiled when it is installed
        return
    x = torch.ones(n, run.d, dtype=run.dtype, requires_grad=True)
    others: dict[str, Any] = {}
    if run.m is not None:
        others["ref_emb"] = torch.ones(run.m, run.d, dtype=run.dtype)
        others["ref_labels"] = torch.arange(run.m) % CLASSES
    loss = bstriplet_loss(
        x, torch.arange(n) % CLASSES, impl=path, reduction=run.reduction,
        similarity=run.similarity, **others,
    )  # fmt: skip
    loss.sum().backward()


def _planned(run: Run, n: int) -> tuple[str, str]:
    """The path of a batch and the name of its schedule."""
    against = None if run.m is None else (run.m, run.d)
    plan = explain(
        (n, run.d), min(CLASSES, run.m or n),
        ref_emb=against, reduction=run.reduction, similarity=run.similarity, dtype=run.dtype,
        device="cuda",
    )  # fmt: skip
    path = plan.path if run.impl == "auto" else run.impl
    with gpu.imagined():
        cost = PATHS[path].cost(plan.work, [run.m or n])
    return path, cost.schedule or path


def table(compiles: bool) -> Iterator[dict[str, Any]]:
    """The rows of the table; without compiling all seconds are 0."""
    for run in RUNS:
        wanted = Wanted(compiles)
        with (
            tempfile.TemporaryDirectory() as cache,
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
            launches_on_h100(wanted),
        ):
            batch(run, run.n)
            first = wanted.kernels
            yield _row(run, run.n, FIRST, first, wanted)
            for kind, sizes in ((LAST, run.same), (SMALL, run.other)):
                for n in sizes:
                    wanted.kernels = set()
                    batch(run, n)
                    yield _row(run, n, kind, wanted.kernels - first, wanted)


def _row(
    run: Run, n: int, kind: str, kernels: set[tuple[str, str]], wanted: Wanted
) -> dict[str, Any]:
    """The row of a batch of n rows, and the kernels that it adds."""
    return {
        "impl": run.impl,
        "batch_size": run.n,
        "m": "" if run.m is None else run.m,
        "d": run.d,
        "dtype": str(run.dtype).removeprefix("torch."),
        "reduction": run.reduction,
        "similarity": run.similarity,
        "batch": kind,
        "n": n,
        "schedule": _planned(run, n)[1],
        "kernels": len(kernels),
        "seconds": f"{sum(wanted.seconds[kernel] for kernel in kernels):.1f}",
        "names": " ".join(sorted(name for name, _ in kernels)),
        "machine": device_name("cpu"),
        "versions": f"triton {triton.__version__}; torch {torch.__version__}",
    }


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Last batches that want a kernel of their own, and a committed table that differs."""
    found = [
        f"{row['impl']}, {row['batch_size']} x {row['d']}, last {row['n']}: {row['names']} is new"
        for row in rows
        if row["batch"] == LAST and row["kernels"]
    ]
    with RESULTS.open(newline="") as file:
        if [_counted(row) for row in csv.DictReader(file)] != [_counted(row) for row in rows]:
            found.append(f"{RESULTS.name} is not what this code wants: python -m bench.first_use")
    return found


def _counted(row: dict[str, Any]) -> list[str]:
    """The columns that do not depend on the machine."""
    return [str(v) for k, v in row.items() if k not in ("seconds", "machine", "versions")]


def main() -> int:
    """Print the table, and write it or compare it with the committed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile and write nothing")
    check = parser.parse_args().check
    rows: list[dict[str, Any]] = []
    for row in table(compiles=not check):
        rows.append(row)
        print(*row.values(), sep=",", flush=True)
    if check:
        found = faults(rows)
        print(*found, f"{len(found)} faults", sep="\n", file=sys.stderr)
        return 1 if found else 0
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
