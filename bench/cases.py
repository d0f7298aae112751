"""What is measured on: one case is one input and one operation, made from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import truth

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
TRAINING_STEP = "training step"
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SEED = 20210122
_PANEL = 1 << 16


@dataclass(frozen=True)
class Case:
    """One input, one operation, one number of threads.

    n, d, c: rows, embedding dimension, classes. balance: "even", "zipf" (class k has a share of
    1/k) or "dominant" (class 0 holds 99 % of the rows). active: the share of rows with h_i > 0,
    set through the margin; None leaves the margin at 0.9. backbone: a timm model; the case is then
    its training step on n images of 1 x 128 x 128.
    """

    n: int
    d: int
    c: int
    dtype: str = "float32"
    operation: str = FORWARD_BACKWARD
    threads: int = torch.get_num_threads()
    balance: str = "even"
    active: float | None = None
    backbone: str = ""
    device: str = "cpu"

    @property
    def embedding_bytes(self) -> int:
        return self.n * self.d * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        what = self.backbone or f"D={self.d:,} C={self.c:,}"
        more = f", {self.balance}" if self.balance != "even" else ""
        more += f", active {self.active}" if self.active is not None else ""
        return f"N={self.n:,} {what} {self.dtype} {self.operation}, {self.threads} threads{more}"


class Problem(NamedTuple):
    """A case made real: x [N, D] of the case's dtype, labels [N] int64, the margin."""

    case: Case
    x: Tensor
    labels: Tensor
    margin: float


def make_problem(case: Case) -> Problem:
    """Normal noise around a centre for each class; the same for the same case.

    The rows of a class have a cosine of about 1/2 with each other and of about 0 with the rest.
    """
    generator = torch.Generator().manual_seed(_SEED)
    labels = _labels(case, generator)
    x = torch.randn(case.n, case.d, generator=generator)
    centres = torch.randn(case.c, case.d, generator=generator)
    for rows, of in zip(x.split(_PANEL), labels.split(_PANEL), strict=True):
        rows.add_(centres[of])
    x = x.to(case.device, DTYPES[case.dtype])
    labels = labels.to(case.device)
    margin = 0.9 if case.active is None else _margin(x, labels, case.active)
    x.requires_grad_(case.operation == FORWARD_BACKWARD)
    return Problem(case, x, labels, margin)


def _labels(case: Case, generator: torch.Generator) -> Tensor:
    """[N] in random order; with enough rows every class has a member."""
    if case.balance == "even":
        labels = torch.arange(case.n) % case.c
    else:
        shares = 1 / torch.arange(1, case.c + 1, dtype=torch.float64)
        if case.balance == "dominant":
            shares.fill_(0.01 / max(1, case.c - 1))[0] = 0.99
        labels = torch.multinomial(shares, case.n, replacement=True, generator=generator)
        labels[: case.c] = torch.arange(case.c)[: case.n]
    return labels[torch.randperm(case.n, generator=generator)]


def _margin(x: Tensor, labels: Tensor, active: float) -> float:
    """The margin at which this share of the rows has h_i > 0."""
    if active in (0, 1):
        return active
    ordered = truth.contrasts(x, labels).sort().values
    n_active = min(max(1, round(active * len(ordered))), len(ordered) - 1)
    # Between two rows: at a row its h is 0 up to rounding, and whether it is active no one can say.
    return ordered[n_active - 1 : n_active + 1].mean().clamp(0, 1).item()
