"""One case: examine every provider, judge it, time in turns those that passed, make the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bstriplet_kernels import plan
from bstriplet_kernels.checks import make_spec
from bstriplet_kernels.paths import PATHS

from . import machine, steps, timing
from .cases import DTYPES, FORWARD, Case, Problem, make_problem
from .counting import Operations, peak_memory, unreturned_memory
from .gate import Gate
from .providers import (
    BASELINE,
    COMPILED,
    FLOOR,
    FORM,
    GROWTH,
    OURS,
    PEER,
    SCHEDULE,
    Provider,
    Step,
    forced,
    providers,
)  # fmt: skip
from .table import EAGER, GRAPH, OK, Row

OUT_OF_MEMORY = "out of memory"
_NO_MEMORY = (  # torch on the CPU, csrc/, C++, CUDA
    "can't allocate memory", "cannot allocate memory", "bad_alloc", OUT_OF_MEMORY
)  # fmt: skip
COMPILE_LIMIT_S = 300.0
_FREE_CALL_S = 0.5
_MOST_UNRETURNED = 1 << 30
_LARGE_N = 4096
_MOST_BUFFERS = 16
_REPLAY_S = 50e-3
_CAPTURE_ORDER = (FLOOR, OURS, GROWTH, SCHEDULE, FORM, COMPILED, BASELINE, PEER)
"""A capture that breaks takes the process with it: those that may break come last."""


class SpentProcess(Exception):
    """Memory ran out, and what was freed is not available to this process any more."""


class LostProcess(Exception):
    """The GPU refuses this process from now on: the provider at work, its status, its mode.

    mode: GRAPH where only a capture or a replay failed, else "".
    """

    def __init__(self, provider: str, status: str, mode: str = "") -> None:
        super().__init__(provider, status, mode)
        self.provider, self.status, self.mode = provider, status, mode


class Job(NamedTuple):
    """One case for one worker.

    skip: providers that are not tried, and what their rows say. uncaptured: providers that are not
    tried in a CUDA graph, and what their rows of that mode say.
    """

    suite: str
    case: Case
    names: tuple[str, ...]
    skip: dict[str, str]
    budget: timing.Budget
    uncaptured: tuple[tuple[str, str], ...] = ()


class Starting(NamedTuple):
    """Sent before anything that may not return: who, and after how many seconds to give up."""

    provider: str
    limit_s: float


@dataclass
class _Candidate:
    """A provider on its way to a row."""

    provider: Provider
    row: Row
    step: Step | None = None
    call_s: float = 0.0
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure(job: Job, tell: Callable[[Starting], None]) -> list[Row]:
    """A row for each provider of the job, in its order.

    Raises:
        SpentProcess: the provider told last ran out of memory, and the process with it.
        LostProcess: a provider broke the process's use of the GPU.
    """
    torch.set_num_threads(job.case.threads)
    make = steps.make_problem if job.case.backbone else make_problem
    known = steps.providers() if job.case.backbone else providers()
    problem = make(job.case)
    gate = Gate(problem)
    active = None if job.case.backbone else gate.truth.active  # found now, on nobody's time
    limits = machine.limits(job.case.device, DTYPES[job.case.dtype], job.case.threads)
    blank = replace(
        _blank_row(job),
        active_share=active,
        gemm_flops_s=limits.gemm,
        bandwidth_bytes_s=limits.bandwidth,
    )
    candidates = [
        _Candidate(known[name], replace(blank, provider=name, group=known[name].group))
        for name in job.names
    ]
    flops: dict[str, int] = {}
    for candidate in candidates:
        provider = candidate.provider
        reason = job.skip.get(provider.name)
        if reason is None and provider.missing is not None:
            reason = f"not installed: {provider.missing}"
        if reason is None:
            is_compiled = provider.group == COMPILED
            tell(Starting(provider.name, COMPILE_LIMIT_S if is_compiled else job.budget.limit_s))
            try:
                reason = _examine(candidate, problem, gate, flops, job.budget.limit_s, tell)
            except Exception as error:
                reason = _failure(error)
                if reason == OUT_OF_MEMORY and _is_spent(job.case.device):
                    raise SpentProcess from error
                if not _is_usable(job.case.device):
                    raise LostProcess(provider.name, reason) from error
        if reason == OUT_OF_MEMORY and job.case.device == "cuda":
            torch.cuda.empty_cache()  # torch would keep it from cuBLAS, graphs and other libraries
        candidate.row = replace(candidate.row, status=reason or OK)
    _time(candidates, problem, job, tell)
    return [row for candidate in candidates for row in _rows(candidate)]


def _examine(
    candidate: _Candidate,
    problem: Problem,
    gate: Gate,
    flops: dict[str, int],
    limit_s: float,
    tell: Callable[[Starting], None],
) -> str | None:
    """Count one call, measure its memory, judge its result; return why it is refused, or None.

    A warm-up call comes first, except for large cases on a processor, whose time it would double.
    Each call has the whole limit.
    """
    provider, case = candidate.provider, problem.case
    candidate.step = step = provider.make(problem)
    is_compiled = provider.group == COMPILED
    operations = Operations()
    if case.n < _LARGE_N or is_compiled or case.device == "cuda":
        step(problem.x, problem.labels)
    seconds = 0.0

    def call() -> Any:
        nonlocal seconds
        start = time.perf_counter()
        with nullcontext() if is_compiled else operations:
            result = step(problem.x, problem.labels)
        if case.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return result

    tell(Starting(provider.name, limit_s))
    (loss, gradient), memory = peak_memory(call, case.device)
    tell(Starting(provider.name, limit_s))
    errors = gate.judge(provider, loss, gradient)
    del loss, gradient
    if seconds < _FREE_CALL_S:
        seconds = timing.expected_seconds(lambda: step(problem.x, problem.labels), case.device)
    candidate.call_s = seconds
    count: dict[str, Any] = {"flops": operations.flops, "bytes": operations.bytes}
    if is_compiled:  # what is fused is not seen; the products are those of what it compiles
        count = {"flops": flops.get(provider.base)}
    elif path := _path(provider, problem):  # no counter looks into an operator of ours
        count = _counted(provider, path, problem)
    if count["flops"] is not None:
        flops[provider.name] = count["flops"]
    candidate.row = replace(
        candidate.row,
        margin=problem.margin,
        loss_error=errors.loss,
        gradient_error=errors.gradient,
        peak_bytes=memory.allocator,
        resident_bytes=memory.resident,
        **count,
    )
    reason = errors.reason_to_refuse(problem.x.dtype)
    return None if reason is None else f"wrong: {reason}"


def _time(
    candidates: list[_Candidate],
    problem: Problem,
    job: Job,
    tell: Callable[[Starting], None],
) -> None:
    """Time all candidates that passed, in turns; keep what came out in each."""
    passed = {c.provider.name: c for c in candidates if c.row.status == OK}
    order = sorted(passed, key=lambda name: _CAPTURE_ORDER.index(passed[name].provider.group))
    if not passed:
        return
    modes = (EAGER, GRAPH) if problem.case.device == "cuda" else (EAGER,)
    buffers, uncaptured = _rotated(problem), dict(job.uncaptured)
    for mode in modes:
        turns = {}
        for name in order:
            candidate = passed[name]
            if mode == GRAPH and name in uncaptured:
                candidate.outcomes[mode] = {"status": uncaptured[name]}
                continue
            tell(Starting(name, job.budget.limit_s))
            try:
                turns[name] = _turn(candidate, problem, buffers, mode)
            except RuntimeError as error:  # what cannot be captured, above all
                status = _failure(error)
                if not _is_usable(problem.case.device):
                    raise LostProcess(name, status, mode) from error
                candidate.outcomes[mode] = {"status": status}
        tell(Starting("", _timing_limit(list(passed.values()), job.budget)))
        try:
            samples = timing.interleave(turns, {n: passed[n].call_s for n in turns}, job.budget)
        except timing.TurnError as error:
            cause = error.__cause__
            assert isinstance(cause, Exception)
            raise LostProcess(error.name, _failure(cause), "" if mode == EAGER else mode) from cause
        for name in turns:
            passed[name].outcomes[mode] = _quantiles(samples[name] or [passed[name].call_s])


def _is_spent(device: str) -> bool:
    """Whether freed memory stays unavailable to this process after memory ran out.

    On a GPU it does not, and CUDA's mappings on the host would mislead.
    """
    return device == "cpu" and unreturned_memory() > _MOST_UNRETURNED


def _is_usable(device: str) -> bool:
    """Whether the GPU still works for this process.

    After an illegal access every later call fails with the same error. After a capture that could
    not be ended, the current stream is still the one that was captured.
    """
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.cuda.current_stream() == torch.cuda.default_stream())
    except RuntimeError:
        return False


def _turn(candidate: _Candidate, problem: Problem, buffers: list[Tensor], mode: str) -> timing.Turn:
    step = candidate.step
    assert step is not None
    if problem.case.device != "cuda":
        return timing.cpu_turn(lambda: step(problem.x, problem.labels))
    calls: list[timing.Call] = [partial(step, x, problem.labels) for x in buffers]
    if mode == EAGER:
        return timing.cuda_turn(cycle(calls))
    # A longer call needs fewer copies: filling the cache takes less than 1 % of 3 ms.
    return timing.graph_turn(calls[: max(1, int(_REPLAY_S / max(candidate.call_s, 1e-9)))])


def _rotated(problem: Problem) -> list[Tensor]:
    """Up to 16 copies of the embeddings, to exceed twice the second-level cache.

    On the CPU the embeddings themselves.
    """
    if problem.case.device != "cuda":
        return [problem.x]
    cache = machine.second_level_cache(problem.case.device)
    n = min(_MOST_BUFFERS, 2 * cache // max(1, problem.x.nbytes) + 1)
    wanted = problem.x.requires_grad
    return [problem.x.detach().clone().requires_grad_(wanted) for _ in range(n)]


def _rows(candidate: _Candidate) -> Iterator[Row]:
    """A row for each mode that was tried, with its shares of the machine's best rates."""
    if not candidate.outcomes:
        yield candidate.row
    for mode, outcome in candidate.outcomes.items():
        row = replace(candidate.row, mode=mode, **outcome)
        if row.p50_ms is not None:
            row = replace(
                row,
                gemm_share=_share(row.flops, row.ms, row.gemm_flops_s),
                bandwidth_share=_share(row.bytes, row.ms, row.bandwidth_bytes_s),
            )
        yield row


def _share(count: int | None, ms: float, limit: float | None) -> float | None:
    return None if count is None or limit is None else count / (ms * 1e-3) / limit


def _quantiles(samples: list[float]) -> dict[str, Any]:
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8)) * 1e3
    return {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "repeats": len(samples)}


def _timing_limit(passed: list[_Candidate], budget: timing.Budget) -> float:
    """Generous: every call passed within its limit once already."""
    expected = sum(budget.expected(c.call_s) for c in passed)
    return budget.limit_s + 5 * expected


def _path(provider: Provider, problem: Problem) -> str:
    """The `impl` that one of our providers takes for this input; "" for other providers."""
    if provider.group not in (OURS, SCHEDULE, FORM) or problem.case.backbone:
        return ""
    if provider.group != OURS:
        return "triton" if provider.group == SCHEDULE else "gram"
    if provider.name != "auto":
        return provider.name
    spec = make_spec(problem.margin, "square", "corrected", "mean")
    wants_gradient = problem.case.operation != FORWARD
    return plan.choose(problem.x, None, spec._replace(wants_gradient=wants_gradient))


def _counted(provider: Provider, path: str, problem: Problem) -> dict[str, Any]:
    """The path's own counts, and the schedule that they are of."""
    case = problem.case
    work = plan.Work(
        case.n,
        None,
        case.d,
        DTYPES[case.dtype],
        wants_gradient=case.operation != FORWARD,
        device=case.device,
        similarity="linear" if provider.group == FORM else "square",
    )
    with forced(provider.name):
        found = PATHS[path].cost(work, problem.labels.bincount().tolist())
    return {
        "path": found.schedule or path,
        "flops": found.flops,
        "bytes": found.bytes,
        "launches": found.launches,
    }


def _failure(error: Exception) -> str:
    """One line that says why there is no time."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    is_memory = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    if is_memory or any(word in text[0] for word in _NO_MEMORY):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text[0][:160]}"


def _blank_row(job: Job) -> Row:
    case = job.case
    shared = {field.name for field in fields(Row)} & {field.name for field in fields(Case)}
    return Row(
        suite=job.suite,
        provider="",
        group="",
        mode=EAGER,
        status="",
        device=machine.device_name(case.device),
        commit="",
        versions=machine.versions(),
        eq8_flops=plan.eq8_flops(case.n, case.d, case.c),
        **{name: getattr(case, name) for name in shared - {"device"}},
    )


def failed_row(job: Job, name: str, group: str, status: str) -> Row:
    """The row of a provider that took its process with it."""
    return replace(_blank_row(job), provider=name, group=group, status=status)
