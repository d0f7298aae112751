"""Properties of the GPU that paths run on, and whether Triton's kernels can run there."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

USUAL_PROCESSORS = 132
"""Those of an H100 and an H200, for predictions without a GPU."""
_INTERPRETER_PROCESSORS = 6  # so that small inputs are shared out among programs there too
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_IS_IMAGINED = False
_KINDS = {9: "hopper", 10: "blackwell"}  # by the major number of the compute capability
_FIRST_CAPABILITY = 8  # the first with bfloat16 and tf32 products


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; on the CPU, for Triton's interpreter, a few."""
    if device.type == "cpu":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def of_type(device_type: str) -> torch.device | None:
    """The current device of that type; None, which means the usual GPU, if there is no GPU."""
    exists = device_type == "cpu" or torch.cuda.is_available()
    return torch.device(device_type) if exists else None


@functools.cache
def kind(device: torch.device) -> str:
    """Which matrix instructions a GPU has.

    "hopper" and "blackwell" (of data centres) multiply blocks in shared memory, "amd" and "other"
    in registers.
    """
    if device.type == "cpu":
        return "other"
    if torch.version.hip is not None:
        return "amd"
    return _KINDS.get(torch.cuda.get_device_capability(device)[0], "other")


def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is a Hopper."""
    return kind(device) == "hopper"


def products_are_exact() -> bool:
    """Whether torch multiplies float32 on a GPU without rounding it to tf32.

    Reads the newer of two settings; `torch.get_float32_matmul_precision` raises once that was set.
    """
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


@contextlib.contextmanager
def imagined() -> Iterator[None]:
    """While entered, GPUs are those of another machine, on which everything is installed."""
    global _IS_IMAGINED
    before, _IS_IMAGINED = _IS_IMAGINED, True
    try:
        yield
    finally:
        _IS_IMAGINED = before


def is_imagined() -> bool:
    """Whether `imagined` is entered."""
    return _IS_IMAGINED


def has_triton() -> bool:
    """Whether Triton is installed, here or on the imagined machine."""
    return _HAS_TRITON or _IS_IMAGINED


def missing() -> str | None:
    """Which need of Triton's kernels is not here (Triton; a GPU or the interpreter), or None."""
    if not _HAS_TRITON:
        return "Triton is not installed (on Linux: pip install triton; on Windows: triton-windows)"
    if not (torch.cuda.is_available() or interpreted()):
        return "it needs a GPU (on a CPU, TRITON_INTERPRET=1 runs the kernels slowly, for tests)"
    return None


def refuses(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None."""
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"its kernels run on GPUs, and the embeddings are on {device}"
    # Where there is no GPU, a tensor on one is fake: another machine will run its kernels.
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability(device)[0] < _FIRST_CAPABILITY:
        return f"its kernels need compute capability {_FIRST_CAPABILITY}.0 or later"
    return None


def runs_triton(device_type: str, device: torch.device | None) -> bool:
    """Whether a device of that type runs Triton's kernels; None stands for the usual GPU."""
    may_run = device is None or refuses(device) is None
    return device_type == "cuda" and has_triton() and may_run


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "yes", "t", "true", "on")


def current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
