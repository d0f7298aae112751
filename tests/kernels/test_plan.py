"""The plan: Eq. 8, counts that can be checked by hand, and choices that do what they say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import Launches
from oracle import batch
from torch._subclasses.fake_tensor import FakeTensorMode

from bstriplet_kernels import available_impls, bstriplet_loss, explain, plan
from bstriplet_kernels.cost import Constants, Cost
from bstriplet_kernels.paths import PATHS, gpu, native
from bstriplet_kernels.paths.moments import class_sums_on_gpu, on_gpu
from bstriplet_kernels.paths.triton import pairs_cost
from bstriplet_kernels.spec import LINEAR, SIGNED_SQUARE, Spec


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(plan, "_planned", {})


@pytest.fixture
def _torch_alone(monkeypatch):
    """The reference and moments are left, whatever is built here; moments count as if it were."""
    monkeypatch.setattr(native, "missing", lambda: None)
    for name in ("native", "triton"):
        monkeypatch.setitem(PATHS, name, PATHS[name]._replace(missing=lambda: "taken away"))


def test_equation_8_for_the_papers_batch():
    # (l^2 + C^2 + l + C + 3) N^2 + (2 l + 5) N with l = 1280, C = 3, N = 36, worked by hand
    assert plan.eq8_flops(36, 1280, 3) == 1_639_695 * 1_296 + 2_565 * 36


@given(
    n=st.integers(2, 5000), d=st.integers(1, 3000), c=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_every_path_counts_at_least_its_products(impl, n, d, c, dtype):
    sizes = [n // c + (i < n % c) for i in range(c)]
    forward = PATHS[impl].cost(plan.Work(n, None, d, dtype, wants_gradient=False), sizes)
    both = PATHS[impl].cost(plan.Work(n, None, d, dtype), sizes)
    least = 2 * n * n * d if impl != "gram" else n * d * d
    assert forward.flops >= min(least, 2 * n * n * d) * (0.5 if impl == "gram" else 1)
    assert both.flops >= forward.flops
    assert both.bytes >= n * d * dtype.itemsize
    assert both.extra_memory > 0
    assert both.launches == 0


def test_moments_are_linear_and_pairs_quadratic_in_n():
    def flops(impl, n):
        work = plan.Work(n, None, 128, torch.float32)
        return PATHS[impl].cost(work, [n // 2, n // 2]).flops

    assert flops("gram", 1 << 20) == pytest.approx(2 * flops("gram", 1 << 19), rel=0.01)
    assert flops("reference", 1 << 14) == pytest.approx(4 * flops("reference", 1 << 13), rel=0.01)


@pytest.mark.usefixtures("_torch_alone")
def test_the_choice_follows_predicted_time(monkeypatch):
    fast_call = Constants(call=1e-6, flop=1e-9, byte=0)
    fast_flop = Constants(call=1e-3, flop=1e-12, byte=0)
    monkeypatch.setattr(plan, "CONSTANTS", {"cpu": {"reference": fast_call, "gram": fast_flop}})
    small, large = torch.randn(4, 8), torch.randn(3000, 8)
    assert plan.choose(small, None, Spec()) == "reference"
    assert plan.choose(large, None, Spec()) == "gram"
    assert plan.choose(large, None, Spec(similarity=SIGNED_SQUARE)) == "reference"
    explained = explain(large, torch.arange(3000) % 4)
    assert explained.path == "gram"
    assert explained.reason == "least predicted time"
    assert set(explained.predicted) == {"reference", "gram"}


@pytest.mark.usefixtures("_torch_alone")
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


def taken(n, d, *takers, m=None, dtype=torch.float32, **more):
    work = plan.Work(n, m, d, dtype, device="cuda", **more)
    return plan.fastest(takers, work)


def test_on_an_unmeasured_gpu_counts_decide(monkeypatch):
    """Native where it takes the input (64 rows), Triton's pairs while N is small, then moments."""
    monkeypatch.setattr(plan, "CONSTANTS", {})
    built, unbuilt = ("reference", "triton", "native", "gram"), ("reference", "triton", "gram")
    for d in (8, 128, 1280, 100_000):
        assert taken(36, d, *built) == "native"
        assert taken(36, d, *unbuilt) == "triton"
    for n, d, path in (
        (65, 8, "triton"), (1024, 32, "triton"), (1024, 128, "triton"), (16384, 128, "gram"),
        (65536, 20000, "gram"), (1 << 20, 128, "gram"), (512, 512, "triton"),
    ):  # fmt: skip
        assert taken(n, d, *unbuilt) == path, (n, d)
    for n, d, path in ((16384, 128, "gram"), (16384, 4096, "triton"), (1 << 20, 1280, "gram")):
        assert taken(n, d, *unbuilt, dtype=torch.bfloat16) == path, (n, d)
    monkeypatch.setattr(gpu, "_HAS_TRITON", False)
    without_triton = ("reference", "gram")
    for n, d, path in (
        (36, 1280, "reference"), (1024, 128, "reference"), (8192, 128, "gram"),
        (4096, 1280, "reference"), (16384, 100_000, "reference"), (1 << 20, 128, "gram"),
    ):  # fmt: skip
        assert taken(n, d, *without_triton) == path, (n, d)
    # signed_square and ref_emb, which have no second moments there
    assert taken(1 << 17, 128, "reference", "triton") == "triton"
    assert taken(1 << 17, 128, "reference") == "reference"
    assert taken(100_000, 128, "reference", "triton", m=1 << 20) == "triton"


@pytest.mark.parametrize("constants", [{}, plan.CONSTANTS], ids=["unmeasured", "measured"])
def test_linear_takes_sums_of_classes_where_the_batch_is_large(monkeypatch, constants):
    """In plain torch; its kernels are so few that they are taken for any batch."""
    monkeypatch.setattr(plan, "CONSTANTS", constants)

    def chosen():
        paths = "reference", "gram"
        return [taken(1 << k, 128, *paths, similarity="linear") for k in range(5, 21)]

    with gpu.imagined():
        assert chosen() == ["gram"] * 16
    monkeypatch.setattr(class_sums_on_gpu, "takes", lambda work, device: False)
    choices = chosen()
    assert choices == sorted(choices, reverse=True)
    assert choices[0] == "reference"
    assert choices[9:] == ["gram"] * 7


@pytest.mark.parametrize(
    ("n", "d", "gradient", "path"),
    [
        (16, 8, True, "reference"), (36, 128, True, "reference"), (200, 2048, True, "gram"),
        (256, 2048, True, "gram"), (256, 1024, False, "gram"), (300, 32768, False, "gram"),
        (4096, 128, True, "gram"), (1 << 18, 128, True, "gram"),
    ],
)  # fmt: skip
def test_linear_on_the_cpu_where_one_path_is_far_faster(n, d, gradient, path):
    """The other path took 1.5 to nine times as long, on two AVX-512 cores."""
    spec = Spec(similarity=LINEAR, wants_gradient=gradient)
    assert plan.choose(torch.empty(n, d), None, spec) == path


@pytest.mark.parametrize(
    ("n", "d", "path"),
    [(36, 128, "reference"), (64, 128, "reference"), (2048, 128, "gram"), (4096, 1280, "gram")],
)
@pytest.mark.usefixtures("_torch_alone")
def test_without_the_native_library_moments_are_of_another_speed(monkeypatch, n, d, path):
    monkeypatch.setattr(native, "missing", lambda: "taken away")
    found = explain((n, d), 3)
    assert found.path == path
    assert found.reason == (
        "least predicted time; the speed of gram torch is assumed, not measured on cpu"
    )


def test_counts_decide_among_the_paths_that_take_it(monkeypatch):
    """From tensors that lie on one, as torch pretends, by what the paths say that they take."""
    monkeypatch.setattr(plan, "CONSTANTS", {})
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(native, "_MISSING_CUDA", None)
    triton = PATHS["triton"]._replace(missing=lambda: None, refuses=lambda *given: None)
    monkeypatch.setitem(PATHS, "triton", triton)

    def choose(n, d, m=None, **spec):
        with FakeTensorMode():
            ref_emb = m and torch.empty(m, d, device="cuda")
            return plan.choose(torch.empty(n, d, device="cuda"), ref_emb, Spec(**spec))

    assert [choose(n, 128) for n in (36, 64, 65, 1024, 16384)] == [
        "native", "native", "triton", "triton", "gram"
    ]  # fmt: skip
    assert choose(36, 128, m=100) == "triton"
    assert choose(1 << 17, 128, m=1 << 17) == "gram"
    assert choose(36, 128, similarity=SIGNED_SQUARE) == "native"
    assert choose(1 << 17, 128, similarity=SIGNED_SQUARE) == "triton"
    with monkeypatch.context() as older:
        older.setattr(torch.cuda, "is_available", lambda: True)
        older.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert choose(36, 128) == "triton"
    monkeypatch.setattr(native, "_MISSING_CUDA", "not built")
    assert choose(36, 128) == "triton"
    monkeypatch.setitem(PATHS, "triton", triton._replace(refuses=lambda *given: "too old"))
    monkeypatch.setattr(gpu, "_HAS_TRITON", False)
    assert [choose(n, 128) for n in (36, 1024, 8192)] == ["reference", "reference", "gram"]
    assert choose(1 << 17, 128, similarity=SIGNED_SQUARE) == "reference"


@pytest.mark.usefixtures("_torch_alone")
def test_the_reason_says_that_a_speed_is_assumed(monkeypatch):
    x, labels = torch.randn(4096, 4), torch.arange(4096) % 3
    least = "least predicted time"
    assert explain(x, labels).reason == least
    monkeypatch.setattr(plan, "CONSTANTS", {})
    assumed = least + "; the speed of reference, gram is assumed, not measured on cpu"
    found = explain(x, labels)
    assert (found.path, found.reason) == ("gram", assumed)
    found = explain((36, 1280), 3)
    assert (found.path, found.reason) == ("reference", assumed)
    only = explain(x, labels, similarity="signed_square")
    assert only.reason == "the only path that takes this input here"


def test_a_path_of_much_memory_gives_way(monkeypatch):
    """However fast its constants make it: eight matrices of N x M numbers."""
    constants = {
        "reference": Constants(0, 1e-20, 0), "gram": Constants(1, 0, 0),
        on_gpu.SCHEDULE: Constants(1, 0, 0),
    }  # fmt: skip
    monkeypatch.setattr(plan, "CONSTANTS", {"cuda": constants})
    assert taken(16_000, 128, "reference", "gram") == "reference"
    assert taken(16_384, 128, "reference", "gram") == "gram"
    assert taken(16_384, 128, "reference") == "reference"
    # beside embeddings of 8 GiB, whose gradient takes as much, moments still are what takes least
    assert taken(1 << 24, 128, "reference", "gram") == "gram"


def test_launches_take_their_time(monkeypatch):
    """On a GPU a path of many launches is left to large batches; the CPU launches nothing."""
    slow = Constants(call=1e-5, flop=1e-11, byte=0, launch=1e-5)
    fast = Constants(call=1e-5, flop=1e-12, byte=0, launch=1e-5)
    measured = {"reference": slow, "gram": fast, on_gpu.SCHEDULE: fast}
    monkeypatch.setattr(plan, "CONSTANTS", {"cuda": measured})
    assert taken(250, 128, "reference", "gram") == "reference"
    assert taken(8192, 128, "reference", "gram") == "gram"
    cost = PATHS["reference"].cost(plan.Work(64, None, 32, torch.float32), [64])
    assert slow.seconds(cost, torch.float32) == 1e-5 + 1e-11 * cost.flops


def test_half_precision_has_its_own_rate():
    constants = Constants(0.0, 1e-11, 0.0, half=1e-13)
    assert constants.seconds(Cost(1000, 0, 0, 0), torch.float32) == pytest.approx(1e-8)
    assert constants.seconds(Cost(1000, 0, 0, 0), torch.bfloat16) == pytest.approx(1e-10)
    without = constants._replace(half=None)
    assert without.seconds(Cost(1000, 0, 0, 0), torch.float16) == pytest.approx(1e-8)


def test_schedules_of_one_path_are_predicted_apart(monkeypatch):
    """Tiles and panels of impl="triton"; measured speeds choose between them."""
    tiles, panels = Constants(1e-5, 1e-13, 0), Constants(2e-4, 1e-14, 0)
    measured = {
        "cuda": {pairs_cost.TILES: tiles, pairs_cost.PANELS: panels, "gram": Constants(1, 0, 0)}
    }
    monkeypatch.setattr(plan, "CONSTANTS", measured)
    monkeypatch.setattr(pairs_cost, "CONSTANTS", {})
    assumed = {t: pairs_cost.by_panels(128, None, 128, t) for t in (torch.float64, torch.bfloat16)}
    monkeypatch.setattr(pairs_cost, "CONSTANTS", measured)
    for n, d, constants, schedule in (
        (128, 128, tiles, pairs_cost.TILES), (8192, 128, panels, pairs_cost.PANELS),
    ):  # fmt: skip
        work = plan.Work(n, None, d, torch.float32, device="cuda")
        counted = PATHS["triton"].cost(work, [n])
        assert counted.schedule == schedule
        found = explain((n, d), [n], device="cuda")
        assert found.predicted["triton"] == constants.seconds(counted, torch.float32)
    measured["cuda"][pairs_cost.TILES] = Constants(1, 0, 0)
    assert pairs_cost.by_panels(128, None, 128, torch.float32)
    for dtype, by_panels in assumed.items():  # of precisions that were not measured
        assert pairs_cost.by_panels(128, None, 128, dtype) == by_panels
    monkeypatch.setattr(gpu, "products_are_exact", lambda: False)
    assert not pairs_cost.by_panels(128, None, 128, torch.float32)


def launches(impl, n, m, d, dtype, gradient):
    """As the path counts them, and of the operators that it would run on a GPU."""
    path, spec = PATHS[impl], Spec(wants_gradient=gradient)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        sides = empty(n, d), None if m is None else empty(m, d)
        labels = empty(n, dtype=torch.int64), m and empty(m, dtype=torch.int64)
        with Launches() as run, torch.no_grad():
            loss, rows, kept = path.forward(*sides, *labels, spec)
            if gradient:
                grads = path.backward(loss, *sides, *labels, rows, kept.tensors, spec)
                _ = [grad.to(dtype) for grad in grads if grad is not None]
    work = plan.Work(n, m, d, dtype, wants_gradient=gradient, device="cuda")
    return path.cost(work, [n if m is None else m]).launches, run.launches


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [None, 50])
def test_the_references_launches_are_its_operators(m, dtype, gradient):
    counted, run = launches("reference", 100, m, 64, dtype, gradient)
    assert counted == pytest.approx(run, abs=2)


def test_what_the_native_kernel_does_on_a_gpu():
    """S's half and the gradient, once; then the gradient times what comes from upstream."""
    n, d = 36, 1280
    counted = PATHS["native"].cost(plan.Work(n, None, d, torch.float32, device="cuda"), [n])
    assert counted[:3] == (3 * n * n * d, 4 * n * d * (1 + 3), 2)
    assert counted.extra_memory == 4 * (n * d + 2 * n + 1)
    half = plan.Work(n, None, d, torch.bfloat16, device="cuda")
    assert PATHS["native"].cost(half, [n])[1:3] == (n * d * (2 + 4 + 4 + 2), 2)
    forward = plan.Work(n, None, d, torch.float32, wants_gradient=False, device="cuda")
    assert PATHS["native"].cost(forward, [n])[:3] == (n * n * d, 4 * n * d, 1)
    rows = plan.Work(n, None, d, torch.float32, "none", device="cuda")
    assert PATHS["native"].cost(rows, [n])[:3] == (4 * n * n * d, 4 * n * d * (2 + 1), 6)
    half_rows = rows._replace(dtype=torch.bfloat16)
    assert PATHS["native"].cost(half_rows, [n])[1:3] == (n * d * (2 * 2 + 4 + 4 + 2), 7)


def test_the_only_path_that_is_left(monkeypatch):
    for name, path in PATHS.items():
        if name != "reference":
            monkeypatch.setitem(PATHS, name, path._replace(missing=lambda: "taken away"))
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


def test_explain_prints_launches_on_a_gpu():
    explained = explain(torch.randn(6, 4), torch.arange(6) % 3)
    assert "launches" not in str(explained)
    work, cost = explained.work._replace(device="cuda"), explained.cost._replace(launches=1234)
    assert "launches      1,234\n" in str(replace(explained, work=work, cost=cost))


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


def test_a_shape_is_explained_as_its_tensors_are():
    x, labels = torch.randn(300, 40), torch.arange(300) % 7
    assert explain((300, 40), 7) == explain(x, labels)
    uneven = torch.tensor([0] * 290 + [1] * 10)
    assert explain([300, 40], [290, 10]) == explain(x, uneven)
    ref = torch.randn(50, 40, dtype=torch.float64)
    given = {"ref_emb": ref, "ref_labels": torch.arange(50) % 5}
    assert explain((300, 40), 5, ref_emb=(50, 40), dtype=torch.float64) == explain(
        x.double(), labels, **given
    )


@pytest.mark.parametrize(
    ("shape", "classes", "options", "path"),
    [
        ((36, 1280), 3, {}, "native"),
        ((1024, 128), 3, {}, "triton"),
        ((4096, 512), 8, {"dtype": torch.bfloat16}, "triton"),
        ((1 << 20, 128), 10, {}, "gram"),
        ((1 << 20, 128), 10, {"similarity": "signed_square"}, "triton"),
        ((1 << 17, 128), 10, {"ref_emb": (1 << 17, 128)}, "gram"),
    ],
)
def test_a_gpu_that_is_not_here_is_explained_too(monkeypatch, shape, classes, options, path):
    """As one on which all is installed, whatever is here."""
    monkeypatch.setattr(native, "_MISSING_CUDA", "no nvcc")
    monkeypatch.setattr(gpu, "_HAS_TRITON", False)
    found = explain(shape, classes, device="cuda", **options)
    assert (found.path, found.work.device) == (path, "cuda")
    assert found.cost.launches > 0
    assert found.predicted[path] == min(found.predicted.values())
    assert f"path          {path}" in str(found)


@pytest.mark.parametrize(
    ("given", "keywords", "error", "message"),
    [
        (("x", 3), {}, TypeError, "embeddings must be a torch.Tensor or a shape of two sizes, got"),
        (((8,), 3), {}, TypeError, "embeddings must be a torch.Tensor or a shape of two sizes"),
        (((8, 4), 9), {}, ValueError, "labels must be a number of classes from 1 to 8, got 9"),
        (((8, 4), [3, 4]), {}, ValueError, "add up to 8, got .3, 4. that add up to 7"),
        (((8, 4), torch.arange(8)), {}, TypeError, "labels must be the number of classes"),
        (((8, 4), 2), {"dtype": torch.int8}, TypeError, "dtype must be float64"),
        (((8, 4), 2), {"device": "cdua:1"}, ValueError, "device must be .*did you mean 'cuda'"),
        ((None, 2), {}, TypeError, "embeddings must be a torch.Tensor or a shape"),
        (((1 << 62, 4), 2), {}, TypeError, "embeddings must be a torch.Tensor or a shape"),
        (((1, 4), 1), {}, ValueError, "embeddings has 1 row,"),
        (((8, 4), 2), {"ref_emb": (3, 5)}, ValueError, "ref_emb must have as many columns"),
        (((8, 4), 2), {"ref_labels": torch.arange(8)}, TypeError, "ref_labels was given with a"),
        ((torch.ones(8, 4), torch.arange(8)), {"device": "cuda"}, TypeError, "belong to a shape"),
    ],
)
def test_what_explain_takes_of_a_shape(given, keywords, error, message):
    with pytest.raises(error, match=message):
        explain(*given, **keywords)
