"""The plan: Eq. 8, counts that can be checked by hand, and choices that do what they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import batch

from bstriplet_kernels import available_impls, bstriplet_loss, checks, explain, plan
from bstriplet_kernels.calibration import Constants
from bstriplet_kernels.paths import PATHS
from bstriplet_kernels.spec import Path, Spec


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(plan, "_planned", {})
    checks.remembered_target.cache_clear()


def test_equation_8_for_the_papers_batch():
    # (l^2 + C^2 + l + C + 3) N^2 + (2 l + 5) N with l = 1280, C = 3, N = 36, worked by hand
    assert plan.eq8_flops(36, 1280, 3) == 1_639_695 * 1_296 + 2_565 * 36


@given(
    n=st.integers(2, 5000), d=st.integers(1, 3000), c=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_every_path_counts_at_least_its_products(impl, n, d, c, dtype):
    sizes = [n // c + (i < n % c) for i in range(c)]
    forward = plan.path_cost(impl, plan.Work(n, None, d, dtype, wants_gradient=False), sizes)
    both = plan.path_cost(impl, plan.Work(n, None, d, dtype), sizes)
    least = 2 * n * n * d if impl != "gram" else n * d * d
    assert forward.flops >= min(least, 2 * n * n * d) * (0.5 if impl == "gram" else 1)
    assert both.flops >= forward.flops
    assert both.bytes >= n * d * dtype.itemsize
    assert all(value > 0 for value in both)


def test_moments_are_linear_and_pairs_quadratic_in_n():
    def flops(impl, n):
        work = plan.Work(n, None, 128, torch.float32)
        return plan.path_cost(impl, work, [n // 2, n // 2]).flops

    assert flops("gram", 1 << 20) == pytest.approx(2 * flops("gram", 1 << 19), rel=0.01)
    assert flops("reference", 1 << 14) == pytest.approx(4 * flops("reference", 1 << 13), rel=0.01)


def test_the_choice_follows_predicted_time(monkeypatch):
    fast_call = Constants(call=1e-6, flop=1e-9, byte=0)
    fast_flop = Constants(call=1e-3, flop=1e-12, byte=0)
    monkeypatch.setattr(plan, "CONSTANTS", {"cpu": {"reference": fast_call, "gram": fast_flop}})
    small, large = torch.randn(4, 8), torch.randn(3000, 8)
    assert plan.choose(small, None, Spec()) == "reference"
    assert plan.choose(large, None, Spec()) == "gram"
    assert plan.choose(large, None, Spec(signed=True)) == "reference"
    explained = explain(large, torch.arange(3000) % 4)
    assert explained.path == "gram"
    assert explained.reason == "least predicted time"
    assert set(explained.predicted) == {"reference", "gram"}


def test_a_choice_that_the_classes_would_change_says_so(monkeypatch):
    """Many small classes make moments cheap, which a choice by shapes alone cannot know."""
    constants = {"reference": Constants(0, 1e-12, 0), "gram": Constants(0, 0.9e-12, 0)}
    monkeypatch.setattr(plan, "CONSTANTS", {"cpu": constants})
    reasons = []
    for classes in (3, 100):
        explained = explain(torch.randn(200, 300), torch.arange(200) % classes)
        assert explained.path == "reference"
        reasons.append(explained.reason)
    assert reasons[0] == "least predicted time"
    assert reasons[1] == (
        "least predicted time for 3 classes, which a choice by shapes alone assumes"
    )


def test_plans_are_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(plan, "REMEMBERED", 5)
    for n in range(2, 20):
        x, y = torch.randn(n, 3), torch.arange(n) % 2
        first = bstriplet_loss(x, y)
        assert torch.equal(bstriplet_loss(x, y), first)
        assert 1 <= len(plan._planned) <= 5


def test_what_was_planned_for_one_input_is_not_run_for_another():
    """Whatever a check or a choice looks at sets inputs apart."""
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    bstriplet_loss(x, y)
    with pytest.raises(TypeError, match="labels"):
        bstriplet_loss(x, y.float())
    with pytest.raises(ValueError, match="labels"):
        bstriplet_loss(x, y[:5])
    with pytest.raises(TypeError, match="ref_labels"):
        bstriplet_loss(x, y, ref_emb=x, ref_labels=y.tolist())
    with pytest.raises(ValueError, match="without ref_emb"):
        bstriplet_loss(x, y, ref_labels=y)
    bstriplet_loss(x, y, ref_emb=x, ref_labels=y)
    for bad in (y.float(), y[:5]):
        with pytest.raises((TypeError, ValueError), match="ref_labels"):
            bstriplet_loss(x, y, ref_emb=x, ref_labels=bad)
    for changed in (x.clone().requires_grad_(), x.double(), x.half()):
        loss = bstriplet_loss(changed, y)
        assert loss.requires_grad == changed.requires_grad
        assert loss.dtype == torch.promote_types(changed.dtype, torch.float32)
    with torch.no_grad():
        assert not bstriplet_loss(x.clone().requires_grad_(), y).requires_grad
    assert isinstance(bstriplet_loss(x, y, return_stats=True), tuple)


def test_an_unmeasured_device_goes_by_rule(monkeypatch):
    monkeypatch.setattr(plan, "CONSTANTS", {})
    assert plan.choose(torch.randn(31, 10), None, Spec()) == "gram"
    assert plan.choose(torch.randn(30, 10), None, Spec()) != "gram"
    explained = explain(torch.randn(31, 10), torch.arange(31) % 3)
    assert explained.reason == "by rule, cpu is not calibrated: N beyond 3 D"


def test_the_only_path_that_is_left(monkeypatch):
    for name, path in PATHS.items():
        if name != "reference":
            monkeypatch.setitem(
                PATHS, name, Path(path.forward, path.backward, lambda: "taken away")
            )
    x, labels = batch(40, 5, 3, 0)
    assert available_impls() == ("reference",)
    assert explain(x, labels).reason == "the only path that takes this input here"
    assert torch.equal(bstriplet_loss(x, labels), bstriplet_loss(x, labels, impl="reference"))
    with pytest.raises(RuntimeError, match=r"impl='gram' cannot run here: taken away. Available"):
        bstriplet_loss(x, labels, impl="gram")


def test_a_named_path_that_refuses_says_why():
    x, labels = batch(8, 5, 3, 0)
    with pytest.raises(ValueError, match=r"impl='gram' does not take this input: .*signed_square"):
        bstriplet_loss(x, labels, impl="gram", similarity="signed_square")


def test_explain_prints_everything():
    text = str(explain(torch.randn(36, 1280), torch.arange(36) % 3))
    for part in ("N = 36, D = 1,280, 3 classes, float32", "path ", "FLOPs", "bytes", "extra memory",
                 "Eq. 8         2.125e+09 FLOPs"):  # fmt: skip
        assert part in text
    x, labels = batch(6, 4, 2, 0)
    ref, ref_labels = batch(9, 4, 3, 1)
    assert "M = 9" in str(explain(x, labels, ref_emb=ref, ref_labels=ref_labels.to(torch.int8)))


def test_explain_counts_in_the_dtype_that_accumulates():
    x, labels = batch(6, 4, 2, 0, torch.float16)
    ref, ref_labels = batch(9, 4, 3, 1, torch.float64)
    mixed = explain(x, labels, ref_emb=ref, ref_labels=ref_labels)
    assert mixed.work.dtype == torch.float64
    assert mixed.cost == explain(x.double(), labels, ref_emb=ref, ref_labels=ref_labels).cost


def test_auto_compiles_whole_across_the_crossover():
    torch.compiler.reset()
    compiled = torch.compile(bstriplet_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 20, 40, 100, 400):
        x, labels = batch(n, 8, 3, n, torch.float32)
        losses = [f(x.requires_grad_(), labels) for f in (compiled, bstriplet_loss)]
        grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)
