"""Correctness before speed: what a provider returned, held against float64 on that very input."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import truth
from .cases import FORWARD_BACKWARD, Problem
from .providers import Provider

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Relative error with which a row is still written; what it was stands in the row."""
_MOST_ROWS = 2048
_SMALLEST = 1e-30  # a triplet loss without a triplet inside its margin is 0, and so its gradient


class Errors(NamedTuple):
    """Relative errors; None where there is nothing to compare."""

    loss: float | None = None
    gradient: float | None = None

    def reason_to_refuse(self, dtype: torch.dtype) -> str | None:
        """Why nothing may be timed, or None."""
        for name, error in zip(self._fields, self, strict=True):
            if error is not None and not error <= TOLERANCE[dtype]:
                return f"{name} is off by {error:.1e}, more than {TOLERANCE[dtype]:.0e}"
        return None


class Gate:
    """Judges every provider of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @functools.cached_property
    def truth(self) -> truth.Truth:
        """Eqs. 3-4 and their gradient on the problem's input."""
        return truth.evaluate(self.problem.x, self.problem.labels, self.problem.margin)

    def judge(self, provider: Provider, loss: Tensor | None, gradient: Tensor | None) -> Errors:
        """The errors of one result. A missing loss or gradient is an error of infinity."""
        if provider.judge == "nothing":
            return Errors()
        if provider.judge == "itself":
            return self._against_itself(provider, loss, gradient)
        t = self.truth
        error = abs(_value(loss) - t.loss) / (abs(t.loss) + 1)
        if self.problem.case.operation != FORWARD_BACKWARD:
            return Errors(error)
        if gradient is None:
            return Errors(error, math.inf)
        difference = (gradient[t.rows].double() - t.gradient).norm().item()
        return Errors(error, difference / (t.gradient.norm().item() + t.scale))

    def _against_itself(
        self, provider: Provider, loss: Tensor | None, gradient: Tensor | None
    ) -> Errors:
        """Errors against the peer's own code in float64, on the first rows of a large input."""
        x, labels = self.problem.x.detach(), self.problem.labels
        if len(x) > _MOST_ROWS:  # a peer's N x N matrices in float64 would not fit
            x, labels = x[:_MOST_ROWS], labels[:_MOST_ROWS]
            loss, gradient = self._result(provider, x, labels)
        true_loss, true_gradient = self._result(provider, x.double(), labels)
        scale = abs(_value(true_loss)) + _SMALLEST
        error = abs(_value(loss) - _value(true_loss)) / scale
        if true_gradient is None:
            return Errors(error)
        if gradient is None:
            return Errors(error, math.inf)
        difference = (gradient.double() - true_gradient).norm().item()
        return Errors(error, difference / (true_gradient.norm().item() + _SMALLEST))

    def _result(
        self, provider: Provider, x: Tensor, labels: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x = x.requires_grad_(self.problem.x.requires_grad)
        return provider.make(self.problem._replace(x=x, labels=labels))(x, labels)


def _value(loss: Tensor | None) -> float:
    return math.nan if loss is None else loss.double().item()
