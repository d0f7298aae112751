"""Reproducible random numbers: seeds, and torch's deterministic mode."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_DETERMINISTIC: Any = torch.utils.deterministic  # its property is unknown to type checkers


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch by ``numbers``: the seed and the epoch."""
    value = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  (libraries draw from it)
    torch.manual_seed(value)


@contextmanager
def reproducible(device: torch.device, *, fill: bool = False) -> Iterator[None]:
    """Make torch compute the same bits each time.

    On exit, torch's modes and the global random states are restored.

    Args:
        device: where the run computes.
        fill: whether new tensors are filled with NaN, as torch's deterministic mode does by
            default: an operator that leaves part of its result unwritten then shows.
    """
    modes = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = _DETERMINISTIC.fill_uninitialized_memory
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    _DETERMINISTIC.fill_uninitialized_memory = fill
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        _DETERMINISTIC.fill_uninitialized_memory = filled
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
