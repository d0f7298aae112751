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
_PANEL_ELEMENTS = 1 << 25  # of float64 rows that are made at once: 256 MiB
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


def contrasts(x: Tensor, labels: Tensor) -> Tensor:
    """Mean over positives less mean over negatives of Eq. 3, [N] float64: margin - h_i.

    From sum_j s_ij^2 = f^_i' (sum_j f^_j f^_j') f^_i, where a class has more rows than x has
    columns, else from its own pairs. Rows are widened to float64 a panel at a time.
    """
    n, d = x.shape
    order = labels.argsort(stable=True)
    classes = order.split(labels[order].unique_consecutive(return_counts=True)[1].tolist())
    moments = [_moment(x, rows) if len(rows) > d else None for rows in classes]
    by_pair = [rows for rows, moment in zip(classes, moments, strict=True) if moment is None]
    total = sum(moment for moment in moments if moment is not None)
    total = total + _moment(x, torch.cat([order[:0], *by_pair]))
    found = torch.empty(n, dtype=torch.float64, device=x.device)
    for rows, moment in zip(classes, moments, strict=True):
        k = len(rows)
        p, q = 1 / (k - 1) if k > 1 else 0.0, 1 / (n - k) if k < n else 0.0
        form = -q * total if moment is None else (p + q) * moment - q * total
        for panel in rows.split(_panel(x)):
            unit = unit_rows(x[panel])
            value = ((unit @ form) * unit).sum(1) - p * unit.square().sum(1).square()
            if moment is None:
                value += (p + q) * (unit @ unit.T).square().sum(1)
            found[panel] = value
    return found


def evaluate(x: Tensor, labels: Tensor, margin: float) -> Truth:
    """Loss and gradient of embeddings [N, D] in any dtype, as they are rounded there."""
    n = len(x)
    h = margin - contrasts(x, labels)
    rows = torch.linspace(0, n - 1, min(n, max(16, _PAIRS // n)), device=x.device).long()

    own = unit_rows(x[rows])
    panels = x.detach().split(_panel(x))
    s = torch.cat([own @ unit_rows(panel).T for panel in panels], dim=1)
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
    v = torch.zeros_like(own)
    for weights, panel in zip(w.split(_panel(x), dim=1), panels, strict=True):
        v += weights @ unit_rows(panel)
    along = (v * own).sum(1, keepdim=True)
    norms = x.detach()[rows].double().norm(dim=1, keepdim=True)
    return Truth(
        loss=h.clamp_min(0).mean().item(),
        active=(h > 0).double().mean().item(),
        rows=rows,
        gradient=(v - along * own) / norms,
        scale=(1 / (n * norms)).norm().item(),
    )


def _moment(x: Tensor, rows: Tensor) -> Tensor:
    """The sum of f^_i f^_i' over some rows."""
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for panel in rows.split(_panel(x)):
        unit = unit_rows(x[panel])
        moment += unit.T @ unit
    return moment


def _panel(x: Tensor) -> int:
    """Rows taken at once; a class without a moment matrix fits into one panel."""
    d = x.shape[1]
    return max(d, _PANEL_ELEMENTS // d)
