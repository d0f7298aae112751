"""Eqs. 3-4 and their gradient in float64, for any N, without any code of the package.

The row sums of all rows come from second moments, in linear time. For a sample of rows (all of
them where N is small) the sums and the gradient are also formed pair by pair; the two must agree
before either is used to judge anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_PAIRS = 1 << 22  # of float64 that are formed at once: 32 MiB
_PANEL = 1 << 16
_AGREEMENT = 1e-9


class Truth(NamedTuple):
    """loss: Eq. 4. active: the share of rows with h_i > 0. gradient: dL/df of `rows`, float64.

    scale: sqrt of the sum over `rows` of (1 / (N |f_i|))^2, the size that a gradient has where
    nothing in it cancels.
    """

    loss: float
    active: float
    rows: Tensor
    gradient: Tensor
    scale: float


def unit_rows(x: Tensor) -> Tensor:
    """f^_i in float64; no row is zero."""
    x = x.detach().double()
    return x / x.norm(dim=1, keepdim=True)


def row_means(unit: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The two means of Eq. 3 for each row, from sum_j s_ij^2 = f^_i' (sum_j f^_j f^_j') f^_i."""
    n, d = unit.shape
    every = _quadratic_forms(unit, unit.T @ unit)
    own = torch.empty_like(every)
    order = labels.argsort(stable=True)
    _, sizes = labels[order].unique_consecutive(return_counts=True)
    for members in order.split(sizes.tolist()):
        of_class = unit[members]
        if len(members) > d:
            own[members] = _quadratic_forms(of_class, of_class.T @ of_class)
        else:
            own[members] = (of_class @ of_class.T).square().sum(1)
    count = torch.empty_like(own)
    count[order] = sizes.repeat_interleave(sizes).double()
    positive = (own - unit.square().sum(1).square()) / (count - 1).clamp_min(1)
    positive[count == 1] = 0
    negative = (every - own) / (n - count).clamp_min(1)
    negative[count == n] = 0
    return positive, negative


def evaluate(x: Tensor, labels: Tensor, margin: float) -> Truth:
    """Loss and gradient of embeddings [N, D] in any dtype, as they are rounded there."""
    unit = unit_rows(x)
    n = len(unit)
    positive, negative = row_means(unit, labels)
    h = margin - positive + negative
    rows = torch.linspace(0, n - 1, min(n, max(16, _PAIRS // n)), device=x.device).long()

    s = unit[rows] @ unit.T
    same = labels[rows, None] == labels[None, :]
    is_self = rows[:, None] == torch.arange(n, device=x.device)
    n_same = torch.bincount(labels)[labels].double() - 1
    p = 1 / n_same.clamp_min(1)
    q = 1 / (n - 1 - n_same).clamp_min(1)
    by_pair = margin - (s.square() * (same & ~is_self)).sum(1) * p[rows]
    by_pair += (s.square() * ~same).sum(1) * q[rows]
    disagreement = (by_pair - h[rows]).abs().max().item()
    if not disagreement <= _AGREEMENT:
        raise ArithmeticError(f"two evaluations of Eq. 3 in float64 differ by {disagreement:.1e}")

    a = (h > 0).double() / n
    w = torch.where(same, -((a * p)[rows, None] + a * p), (a * q)[rows, None] + a * q)
    w = (2 * w * s).masked_fill_(is_self, 0)
    v = w @ unit
    along = (v * unit[rows]).sum(1, keepdim=True)
    norms = x.detach()[rows].double().norm(dim=1, keepdim=True)
    return Truth(
        loss=h.clamp_min(0).mean().item(),
        active=(h > 0).double().mean().item(),
        rows=rows,
        gradient=(v - along * unit[rows]) / norms,
        scale=(1 / (n * norms)).norm().item(),
    )


def _quadratic_forms(unit: Tensor, moment: Tensor) -> Tensor:
    """f^_i' T f^_i for each row."""
    return torch.cat([((panel @ moment) * panel).sum(1) for panel in unit.split(_PANEL)])
