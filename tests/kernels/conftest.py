"""Poisoned memory, repeatable property tests, and every `impl` that can run here as a fixture."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from bstriplet_kernels import available_impls
from bstriplet_kernels.paths import gpu
from bstriplet_kernels.paths.triton import blocks, pairs

if gpu.interpreted():
    import quick_interpreter

    quick_interpreter.install()

settings.register_profile(
    "kernels",
    derandomize=True,
    deadline=None,
    max_examples=int(os.environ.get("BSTRIPLET_EXAMPLES", "30")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("kernels")


def pytest_collection_modifyitems(items):
    """Children of a minute come first: no worker waits for another's at the end."""
    items.sort(key=lambda item: "test_in_the_interpreter" not in item.name)


@pytest.fixture(params=available_impls())
def impl(request):
    """The name of one path; a path joins every test that asks for this as soon as it can run."""
    return request.param


@pytest.fixture
def brief_kernels(monkeypatch):
    """For tests of what surrounds kernels: one program prepares all rows in place of 16."""
    if gpu.interpreted():
        monkeypatch.setattr(pairs, "PREPARED", blocks.ROWS)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every tensor that is allocated and not written holds NaN, so a missed output is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
