"""Everything that is timed: floors, baselines, compiled baselines, peers, and our paths.

A provider makes, for a problem, a step: step(x, labels) -> (loss, gradient), or (loss, None) where
the case asks for the forward alone. x and labels are arguments so that a GPU's buffers can rotate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bstriplet_kernels import available_impls, bstriplet_loss
from bstriplet_kernels.paths.gram_host import panel_rows, smallest_moment
from bstriplet_kernels.paths.second_moments import add_moment, half_matrices
from bstriplet_kernels.reference import naive_loss

from .cases import FORWARD, Problem

Step = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
Loss = Callable[[Tensor, Tensor], Tensor]
FLOOR, BASELINE, COMPILED, PEER, OURS = "floor", "baseline", "compiled", "peer", "ours"
EMPTY, PAIR_PRODUCTS, MOMENT_PRODUCTS = "empty function", "products of pairs", "products of moments"


@dataclass(frozen=True)
class Provider:
    """One thing that is timed.

    judge: "truth" (Eqs. 3-4 in float64), "itself" (the same code in float64, for losses that are
    not ours) or "nothing" (floors). missing: what is not installed, or None. base: of a compiled
    provider, the one that it compiles.
    """

    name: str
    group: str
    make: Callable[[Problem], Step]
    judge: str = "truth"
    missing: str | None = None
    base: str = ""


def providers() -> dict[str, Provider]:
    """All of them by name; our paths are those that can run here, and "auto"."""
    every = (
        Provider(EMPTY, FLOOR, _empty_function, "nothing"),
        Provider(PAIR_PRODUCTS, FLOOR, _pair_products, "nothing"),
        Provider(MOMENT_PRODUCTS, FLOOR, _moment_products, "nothing"),
        Provider("naive", BASELINE, partial(_of_margin, naive_loss)),
        Provider("eager", BASELINE, partial(_of_margin, eager_loss)),
        _compiled("naive", naive_loss),
        _compiled("eager", eager_loss),
        *_metric_learning(),
        Provider("tiled SupCon", PEER, lambda p: _differentiated(TiledSupCon.apply, p), "itself"),
        *(Provider(name, OURS, partial(_ours, name)) for name in (*available_impls(), "auto")),
    )
    return {provider.name: provider for provider in every}


def eager_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The loss as one would write it well in torch: masks, no one-hot, one pass for each sum."""
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


class _Empty(torch.autograd.Function):
    """What any loss costs: one small kernel forward, the gradient's allocation backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor) -> Tensor:
        ctx.save_for_backward(embeddings)
        return embeddings.new_ones(())

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _differentiated(loss: Loss, problem: Problem) -> Step:
    """The step that the case's operation asks for; the upstream gradient exists beforehand."""
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


def _ours(impl: str, problem: Problem) -> Step:
    margin = problem.margin

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        value = bstriplet_loss(x, labels, margin=margin, impl=impl)
        assert isinstance(value, Tensor)  # no statistics were asked for
        return value

    return _differentiated(loss, problem)


def _empty_function(problem: Problem) -> Step:
    return _differentiated(lambda x, labels: _Empty.apply(x), problem)


def _pair_products(problem: Problem) -> Step:
    """S = F F' and, with a backward, W F: what a form with an N x N matrix cannot avoid."""
    only_forward = problem.case.operation == FORWARD

    def products(x: Tensor, labels: Tensor) -> tuple[None, Tensor | None]:
        x = x.detach()
        s = x @ x.T
        return None, None if only_forward else s @ x

    return products


def _moment_products(problem: Problem) -> Step:
    """The products that the form by second moments executes, alone, on rows that lie ready.

    For a class with a moment matrix the halves of F_c' F_c and of two quadratic forms; for smaller
    ones S_c = F_c F_c', the half of F' F and of one form. With a backward F M, and for small
    classes S_c anew and W_c F_c. Panels that stay in cache, as the path has them on a CPU.
    """
    d, only_forward = problem.case.d, problem.case.operation == FORWARD
    step_rows = panel_rows(d) if problem.x.device.type == "cpu" else problem.case.n
    sizes = torch.bincount(problem.labels).sort(descending=True).values
    n_large = int(sizes[sizes >= smallest_moment(d)].sum())
    small = sizes[(sizes < smallest_moment(d)) & (sizes > 1)]
    blocks = [tuple(run) for run in torch.stack(
        small.unique_consecutive(return_counts=True), dim=1).tolist()]  # fmt: skip
    matrix = torch.randn(d, d).to(problem.x)
    moment = torch.zeros_like(matrix)
    counts = {1: problem.case.n - n_large, 2: n_large}
    halves = {forms: half_matrices((matrix,) * forms, n) for forms, n in counts.items()}

    def dense(rows: Tensor, forms: int) -> None:
        for panel in rows.split(step_rows):
            add_moment(moment, panel, panel)
            for half in halves[forms]:
                torch.mm(panel[:, : half.shape[0]], half)
            if not only_forward:
                torch.mm(panel, matrix)

    def products(x: Tensor, labels: Tensor) -> tuple[None, None]:
        rows = x.detach()
        dense(rows[:n_large], 2)
        dense(rows[n_large:], 1)
        start = n_large
        for size, classes in blocks:
            own = rows[start : start + size * classes]
            start += size * classes
            for panel in own.split(max(1, step_rows // size) * size):
                members = panel.unflatten(0, (-1, size))
                similarity = members @ members.mT
                if not only_forward:
                    similarity = members @ members.mT
                    torch.bmm(similarity, members)
        return None, None

    return products


def _metric_learning() -> tuple[Provider, ...]:
    """pytorch-metric-learning's nearest losses, as its users would make them."""
    package = "pytorch_metric_learning"
    missing = None if importlib.util.find_spec(package) else "pytorch-metric-learning"

    def make(loss: str, cosine: dict[str, float] | None, problem: Problem) -> Step:
        from pytorch_metric_learning import distances, losses

        options: dict[str, Any] = dict(cosine or {})
        if cosine is not None:
            options["distance"] = distances.CosineSimilarity()
        return _differentiated(getattr(losses, loss)(**options), problem)

    margins = {"pos_margin": 1.0, "neg_margin": 0.0}
    return tuple(
        Provider(f"pml {name}", PEER, partial(make, loss, cosine), "itself", missing)
        for name, loss, cosine in (
            ("contrastive", "ContrastiveLoss", margins),
            ("SupCon", "SupConLoss", None),
            ("lifted", "GeneralizedLiftedStructureLoss", margins),
            ("triplet", "TripletMarginLoss", None),
        )
    )
