"""How long the work takes: what its budgets allow, corrected by what the jobs before it took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from .measure import Job
from .providers import COMPILED

_START_S = 10.0
"""A process, torch, the device's context, the machine's limits."""
_COMPILE_S = 25.0
_CASE_S, _PROVIDER_S = 0.5, 0.3
"""An input and its truth; a provider's examination, its kernels' compilation, its captures."""


def run_seconds(jobs: Iterable[Job]) -> float:
    """The seconds that a run of these jobs should take, where their calls are short."""
    return _START_S + sum(_measuring_s(job) + _compiling_s(job) for job in jobs)


class TimeLimit:
    """Lets a job begin where it is expected to end in the seconds that are left."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._expected = self._taken = 0.0

    def predict(self, job: Job) -> float:
        """Seconds of the job, by the ratio of taken to expected time so far."""
        if not self._expected:
            return run_seconds([job])
        return _measuring_s(job) * self._taken / self._expected + _compiling_s(job)

    def left(self) -> float:
        """Seconds until the end."""
        return self._end - time.monotonic()

    def learn(self, job: Job, seconds: float) -> None:
        """Remember what a job took."""
        if not self._expected:
            self._expected = _START_S
        self._expected += _measuring_s(job)
        self._taken += max(0.0, seconds - _compiling_s(job))


def _measuring_s(job: Job) -> float:
    modes = 2 if job.case.device == "cuda" else 1
    return _CASE_S + len(job.names) * (_PROVIDER_S + modes * job.budget.expected(0.0))


def _compiling_s(job: Job) -> float:
    return _COMPILE_S * sum(name.startswith(COMPILED) for name in job.names)
