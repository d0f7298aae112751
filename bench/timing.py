"""The one timing loop: variants take turns, in a changing order, until each has its samples."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Turn = Callable[[int], list[float]]

_LONG_CALL_S, _SINGLE_CALL_S = 2.0, 10.0
_NO_WARM_UP_S = 0.1
_MOST_WARM_UPS = 3


class TurnError(Exception):
    """A variant failed in its turn: its name; the cause is what it raised."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Budget:
    """How long one variant is measured: seconds in all, and the fewest and the most samples.

    limit_s: a variant whose first call takes longer is given up. turn_s: how long a turn is.
    """

    seconds: float = 0.4
    least: int = 3
    most: int = 1000
    limit_s: float = 60.0
    turn_s: float = 2e-3

    def is_spent(self, call_s: float, seconds: float, samples: int) -> bool:
        """Whether a variant with these seconds and samples ends."""
        least = self._least(call_s)
        return samples >= least and (least == 0 or seconds >= self.seconds or samples >= self.most)

    def expected(self, call_s: float) -> float:
        """Seconds of all turns of a variant, its warm-up included, where a turn is a sample."""
        turn_s = max(self.turn_s, call_s)
        warm_up_s = turn_s if call_s < _NO_WARM_UP_S else 0.0
        least = self._least(call_s)
        return warm_up_s + max(self.seconds, least * turn_s) if least else 0.0

    def _least(self, call_s: float) -> int:
        """`least` for a call of up to 2 s, one for a longer one.

        None for a call of more than 10 s: its examination is its sample.
        """
        if call_s > _SINGLE_CALL_S:
            return 0
        return self.least if call_s <= _LONG_CALL_S else 1


def interleave(
    turns: Mapping[str, Turn], call_s: Mapping[str, float], budget: Budget
) -> dict[str, list[float]]:
    """Seconds a call, some samples for each variant.

    turns: turn(n) makes n calls and returns a sample for each (or one for all of them). call_s: the
    expected seconds a call. Where a call is short the first turns of each variant are a warm-up,
    until one confirms what was expected (a turn of a single call confirms nothing): they are
    dropped, and their times plan the turns that follow.

    Raises:
        TurnError: a variant failed.
    """
    expected = dict(call_s)
    spent = dict.fromkeys(turns, 0.0)
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    shuffle = random.Random(0).shuffle

    def calls_of(name: str) -> int:
        return max(1, int(budget.turn_s / max(expected[name], 1e-9)))

    def take(name: str) -> list[float]:
        try:
            return turns[name](calls_of(name))
        except Exception as error:
            raise TurnError(name) from error

    with _without_collector():
        for name in order:
            before = expected[name] if calls_of(name) > 1 else math.inf
            for _ in range(_MOST_WARM_UPS if call_s[name] < _NO_WARM_UP_S else 0):
                expected[name] = min(expected[name], statistics.median(take(name)))
                if expected[name] > before / 2:
                    break
                before = expected[name]
        while order := [
            name
            for name in order
            if not budget.is_spent(call_s[name], spent[name], len(samples[name]))
        ]:
            shuffle(order)
            for name in order:
                start = time.perf_counter()
                samples[name] += take(name)
                spent[name] += time.perf_counter() - start
    return samples


def cpu_turn(call: Call) -> Turn:
    """Each call by the wall clock."""

    def turn(n: int) -> list[float]:
        samples = []
        for _ in range(n):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return samples

    return turn


def cuda_turn(calls: Iterator[Call]) -> Turn:
    """n calls between two synchronisations, by the wall clock: what a training loop pays.

    calls: the same work on one buffer after another, endlessly. The sample is the turn's mean.
    """

    def turn(n: int) -> list[float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            next(calls)()
        torch.cuda.synchronize()
        return [(time.perf_counter() - start) / n]

    return turn


def graph_turn(calls: Sequence[Call]) -> Turn:
    """Replays of one CUDA graph that holds every call once, each on its own buffer.

    Raises:
        RuntimeError: the call cannot be captured. One that synchronises is found before a capture
            begins, because a capture that breaks may take the process with it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def turn(n: int) -> list[float]:
        replays = -(-n // len(calls))
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        return [(time.perf_counter() - start) / (replays * len(calls))]

    return turn


def expected_seconds(call: Call, device: str) -> float:
    """The least time of a few calls (two where a call is long), to plan samples with.

    The first call may be many times slower than the others.
    """

    def once() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    more = max(1, min(5, int(0.1 / max(first, 1e-9))))
    return min([first, *(once() for _ in range(more))])


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
