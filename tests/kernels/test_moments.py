"""The second-moment path's own promises: its two schedules, class by class, and its memory."""

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launches import Launches, on_fake_gpu
from oracle import Formula, assert_as_exact_as_plain, batch, sized
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bstriplet_kernels import bstriplet_loss
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import moments, native
from bstriplet_kernels.paths.moments import anywhere, on_cpu, on_cpu_native
from bstriplet_kernels.spec import SIGNED_SQUARE

SCHEDULES = [on_cpu, on_cpu_native, anywhere]


@pytest.fixture(autouse=True)
def _every_class_size_meets_both_ways(monkeypatch):
    """Small batches then hold classes with and without a moment matrix, and several panels."""
    monkeypatch.setattr(on_cpu, "SMALLEST_MOMENT", 6)
    monkeypatch.setattr(on_cpu, "panel_rows", lambda d: 7)
    monkeypatch.setattr(on_cpu_native, "SMALLEST_MOMENT", 6)
    monkeypatch.setattr(anywhere, "CHUNK_NUMBERS", 1 << 12)


@pytest.fixture(params=SCHEDULES, ids=["on_cpu", "on_cpu_native", "anywhere"])
def schedule(request, monkeypatch):
    """Every schedule, on CPU tensors, behind the public function."""
    if request.param is on_cpu_native and native.missing() is not None:
        pytest.skip(native.missing())
    monkeypatch.setattr(moments, "schedule_of", lambda *_: request.param)
    if request.param is anywhere:
        monkeypatch.setattr(anywhere, "smallest_moment", lambda d: max(d, 5))
    return request.param


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    d=st.integers(1, 9),
    seed=st.integers(0, 999),
    formula=st.builds(
        Formula,
        margin=st.sampled_from([0.3, 0.9]),
        eq3=st.sampled_from(["corrected", "printed"]),
        reduction=st.sampled_from(["mean", "none"]),
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@example(sizes=[7] * 12, d=9, seed=0, formula=Formula(0.3, reduction="none"), dtype=torch.float64)
@example(sizes=[60, 1, 1], d=4, seed=0, formula=Formula(), dtype=torch.float32)
@example(sizes=[5, 5, 5, 5, 6, 6], d=5, seed=0, formula=Formula(margin=0.3), dtype=torch.float32)
@example(sizes=[4, 1], d=9, seed=1, formula=Formula(reduction="none"), dtype=torch.float64)
def test_any_mixture_of_class_sizes(schedule, sizes, d, seed, formula, dtype):
    x, labels = sized(sizes, d, seed, dtype)
    assert_as_exact_as_plain("gram", x, labels, formula)


@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    d=st.integers(1, 9),
    classes=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_reference_rows_with_and_without_moment_matrices(n, m, d, classes, seed):
    x, labels = batch(n, d, classes, seed)
    ref, ref_labels = batch(m, d, classes + 2, seed + 1)
    assert_as_exact_as_plain("gram", x, labels, Formula(margin=0.3), ref, ref_labels)


def test_blocks_above_the_diagonal_of_wide_embeddings(schedule):
    x, labels = sized([150, 140, 3], 130, 0, torch.float32)
    assert_as_exact_as_plain("gram", x, labels, Formula())


@pytest.mark.parametrize("members", [1, 2])
def test_others_of_a_dominating_class_do_not_cancel(schedule, members):
    """One class holds nearly everything: T - T_c would be N_c roundings beside a few rows."""
    generator = torch.Generator().manual_seed(members)
    centre = torch.randn(16, generator=generator, dtype=torch.float64)
    x = centre + 0.3 * torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    labels = torch.zeros(4000, dtype=torch.int64)
    labels[:members] = 1
    x = x.float()
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    truth = (unit[members:] @ unit[:members].T).square().mean(1)
    rows, _ = schedule.means(x, None, labels, None, 1e-12)
    assert (rows.negative[members:] - truth).norm() <= 1e-6 * truth.norm()
    a = torch.full((4000,), 1 / 4000)
    grads = [
        s.gradients(a.to(t.dtype), t, None, s.means(t, None, labels, None, 1e-12)[1], -1.0)[0]
        for s, t in ((schedule, x), (on_cpu, x.double()))
    ]
    assert (grads[0][members:] - grads[1][members:]).norm() <= 4e-6 * grads[1][members:].norm()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_active_rows_are_found_one_by_one(schedule, share):
    x, labels = sized([20, 20, 9, 2, 2, 1], 4, 3)
    losses = bstriplet_loss(x, labels, reduction="none", impl="reference", margin=0.02)
    upstream = (torch.rand(len(x), generator=torch.Generator().manual_seed(0)) < share).double()
    assert 0 < (losses > 0).sum() < len(x)
    grads = []
    for impl in ("gram", "reference"):
        leaf = x.clone().requires_grad_()
        loss = bstriplet_loss(leaf, labels, reduction="none", impl=impl, margin=0.02)
        loss.backward(upstream)
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_schedules_agree_and_repeat_their_bits(schedule):
    x, labels = sized([40, 33, 8, 8, 3, 1, 1], 12, 5, torch.float32)
    a, runs = torch.rand(len(x)), []
    for s in (on_cpu, schedule, schedule):
        rows, kept = s.means(x, None, labels, None, 1e-12)
        runs.append((*rows, s.gradients(a, x, None, kept, 1.0)[0]))
    for of_cpu, first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(of_cpu, first, rtol=2e-5, atol=1e-6)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
class TestNative:
    """What is particular to the native operators."""

    @pytest.mark.parametrize("labels_are", ["dense", "sparse"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_many_blocks_of_many_parts(self, reduction, labels_are, monkeypatch):
        """Classes of more rows than one block, one sum or one batch of packed matrices holds."""
        monkeypatch.setattr(on_cpu_native, "SMALLEST_MOMENT", 100)
        x, labels = sized([700, 500, 110, *[40] * 10, *range(1, 90, 9)], 24, 0, torch.float32)
        if labels_are == "sparse":
            labels = labels * (1 << 40) - (1 << 50)
        assert_as_exact_as_plain("gram", x, labels, Formula(reduction=reduction, margin=0.3))

    def test_bits_do_not_depend_on_the_number_of_threads(self):
        x, labels = sized([3000, 1500, *[20] * 40], 32, 0, torch.float32)
        before, results = torch.get_num_threads(), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows, kept = on_cpu_native.means(x, None, labels, None, 1e-12)
            gradient, _ = on_cpu_native.gradients(torch.linspace(0, 1, len(x)), x, None, kept, 1.0)
            results.append((*rows, *kept, gradient))
        torch.set_num_threads(before)
        assert all(
            torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True)
        )

    def test_a_gradient_whose_pages_are_mapped_at_once(self):
        """More than 16 MiB, no multiple of a page or of a piece of them, is what it was before."""
        x, labels = sized([60_000, 5_001, 17], 67, 0, torch.float32)

        def gradient(schedule, x):
            _, kept = schedule.means(x, None, labels, None, 1e-12)
            return schedule.gradients(torch.ones(len(x)).to(x), x, None, kept, 1.0)[0]

        truth = gradient(on_cpu, x.double())
        assert (gradient(on_cpu_native, x) - truth).norm() / truth.norm() < 1e-5

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("a", lambda t: t[:-1]),
            ("a", lambda t: t.double()),
            ("table", lambda t: t.float()),
            ("table", lambda t: t + 1),
            ("table", lambda t: -t),
            ("table", torch.zeros_like),
            ("small", lambda t: t[:1]),
            ("slots", lambda t: t[0]),
            ("slots", lambda t: t.mT.expand_as(t)[:, ::1, 1:]),
            ("slots", lambda t: t.repeat(100, 1, 1)),
            ("slots", lambda t: t[:0]),
            ("order", lambda t: t - 1),
            ("order", lambda t: t * 1000),
            ("order", lambda t: t.int()),
            ("inverse", lambda t: t[::2]),
        ],
    )
    def test_what_was_kept_and_does_not_fit_raises(self, name, change):
        x, labels = sized([30, 20, 2, 1], 8, 0, torch.float32)
        kept = dict(
            zip(
                ("table", "small", "slots", "order", "inverse"),
                torch.ops.bstriplet.moment_means(x, labels, 1e-12, 10)[2:],
                strict=True,
            )
        )
        arguments = {"a": torch.ones(len(x)), "embeddings": x, **kept}
        torch.ops.bstriplet.moment_gradient(*arguments.values(), 1.0)
        arguments[name] = change(arguments[name])
        with pytest.raises(RuntimeError, match=r"must|moment_means"):
            torch.ops.bstriplet.moment_gradient(*arguments.values(), 1.0)


def test_anywhere_reads_no_value_of_a_tensor():
    """A fake tensor has no values: reading one, as a synchronisation would, raises."""
    with FakeTensorMode():
        x, labels = torch.empty(500, 24, dtype=torch.bfloat16), torch.empty(500, dtype=torch.int64)
        _, kept = anywhere.means(x, None, labels, None, 1e-12)
        gradient, _ = anywhere.gradients(torch.empty(500), x, None, kept, 1.0)
    assert (gradient.shape, gradient.dtype) == (x.shape, torch.float32)


def test_anywhere_costs_what_it_says(monkeypatch):
    """Products of a row with D x D matrices, as its docstring counts them."""
    monkeypatch.undo()
    n, d = 1 << 15, 128
    counted = []
    with FakeTensorMode():
        x, labels = torch.empty(n, d), torch.empty(n, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            _, kept = anywhere.means(x, None, labels, None, 1e-12)
        counted.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            anywhere.gradients(torch.empty(n), x, None, kept, 1.0)
        counted.append(counter.get_total_flops())
    forward, backward = (flops / (2 * n * d * d) for flops in counted)
    assert forward == pytest.approx(5.75, rel=0.02)
    assert backward == pytest.approx(9.5, rel=0.02)


class Additions(TorchDispatchMode):
    """Fails where more than one number other than 0 is added to one place by one operator."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_add_.default:
            self.calls += 1
            total, dim, index, source = args
            added = torch.zeros(len(total), *source.shape[1:]).index_add_(
                dim, index, (source != 0).float()
            )
            assert added.max() <= 1
        return func(*args, **(kwargs or {}))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    d=st.integers(1, 6),
    chunk=st.sampled_from([1, 1 << 10, 1 << 12]),
)
@example(sizes=[400], d=3, chunk=1 << 10)
@example(sizes=[1, 2, 3, 60, 59, 7], d=4, chunk=1)
def test_moments_anywhere_add_once_to_a_segment_in_each_chunk(sizes, d, chunk):
    """So atomics on a GPU, in whatever order, give the same bits."""
    x, labels = sized(sizes, d, 0)
    with mock.patch.object(anywhere, "CHUNK_NUMBERS", chunk):
        batch = anywhere.TiledRows(x, anywhere.make_layout(x, labels, 1e-12))
        weights = torch.linspace(-1, 1, len(x), dtype=x.dtype)
        with Additions() as additions:
            moments = batch.moments(weights)
        assert additions.calls == len(list(batch.chunks()))
    unit = torch.nn.functional.normalize(x)[batch.layout.order]
    expected = torch.zeros_like(moments)
    for segment, u, w in zip(batch.layout.segment, unit, weights, strict=True):
        expected[segment] += w * u[:, None] * u[None, :]
    torch.testing.assert_close(moments, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_moments_anywhere_keep_a_bad_row_in_its_segment(bad):
    x, labels = sized([40, 40, 3, 2], 4, 0)
    x[0, 1] = bad
    batch = anywhere.TiledRows(x, anywhere.make_layout(x, labels, 1e-12))
    moments = batch.moments()
    spoilt = batch.layout.segment[batch.layout.order == 0].item()
    assert moments[spoilt].isnan().all()
    assert moments[torch.arange(len(moments)) != spoilt].isfinite().all()


def test_anywhere_runs_where_torch_is_deterministic():
    x, labels = sized([70, 40, 3, 2], 4, 0)
    torch.use_deterministic_algorithms(True)
    try:
        _, kept = anywhere.means(x, None, labels, None, 1e-12)
        gradient, _ = anywhere.gradients(torch.ones(len(x)).double(), x, None, kept, 1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradient.isfinite().all()


SIZES = [(36, 8), (37, 9), (300, 64), (1024, 128), (4096, 512), (10_007, 33), (65536, 128)]


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [
        *((n, d, t) for n, d in SIZES for t in (torch.float32, torch.bfloat16, torch.float64)),
        (1 << 20, 128, torch.float32),
    ],
)
def test_operations_of_anywhere_are_those_it_calls(monkeypatch, n, d, dtype):
    monkeypatch.undo()
    with FakeTensorMode():
        x, labels = on_fake_gpu(n, d, dtype)
        with Launches() as forward:
            _, kept = anywhere.means(x, None, labels, None, 1e-12)
        a = kept[0].new_empty(n)
        with Launches() as backward:
            anywhere.gradients(a, x, None, kept, 1.0)
    work = Work(n, None, d, dtype, wants_gradient=False, device="cuda")
    counts = [forward], [forward, backward]
    for wanted, phases in zip((False, True), counts, strict=True):
        got = anywhere.cost(work._replace(wants_gradient=wanted), [n])
        assert got.launches == sum(phase.launches for phase in phases)
        assert got.flops == pytest.approx(sum(phase.flops for phase in phases), rel=0.01)
        rel = 0.15 if n < 100 else 0.03
        assert got.bytes == pytest.approx(sum(phase.bytes for phase in phases), rel=rel)


def test_operations_of_anywhere_grow_with_the_batch(monkeypatch):
    monkeypatch.undo()
    small, large = (
        anywhere.cost(Work(n, None, 128, torch.float32), [n]) for n in (1 << 18, 1 << 22)
    )
    assert large.bytes <= 16.2 * small.bytes
    assert large.launches <= 6000


def test_anywhere_refuses_reference_embeddings():
    x, ref = torch.empty(4, 3, device="meta"), torch.empty(5, 3, device="meta")
    spec = moments.Spec()
    assert "by Triton's kernels: it" in moments.refuses(x, ref, spec)
    assert moments.refuses(x, None, spec) is None
    assert "second-moment" in moments.refuses(x, None, spec._replace(similarity=SIGNED_SQUARE))


@given(
    sizes=st.lists(st.integers(1, 100), min_size=2, max_size=20),
    d=st.integers(1, 100),
)
@example(sizes=[1] * 20, d=7)
@example(sizes=[100, 1, 60], d=100)
@settings(max_examples=3)  # torch takes a third of a second for one
def test_anywhere_has_the_same_shapes_for_any_labels(sizes, d):
    x, labels = sized(sizes, d, 0, torch.float32)
    rows, kept = anywhere.means(x, None, labels, None, 1e-12)
    with FakeTensorMode():
        unknown = torch.empty(x.shape), torch.empty(labels.shape, dtype=torch.int64)
        declared = anywhere.means(unknown[0], None, unknown[1], None, 1e-12)
    for here, there in ((rows, declared[0]), (kept, declared[1])):
        assert [(t.shape, t.dtype) for t in here] == [(t.shape, t.dtype) for t in there]


def test_moment_sums_do_not_lose_digits_with_the_number_of_panels():
    x, labels = sized([20000, 20000], 4, 0)
    truth, _ = on_cpu.means(x, None, labels, None, 1e-12)
    got, _ = on_cpu.means(x.float(), None, labels, None, 1e-12)
    for exact, rounded in zip(truth, got, strict=True):
        assert (rounded - exact).norm() <= 3e-7 * exact.norm()


class TestCosts:
    """What the plan counts."""

    @pytest.fixture(autouse=True)
    def _as_shipped(self, monkeypatch, _every_class_size_meets_both_ways):
        monkeypatch.undo()

    def test_flops_by_hand(self):
        n, d = 1024, 64  # one block: nothing of a symmetric product is saved
        products = (1 + 2 + 1) * n * d * d
        work = Work(n, None, d, torch.float32)
        assert on_cpu.cost(work, [512, 512]).flops == 2 * products
        assert on_cpu.cost(work, [512, 512]).bytes == n * (6 * d * 4 + 96)
        by_row = on_cpu.cost(work._replace(reduction="none"), [512, 512])
        assert by_row.flops == 2 * (products + 2 * n * d * d)

    def test_flops_of_small_classes_count_their_blocks(self):
        n, d = 1024, 64
        counted = on_cpu.cost(Work(n, None, d, torch.float32), [8] * 128)
        assert counted.flops == 2 * (3 * n * d * d + 3 * n * 8 * d)

    @pytest.mark.parametrize("counts", [on_cpu, on_cpu_native])
    def test_flops_and_traffic_are_linear_in_the_batch(self, counts):
        one, two = (
            counts.cost(Work(1000 * c, None, 128, torch.float32), [1000] * c) for c in (10, 20)
        )
        assert two.flops == pytest.approx(2 * one.flops, rel=1e-9)
        assert two.bytes == 2 * one.bytes

    @pytest.mark.parametrize("counts", [on_cpu, on_cpu_native])
    @pytest.mark.parametrize(
        ("classes", "most"),
        [(2, 1.2), (100, 1.2), (1 << 17, 1.2), (1 << 13, 3.2)],
    )
    def test_memory_of_a_million_rows(self, counts, classes, most):
        """Little more than the gradient; the most where classes have D rows, a matrix for each."""
        n, d = 1 << 20, 128
        work = Work(n, None, d, torch.float32)
        counted = counts.cost(work, [n // classes] * classes)
        assert counted.extra_memory <= most * work.embedding_bytes
