"""The one timing loop: variants take turns, in a changing order, until each has its samples."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Turn = Callable[[int], list[float]]

_TURN_S = 2e-3
_LONG_CALL_S, _SINGLE_CALL_S = 2.0, 10.0


@dataclass(frozen=True)
class Budget:
    """How long one variant is measured: seconds in all, and the fewest and the most samples.

    limit_s: a variant whose first call takes longer is given up.
    """

    seconds: float = 0.4
    least: int = 3
    most: int = 1000
    limit_s: float = 60.0

    def samples(self, call_s: float) -> int:
        """What fits the time, and `least` of a call of up to 2 s, one of a longer one.

        None of a call of more than 10 s: it was made once already, and that is its sample.
        """
        if call_s > _SINGLE_CALL_S:
            return 0
        least = self.least if call_s <= _LONG_CALL_S else 1
        return min(self.most, max(least, int(self.seconds / max(call_s, 1e-9))))


def interleave(
    turns: Mapping[str, Turn], call_s: Mapping[str, float], budget: Budget
) -> dict[str, list[float]]:
    """Seconds a call, some samples for each variant.

    turns: turn(n) makes n calls and returns a sample for each (or one for all of them). call_s: the
    expected seconds a call. A variant's turn is 2 ms of calls in a row, or one call; variants in
    shuffled order, round after round, so that what disturbs the machine disturbs all alike. The
    first turn of each is a warm-up and is dropped where a call is short.
    """
    wanted = {name: budget.samples(call_s[name]) for name in turns}
    calls = {name: max(1, int(_TURN_S / max(call_s[name], 1e-9))) for name in turns}
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    shuffle = random.Random(0).shuffle
    with _without_collector():
        for name in order:
            if call_s[name] < 0.1:
                turns[name](calls[name])
        while order := [name for name in order if len(samples[name]) < wanted[name]]:
            shuffle(order)
            for name in order:
                samples[name] += turns[name](calls[name])
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

    calls: the same work on one buffer after the other, without end.
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
    """Replays of one CUDA graph that holds every call once, each on its own buffer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def turn(n: int) -> list[float]:
        replays = max(1, n // len(calls))
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        return [(time.perf_counter() - start) / (replays * len(calls))]

    return turn


def seconds_once(call: Call, device: str) -> float:
    """One call, waited for."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def expected_seconds(call: Call, device: str) -> float:
    """The least of a few calls, two where a call is long: what to plan samples with.

    The first may be many times slower than the others: then it says nothing of them.
    """
    first = seconds_once(call, device)
    more = max(1, min(5, int(0.1 / max(first, 1e-9))))
    return min([first, *(seconds_once(call, device) for _ in range(more))])


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
