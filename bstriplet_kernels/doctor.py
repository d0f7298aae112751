"""`python -m bstriplet_kernels`: what is installed, which paths run, whether they agree."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time

import torch
from torch import Tensor

from .loss import BSTripletLoss
from .paths import PATHS
from .spec import Spec

_N, _D, _CLASSES = 36, 1280, 3
"""The paper's batch of MobileNet-V3-Small embeddings."""
_TOLERANCE = 1e-5
_REPEATS = 20
_SECONDS = 1.0
"""Timing stops after `_REPEATS` calls, or after so many seconds (Triton's interpreter is slow)."""


def main() -> int:
    """Print the report; return 1 if a path that can run disagrees with the reference, else 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("bstriplet-kernels", "torch", "triton", "numpy"):
        print(f"{package} {_version(package)}")
    print(f"device {_name(device)}, {torch.get_num_threads()} CPU threads")
    print(f"\nforward and backward, N = {_N}, D = {_D}, {_CLASSES} classes, float32 on {device}:")
    healthy = True
    for impl in ("auto", *PATHS):
        verdict, agrees = _examine(impl, device)
        healthy &= agrees
        print(f"  {impl:<10} {verdict}")
    print("\nall paths that can run agree" if healthy else "\nA PATH DISAGREES: do not use it")
    return 0 if healthy else 1


def _examine(impl: str, device: torch.device) -> tuple[str, bool]:
    """One line on a path, and False only if it disagrees with the reference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_N, _D, generator=generator).to(device)
    labels = torch.randint(0, _CLASSES, (_N,), generator=generator).to(device)
    if impl != "auto":
        reason = PATHS[impl].missing() or PATHS[impl].refuses(x, None, Spec())
        if reason is not None:
            return f"not here: {reason}", True
    loss, grad = _run(x, labels, impl)
    true_loss, true_grad = _run(x.double(), labels, "reference")
    error = max(_relative_error(loss, true_loss), _relative_error(grad, true_grad))
    agrees = error <= _TOLERANCE
    timings = [_seconds(x, labels, impl)]
    while len(timings) < _REPEATS and sum(timings) < _SECONDS:
        timings.append(_seconds(x, labels, impl))
    milliseconds = 1e3 * statistics.median(timings)
    verdict = "agrees" if agrees else "DISAGREES"
    return f"{verdict}, relative error {error:.1e}, {milliseconds:.3f} ms", agrees


def _run(x: Tensor, labels: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = BSTripletLoss(impl=impl)(x, labels)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def _relative_error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def _seconds(x: Tensor, labels: Tensor, impl: str) -> float:
    start = time.perf_counter()
    _run(x, labels, impl)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
