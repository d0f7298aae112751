"""Where Triton's kernels run in tests, and inputs that lie there."""

import oracle
import pytest
import torch

from bstriplet_kernels import available_impls
from bstriplet_kernels.paths import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(
    "triton" not in available_impls(), reason="needs a GPU or TRITON_INTERPRET=1"
)
interpreted = pytest.mark.skipif(
    not (gpu.interpreted() and "triton" in available_impls()), reason="needs TRITON_INTERPRET=1"
)


def on_device(*tensors):
    return tuple(t.to(DEVICE) for t in tensors)


def sized(sizes, d, seed, dtype=torch.float32):
    """Those of `oracle.sized`."""
    return on_device(*oracle.sized(sizes, d, seed, dtype))


def assert_near(got, truth, tolerance):
    """By the norm of what is compared."""
    for g, t in zip(got, truth, strict=True):
        assert (g - t).norm() <= tolerance * t.norm()
