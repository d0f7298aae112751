"""An H100 that is only a clock: the real loop of a suite runs, its calls take assumed times.

`python tests/support/simulated_gpu.py [SUITE ...]`, from the root, prints their seconds.

Every number in capitals below is an assumption, no measurement. What is real: the suites, the order
of the work, examining, planning of turns, rotation, what ends a provider, and the rows. What is
made up: the time of a call, of a compilation, of a capture, of making an input and of judging it.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import counting, floors, forecast, machine, measure, providers, run, table, timing
from bench.cases import DTYPES, FORWARD, Problem
from bench.gate import Errors
from bench.measure import Job
from bench.suites import DEFAULT, suites
from bench.worker import Lost
from bstriplet_kernels.paths import PATHS
from bstriplet_kernels.paths.triton import pairs_cost

PROCESS_S = 8.0  # Python, torch, the CUDA context, cuBLAS
COMPILE_S = 25.0  # torch.compile of a loss and its gradient, nothing cached
KERNEL_S = 1.0  # of a Triton kernel, for each specialisation
KERNELS = {"triton": 2}  # of a path; of the others that Triton may compile:
OTHER_KERNELS = 6
EAGER_LAUNCH_S, GRAPH_LAUNCH_S = 5e-6, 1.5e-6
COUNTED_LAUNCH_S = 40e-6  # more, where a dispatch mode counts the operators
CAPTURE_S = 30e-3  # and what the calls in it take
IMPORT_S = 4.0  # of another library, once a process
COLLECT_S = 0.05  # Python's collector, once for each case and mode
SYNCHRONIZE_S = 10e-6
FLOPS = {"float64": 50e12, "float32": 40e12, "bfloat16": 500e12, "float16": 500e12}
BYTES_S = 2.5e12
NORMALS_S = 8e-9  # torch.randn, one number on one core
TRANSFER_S = 5e9  # bytes a second, from pageable memory
MEMORY, L2 = 78 << 30, 50 << 20


class Call:
    """What one call of a provider takes, and the N x N matrices of float32 that it holds."""

    def __init__(self, launches, flops=0.0, moved=0.0, overhead=30e-6, held=0.0, waits=False):
        self.launches, self.flops, self.moved = launches, flops, moved
        self.overhead, self.held, self.waits = overhead, held, waits


def assumed(name, case) -> Call:
    """The call of this provider on this case."""
    n, d, backward = case.n, case.d, case.operation != FORWARD
    pairs, products, row_bytes = n * n, 2.0 * n * n * d * (3 if backward else 1), 4 * n * d
    if case.backbone:
        return Call(1500, 36 * 3e9, 36 * 2e8)
    name = _path_of(name, case)
    if name in PATHS and name not in ("reference", "native"):
        if name == "triton":
            return Call(2, products * 4 / 3, 4 * row_bytes, 80e-6)
        launches = 355 + n // 69  # of a path by second moments, as it stands: quadratic in N
        return Call(launches, 10.0 * n * d * d, 0.5 * pairs * d * 4e-3 + 5 * row_bytes, 80e-6)
    dense = {  # launches, matrices swept, matrices held
        "reference": (160, 40, 12), "naive": (140, 40, 12), "eager": (50, 20, 8),
        "compiled naive": (10, 8, 6), "compiled eager": (8, 6, 4), "native": (2, 2, 0),
    }  # fmt: skip
    if name in dense:
        launches, sweeps, held = dense[name]
        return Call(launches * (2 if backward else 1) // 2, products, 4 * sweeps * pairs, held=held)
    if name.startswith("pml"):
        cubes = n / 2 if name == "pml triplet" else 1
        return Call(300, products, 4 * 60 * pairs * cubes, 500e-6, held=12 * cubes, waits=True)
    if name == "tiled SupCon":
        return Call(40 * (1 + pairs // providers.TiledSupCon.PAIRS), products, 4 * 20 * pairs)
    if name == "Liger InfoNCE":
        return Call(60, products, 4 * 4 * pairs, 300e-6)
    if name == providers.PAIR_PRODUCTS:
        return Call(3, products, 4 * 3 * pairs, 0.0, held=1)
    if name == providers.MOMENT_PRODUCTS:
        return Call(40, 6.0 * n * d * d, 3 * row_bytes, 0.0)
    return Call(*((12, 0, 6 * row_bytes) if name == providers.ROW_MOVES else (2, 0, row_bytes)))


def _path_of(name, case) -> str:
    """The path that a provider of ours takes; the name itself of the others."""
    if name in (pairs_cost.TILES, pairs_cost.PANELS):
        return "triton"
    if name in ("auto", providers.HALF):
        return "triton" if case.n <= 3 * case.d else "gram"
    return name


class SimulatedGPU:
    """Time, and what it is spent on."""

    def __init__(self) -> None:
        self.now, self.replay_s, self.capturing, self.sync_error = 0.0, 0.0, False, False
        self.compiled: set[object] = set()
        self.spent: Counter[str] = Counter()
        self.processes = 0
        self.breaking: set[str] = set()
        self.breaking_capture: set[str] = set()
        self.is_broken = self.is_stuck_in_capture = False

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def advance(self, seconds: float, what: str) -> None:
        self.now += seconds
        self.spent[what] += seconds

    def synchronize(self) -> None:
        self.advance(SYNCHRONIZE_S, "synchronisation")
        if self.is_broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def restart(self) -> None:
        """A fresh process."""
        self.processes += 1
        self.compiled = set()
        self.is_broken = self.is_stuck_in_capture = False
        self.advance(PROCESS_S, "processes")

    def call(self, name: str, case) -> None:
        """One call by a provider, wherever it is made."""
        cost = assumed(name, case)
        if name == "native" and case.n > 64:
            raise ValueError("native does not take this input")
        if 4.0 * cost.held * case.n**2 > MEMORY:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if cost.waits and self.sync_error:
            raise RuntimeError("called a synchronizing CUDA operation")
        if name in self.breaking or self.is_broken:
            self.is_broken = True
            self.synchronize()
        if self.capturing and (cost.waits or name in self.breaking_capture):
            self.is_stuck_in_capture = True
            raise torch.AcceleratorError("CUDA error: operation failed during capture")
        self._compile(name, case)
        replay = cost.launches * GRAPH_LAUNCH_S
        replay += max(cost.flops / FLOPS[case.dtype], cost.moved / BYTES_S)
        host = cost.overhead + cost.launches * EAGER_LAUNCH_S
        if isinstance(_get_current_dispatch_mode(), counting.Operations):
            host += cost.launches * COUNTED_LAUNCH_S
        if self.capturing:
            self.replay_s += replay
            self.advance(host, "captures")
        else:
            self.advance(max(host, replay), "calls")

    def _compile(self, name: str, case) -> None:
        """The first call of a library imports it; that of a specialisation compiles it."""
        library = next((word for word in ("pml", "Liger", "CE") if name.startswith(word)), None)
        if library not in (None, *self.compiled):
            self.compiled.add(library)
            self.advance(IMPORT_S, "imports")
        key, seconds = (name, case), COMPILE_S
        if not name.startswith("compiled"):
            path = _path_of(name, case)
            if path not in PATHS or path in ("native", "reference"):
                return
            key = (path, case.d, case.dtype, case.operation, case.n % 16 == 0)
            seconds = KERNEL_S * KERNELS.get(path, OTHER_KERNELS)
        if key not in self.compiled:
            self.compiled.add(key)
            self.advance(seconds, "compilation")

    @contextmanager
    def graph(self, graph):
        self.capturing, self.replay_s = True, 0.0
        self.advance(CAPTURE_S, "captures")
        try:
            yield
            graph.seconds = self.replay_s
        finally:
            self.capturing = False


def install(monkeypatch) -> SimulatedGPU:
    """Replace torch.cuda's names, the clocks, the providers, inputs and judge of the bench."""
    gpu = SimulatedGPU()

    class Graph:
        def replay(self) -> None:
            gpu.advance(self.seconds, "replays")

    class Stream:
        def wait_stream(self, other) -> None:
            pass

    @contextmanager
    def stream(_):
        yield

    default, other = Stream(), Stream()
    for name, fake in {
        "synchronize": gpu.synchronize,
        "reset_peak_memory_stats": lambda *_: None, "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20, "Stream": Stream,
        "current_stream": lambda: other if gpu.is_stuck_in_capture else default,
        "default_stream": lambda: default,
        "CUDAGraph": Graph, "graph": gpu.graph, "stream": stream,
        "get_device_name": lambda *_: "simulated H100",
        "is_available": lambda: True,
        "set_sync_debug_mode": lambda mode: setattr(gpu, "sync_error", mode == "error"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    for module in (timing, measure, run, forecast):
        monkeypatch.setattr(module, "time", gpu, raising=False)
    monkeypatch.setattr(machine, "second_level_cache", lambda _: L2)
    _simulate_limits(monkeypatch, gpu)
    collector = SimpleNamespace(
        collect=lambda: gpu.advance(COLLECT_S, "collector"), disable=int, enable=int
    )
    monkeypatch.setattr(timing, "gc", collector)
    monkeypatch.setattr(measure, "_counted", lambda _, path, problem: {"path": path, "flops": 1})
    monkeypatch.setattr(measure, "Gate", lambda problem: _Judge(gpu, problem))
    monkeypatch.setattr(measure, "_path", _impl)
    monkeypatch.setattr(measure, "make_problem", lambda case: _problem(gpu, case))
    monkeypatch.setattr(measure.steps, "make_problem", lambda case: _problem(gpu, case))
    known = providers.providers()
    make = known["auto"].make
    for name in (*PATHS, "auto"):
        known[name] = providers.Provider(name, providers.OURS, make)
    for name in (pairs_cost.TILES, pairs_cost.PANELS):
        known[name] = providers.Provider(name, providers.SCHEDULE, make)
    losses = {name: _faked(gpu, provider) for name, provider in known.items()}
    steps = {name: _faked(gpu, p) for name, p in measure.steps.providers().items()}
    for module in (measure, run):
        monkeypatch.setattr(module, "providers", lambda: losses)
    monkeypatch.setattr(measure.steps, "providers", lambda: steps)
    monkeypatch.setattr(machine, "commit", lambda: "0123456789")
    return gpu


def _faked(gpu, provider):
    """The provider with calls that only take time; a floor tries its candidates first."""

    def make(problem):
        case, name = problem.case, provider.name
        trials = {providers.PAIR_PRODUCTS: 3, providers.MOMENT_PRODUCTS: 9}.get(name, 0)

        def step(x, labels):
            gpu.call(name, case)
            return None, None

        if trials:
            floors._fastest([lambda x: step(x, None)] * trials, torch.empty(()))
        return step

    return replace(provider, make=make, missing=None)


class _Judge:
    def __init__(self, gpu, problem) -> None:
        self._gpu, self._case = gpu, problem.case

    @cached_property
    def truth(self) -> SimpleNamespace:
        case = self._case
        flops = 6.0 * case.n * case.d**2 + 4.0 * case.d * min(case.n**2, max(1 << 22, 16 * case.n))
        launches = 60 + 12 * case.c  # a loop over classes
        self._gpu.advance(launches * 8e-6 + flops / FLOPS["float64"], "truth")
        return SimpleNamespace(active=1.0)

    def judge(self, provider, loss, gradient) -> Errors:
        if provider.judge == "itself":
            for _ in range(3 if self._case.n > 2048 else 1):
                self._gpu.call(provider.name, replace(self._case, n=min(2048, self._case.n)))
        self._gpu.advance(200e-6, "judging")
        return Errors(0.0, 0.0)


def _impl(provider, problem) -> str:
    is_ours = provider.group in (providers.OURS, providers.SCHEDULE)
    return _path_of(provider.name, problem.case) if is_ours else ""


def _problem(gpu, case) -> Problem:
    numbers = case.n * case.d if not case.backbone else case.n * 128 * 128
    gpu.advance(numbers * (NORMALS_S + 4 / TRANSFER_S) + 2e-3, "inputs")
    x = torch.empty(case.n, case.d, dtype=DTYPES[case.dtype], device="meta")
    x.requires_grad_(case.operation != FORWARD)
    return Problem(case, x, torch.arange(case.n) % case.c, 0.9)


def _simulate_limits(monkeypatch, gpu) -> None:
    real, known = machine.limits.__wrapped__, {}

    def seconds(call) -> float:
        with counting.Operations() as operations:
            call()
        one = max(operations.flops / FLOPS["float32"], operations.bytes / BYTES_S) + 20e-6
        gpu.advance(6 * one, "limits")
        return one

    def limits(device, dtype, threads):
        key = (gpu.processes, dtype)
        if key not in known:
            known[key] = real("meta", dtype, threads)
        return known[key]

    monkeypatch.setattr(machine, "_median_seconds", seconds)
    monkeypatch.setattr(machine, "limits", limits)


class SimulatedWorker:
    """Measures in this process, which is as fresh as a new one after each loss."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self._gpu, self._runs = gpu, False

    def run(self, job: Job) -> list[table.Row] | Lost:
        if not self._runs:
            self._gpu.restart()
            self._runs = True
        try:
            return measure.measure(job, lambda _: None)
        except measure.LostProcess as error:
            self.stop()
            return Lost(error.provider, error.status, error.mode)

    def stop(self) -> None:
        self._runs = False


def main(names: list[str]) -> None:
    """A line for each suite: seconds in all, and of what."""
    known = suites("cuda")
    for name in names or [name for name in DEFAULT if name in known]:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
            gpu = install(patch)
            run.run_suite(known[name], SimulatedWorker(gpu))
        parts = ", ".join(f"{what} {s:.0f}" for what, s in gpu.spent.most_common() if s >= 1)
        print(f"{name:<14}{gpu.now:4.0f} s: {parts}")


if __name__ == "__main__":
    main(sys.argv[1:])
