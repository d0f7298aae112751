"""`bench.gpu_check`: what a CPU can do of it, and every line of the rest with a pretended GPU."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check
from bench.gpu_check import Subject
from bstriplet_kernels.paths.triton import pairs_cost

FLOAT32 = (torch.float32,)


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
    options = ["--device", "cpu", "--impl", "gram", "--quick", "--dtype", "float32"]
    assert gpu_check.main(options) == gpu_check.HELD
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == list(gpu_check.ANYWHERE)
    assert lines[-1] == "all hold"


def test_what_fails_is_collected_and_the_rest_goes_on(monkeypatch, capsys):
    """Every bad case of a check is counted, NaN among them, and the next check still runs."""
    true = gpu_check.evaluate

    def wrong(impl, x, *rest, **options):
        results = true(impl, x, *rest, **options)
        if impl == "gram" and x.shape[0] == 36:
            results[1][0, 0] = torch.nan
        return results

    monkeypatch.setattr(gpu_check, "evaluate", wrong)
    options = ["--device", "cpu", "--impl", "gram", "--quick", "--dtype", "float32"]
    assert gpu_check.main([*options, "--check", "exact", "bits"]) == gpu_check.FAILED
    out = capsys.readouterr().out
    assert "FAILED: 8 of 32 cases" in out
    assert "N=36 D=100 torch.float32" in out
    assert "inf times what is allowed" in out
    assert "FAILED: 4 of 8 cases" in out  # the same bits: NaN is not equal to itself


def test_what_is_cut_short_tells_how_far_it_came(monkeypatch, capsys):
    outcomes = iter((ValueError("a kernel"), ValueError("another"), KeyboardInterrupt()))

    def evaluate(*_, **__):
        raise next(outcomes)

    monkeypatch.setattr(gpu_check, "evaluate", evaluate)
    options = ["--device", "cpu", "--impl", "gram", "--check", "exact", "bits"]
    assert gpu_check.main(options) == gpu_check.INTERRUPTED
    out = capsys.readouterr().out
    assert "stopped in case 3, 2 before it failed" in out
    assert "ValueError: another" in out
    assert "bits" not in out


def test_a_check_that_is_stopped_between_its_cases_says_so(monkeypatch, capsys):
    def stops(subject):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_check.CHECKS, "bits", stops)
    assert gpu_check.main(["--device", "cpu", "--impl", "gram", "--check", "bits"]) == 130
    assert "bits     stopped" in capsys.readouterr().out


def test_the_wide_shapes_alone_go_through_panels():
    n, d = gpu_check.WIDE
    assert pairs_cost.by_panels(n, None, d, torch.float32)
    assert not any(
        pairs_cost.by_panels(n, None, d, torch.float32)
        for n, d in (*gpu_check.SHAPES, *gpu_check.QUICK_SHAPES)
    )


def test_the_small_wide_shape_is_forced_through_panels(monkeypatch):
    ways = []
    monkeypatch.setattr(gpu_check, "forced", lambda way: ways.append(way) or nullcontext())
    gpu_check.is_exact(Subject("gram", "cpu", FLOAT32, quick=True))
    shapes = (*gpu_check.QUICK_SHAPES, gpu_check.QUICK_WIDE)
    # similarities that moments take, reductions, with and without ref_emb, poisoned or not
    assert len(ways) == 16 * len(shapes)
    assert set(ways[:-16]) == {""}
    assert set(ways[-16:]) == {pairs_cost.PANELS}


def test_a_path_that_takes_nothing_has_not_passed(monkeypatch):
    nowhere = SimpleNamespace(missing=lambda: None, refuses=lambda *_: "not here")
    monkeypatch.setitem(gpu_check.PATHS, "gram", nowhere)
    with pytest.raises(AssertionError, match="no case was run: not here"):
        gpu_check.is_exact(Subject("gram", "cpu", FLOAT32, quick=True))


def test_a_lost_device_ends_the_process(monkeypatch, capsys):
    """After an illegal access every call fails: what came after would say nothing."""

    def breaks(subject):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", fails)
        fails()

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_check.CHECKS, "exact", breaks)
    assert gpu_check.main(["--device", "cpu", "--impl", "gram", "native"]) == gpu_check.LOST
    out = capsys.readouterr().out
    assert out.count("FAILED") == 1
    assert "CUDA is lost" in out


def test_checks_of_a_gpu_run_every_line(pretended_gpu, monkeypatch):
    gram, native = Subject("gram", "cpu", quick=True), Subject("native", "cpu", quick=True)
    assert "no synchronisation" in gpu_check.never_waits(gram)
    assert pretended_gpu[-1] == "default"
    assert "1 forward and 1 backward in bfloat16" in gpu_check.launches_few(native)
    assert "1 forward and 1 backward in float32, linear" in gpu_check.launches_few(gram)
    monkeypatch.setattr(Profile, "kinds", ["CUDA", "CUDA"])
    monkeypatch.setattr(gpu_check, "bstriplet_loss", lambda x, labels, **options: x.sum())
    with pytest.raises(AssertionError, match="2 kernels backward, at most 1"):
        gpu_check.launches_few(native)
    monkeypatch.setattr(gpu_check, "evaluate", lambda *_, **__: [torch.ones(())])
    assert "captured" in gpu_check.is_capturable(gram)


def test_another_device_is_minded(pretended_gpu, monkeypatch):
    last = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(gpu_check, "fresh", lambda *_: (None, None))
    monkeypatch.setattr(gpu_check, "evaluate", lambda *_, **__: [last, last])
    monkeypatch.setattr(torch.testing, "assert_close", lambda *_: None)
    assert gpu_check.minds_the_device(Subject("gram", "cuda")).startswith("cuda:0")
