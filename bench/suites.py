"""What is measured: suites of cases, each a file of results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from .cases import DTYPES, FORWARD, FORWARD_BACKWARD, TRAINING_STEP, Case
from .providers import BASELINE, COMPILED, FLOOR, OURS, PEER
from .timing import Budget

BACKBONES = {
    "efficientnet_b1": 1280,
    "mobilenetv3_small_100": 1024,
    "shufflenet_v2": 1024,
    "peleenet": 704,
}
"""The paper's backbones as timm or `bstriplet` calls them, and D of their embeddings."""
_ALL = (FLOOR, BASELINE, COMPILED, PEER, OURS)
_UNCOMPILED = (FLOOR, BASELINE, PEER, OURS)
_BUDGET = Budget()
_GPU_SPEEDUP = 4  # a GPU's clock scatters less, and each provider is measured in two modes
_BOTH = (FORWARD, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Suite:
    """Cases in ascending size, the groups of providers that run on them, and the time for each."""

    name: str
    purpose: str
    cases: tuple[Case, ...]
    groups: tuple[str, ...]
    budget: Budget = _BUDGET


def suites(device: str = "cpu") -> dict[str, Suite]:
    """All suites by name, in the order in which they run."""
    every = (
        Suite("smoke", "every line of the framework, in seconds", _smoke(), _ALL, Budget(0.01)),
        Suite("targets", "the work that the targets name", _targets(device),
              (FLOOR, BASELINE, COMPILED, OURS)),
        Suite("paper", "the paper's batches, Fig. 5", _paper(), _UNCOMPILED),
        Suite("sweep", "N to a million", _sweep(), _UNCOMPILED),
        Suite("classes", "2 to N/2 classes, even and not", _classes(), (FLOOR, OURS)),
        Suite("dtypes", "precisions", _dtypes(), (FLOOR, BASELINE, OURS)),
        Suite("threads", "one thread and all", _threads(), (FLOOR, BASELINE, OURS)),
        Suite("hinge", "the share of rows with h_i > 0", _hinge(), (BASELINE, OURS)),
        Suite("crossover", "which path is fastest where", _crossover(), (OURS,), Budget(0.15)),
        Suite("training_step", "a step with and without the loss", _training_steps(),
              (BASELINE, OURS), Budget(2.0)),
    )  # fmt: skip
    found = {suite.name: suite for suite in every}
    if device == "cpu":
        return found
    return {
        name: replace(
            suite,
            cases=tuple(_on_gpu(suite.cases, device)),
            budget=replace(suite.budget, seconds=suite.budget.seconds / _GPU_SPEEDUP),
        )
        for name, suite in found.items()
        if name != "threads"
    }


DEFAULT = (
    "targets", "paper", "sweep", "classes", "dtypes", "threads", "hinge", "crossover",
    "training_step",
)  # fmt: skip


def _on_gpu(cases: tuple[Case, ...], device: str) -> Iterator[Case]:
    """A GPU's cases; its threads do not matter."""
    return (replace(case, device=device) for case in cases)


def _smoke() -> tuple[Case, ...]:
    small = Case(12, 16, 3)
    return (small, replace(small, operation=FORWARD), Case(64, 16, 4, active=0.5))


def _targets(device: str) -> tuple[Case, ...]:
    """What the sweep does not hold already."""
    cpu = (
        Case(36, 128, 3), Case(36, 1280, 3), Case(256, 512, 8), Case(1024, 128, 3),
        Case(1024, 512, 8), Case(4096, 128, 3), Case(65536, 128, 8192),
    )  # fmt: skip
    return cpu if device == "cpu" else (*cpu, Case(4096, 512, 8, "bfloat16"))


def _paper() -> tuple[Case, ...]:
    batches = (6, 12, 18, 24, 30, 36)
    return tuple(Case(n, 1280, 3, operation=o) for n, o in product(batches, _BOTH))


def _sweep() -> tuple[Case, ...]:
    """Each D up to a size that takes seconds a call; the forward alone where N is moderate."""
    last = {128: 1 << 20, 512: 1 << 17, 1280: 1 << 14}
    sizes = (64, 256, 1024, 4096, 1 << 14, 1 << 17, 1 << 18, 1 << 20)
    both = [Case(n, 128, 10, operation=FORWARD) for n in sizes if n <= 4096]
    return (*both, *(Case(n, d, 10) for d in last for n in sizes if n <= last[d]))


def _classes() -> tuple[Case, ...]:
    counts = (2, 10, 100, 1024, 2048)
    even = [Case(4096, 128, c) for c in counts]
    uneven = [Case(4096, 128, c, balance=b) for b, c in product(("zipf", "dominant"), (10, 100))]
    return tuple(even + uneven)


def _dtypes() -> tuple[Case, ...]:
    sizes = ((36, 1280, 3), (1024, 512, 8), (4096, 128, 10))
    return tuple(Case(*size, dtype) for size, dtype in product(sizes, DTYPES))


def _threads() -> tuple[Case, ...]:
    sizes = ((36, 1280, 3), (1024, 512, 8), (4096, 128, 10))
    every = sorted({1, Case(2, 1, 1).threads})
    return tuple(Case(*size, threads=t) for size, t in product(sizes, every))


def _hinge() -> tuple[Case, ...]:
    shares = (0.0, 0.01, 0.1, 0.5, 1.0)
    return tuple(Case(n, 128, 10, active=a) for n, a in product((1024, 4096), shares))


def _crossover() -> tuple[Case, ...]:
    """A log grid of 60 points: ten N by six D, the classes changing along both."""
    ns = (16, 36, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    ds = (32, 64, 128, 256, 512, 1280)
    classes = (2, 8, 64)
    return tuple(
        Case(n, d, min(classes[(i + j) % 3], n // 2))
        for (i, n), (j, d) in product(enumerate(ns), enumerate(ds))
    )


def _training_steps() -> tuple[Case, ...]:
    """For each backbone its step, and the loss alone on embeddings of its dimension."""
    whole = [Case(36, d, 3, operation=TRAINING_STEP, backbone=b) for b, d in BACKBONES.items()]
    return (*whole, *(Case(36, d, 3) for d in sorted(set(BACKBONES.values()))))
