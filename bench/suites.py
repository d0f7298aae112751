"""What is measured: suites of cases, each a file of results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from bstriplet_kernels.paths import PATHS

from .cases import DTYPES, FORWARD, FORWARD_BACKWARD, TRAINING_STEP, Case
from .providers import (
    BASELINE,
    COMPILED,
    EMPTY,
    FLOOR,
    FORM,
    HALF,
    LIGER,
    MOMENT_PRODUCTS,
    OURS,
    PAIR_PRODUCTS,
    PEER,
    PML,
    ROW_MOVES,
    SCHEDULE,
)  # fmt: skip
from .timing import Budget

BACKBONES = {
    "efficientnet_b1": 1280,
    "mobilenetv3_small_100": 1024,
    "shufflenet_v2": 1024,
    "peleenet": 704,
}
"""The paper's backbones as timm or `bstriplet` calls them, and D of their embeddings."""
_UNCOMPILED = (FLOOR, BASELINE, PEER, OURS)
_NO_PEERS = (FLOOR, BASELINE, OURS)
_FAST = (*(name for name in PATHS if name != "reference"), "auto")
_FAST_AND_BASELINE = (FLOOR, BASELINE, *_FAST)
_COMPILED_NAIVE = "compiled naive"
_LINEAR = (EMPTY, MOMENT_PRODUCTS, ROW_MOVES, "gram", "auto")  # the others would take N^2
_BUDGET = Budget()
_GPU_SPEEDUP = 4  # a GPU's clock scatters less, and each provider is measured in two modes
_GPU_MOST_S = 0.5
_GPU_LIMIT_S = 30.0  # of an examined call, Triton's compilation included
_GPU_TURN_S = 25e-3  # beside which two synchronisations, about 20 us, do not count
_BOTH = (FORWARD, FORWARD_BACKWARD)


class Part(NamedTuple):
    """Cases in ascending size, and what runs on them.

    wanted: groups or names of providers. budget: where it is not the suite's.
    """

    cases: tuple[Case, ...]
    wanted: tuple[str, ...]
    budget: Budget | None = None


@dataclass(frozen=True)
class Suite:
    """Parts that share a file, and the time for each provider on each case."""

    name: str
    purpose: str
    parts: tuple[Part, ...]
    budget: Budget = _BUDGET

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases of all parts."""
        return tuple(case for part in self.parts for case in part.cases)

    def work(self) -> Iterator[tuple[Case, tuple[str, ...], Budget]]:
        """Each case, what runs on it, and how long. What compiles comes last, as it takes longest.

        A case with compiled forms comes twice: first without them, at the end with everything,
        because ratios are taken between providers that took turns with each other.
        """
        every = [
            (case, part.wanted, part.budget or self.budget)
            for part in self.parts
            for case in part.cases
        ]
        for case, wanted, budget in every:
            yield case, tuple(name for name in wanted if not _compiles(name)), budget
        yield from (work for work in every if any(map(_compiles, work[1])))


def _compiles(wanted: str) -> bool:
    """Whether a group or a provider is of compiled forms."""
    return wanted.startswith(COMPILED)


def suites(device: str = "cpu") -> dict[str, Suite]:
    """All suites by name, in the order in which they run."""
    every = (
        Suite("small", "the paper's batch alone", _paper_batch(), Budget(0.8)),
        Suite("first", "eight sizes, and two large ones once", _first(), Budget(0.8)),
        Suite("targets", "the work that the targets name", _targets(device), Budget(0.6, least=5)),
        Suite("paper", "the paper's batches, Fig. 5", _paper(), Budget(0.15)),
        Suite("sweep", "N to a million", _sweep(device), Budget(0.15)),
        Suite("million", "a million rows of 512 and 1,280; minutes each", _million()),
        Suite("classes", "2 to N/2 classes, even and not", _classes(), Budget(0.15)),
        Suite("dtypes", "precisions", _dtypes(device), Budget(0.15)),
        Suite("threads", "one thread and all", _threads()),
        Suite("hinge", "the share of rows with h_i > 0", _hinge(), Budget(0.2)),
        Suite("crossover", "which path is fastest where", _crossover(device), Budget(0.15)),
        Suite("linear", "sums of classes against second moments", _linear(device), Budget(0.2)),
        Suite("training_step", "a step with and without the loss", _training_steps(), Budget(1.0)),
    )
    found = {suite.name: suite for suite in every}
    if device == "cpu":
        return found
    return {
        name: replace(
            suite,
            parts=tuple(_on(device, part) for part in suite.parts),
            budget=_quicker(suite.budget),
        )
        for name, suite in found.items()
        if name != "threads"
    }


DEFAULT = (
    "targets", "paper", "sweep", "classes", "dtypes", "threads", "hinge", "crossover", "linear",
    "training_step",
)  # fmt: skip


def _on(device: str, part: Part) -> Part:
    """The part on a GPU; its threads do not matter."""
    cases = tuple(replace(case, device=device) for case in part.cases)
    return part._replace(cases=cases, budget=part.budget and _quicker(part.budget))


def _quicker(budget: Budget) -> Budget:
    seconds = min(_GPU_MOST_S, budget.seconds / _GPU_SPEEDUP)
    limit_s = min(_GPU_LIMIT_S, budget.limit_s)
    return replace(budget, seconds=seconds, limit_s=limit_s, turn_s=_GPU_TURN_S)


def _paper_batch() -> tuple[Part, ...]:
    return (Part((Case(36, 1280, 3), Case(36, 1280, 3, "bfloat16")), (EMPTY, "naive", "native")),)


def _first() -> tuple[Part, ...]:
    """Every path in the first minutes on a device, in ascending size."""
    pairs = (EMPTY, "naive", "gram", SCHEDULE)
    return (
        Part((Case(36, 1280, 3), Case(36, 1280, 3, "bfloat16")), (EMPTY, "naive", *_FAST)),
        Part((Case(256, 512, 8), Case(1024, 128, 3), Case(4096, 128, 3)), pairs),
        Part((Case(4096, 512, 8, "bfloat16"), Case(1 << 14, 128, 10)), pairs),
        Part((Case(1 << 16, 128, 10),), (EMPTY, "gram", SCHEDULE)),
        Part((Case(1 << 18, 128, 10), Case(1 << 20, 128, 10)), ("gram",), Budget(0.2, least=1)),
    )


def _targets(device: str) -> tuple[Part, ...]:
    """Compiled forms only where a target names them, because each takes long to compile.

    A GPU's targets name fewer; `crossover` has the smaller sizes.
    """
    few_classes, many_classes = Case(1 << 18, 128, 10), Case(65536, 128, 8192)
    if device != "cpu":
        return (
            Part((Case(36, 1280, 3),), (*_NO_PEERS, _COMPILED_NAIVE)),
            Part((Case(4096, 512, 8, "bfloat16"), Case(4096, 128, 3)), _FAST_AND_BASELINE),
            Part((few_classes,), (*_LINEAR, HALF), Budget(1.0)),
            Part((Case(1 << 16, 128, 10), many_classes), _LINEAR, Budget(1.0)),
            Part((Case(1 << 20, 128, 10),), _LINEAR, Budget(1.0)),
            Part((Case(1024, 128, 3),), _NO_PEERS),
        )
    return (
        Part((Case(36, 1280, 3), Case(1024, 128, 3)), (*_NO_PEERS, COMPILED)),
        Part((Case(36, 128, 3), Case(256, 512, 8), Case(1024, 512, 8)),
             (*_NO_PEERS, _COMPILED_NAIVE)),
        Part((Case(4096, 128, 3),), _FAST_AND_BASELINE),
        Part((many_classes,), _LINEAR, Budget(2.0)),
        Part((few_classes,), (*_LINEAR, HALF), Budget(2.0)),
    )  # fmt: skip


def _paper() -> tuple[Part, ...]:
    batches = (6, 12, 18, 24, 30, 36)
    cases = tuple(Case(n, 1280, 3, operation=o) for n, o in product(batches, _BOTH))
    return (Part(cases, (EMPTY, PAIR_PRODUCTS, BASELINE, PEER, OURS)),)


def _sweep(device: str) -> tuple[Part, ...]:
    """At each D ours until a call takes seconds, the others until a call takes one second or fails.

    What needs N^2 memory and does not fit is asked for all the same: its row then says so.
    """
    peers = (*PML[:3], "tiled SupCon", LIGER)  # N^3 triplets: up to N = 256, and 4,096
    small, forward = (1024,), tuple[Part, ...]()  # new kernels each; others are in `paper`
    if device == "cpu":
        small = (64, 1024)
        forward = (
            Part((Case(256, 128, 10, operation=FORWARD),), _UNCOMPILED),
            Part((Case(4096, 128, 10, operation=FORWARD),), _FAST_AND_BASELINE),
        )
    refused = (BASELINE, *PML, "reference", "native", PAIR_PRODUCTS)
    return (
        *forward,
        Part((Case(64, 128, 10), Case(256, 128, 10)), _UNCOMPILED),
        Part((Case(1024, 128, 10),), (*_NO_PEERS, *peers)),
        Part((Case(4096, 128, 10),), _UNCOMPILED),
        Part((Case(1 << 14, 128, 10),), (*_FAST_AND_BASELINE, *peers[3:])),
        Part((Case(1 << 15, 128, 10),), (*_LINEAR, *PML)),
        Part((Case(1 << 17, 128, 10),), (*_LINEAR, *refused, "triton")),
        Part((Case(1 << 20, 128, 10),), (*_LINEAR, *refused), Budget(6.0)),
        *(Part(tuple(Case(n, d, 10) for n in small), (*_NO_PEERS, *peers)) for d in (512, 1280)),
        *(Part((Case(4096, d, 10),), _FAST_AND_BASELINE) for d in (512, 1280)),
        Part((Case(1 << 17, 512, 10), Case(1 << 14, 1280, 10)), _LINEAR),
    )


def _million() -> tuple[Part, ...]:
    """Calls of ten seconds and more, and the floors beside them."""
    cases = tuple(Case(1 << 20, d, 10) for d in (512, 1280))
    return (Part(cases, (EMPTY, MOMENT_PRODUCTS, ROW_MOVES, "auto"), Budget(1.0, limit_s=300.0)),)


def _classes() -> tuple[Part, ...]:
    counts = (2, 10, 100, 1024, 2048)
    even = [Case(4096, 128, c) for c in counts]
    uneven = [Case(4096, 128, c, balance=b) for b, c in product(("zipf", "dominant"), (10, 100))]
    return (Part(tuple(even + uneven), (FLOOR, *_FAST)),)


def _dtypes(device: str) -> tuple[Part, ...]:
    """Baselines on small inputs alone: a processor may have no fast product of half precision."""
    small, large = ((36, 1280, 3), (256, 256, 8)), (4096, 128, 10)
    if device != "cpu":
        small = small[:1]
    return (
        Part(tuple(Case(*size, dtype) for size, dtype in product(small, DTYPES)), _NO_PEERS),
        Part(tuple(Case(*large, dtype) for dtype in DTYPES), _FAST),
    )


def _threads() -> tuple[Part, ...]:
    every = sorted({1, Case(2, 1, 1).threads})
    small, large = ((36, 1280, 3), (1024, 512, 8)), (4096, 128, 10)
    return (
        Part(tuple(Case(*size, threads=t) for size, t in product(small, every)), _NO_PEERS),
        Part(tuple(Case(*large, threads=t) for t in every), (FLOOR, *_FAST)),
    )


def _hinge() -> tuple[Part, ...]:
    """From all rows active to none, as late in training: skipping inactive rows saves time."""
    shares = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0)
    sizes = ((36, 1280, 3), (1024, 128, 10), (4096, 128, 10))
    active = (
        Case(*size, active=a) for size, a in product(sizes, shares) if a * size[0] >= 1 or a == 0
    )
    forward = (Case(*size, active=1.0, operation=FORWARD) for size in sizes)
    return (Part((*active, *forward), _FAST),)


def _crossover(device: str) -> tuple[Part, ...]:
    """A log grid of 60 points: ten N by six D, the classes changing along both."""
    if device != "cpu":
        return _gpu_crossover()
    ns = (16, 36, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    grid = tuple(_grid(ns, (32, 64, 128, 256, 512, 1280)))
    small, large = _up_to(2048, grid)
    return Part(small, (OURS,)), Part(large, _FAST, Budget(0.4, least=2))


def _grid(ns: tuple[int, ...], ds: tuple[int, ...]) -> Iterator[Case]:
    classes = (2, 8, 64)
    for (i, n), (j, d) in product(enumerate(ns), enumerate(ds)):
        yield Case(n, d, min(classes[(i + j) % 3], n // 2))


def _up_to(most: int, cases: Iterable[Case]) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The cases of at most so many rows, and the others."""
    cases = tuple(cases)
    return tuple(c for c in cases if c.n <= most), tuple(c for c in cases if c.n > most)


def _gpu_crossover() -> tuple[Part, ...]:
    """A coarser grid that reaches further, and in half precision too.

    From 65 rows on impl="triton" has two schedules, which are timed apart; second moments have
    other kernels from D = 257 on. Each D and dtype takes some seconds to compile, and so does an N
    that 16 does not divide: hence three D, and N_b = 36 in `paper` only.
    """
    ds = (128, 256, 1280)
    grid = (
        replace(case, dtype=dtype)
        for case in _grid((128, 512, 2048, 8192, 32768), ds)
        for dtype in ("float32", "bfloat16")
        if case.d <= 256 or dtype == "float32"
    )
    paired, longer = _up_to(2048, grid)
    longest = tuple(Case(1 << 17, d, 8, t) for d, t in product(ds[:2], ("float32", "bfloat16")))
    return (
        Part(tuple(_grid((16, 32, 64), ds)), _FAST),
        Part(paired, ("reference", "gram", "auto", SCHEDULE)),
        Part(longer, ("gram", "auto", SCHEDULE)),
        Part(longest, ("gram", "auto")),
    )


def _linear(device: str) -> tuple[Part, ...]:
    """On a GPU also a million rows, and half precision, whose speed has a constant of its own."""
    sizes = (
        (36, 1280, 3), (36, 128, 3), (256, 512, 8), (1024, 128, 3), (4096, 128, 10),
        (4096, 1280, 10), (16384, 128, 10), (65536, 128, 10), (65536, 128, 8192),
        (1 << 18, 128, 10),
    )  # fmt: skip
    cases = [Case(*size) for size in sizes]
    if device != "cpu":
        cases += [Case(1 << 20, 128, c) for c in (10, 1 << 19)]
        cases += [replace(case, dtype="bfloat16") for case in cases if case.n >= 4096]
    return (Part(tuple(cases), (EMPTY, "gram", FORM)),)


def _training_steps() -> tuple[Part, ...]:
    """For each backbone its step, and the loss alone on embeddings of its dimension."""
    whole = [Case(36, d, 3, operation=TRAINING_STEP, backbone=b) for b, d in BACKBONES.items()]
    alone = [Case(36, d, 3) for d in sorted(set(BACKBONES.values()))]
    return (Part((*whole, *alone), (BASELINE, OURS)),)
