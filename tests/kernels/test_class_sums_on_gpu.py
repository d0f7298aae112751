"""What is particular to sums of classes on a GPU: in Triton's interpreter, or on a GPU.

`test_triton.py` runs this file in a child that has the interpreter.
"""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from launches import Launches, NotRun, Peak, on_fake_gpu
from oracle import Formula, assert_as_exact_as_plain
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_device import DEVICE, assert_near, runs_here, sized

from bstriplet_kernels import bstriplet_loss, explain, reference
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import PATHS, gpu
from bstriplet_kernels.paths.moments import class_sums, class_sums_on_gpu, schedule_of
from bstriplet_kernels.spec import LINEAR, Spec

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _taken(monkeypatch):
    monkeypatch.setattr(class_sums_on_gpu, "takes", lambda work, device: True)


@pytest.fixture
def small(monkeypatch):
    """Small batches then have many runs, and classes that are in several."""
    monkeypatch.setattr(class_sums_on_gpu, "SUMMED", 4)
    monkeypatch.setattr(class_sums_on_gpu, "_SUM_BLOCKS", 1)
    monkeypatch.setattr(class_sums_on_gpu, "_SUM_WARPS", 2)
    monkeypatch.setattr(class_sums_on_gpu, "FOUND", 16)
    monkeypatch.setattr(class_sums_on_gpu, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(class_sums_on_gpu, "_ROW_PROGRAMS", 2)
    monkeypatch.setattr(class_sums_on_gpu, "ADDED_RUNS", 4)


@pytest.fixture
def wide(small, monkeypatch):
    """Rows of D > 16 are then in several blocks of columns."""
    monkeypatch.setattr(class_sums_on_gpu, "WIDEST", 16)


def linear(margin=0.9, eq3="corrected", reduction="mean"):
    return Formula(margin, "linear", eq3, reduction)


def both_ways(x, labels, spec, upstream=None, ref=None, ref_labels=None):
    """(loss, positive, negative, gradients) by the kernels, and by the reference in float64."""
    spec, found = spec._replace(similarity=LINEAR), []
    exact = x.double(), None if ref is None else ref.double()
    for path, sides in ((PATHS["gram"], (x, ref)), (reference, exact)):
        loss, rows, kept = path.forward(*sides, labels, ref_labels, spec)
        up = torch.ones_like(loss) if upstream is None else upstream.to(loss)
        kept = () if path is reference else kept.tensors
        grads = path.backward(up, *sides, labels, ref_labels, rows, kept, spec)
        found.append((loss, *rows, *(g for g in grads if g is not None)))
    return found


@runs_here
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    d=st.integers(1, 40),
    seed=st.integers(0, 999),
    formula=st.builds(
        linear,
        margin=st.sampled_from([0.0, 0.5, 1.0]),
        eq3=st.sampled_from(["corrected", "printed"]),
        reduction=st.sampled_from(["mean", "sum", "none"]),
    ),
    dtype=st.sampled_from(DTYPES),
)
@example(sizes=[60, 1], d=4, seed=0, formula=linear(), dtype=torch.float64)
@example(sizes=[50], d=5, seed=0, formula=linear(), dtype=torch.float32)
@example(sizes=[1, 1], d=1, seed=0, formula=linear(), dtype=torch.float32)
@example(sizes=[1] * 40, d=9, seed=0, formula=linear(0.3), dtype=torch.float32)
@example(sizes=[2] * 20, d=33, seed=0, formula=linear(0.3, reduction="none"), dtype=torch.float32)
@example(sizes=[8] * 6, d=16, seed=0, formula=linear(0.5), dtype=torch.float16)
@pytest.mark.usefixtures("wide")
def test_any_mixture_of_class_sizes(sizes, d, seed, formula, dtype):
    x, labels = sized(sizes, d, seed, dtype)
    assert_as_exact_as_plain("gram", x, labels, formula)


@runs_here
@pytest.mark.parametrize(
    ("rows", "columns", "d", "formula"),
    [
        ([20, 3, 0, 9, 1], [30, 2, 9, 0, 5], 24, linear(0.05)),
        ([4, 12, 1], [14, 1, 3], 7, linear(0.9, "printed", "none")),
        ([0, 10, 0], [50, 0, 1], 20, linear(0.9, reduction="sum")),
        ([1], [0, 1], 3, linear()),
        ([1] * 30, [0] * 15 + [1] * 30, 12, linear(0.5, reduction="none")),
    ],
)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.usefixtures("wide")
def test_other_columns(rows, columns, d, formula, dtypes):
    """Classes without rows, without columns, with few and with many; sides of two dtypes."""
    (x, labels), (ref, ref_labels) = (
        sized(sizes, d, seed, dtype)
        for seed, (sizes, dtype) in enumerate(zip((rows, columns), dtypes, strict=True))
    )
    assert_as_exact_as_plain("gram", x, labels, formula, ref, ref_labels)
    spec = Spec(formula.margin, 1.0 if formula.eq3 == "corrected" else -1.0)
    spec = spec._replace(reduction=formula.reduction)
    got, truth = both_ways(x, labels, spec, None, ref, ref_labels)
    assert_near(got, truth, 1e-6)
    assert [g.dtype for g in got] == [torch.float32] * 5


@runs_here
@pytest.mark.parametrize(("n", "d"), [(200, 20), (20, 1280), (9, 2050)])
def test_blocks_of_their_own_size(n, d):
    x, labels = sized([n - 7, 4, 2, 1], d, 0)
    assert_as_exact_as_plain("gram", x, labels, linear(0.5))


@runs_here
@pytest.mark.parametrize(("dtype", "others"), [(torch.float64, 1), (torch.float32, 4)])
@pytest.mark.usefixtures("small")
def test_a_class_that_holds_nearly_everything(dtype, others):
    """In float64 too: the total is kept without it, and nothing cancels."""
    generator = torch.Generator().manual_seed(others)
    x = torch.randn(1, 8, dtype=torch.float64, generator=generator).repeat(300, 1)
    x += 1e-3 * torch.randn(300, 8, dtype=torch.float64, generator=generator)
    x, labels = x.to(DEVICE, dtype), torch.zeros(300, dtype=torch.int64, device=DEVICE)
    labels[:others] = torch.tensor([3, -5, -5, 7])[:others]
    assert_as_exact_as_plain("gram", x, labels, linear())
    got, truth = both_ways(x, labels, Spec())
    assert_near(got[1:3], truth[1:3], 1e-15 if dtype == torch.float64 else 1e-6)


@runs_here
@pytest.mark.parametrize("n", [2, 24])
def test_a_rows_own_share_does_not_cancel(n):
    """Classes of two: a row's own share is 1, and its one positive is near 0."""
    x = torch.randn(n, 2048, generator=torch.Generator().manual_seed(n))
    x[0].neg_()  # so that its one positive is below the margin
    x, labels = x.to(DEVICE), torch.arange(n, device=DEVICE) % (n // 2)
    got, truth = both_ways(x, labels, Spec(margin=0.0, reduction="none"))
    assert truth[0].norm() > 0
    assert_near(got[:2], truth[:2], 1e-6)
    assert_as_exact_as_plain("gram", x, labels, linear(0.0))


@runs_here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.03, 1e-3])
@pytest.mark.usefixtures("small")
def test_rows_that_lie_close_together(dtype, spread):
    """Their gradient is almost all along them, and projected away."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor([30, 5, 5, 5, 30]))
    centres = torch.randn(5, 16, generator=generator)
    x = centres[labels] + spread * torch.randn(len(labels), 16, generator=generator)
    assert_as_exact_as_plain("gram", x.to(DEVICE, dtype), labels.to(DEVICE), linear(1.0))


@runs_here
@pytest.mark.usefixtures("small")
def test_rows_of_any_norm():
    x, labels = sized([40, 30, 4], 12, 0)
    powers = torch.linspace(-10, 15, len(x), device=DEVICE)[:, None]
    x = torch.nn.functional.normalize(x, dim=1) * 10**powers
    x[5] = 0
    got, truth = both_ways(x, labels, Spec())
    assert_near(got[:3], truth[:3], 1e-6)
    scale = x.double().norm(dim=1, keepdim=True)
    assert_near([got[3] * scale], [truth[3] * scale], 1e-6)
    assert (got[3][5] == 0).all()


@runs_here
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("size", [20, 1], ids=["of a large class", "alone"])
@pytest.mark.usefixtures("small")
def test_a_bad_row_is_never_hidden(bad, size):
    x, labels = sized([40, size], 4, 0)
    x[(labels == labels.max()).nonzero()[0], 1] = bad
    got, _ = both_ways(x, labels, Spec())
    assert got[0].isnan()
    assert got[3].isnan().all()


@runs_here
@pytest.mark.parametrize("upstream", [-3.0, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("small")
def test_upstream_of_any_size_and_sign(upstream, reduction):
    x, labels = sized([40, 30, 4], 8, 0)
    upstream = torch.full((74,) if reduction == "none" else (), upstream)
    if reduction == "none":  # that of every other row of a longer tensor
        upstream = torch.stack((upstream, upstream.neg()), dim=1)[:, 0].to(DEVICE)
    spec = Spec(margin=0.4, reduction=reduction)
    got, truth = both_ways(x, labels, spec, upstream)
    assert_near([got[3].double()], [truth[3]], 1e-6)


@runs_here
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("small")
def test_inactive_rows_have_no_gradient_whatever_comes_from_upstream(reduction):
    x, labels = sized([40, 30, 4], 8, 0)
    spec = Spec(margin=-2.5, similarity=LINEAR, reduction=reduction)
    loss, _, kept = class_sums_on_gpu.forward(x, None, labels, None, spec)
    upstream = torch.full_like(loss, torch.inf)
    assert not loss.any()
    assert (class_sums_on_gpu.backward(upstream, x, None, kept, spec)[0] == 0).all()


@runs_here
@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.usefixtures("small")
def test_few_runs_and_many_give_the_same(monkeypatch, processors):
    monkeypatch.setattr(gpu, "processors", lambda _: processors)
    x, labels = sized([90, 40, 1, 1, 9], 8, 0)
    for reduction in ("mean", "none"):
        got, truth = both_ways(x, labels, Spec(margin=0.15, reduction=reduction))
        assert_near(got, truth, 1e-6)


@runs_here
@pytest.mark.usefixtures("small")
def test_the_same_bits_whatever_the_order_in_memory():
    x, labels = sized([40, 33, 8, 3, 1, 1], 12, 5)
    runs = []
    for view in (x, x, x.T.contiguous().T, torch.stack((x, -x), dim=2)[:, :, 0]):
        leaf = view.detach().requires_grad_()
        loss = bstriplet_loss(leaf, labels, similarity="linear", impl="gram")
        runs.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@runs_here
@pytest.mark.usefixtures("small")
def test_negated_views_are_read_as_they_are():
    """Their numbers in memory have the other sign, which a kernel's pointer would not tell."""
    x, labels = sized([20, 10], 8, 0)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    grads = []
    for rows, columns in ((x, x[:7]), (negated, negated[:7])):
        leaves = rows.detach().requires_grad_(), columns.detach().requires_grad_()
        given = {"ref_emb": leaves[1], "ref_labels": labels[:7], "similarity": "linear"}
        loss = bstriplet_loss(leaves[0], labels, impl="gram", **given)
        upstream = torch.complex(torch.zeros(()), torch.tensor(-1.0)).conj().imag.to(DEVICE)
        grads.append(torch.autograd.grad(loss, leaves, upstream))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("n", "d", "m"),
    [
        (36, 1280, None),
        (4096, 128, None),
        (1 << 20, 128, None),
        (65536, 16, None),
        (20_000, 4096, None),
        (1 << 16, 128, 1 << 17),
        (20_000, 384, 3000),
    ],
)
def test_predicted_launches_and_memory_are_those_made(monkeypatch, n, d, m, dtype, reduction):
    """On fake tensors of a GPU: as many launches for any batch, three times the embeddings."""
    monkeypatch.undo()
    kernels = NotRun()
    monkeypatch.setattr(class_sums_on_gpu, "kernels", lambda: kernels)
    monkeypatch.setattr(gpu, "current", lambda _: nullcontext())
    monkeypatch.setattr(gpu, "processors", lambda _: 132)
    spec = Spec(similarity=LINEAR, reduction=reduction, wants_gradient=True)
    with gpu.imagined(), FakeTensorMode(), Launches() as torchs, Peak() as peak:
        x, labels = on_fake_gpu(n, d, dtype)
        ref, ref_labels = (None, None) if m is None else on_fake_gpu(m, d, dtype)
        given, inputs = peak.held, (x, ref, labels, ref_labels)
        loss, _, kept = class_sums_on_gpu.forward(*inputs, spec)
        forward = torchs.launches + kernels.launches
        upstream = torch.empty_like(loss)
        sides = class_sums_on_gpu.backward(upstream, x, ref, kept, spec)
        _ = [side.to(dtype) for side in sides if side is not None]  # as the caller does
        both = torchs.launches + kernels.launches
        work = Work(n, m, d, dtype, reduction, device="cuda", similarity="linear")
        got = PATHS["gram"].cost(work, [work.columns])
        one = PATHS["gram"].cost(work._replace(wants_gradient=False), [work.columns])
    assert (got.launches, got.schedule) == (both, class_sums_on_gpu.SCHEDULE)
    assert one.launches == forward
    assert both <= (12 if m is None else 14)
    assert got.extra_memory == pytest.approx(peak.most - given, rel=0.05)
    passes = 5 if m is None and d <= class_sums_on_gpu.WIDEST else 6
    if dtype == torch.float32 and n >= 4096 and d >= 128:
        assert got.extra_memory - work.gradient_bytes <= 2.3 * work.embedding_bytes
        assert got.bytes <= 1.25 * passes * work.embedding_bytes


def test_cost_by_hand():
    """Rows are read for sums with norms, for means, for sums again and for the gradient."""
    n, d, sizes = 10_000, 128, [4000, 6000]
    work = Work(n, None, d, torch.float32, device="cuda", similarity="linear")
    both = class_sums_on_gpu.cost(work, sizes)
    forward = class_sums_on_gpu.cost(work._replace(wants_gradient=False), sizes)
    per_class = len(sizes) * d
    norms, sums, means, back, gradient = 2, 2, 7, 3, 17
    assert forward.flops == (norms + sums + means) * n * d + per_class
    assert both.flops - forward.flops == (back + gradient) * n * d + 2 * per_class
    # labels, order and where classes begin and end; then order, ends, norm, flag and means
    runs = 313  # of 32 rows: a total and a part of a class each, in float64, written and read
    assert forward.bytes == (n * (40 + 20 + 29) + 2 * n * d * 4 + 32 * runs * d + 2 * per_class * 4)
    assert both.bytes - forward.bytes == (
        n * (21 + 21) + 3 * n * d * 4 + 32 * runs * d + 3 * per_class * 4
    )


def test_where_its_kernels_run(monkeypatch):
    monkeypatch.undo()
    work = Work(4096, None, 128, torch.float64, device="cuda", similarity="linear")
    device = torch.device("cuda", 0)
    with gpu.imagined():
        for taken in (work, work._replace(n=10, m=8192), work._replace(n=2, d=100_000)):
            assert schedule_of(taken, None) is class_sums_on_gpu
        for refused in (work._replace(n=(1 << 30) + 1), work._replace(d=(1 << 20) + 1)):
            assert schedule_of(refused, None) is class_sums
        assert schedule_of(work._replace(device="cpu"), torch.device("cpu")) is class_sums
        plan = explain((1 << 20, 128), 10, device="cuda", similarity="linear")
        assert plan.cost.schedule == class_sums_on_gpu.SCHEDULE
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, taken in ((7, False), (8, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=major: (of, 0))
        assert class_sums_on_gpu.takes(work, device) is taken
    with monkeypatch.context() as without:
        without.setattr(gpu, "_HAS_TRITON", False)
        assert schedule_of(work, device) is class_sums
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert class_sums_on_gpu.takes(work, device)
