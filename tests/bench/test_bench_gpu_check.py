"""`bench.gpu_check`: what a CPU can do of it, and every line of the rest with a pretended GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


class Profile:
    kinds = ("CPU", "CUDA")

    def __init__(self, activities):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        return [SimpleNamespace(device_type=SimpleNamespace(name=kind)) for kind in self.kinds]


@contextmanager
def context(_):
    yield


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch.cuda's names without a GPU behind them; returns the modes of synchronisation set."""
    modes = []
    for name, fake in {
        "synchronize": lambda: None, "set_sync_debug_mode": modes.append, "Stream": Stream,
        "current_stream": Stream, "CUDAGraph": Graph, "graph": context, "stream": context,
        "device_count": lambda: 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    return modes


def test_a_cpu_checks_what_it_can(capsys):
    assert gpu_check.main(["--device", "cpu", "--impl", "gram", "--quick"]) == 0
    assert "all hold" in capsys.readouterr().out


def test_a_check_that_fails_is_told(monkeypatch, capsys):
    def fails(impl, device, quick):
        raise AssertionError("off by 3")

    monkeypatch.setattr(gpu_check, "is_exact", fails)
    assert gpu_check.main(["--device", "cpu", "--impl", "gram", "--quick"]) == 1
    assert "off by 3" in capsys.readouterr().out


def test_checks_of_a_gpu_run_every_line(pretended_gpu, monkeypatch):
    assert "no synchronisation" in gpu_check.never_waits("gram", "cpu", quick=True)
    assert pretended_gpu[-1] == "default"
    assert "1 kernels forward" in gpu_check.launches_few("native", "cpu", quick=True)
    monkeypatch.setattr(Profile, "kinds", ["CUDA", "CUDA"])
    monkeypatch.setattr(gpu_check, "bstriplet_loss", lambda x, labels, impl: x.sum())
    with pytest.raises(AssertionError, match="2 kernels backward, at most 1"):
        gpu_check.launches_few("triton", "cpu", quick=True)
    monkeypatch.setattr(gpu_check, "evaluate", lambda *_: [torch.ones(())])
    assert "captured" in gpu_check.is_capturable("gram", "cpu", quick=True)


def test_another_device_is_minded(pretended_gpu, monkeypatch):
    last = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(gpu_check, "fresh", lambda *_: (None, None))
    monkeypatch.setattr(gpu_check, "evaluate", lambda *_: [last, last])
    monkeypatch.setattr(torch.testing, "assert_close", lambda *_: None)
    assert gpu_check.minds_the_device("gram", "cuda", quick=True).startswith("cuda:0")
