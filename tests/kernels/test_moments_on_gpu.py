"""What is particular to the second moments of a GPU: in Triton's interpreter, or on a GPU.

`test_triton.py` runs this file in a child that has the interpreter.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from launches import Launches, NotRun, Peak, on_fake_gpu
from oracle import Formula, assert_as_exact_as_plain, batch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_device import DEVICE, assert_near, interpreted, runs_here, sized

from bstriplet_kernels import bstriplet_loss, reference
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import gpu, moments, triton
from bstriplet_kernels.paths.moments import anywhere, class_sums_on_gpu, on_gpu
from bstriplet_kernels.spec import LINEAR, SQUARE, Spec, work_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def small(monkeypatch):
    """Small batches then hold classes with and without matrices, in several runs."""
    monkeypatch.setattr(on_gpu, "takes", lambda work, device: True)
    monkeypatch.setattr(on_gpu, "smallest_moment", lambda depth: 6)
    monkeypatch.setattr(on_gpu, "_MULTIPLE", 4)


@pytest.fixture
def wide(small, monkeypatch):
    """Matrices of D > 20 are then in tiles of 16, added up down to their diagonal."""
    monkeypatch.setattr(on_gpu, "NARROW_DEPTH", {"hopper": 20, "other": 20})
    monkeypatch.setattr(on_gpu, "_TILE", 16)


def both_ways(x, labels, spec, upstream=None):
    """(loss, positive, negative, gradient) by the kernels, and by the reference in float64."""
    found = []
    for forward in (on_gpu.forward, None):
        if forward is None:
            loss, rows, _ = reference.forward(x.double(), None, labels, None, spec)
        else:
            loss, rows, kept = forward(x, None, labels, None, spec)
        up = torch.ones_like(loss) if upstream is None else upstream.to(loss)
        if forward is None:
            gradient = reference.backward(up, x.double(), None, labels, None, None, (), spec)[0]
        else:
            gradient, _ = on_gpu.backward(up, x, None, kept, spec)
        found.append((loss, *rows, gradient))
    return found


@runs_here
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    d=st.integers(1, 20),
    seed=st.integers(0, 999),
    formula=st.builds(
        Formula,
        margin=st.sampled_from([0.3, 0.9]),
        eq3=st.sampled_from(["corrected", "printed"]),
        reduction=st.sampled_from(["mean", "sum", "none"]),
    ),
    dtype=st.sampled_from(DTYPES),
)
@example(sizes=[7] * 8, d=9, seed=0, formula=Formula(0.3, reduction="none"), dtype=torch.float32)
@example(sizes=[60, 1, 1], d=4, seed=0, formula=Formula(), dtype=torch.float32)
@example(sizes=[5] * 9, d=5, seed=0, formula=Formula(margin=0.3), dtype=torch.float32)
@example(sizes=[36, 1], d=1, seed=0, formula=Formula(), dtype=torch.float32)
@example(sizes=[64], d=5, seed=0, formula=Formula(), dtype=torch.float32)
@pytest.mark.usefixtures("small")
def test_any_mixture_of_class_sizes(sizes, d, seed, formula, dtype):
    x, labels = sized(sizes, d, seed, dtype)
    assert_as_exact_as_plain("gram", x, labels, formula)


@runs_here
@pytest.mark.parametrize(("d", "whole"), [(100, True), (100, False), (200, True)])
@pytest.mark.usefixtures("small")
def test_wide_embeddings(monkeypatch, d, whole):
    """Matrices held as a whole, as on Hopper, or multiplied in parts."""
    monkeypatch.setattr(gpu, "kind", lambda _: "hopper" if whole else "other")
    x, labels = sized([60, 55, 3, 1], d, 0)
    assert_as_exact_as_plain("gram", x, labels, Formula(margin=0.5))


@runs_here
@pytest.mark.parametrize(
    ("sizes", "d", "margin", "reduction", "hopper", "dtype"),
    [
        ([*[5] * 3, 20, 15, 1], 33, 0.05, "mean", False, torch.float32),
        ([*[5] * 3, 20, 15], 40, 0.05, "none", True, torch.float32),
        ([30, 1, 1], 22, 0.9, "none", True, torch.bfloat16),
        ([*[5] * 3, 20, 15, 1], 33, 0.05, "none", False, torch.float64),
    ],
)
@pytest.mark.usefixtures("wide")
def test_matrices_in_blocks(monkeypatch, sizes, d, margin, reduction, hopper, dtype):
    """Rows of several classes in a block, active ones among others, tails of columns."""
    monkeypatch.setattr(gpu, "kind", lambda _: "hopper" if hopper else "other")
    x, labels = sized(sizes, d, 0, dtype)
    assert_as_exact_as_plain("gram", x, labels, Formula(margin, reduction=reduction))
    if margin < 0.1:
        losses = bstriplet_loss(x, labels, margin=margin, reduction="none", impl="reference")
        assert 0 < (losses > 0).sum() < len(x)


@runs_here
@pytest.mark.usefixtures("wide")
def test_a_band_of_several_blocks(monkeypatch):
    """What later blocks of a small class add to the gradient is added to what earlier ones did."""
    monkeypatch.setattr(on_gpu, "smallest_moment", lambda depth: 200)
    x, labels = sized([150, 20], 33, 0)
    got, truth = both_ways(x, labels, Spec(margin=0.0))
    assert_near(got[1:], truth[1:], 1e-6)  # at this margin losses are differences


@runs_here
@pytest.mark.parametrize(
    ("rows", "columns", "d", "margin", "dtypes", "reduction"),
    [
        ([20, 3, 0, 9, 1], [30, 2, 9, 0, 5], 24, 0.05, (torch.float32,) * 2, "mean"),
        ([4, 12, 1], [14, 1, 3], 7, 0.9, (torch.bfloat16,) * 2, "none"),
        ([20, 3, 0, 9, 1], [30, 2, 9, 0, 5], 24, 0.05, (torch.float16, torch.float32), "none"),
        ([4, 12, 1], [14, 1, 3], 7, 0.9, (torch.float64, torch.bfloat16), "mean"),
    ],
)
@pytest.mark.usefixtures("wide")
def test_other_columns(rows, columns, d, margin, dtypes, reduction):
    """Classes without rows, without columns, with few and with many; both gradients."""
    x, labels = sized(rows, d, 0, dtypes[0])
    ref, ref_labels = sized(columns, d, 1, dtypes[1])
    formula = Formula(margin, reduction=reduction)
    assert_as_exact_as_plain("gram", x, labels, formula, ref, ref_labels)


@runs_here
@pytest.mark.usefixtures("small")
def test_tiles_of_their_own_size():
    """No smaller tiles in place of those that a GPU has."""
    x, labels = sized([13, 9, 2], 257, 0)
    got, truth = both_ways(x, labels, Spec(margin=0.3))
    assert_near(got, truth, 1e-6)


@runs_here
@pytest.mark.usefixtures("wide")
def test_bad_rows_of_wide_embeddings():
    """A zero row has no gradient; NaN is never hidden; nor does infinity reach inactive rows."""
    x, labels = sized([20, 9, 2], 24, 0)
    x[5] = 0
    got, truth = both_ways(x, labels, Spec())
    assert_near(got, truth, 1e-6)
    assert (got[3][5] == 0).all()
    loss, _, kept = on_gpu.forward(x, None, labels, None, Spec(margin=-1.5))
    inf = torch.full_like(loss, torch.inf)
    assert (on_gpu.backward(inf, x, None, kept, Spec(margin=-1.5))[0] == 0).all()
    x[5, 3] = torch.nan
    got, _ = both_ways(x, labels, Spec())
    assert got[0].isnan()
    assert got[3].isnan().all()


@runs_here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sizes", [[90, 2], [45, 45], [30, 5, 5, 5, 30]])
def test_others_do_not_cancel(sizes):
    """T - T_c is a few roundings of T where a class holds most rows, or its rows are alike."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    centres = torch.randn(len(sizes), 16, generator=generator)
    x = centres[labels] + 1e-2 * torch.randn(len(labels), 16, generator=generator)
    x, labels = x.to(DEVICE), labels.to(DEVICE)
    got, truth = both_ways(x, labels, Spec(margin=1.5))
    large = torch.bincount(labels)[labels] >= 6
    assert_near([v[large] for v in got[1:3]], [v[large] for v in truth[1:3]], 1e-6)
    assert_near(got[:1], truth[:1], 1e-6)


@runs_here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small")
def test_rows_that_lie_close_together(dtype):
    """What matrices make of such a row is almost all along it, and projected away."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor([30, 5, 5, 5, 30]))
    centres = torch.randn(5, 16, generator=generator)
    x = centres[labels] + 0.03 * torch.randn(len(labels), 16, generator=generator)
    formula = Formula(margin=1.0)
    assert_as_exact_as_plain("gram", x.to(DEVICE, dtype), labels.to(DEVICE), formula)


@runs_here
@pytest.mark.parametrize("processors", [2, 48])
def test_runs_of_many_blocks_and_many_runs(monkeypatch, processors):
    monkeypatch.setattr(on_gpu, "takes", lambda work, device: True)
    monkeypatch.setattr(on_gpu, "_MULTIPLE", 4)
    monkeypatch.setattr(gpu, "processors", lambda _: processors)
    sizes = [300, 150, *[50] * 3] if processors == 2 else [150, 130, 40, 20, 20]
    x, labels = sized(sizes, 8, 0)
    for margin, reduction in ((0.9, "mean"), (0.15, "mean"), (0.15, "none")):
        spec = Spec(margin=margin, reduction=reduction)
        got, truth = both_ways(x, labels, spec)
        assert_near(got, truth, 1e-6)


@runs_here
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("small")
def test_inactive_rows_have_no_gradient_whatever_comes_from_upstream(reduction):
    x, labels = sized([40, 30, 4], 8, 0)
    loss, _, kept = on_gpu.forward(x, None, labels, None, Spec(margin=-1.5, reduction=reduction))
    upstream = torch.full_like(loss, torch.inf)
    spec = Spec(margin=-1.5, reduction=reduction)
    assert (on_gpu.backward(upstream, x, None, kept, spec)[0] == 0).all()


@runs_here
@pytest.mark.usefixtures("small")
def test_the_backward_multiplies_as_its_forward_did():
    x, labels = sized([40, 33, 8, 3], 12, 5)
    loss, _, kept = on_gpu.forward(x, None, labels, None, Spec())
    gradients = [on_gpu.backward(torch.ones_like(loss), x, None, kept, Spec())[0]]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert not on_gpu.splits(torch.float32)
        gradients.append(on_gpu.backward(torch.ones_like(loss), x, None, kept, Spec())[0])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(*gradients)


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
    assert_near([got[3] * scale], [truth[3] * scale], 2e-6)
    assert (got[3][5] == 0).all()


@runs_here
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("size", [20, 2], ids=["of a large class", "of a small class"])
@pytest.mark.usefixtures("small")
def test_a_bad_row_is_never_hidden(bad, size):
    x, labels = sized([40, size], 4, 0)
    x[(labels == labels.max()).nonzero()[0], 1] = bad
    got, _ = both_ways(x, labels, Spec())
    assert got[0].isnan()
    assert got[3].isnan().all()


@runs_here
@pytest.mark.parametrize("upstream", [-3.0, 0.0, 1e-30, 1e30])
@pytest.mark.usefixtures("small")
def test_upstream_of_any_size_and_sign(upstream):
    x, labels = sized([40, 30, 4], 8, 0)
    got, truth = both_ways(x, labels, Spec(margin=0.4), torch.tensor(upstream))
    assert_near([got[3].double()], [truth[3]], 2e-6)


@runs_here
@pytest.mark.usefixtures("small")
def test_the_same_bits():
    x, labels = sized([40, 33, 8, 3, 1, 1], 12, 5)
    for reduction in ("mean", "none"):
        runs = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            loss = bstriplet_loss(leaf, labels, impl="gram", reduction=reduction)
            runs.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def truncated(x):
    """Float64 numbers as float32 nearer to zero."""
    near = x.astype(np.float32)
    return np.where(abs(near) > abs(x), np.nextafter(near, np.float32(0)), near)


@interpreted
def test_sums_of_tensor_cores_that_truncate(monkeypatch):
    """They lose up to 2^-23 a step, always the same way: in one go, 2e-6 of this loss."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, total, *options):
        a, b, total = a.data.astype(float), b.data.astype(float), total.data
        for k in range(0, a.shape[1], 16):
            total = truncated(total.astype(float) + a[:, k : k + 16] @ b[k : k + 16])
        return interpreter.TensorHandle(total, interpreter.tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(gpu, "processors", lambda _: 1)
    x, labels = sized([1024, 100], 8, 0)
    x = x.abs() + 0.1  # all that is added up is of one sign
    got, truth = both_ways(x, labels, Spec())
    assert_near(got, truth, 5e-7)


@runs_here
@pytest.mark.usefixtures("small")
def test_tf32_is_one_product():
    x, labels = sized([40, 33, 8, 3], 12, 5)
    torch.set_float32_matmul_precision("high")
    try:
        _, _, kept = on_gpu.forward(x, None, labels, None, Spec())
        got, truth = both_ways(x, labels, Spec())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert on_gpu.KeptMoments.of(kept).batch.low.numel() == 0
    assert_near(got, truth, 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("n", "d", "m"),
    [
        (256, 128, None),
        (1024, 128, None),
        (4096, 128, None),
        (1 << 20, 128, None),
        (65536, 16, None),
        (8192, 256, None),
        (38400, 384, None),
        (131072, 1280, None),
        (1 << 16, 128, 1 << 17),
        (20_000, 384, 50_000),
    ],
)
def test_predicted_launches_and_memory_are_those_made(monkeypatch, n, d, m, dtype, reduction):
    """On fake tensors of a GPU: as many launches for any batch, three times the embeddings."""
    kernels = NotRun()
    make = on_gpu.Launcher.__init__

    def counted(self, *args, **keywords):
        make(self, *args, **keywords)
        self.kernels = self.wide_kernels = kernels

    monkeypatch.setattr(on_gpu.Launcher, "__init__", counted)
    monkeypatch.setattr(gpu, "current", lambda _: nullcontext())
    monkeypatch.setattr(gpu, "processors", lambda _: 132)
    monkeypatch.setattr(gpu, "kind", lambda _: "hopper")
    with FakeTensorMode(), Launches() as torchs, Peak() as peak:
        x, labels = on_fake_gpu(n, d, dtype)
        ref, ref_labels = (None, None) if m is None else on_fake_gpu(m, d, dtype)
        given = peak.held
        spec = Spec(reduction=reduction, wants_gradient=True)
        loss, _, kept = on_gpu.forward(x, ref, labels, ref_labels, spec)
        forward = torchs.launches + kernels.launches
        sides = on_gpu.backward(torch.empty_like(loss), x, ref, kept, spec)
        _ = [side.to(dtype) for side in sides if side is not None]  # as the caller does
        both = torchs.launches + kernels.launches
    work = Work(n, m, d, dtype, reduction, device="cuda")
    assert on_gpu.takes(work, None)
    sizes = [work.columns // 2] * 2
    got = on_gpu.cost(work, sizes)
    assert (got.launches, got.schedule) == (both, on_gpu.SCHEDULE)
    one = on_gpu.cost(work._replace(wants_gradient=False), sizes)
    assert one.launches == forward
    assert both - len(work.narrow_sides) <= 16
    assert got.extra_memory == pytest.approx(peak.most - given, rel=0.05)
    products, joint, every = 3 if on_gpu.splits(dtype) else 1, m is not None, n + (m or 0)
    cut = on_gpu.sizes_of(work)
    each, half = (2 * k * every * products for k in (cut.depth**2, cut.numbers))
    forms = 2 * half * n // every
    more = (1 if reduction == "mean" or joint else 2) * each
    assert one.flops == pytest.approx(half + forms, rel=0.01)
    assert got.flops == pytest.approx(2 * half + forms + more, rel=0.01)
    if joint:
        return
    if dtype == torch.float32 and n >= 100 * d and (n > 100_000 or d > 256):
        assert on_gpu.cost(work, [n]).extra_memory <= 3 * work.embedding_bytes
        assert d > 256 or got.bytes <= 4e9


@pytest.mark.parametrize(
    ("n", "m", "least"),
    [(256, None, 128), (301, None, 150), (1 << 16, None, 768), (9, 300, 150), (1 << 16, 256, 128)],
)
def test_a_class_of_half_of_the_columns_is_large(n, m, least):
    assert on_gpu.sizes_of(Work(n, m, 128, torch.float32, device="cuda")).least == least


@pytest.mark.parametrize("similarity", [SQUARE, LINEAR])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_launches_of_sides_of_two_dtypes(monkeypatch, dtypes, similarity):
    """No side is widened before it is read, and each gradient is cast to its own side's dtype."""
    kernels = NotRun()
    make = on_gpu.Launcher.__init__

    def counted(self, *args, **keywords):
        make(self, *args, **keywords)
        self.kernels = self.wide_kernels = kernels

    monkeypatch.setattr(on_gpu.Launcher, "__init__", counted)
    monkeypatch.setattr(class_sums_on_gpu, "kernels", lambda: kernels)
    monkeypatch.setattr(gpu, "current", lambda _: nullcontext())
    monkeypatch.setattr(gpu, "processors", lambda _: 132)
    monkeypatch.setattr(gpu, "kind", lambda _: "hopper")
    spec = Spec(similarity=similarity, wants_gradient=True)
    with gpu.imagined(), FakeTensorMode(), Launches() as torchs:
        (x, labels), (ref, ref_labels) = (on_fake_gpu(4096, 128, dtype) for dtype in dtypes)
        sides = x, ref, labels, ref_labels
        loss, rows, kept = moments.forward(*sides, spec)
        gradients = moments.backward(torch.empty_like(loss), *sides, rows, kept.tensors, spec)
        _ = [g.to(side.dtype) for g, side in zip(gradients, (x, ref), strict=True)]
        cost = moments.cost(work_of(x, ref, spec), [2048, 2048])
    assert kernels.launches > 4
    assert cost.launches == torchs.launches + kernels.launches


def test_what_it_does_not_take():
    assert not on_gpu.takes(Work(4096, None, 128, torch.float32, device="meta"), None)
    work = Work(4096, None, 128, torch.float32, device="cuda")
    with gpu.imagined():
        for taken in (
            work,
            work._replace(n=10, m=8192),
            work._replace(dtype=torch.float64),
            work._replace(n=256),
            work._replace(n=10, m=256),
            work._replace(d=2048),
        ):
            assert on_gpu.takes(taken, None)
        for refused in (
            work._replace(m=255),
            work._replace(n=1 << 16, d=2049),
            work._replace(n=255),
        ):
            assert not on_gpu.takes(refused, None)
        assert not on_gpu.takes(work._replace(n=(1 << 30) + 1), None)


@pytest.mark.parametrize(
    ("n", "m", "d", "schedule"),
    [
        (36, None, 1280, triton),
        (255, None, 128, triton),
        (256, None, 128, on_gpu),
        (4096, 255, 128, triton),
        (4096, 256, 128, on_gpu),
        (8192, 8192, 2049, triton),
        (8192, None, 2049, anywhere),
    ],
)
def test_few_columns_are_for_pairs(monkeypatch, n, m, d, schedule):
    work = Work(n, m, d, torch.float32, device="cuda")
    with gpu.imagined():
        assert moments.schedule_of(work, None) is schedule
    monkeypatch.setattr(gpu, "_HAS_TRITON", False)
    assert moments.schedule_of(work, None) is anywhere


@runs_here
@pytest.mark.parametrize(("n", "m", "reduction"), [(20, None, "mean"), (70, 30, "none")])
def test_pairs_in_place_of_moments(monkeypatch, n, m, reduction):
    monkeypatch.setattr(moments, "schedule_of", lambda *_: triton)
    x, labels = batch(n, 40, 3, 0, torch.float32)
    other = batch(m, 40, 3, 1, torch.float32) if m else (None, None)
    x, labels, *other = (None if t is None else t.to(DEVICE) for t in (x, labels, *other))
    assert_as_exact_as_plain("gram", x, labels, Formula(reduction=reduction), *other)


def test_where_its_kernels_do_not_run(monkeypatch):
    work, device = Work(4096, None, 128, torch.float32, device="cuda"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, taken in ((7, False), (8, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=major: (of, 0))
        assert on_gpu.takes(work, device) is taken
    with monkeypatch.context() as without:
        without.setattr(gpu, "_HAS_TRITON", False)
        assert not on_gpu.takes(work, device)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert on_gpu.takes(work, device)


def test_sides_of_two_dtypes_are_taken_as_one():
    with FakeTensorMode():
        x, ref = (torch.empty(n, 128, device="cuda") for n in (4096, 8192))
        for rows, columns, dtype in (
            (x.half(), ref.bfloat16(), torch.float32), (x, ref.double(), torch.float64),
        ):  # fmt: skip
            assert work_of(rows, columns, Spec()).dtype == dtype


@runs_here
@pytest.mark.parametrize("d", [8, 24])
def test_negated_views_are_read_as_they_are(wide, d):
    """Their numbers in memory have the other sign, which a kernel's pointer would not tell."""
    x, labels = batch(60, d, 3, 0, torch.float32)
    plain = x.to(DEVICE).requires_grad_()
    negated = torch.complex(torch.zeros_like(plain), -plain.detach()).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, plain)
    labels, negated = labels.to(DEVICE), negated.requires_grad_()
    (expected,) = torch.autograd.grad(bstriplet_loss(plain, labels, impl="gram"), plain)
    loss = bstriplet_loss(negated, labels, impl="gram")
    upstream = torch.complex(torch.zeros(()), torch.tensor(-1.0)).conj().imag.to(DEVICE)
    (got,) = torch.autograd.grad(loss, negated, upstream)
    torch.testing.assert_close(got, expected)
