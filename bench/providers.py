"""Everything that is timed: floors, baselines, compiled baselines, peers, and our paths.

A provider makes, for a problem, a step: step(x, labels) -> (loss, gradient), or (loss, None) where
the case asks for the forward alone. x and labels are arguments so that a GPU's buffers can rotate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bstriplet_kernels import available_impls, bstriplet_loss
from bstriplet_kernels.paths.moments import class_sums
from bstriplet_kernels.paths.triton import pairs_cost
from bstriplet_kernels.reference import naive_loss

from . import floors
from .cases import FORWARD, Problem

Step = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
Loss = Callable[[Tensor, Tensor], Tensor]
FLOOR, BASELINE, COMPILED, PEER, OURS = "floor", "baseline", "compiled", "peer", "ours"
GROWTH, SCHEDULE, FORM = "growth", "schedule", "form"
EMPTY, PAIR_PRODUCTS, MOMENT_PRODUCTS = "empty function", "products of pairs", "products of moments"
ROW_MOVES = "moves of rows"
HALF = "auto, half the rows"
LIGER = "Liger InfoNCE"
_MARGINS = {"pos_margin": 1.0, "neg_margin": 0.0}  # of cosines
_PML: dict[str, tuple[str, dict[str, float]]] = {
    "pml contrastive": ("ContrastiveLoss", _MARGINS),
    "pml SupCon": ("SupConLoss", {}),
    "pml lifted": ("GeneralizedLiftedStructureLoss", _MARGINS),
    "pml triplet": ("TripletMarginLoss", {}),
}
"""pytorch-metric-learning's nearest losses, as its users would make them."""
PML = tuple(_PML)
_SHOWN = {LIGER: "InfoNCE by Liger's linear cross entropy"}
"""Names for readers, where the one in the committed files misleads."""


def shown(name: str) -> str:
    """What tables and pictures call a provider."""
    return _SHOWN.get(name, name)


@dataclass(frozen=True)
class Provider:
    """One thing that is timed.

    judge: "truth" (Eqs. 3-4 in float64), "itself" (the same code in float64, for losses that are
    not ours) or "nothing" (floors, and ours on another input). missing: what is not installed, or
    None. base: of a compiled provider, the one that it compiles.
    """

    name: str
    group: str
    make: Callable[[Problem], Step]
    judge: str = "truth"
    missing: str | None = None
    base: str = ""


def providers() -> dict[str, Provider]:
    """All of them by name; our paths are those that can run here, and "auto"."""
    paths = available_impls()
    schedules = (pairs_cost.TILES, pairs_cost.PANELS) if "triton" in paths else ()
    pml = _missing("pytorch_metric_learning", "pytorch-metric-learning")
    every = (
        Provider(EMPTY, FLOOR, _empty_function, "nothing"),
        Provider(PAIR_PRODUCTS, FLOOR, floors.pair_products, "nothing"),
        Provider(MOMENT_PRODUCTS, FLOOR, floors.moment_products, "nothing"),
        Provider(ROW_MOVES, FLOOR, floors.row_moves, "nothing"),
        Provider(HALF, GROWTH, _on_half, "nothing"),
        Provider("naive", BASELINE, partial(_of_margin, naive_loss)),
        Provider("eager", BASELINE, partial(_of_margin, eager_loss)),
        _compiled("naive", naive_loss),
        _compiled("eager", eager_loss),
        *(
            Provider(name, PEER, partial(_metric_learning, *made_by), "itself", pml)
            for name, made_by in _PML.items()
        ),
        Provider("tiled SupCon", PEER, lambda p: _differentiated(TiledSupCon.apply, p), "itself"),
        Provider(LIGER, PEER, _liger, "itself", _missing("liger_kernel", "liger-kernel")),
        *(Provider(name, OURS, partial(_ours, name)) for name in (*paths, "auto")),
        *(Provider(name, SCHEDULE, partial(_scheduled, name)) for name in schedules),
        Provider(class_sums.SCHEDULE, FORM, partial(_ours, "gram", similarity="linear"), "itself"),
    )
    return {provider.name: provider for provider in every}


def eager_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The loss written well in torch: masks instead of one-hot labels, one pass for each sum."""
    unit = functional.normalize(embeddings, dim=1)
    s = unit @ unit.T
    phi = s * s
    same = labels[:, None] == labels[None, :]
    n_positive = same.sum(1) - 1
    n_negative = len(labels) - 1 - n_positive
    own = (phi * same).sum(1)
    positive = (own - phi.diagonal()) / n_positive.clamp_min(1)
    negative = (phi.sum(1) - own) / n_negative.clamp_min(1)
    return torch.relu(margin - positive + negative).mean()


class TiledSupCon(torch.autograd.Function):
    """Supervised contrastive loss in panels of rows, gradient with the loss, no N x N storage.

    The yardstick for a loss of all pairs that tiles: three products of 2 N^2 D FLOPs.
    """

    TEMPERATURE = 0.1
    PAIRS = 1 << 22

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        n = len(embeddings)
        norms = embeddings.norm(dim=1, keepdim=True)
        unit = embeddings / norms
        wanted = ctx.needs_input_grad[0]
        v = torch.zeros_like(unit) if wanted else None
        losses = []
        panel = max(1, TiledSupCon.PAIRS // n)
        for first in range(0, n, panel):
            last = min(first + panel, n)
            part = unit[first:last]
            logits = (part @ unit.T).div_(TiledSupCon.TEMPERATURE)
            logits.diagonal(first).fill_(-torch.inf)
            same = labels[first:last, None] == labels[None, :]
            same.diagonal(first).fill_(False)
            share = (same / same.sum(1, keepdim=True).clamp_min(1)).to(logits.dtype)
            lse = logits.logsumexp(1, keepdim=True)
            listed = torch.where(same, logits, 0)
            has_positive = same.any(1)
            losses.append((lse[:, 0] - (share * listed).sum(1)) * has_positive)
            if v is not None:
                slope = (logits - lse).exp_().sub_(share).mul_(has_positive[:, None])
                slope /= TiledSupCon.TEMPERATURE * n
                v[first:last] += slope @ unit
                v += slope.T @ part
        if v is not None:
            gradient = (v - (v * unit).sum(1, keepdim=True) * unit) / norms
            ctx.save_for_backward(gradient)
        return torch.cat(losses).sum() / n

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None


def _differentiated(loss: Loss, problem: Problem) -> Step:
    """The step of the case's operation; the upstream gradient is made once."""
    if problem.case.operation == FORWARD:

        def forward(x: Tensor, labels: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                return loss(x, labels), None

        return forward
    upstream: dict[torch.dtype, Tensor] = {}

    def forward_backward(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x, labels)
        if value.dtype not in upstream:
            upstream[value.dtype] = torch.ones_like(value)
        (gradient,) = torch.autograd.grad(value, x, upstream[value.dtype])
        return value, gradient

    return forward_backward


def _of_margin(
    loss: Callable[[Tensor, Tensor, float], Tensor], problem: Problem, compiled: bool = False
) -> Step:
    margin = problem.margin

    def with_margin(x: Tensor, labels: Tensor) -> Tensor:
        return loss(x, labels, margin)

    if compiled:
        torch.compiler.reset()  # each case is a first compilation, never a recompilation
        with_margin = torch.compile(with_margin, dynamic=False)
    return _differentiated(with_margin, problem)


def _compiled(base: str, loss: Callable[[Tensor, Tensor, float], Tensor]) -> Provider:
    make = partial(_of_margin, loss, compiled=True)
    return Provider(f"compiled {base}", COMPILED, make, base=base)


def _ours(impl: str, problem: Problem, similarity: str = "square") -> Step:
    margin = problem.margin

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        value = bstriplet_loss(x, labels, margin=margin, similarity=similarity, impl=impl)
        assert isinstance(value, Tensor)  # no statistics were asked for
        return value

    return _differentiated(loss, problem)


def _scheduled(name: str, problem: Problem) -> Step:
    """Tiles or panels of impl="triton", where the path itself may take the other."""
    step = _ours("triton", problem)

    def scheduled(x: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        with forced(name):
            return step(x, labels)

    return scheduled


@contextmanager
def forced(name: str) -> Iterator[None]:
    """While entered, impl="triton" runs and counts this schedule; other names have no effect."""
    chosen = pairs_cost.by_panels
    if name in (pairs_cost.TILES, pairs_cost.PANELS):
        pairs_cost.by_panels = lambda *shape: name == pairs_cost.PANELS
    try:
        yield
    finally:
        pairs_cost.by_panels = chosen


def _on_half(problem: Problem) -> Step:
    """`auto` on the first half of the rows, to see how time grows with N."""
    n = problem.case.n // 2
    step = _ours("auto", problem)

    def on_half(x: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return step(x.detach()[:n].requires_grad_(x.requires_grad), labels[:n])

    return on_half


def _empty_function(problem: Problem) -> Step:
    return _differentiated(lambda x, labels: floors.EmptyFunction.apply(x), problem)


def _metric_learning(loss: str, margins: dict[str, float], problem: Problem) -> Step:
    from pytorch_metric_learning import distances, losses

    options = {**margins, "distance": distances.CosineSimilarity()} if margins else {}
    return _differentiated(getattr(losses, loss)(**options), problem)


def _missing(module: str, distribution: str) -> str | None:
    """The distribution's name where its module is not installed."""
    return None if importlib.util.find_spec(module) else distribution


def _liger(problem: Problem) -> Step:
    """InfoNCE of the same N, built from Liger's fused linear cross entropy: no N x N storage.

    Each row's positive is the next member of its class; the denominator has all rows, itself too.
    In float64, where it is judged, it is the same in plain torch.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    order = problem.labels.argsort(stable=True)
    _, sizes = problem.labels[order].unique_consecutive(return_counts=True)
    target = torch.empty_like(order)
    for members in order.split(sizes.tolist()):
        target[members] = members.roll(-1)
    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        unit = functional.normalize(x, dim=1)
        scaled = unit / TiledSupCon.TEMPERATURE
        if x.dtype is torch.float64:
            return functional.cross_entropy(scaled @ unit.T, target)
        return fused(unit, scaled, target)

    return _differentiated(loss, problem)
