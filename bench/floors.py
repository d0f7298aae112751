"""Lower bounds that are timed beside the providers: what no implementation can do without.

Products are timed alone, on rows that lie ready in class order, into outputs allocated beforehand.
Where a product can be made in several orders (panels of rows or all rows at once, whole or in the
blocks of a symmetric half), each is tried when the step is made and the fastest is the floor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import FORWARD, Problem
from .timing import expected_seconds

Products = Callable[[Tensor], None]
_PANEL_BYTES = (1 << 19, 1 << 21, 1 << 23)


class EmptyFunction(torch.autograd.Function):
    """The least that any loss costs: one small kernel forward, one allocation backward."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor) -> Tensor:
        ctx.save_for_backward(embeddings)
        return embeddings.new_ones(())

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def pair_products(problem: Problem) -> Callable[[Tensor, Tensor], tuple[None, None]]:
    """S = F F' and, with a backward, W F: what a form with an N x N matrix cannot avoid.

    4 N^2 D FLOPs; S is symmetric, so 3 N^2 D where its blocks above the diagonal are enough.
    """
    x = problem.x.detach()
    s, gradient = x.new_empty(len(x), len(x)), torch.empty_like(x)
    first = _fastest([partial(_similarities, s, _cuts(len(x), parts)) for parts in (1, 2, 4)], x)
    s.fill_(1)

    def products(x: Tensor, labels: Tensor) -> tuple[None, None]:
        rows = x.detach()
        first(rows)
        if problem.case.operation != FORWARD:
            torch.mm(s, rows, out=gradient)
        return None, None

    return products


def moment_products(problem: Problem) -> Callable[[Tensor, Tensor], tuple[None, None]]:
    """What a second-moment form cannot avoid, whatever its schedule.

    A row goes into the moment matrix of its class or of the batch, and has one quadratic form (both
    means of Eq. 3 in one matrix of its class): N D^2 FLOPs each, as symmetric halves, or twice that
    where halves do not pay. With a backward it is multiplied by one matrix more: 2 N D^2. A class
    of fewer than D rows has no matrix of its own (memory would not stay O(N D)) but its block
    S_c = F_c F_c', and W_c F_c with a backward: 2 N_c^2 D each.
    """
    x = problem.x.detach()
    d, with_backward = x.shape[1], problem.case.operation != FORWARD
    sizes = torch.bincount(problem.labels).sort(descending=True).values
    large = sizes[sizes >= d].tolist()
    n_large = sum(large)
    small = sizes[(sizes < d) & (sizes > 1)]
    runs = torch.stack(small.unique_consecutive(return_counts=True), dim=1).tolist()
    parts = [size for size in (*large, len(x) - n_large) if size]
    panels = _panel_sizes(x, max(parts))
    total, halvings = x.new_zeros(d, d), list(itertools.product(panels, _halvings(d)))
    orders: list[list[Products]] = [
        [partial(_add_moments, total, step, cuts) for step, cuts in halvings],
        [partial(_forms, step, _factors(x, step, cuts)) for step, cuts in halvings],
    ]
    if with_backward:
        orders.append([partial(_forms, step, _factors(x, step, [(0, d)])) for step in panels])
    steps = [_fastest(candidates, x[: panels[-1]]) for candidates in orders]
    blocks = [_block_products(x, size, with_backward) for size, _ in runs]

    def products(x: Tensor, labels: Tensor) -> tuple[None, None]:
        rows = x.detach()
        for of_class in rows.split(parts):
            for multiply in steps:
                multiply(of_class)
        start = n_large
        for (size, classes), multiply in zip(runs, blocks, strict=True):
            multiply(rows[start : start + size * classes])
            start += size * classes
        return None, None

    return products


def row_moves(problem: Problem) -> Callable[[Tensor, Tensor], tuple[None, Tensor | None]]:
    """The memory traffic of rows: reading them in class order, and writing a fresh gradient.

    They are read once for the moments, again for the forms, which need all moments, and again for
    the gradient, which needs all forms.
    """
    order = problem.labels.argsort(stable=True)
    step = _panel_sizes(problem.x, len(order))[0]
    panel = torch.empty_like(problem.x.detach()[:step])
    with_backward = problem.case.operation != FORWARD

    def moves(x: Tensor, labels: Tensor) -> tuple[None, Tensor | None]:
        rows = x.detach()
        gradient = torch.empty_like(rows) if with_backward else None
        for last in (False, False, True) if with_backward else (False, False):
            for part in order.split(step):
                torch.index_select(rows, 0, part, out=panel[: len(part)])
                if last and gradient is not None:
                    gradient.index_copy_(0, part, panel[: len(part)])
        return None, gradient

    return moves


def _similarities(s: Tensor, cuts: list[tuple[int, int]], rows: Tensor) -> None:
    """F F', or its blocks on and above the diagonal."""
    for start, stop in cuts:
        torch.mm(rows[start:stop], rows[start:].T, out=s[start:stop, start:])


def _add_moments(total: Tensor, step: int, cuts: list[tuple[int, int]], rows: Tensor) -> None:
    """F' F added up over panels, or its blocks on and above the diagonal."""
    for panel in rows.split(step):
        for start, stop in cuts:
            part = total[start:stop, start:]
            torch.addmm(part, panel[:, start:stop].T, panel[:, start:], out=part)


def _factors(x: Tensor, step: int, cuts: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """The columns of a matrix H down to their last row in the cut, and an output for each."""
    return [
        (torch.randn(stop, stop - start).to(x), x.new_empty(step, stop - start))
        for start, stop in cuts
    ]


def _forms(step: int, factors: list[tuple[Tensor, Tensor]], rows: Tensor) -> None:
    """F H for the forms f' H f of a symmetric H, whole or down to its diagonal blocks."""
    for panel in rows.split(step):
        for columns, out in factors:
            torch.mm(panel[:, : len(columns)], columns, out=out[: len(panel)])


def _block_products(x: Tensor, size: int, with_backward: bool) -> Products:
    """S_c and W_c F_c of classes of one size, batched, in panels that stay in cache."""
    step = max(1, _panel_sizes(x, len(x))[0] // size)
    s, out = x.new_empty(step, size, size), x.new_empty(step, size, x.shape[1])

    def multiply(rows: Tensor) -> None:
        for members in rows.unflatten(0, (-1, size)).split(step):
            k = len(members)
            torch.bmm(members, members.mT, out=s[:k])
            if with_backward:
                torch.bmm(s[:k], members, out=out[:k])

    return multiply


def _panel_sizes(x: Tensor, n: int) -> list[int]:
    """Numbers of rows to try: all on a GPU, those that fit into a cache on a processor."""
    if x.device.type != "cpu":
        return [n]
    row = x.shape[1] * x.itemsize
    return sorted({min(n, max(1, size // row)) for size in _PANEL_BYTES})


def _halvings(d: int) -> list[list[tuple[int, int]]]:
    """Ways to cut D columns: whole, or in ranges whose blocks form a symmetric half."""
    return [_cuts(d, parts) for parts in (1, 2, 4) if d >= 32 * parts or parts == 1]


def _cuts(n: int, parts: int) -> list[tuple[int, int]]:
    step = -(-n // parts)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _fastest(candidates: Iterable[Products], rows: Tensor) -> Products:
    """The candidate that takes least time on these rows."""
    device = rows.device.type
    timed = [(expected_seconds(lambda c=c: c(rows), device), c) for c in candidates]
    return min(timed, key=lambda found: found[0])[1]
