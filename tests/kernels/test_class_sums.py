"""similarity="linear" by sums of classes: as on the CPU, and as where sizes are not asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import Launches, Peak, on_fake_gpu
from oracle import Formula, assert_as_exact_as_plain, batch
from torch._subclasses.fake_tensor import FakeTensorMode

from bstriplet_kernels import bstriplet_loss, explain
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import PATHS
from bstriplet_kernels.paths.moments import class_sums, class_sums_on_gpu
from bstriplet_kernels.spec import LINEAR, Spec


@pytest.fixture(params=["counted", "not counted"], autouse=True)
def _classes(request, monkeypatch):
    """Whether the schedule may ask how many classes there are; panels of a few rows."""
    monkeypatch.setattr(class_sums, "_may_count", lambda _: request.param == "counted")
    monkeypatch.setattr(class_sums, "PANEL_NUMBERS", {"cpu": 100, "other": 100})
    monkeypatch.setattr(class_sums, "_BLOCK", 8)


@given(
    n=st.integers(2, 150), m=st.integers(0, 90), d=st.integers(1, 30), classes=st.integers(1, 40),
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    margin=st.sampled_from([0.0, 0.5, 1.0]), eq3=st.sampled_from(["corrected", "printed"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
def test_as_exact_as_plain(n, m, d, classes, seed, dtype, margin, eq3, reduction):
    formula = Formula(margin, "linear", eq3, reduction)
    x, labels = batch(n, d, classes, seed, dtype)
    ref = batch(m, d, classes + 2, seed + 1, dtype) if m else ()
    assert_as_exact_as_plain("gram", x, labels - 3, formula, *ref)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65, 600])
def test_running_sums_of_any_length(n):
    x = torch.randn(n, 3, dtype=torch.float64)
    sums = class_sums.running_sums(x)
    torch.testing.assert_close(sums[1:], x.cumsum(0))
    assert not sums[0].any()


def test_a_class_that_holds_nearly_everything():
    """The mean over the few others is of sums from which that class's have cancelled."""
    x = torch.randn(1, 20).repeat(2000, 1) + 1e-3 * torch.randn(2000, 20)
    labels = torch.zeros(2000, dtype=torch.int64)
    labels[:3] = torch.tensor([1, 1, 2])
    assert_as_exact_as_plain("gram", x, labels, Formula(similarity="linear"))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:1].expand(300, 17),
        lambda x: x[:, :1].expand(300, 17),
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack((x, -x), dim=2)[:, :, 0],
        lambda x: torch.cat((x, x))[::2],
    ],
    ids=["one row", "one column", "transposed", "inner stride", "outer stride"],
)
def test_views_are_read_where_they_lie(view):
    x, labels = batch(300, 17, 5, 0, torch.float32)
    losses, grads = [], []
    for rows in (view(x), view(x).contiguous()):
        leaf = rows.detach().requires_grad_()
        losses.append(bstriplet_loss(leaf, labels, similarity="linear", impl="gram"))
        grads += torch.autograd.grad(losses[-1], leaf)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("n", [2, 200])
def test_a_rows_own_share_does_not_cancel(n):
    """Classes of two: a row's own share is 1, and its one positive is near 0."""
    x = torch.randn(n, 2048, generator=torch.Generator().manual_seed(n))
    x[0].neg_()  # so that its one positive is below the margin
    labels = torch.arange(n) % (n // 2)
    given = {"similarity": "linear", "margin": 0.0, "return_stats": True, "reduction": "none"}
    truth, exact = bstriplet_loss(x.double(), labels, impl="reference", **given)
    loss, stats = bstriplet_loss(x, labels, impl="gram", **given)
    assert truth.norm() > 0
    assert (loss - truth).norm() <= 1e-6 * truth.norm()
    error = stats.positive_similarity - exact.positive_similarity
    assert error.abs() <= 1e-6 * exact.positive_similarity.abs()


def test_the_same_bits_again():
    x, labels = batch(300, 17, 5, 0, torch.float32)
    x.requires_grad_()
    first, again = (
        torch.autograd.grad(bstriplet_loss(x, labels, similarity="linear", impl="gram"), x)[0]
        for _ in range(2)
    )
    assert torch.equal(first, again)


def test_nothing_is_n_by_n():
    """A batch whose pairs would take 2 TB."""
    n = 1 << 19
    x, labels = torch.randn(n, 4), torch.arange(n) % 1000
    loss = bstriplet_loss(x.requires_grad_(), labels, similarity="linear", impl="gram")
    loss.backward()
    assert loss.isfinite()
    explained = explain((n, 4), 1000, similarity="linear")
    assert explained.path == "gram"
    assert explained.cost.extra_memory < 64 * x.nbytes
    assert explained.cost.schedule == class_sums.SCHEDULE


def test_cost_on_the_cpu_by_hand():
    """Rows are read for norms, sums and means, then for sums and the gradient.

    Writing the gradient reads its cache lines first. FLOPs: norms 2, sums 2, a row's own share 2,
    means 4; then sums 2, v 2, unit rows 1, the normalisation's backward 5.
    """
    n, d, sizes = 1000, 64, [400, 600]
    work = Work(n, None, d, torch.float32, similarity="linear")
    both = PATHS["gram"].cost(work, sizes)
    assert both.bytes == 7 * n * d * 4 + 96 * len(sizes) * d
    assert both.flops == (2 + 2 + 2 + 4 + 2 + 2 + 1 + 5) * n * d + 16 * len(sizes) * d
    forward = PATHS["gram"].cost(work._replace(wants_gradient=False), sizes)
    assert forward.bytes == 3 * n * d * 4 + 48 * len(sizes) * d
    assert forward.flops == (2 + 2 + 2 + 4) * n * d + 8 * len(sizes) * d


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_paths_over_pairs_refuse_it_and_say_what_takes_it(impl):
    x = torch.ones(4, 2, device="cpu" if impl == "native" else "meta")
    refused = PATHS[impl].refuses(x, None, Spec(similarity=LINEAR))
    assert 'impl="gram" takes sums of classes' in refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [
        (64, None, 128),
        (4096, None, 128),
        (1 << 18, None, 128),
        (1 << 16, None, 512),
        (4096, 4096, 128),
        (4096, 8192, 128),
    ],
)
def test_predicted_cost_on_a_gpu(monkeypatch, n, m, d, dtype, reduction):
    monkeypatch.undo()  # blocks and panels of their own size
    monkeypatch.setattr(class_sums_on_gpu, "takes", lambda work, device: False)
    spec = Spec(similarity=LINEAR, reduction=reduction, wants_gradient=True)
    with FakeTensorMode(), Launches() as launches, Peak() as peak:
        x, labels = on_fake_gpu(n, d, dtype)
        ref, ref_labels = (None, None) if m is None else on_fake_gpu(m, d, dtype)
        given, inputs = peak.held, (x, ref, labels, ref_labels)
        loss, rows, kept = PATHS["gram"].forward(*inputs, spec)
        forward, upstream = launches.launches, torch.empty_like(loss)
        found = PATHS["gram"].backward(upstream, *inputs, rows, kept.tensors, spec)
        found = [gradient.to(dtype) for gradient in found if gradient is not None]
    work = Work(n, m, d, dtype, reduction, device="cuda", similarity="linear")
    path = PATHS["gram"]
    if m is None or dtype == torch.float32:  # two sides are cast once more
        one = path.cost(work._replace(wants_gradient=False), [])
        assert one.launches == forward
        assert path.cost(work, []).launches == launches.launches
    assert path.cost(work, []).flops == pytest.approx(launches.flops, rel=0.02)
    assert path.cost(work, []).bytes == pytest.approx(launches.bytes, rel=0.05)
    assert path.cost(work, []).extra_memory == pytest.approx(peak.most - given, rel=0.1)
    assert len(found) == (1 if m is None else 2)
