"""What is particular to impl="native": the operator itself, called as anyone can call it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bstriplet_kernels import BSTripletLoss, bstriplet_loss, reference
from bstriplet_kernels.paths import PATHS, native
from bstriplet_kernels.spec import SIGNED_SQUARE, SQUARE, Spec, accumulation_dtype

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # of the accumulation dtype


def operator(embeddings, labels, ref_emb=None, ref_labels=None, upstream=None, **options):
    """torch.ops.bstriplet.batch_similarity, whose defaults are those of `bstriplet_loss`.

    Returns (loss, positive, negative, grad, grad_ref).
    """
    loss, means, *grads = torch.ops.bstriplet.batch_similarity(
        embeddings,
        labels,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        upstream=upstream,
        **options,
    )
    return loss, *means, *grads


def agree(got, truth, dtype, scale=None):
    """|got - truth| within the accumulation's tolerance of the truth's norm (or of `scale`)."""
    assert got.shape == truth.shape
    size = max(truth.norm().item(), scale or 0.0)
    assert (got.double() - truth).norm().item() <= TOLERANCE[dtype] * size + 1e-300


def strided(values, layout):
    """The same values with other strides."""
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "spread":
        wide = torch.full((values.shape[0] * 2, values.shape[1] * 3), torch.nan, dtype=values.dtype)
        wide[::2, 1::3] = values
        return wide[::2, 1::3]
    if layout == "window":
        wide = torch.full((values.shape[0] + 2, values.shape[1] + 5), torch.nan, dtype=values.dtype)
        wide[1:-1, 2:-3] = values
        return wide[1:-1, 2:-3]
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values


@st.composite
def problems(draw):
    """Embeddings, labels and, half of the time, reference embeddings of any dtype and strides."""
    n, d = draw(st.integers(2, 70)), draw(st.integers(1, 90))
    m = draw(st.none() | st.integers(1, 40))
    layout = st.sampled_from(["plain", "transposed", "spread", "window", "expanded"])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def side(rows, dtype, layout):
        values = torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(-2, 3, (rows,), generator=generator) * 2**60
        return strided(values, layout), labels

    dtype = draw(st.sampled_from(DTYPES))
    rows = side(n, dtype, draw(layout))
    columns = side(m, draw(st.sampled_from(DTYPES)), draw(layout)) if m else (None, None)
    spec = Spec(margin=draw(st.floats(0, 1)), sigma=draw(st.sampled_from([1.0, -1.0])))
    return *rows, *columns, spec._replace(similarity=draw(st.sampled_from([SQUARE, SIGNED_SQUARE])))


@given(problem=problems(), mean=st.booleans(), per_row=st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_operator_agrees_with_the_reference(problem, mean, per_row):
    embeddings, labels, ref_emb, ref_labels, spec = problem
    exact = embeddings.double()
    exact_ref = None if ref_emb is None else ref_emb.double()
    sides = (embeddings,) if ref_emb is None else (embeddings, ref_emb)
    dtype = accumulation_dtype(*sides)
    spec = spec._replace(reduction="none" if per_row else "mean" if mean else "sum")
    truth, rows, _ = reference.forward(exact, exact_ref, labels, ref_labels, spec)
    # A row this near h = 0 may be active in one precision and not in another.
    h = spec.margin - rows.positive + spec.sigma * rows.negative
    if (h.abs() < 1e-5).any():
        return
    weight = (
        torch.linspace(-1, 2, len(labels), dtype=dtype) if per_row else torch.ones((), dtype=dtype)
    )
    grads = reference.backward(
        weight.double(), exact, exact_ref, labels, ref_labels, None, (), spec
    )
    loss, positive, negative, *got = operator(
        embeddings,
        labels,
        ref_emb,
        ref_labels,
        weight if per_row else None,
        margin=spec.margin,
        sigma=spec.sigma,
        signed=spec.signed,
        mean=mean,
    )
    if not per_row:
        agree(loss, truth, dtype, scale=float(len(labels)))
    agree(positive, rows.positive, dtype, scale=1.0)
    agree(negative, rows.negative, dtype, scale=1.0)
    smallest = min(1.0, exact.norm(dim=1).min().item())
    for grad, expected in zip(got, grads, strict=True):
        if expected is None:
            assert grad.shape == (0,)
        else:  # what cancels in it is of the size of one row's own share
            agree(grad, expected, dtype, scale=len(labels) * weight.abs().max().item() / smallest)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instruction_set):
    """In a process of its own, since the choice is made once; narrower ones must agree too."""
    script = (
        "import torch\n"
        "from bstriplet_kernels import bstriplet_loss\n"
        "for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):\n"
        "    torch.manual_seed(0)\n"
        "    x = torch.randn(61, 75).to(dtype).requires_grad_()\n"
        "    y = torch.randint(4, (61,))\n"
        "    def run(impl):\n"
        "        loss = bstriplet_loss(x, y, impl=impl, similarity='signed_square')\n"
        "        return loss, *torch.autograd.grad(loss, x)\n"
        "    for got, want in zip(run('native'), run('reference')):\n"
        "        torch.testing.assert_close(got, want)\n"
        "print(torch.ops.bstriplet.instruction_set())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "BSTRIPLET_INSTRUCTION_SET": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    order = ["baseline", "avx2", "avx512"]
    assert order.index(ran.stdout.strip()) <= order.index(instruction_set)


def test_float16_of_every_bit_pattern():
    """Each finite half, subnormals too, is widened exactly; infinities and NaNs make NaN."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = halves[halves.isfinite() & (halves != 0)]
    # One column beside a constant one: the cosine of (x, 1) and (0, 1) gives x back.
    x = torch.stack((finite, torch.ones_like(finite)), dim=1)
    anchor = torch.tensor([[0.0, 1.0]])
    labels = torch.zeros(len(x), dtype=torch.int64)
    _, positive, *_ = operator(x, labels, anchor, labels[:1], gradient=False)
    torch.testing.assert_close(positive, 1 / (1 + finite.float().square()))
    for value in halves[~halves.isfinite()][:: 2**6]:
        bad = torch.tensor([[1.0, 2.0], [float(value), 1.0]]).half()
        assert operator(bad, torch.tensor([0, 1]))[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_whatever_the_number_of_threads(dtype):
    x = torch.randn(150, 700, dtype=dtype)
    y = torch.randint(5, (150,))
    r, yr = torch.randn(90, 700, dtype=dtype), torch.randint(5, (90,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append((*operator(x, y), *operator(x, y, r, yr)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_small_gradients_of_half_survive_until_the_loss_scale():
    """A gradient below float16's range times a loss scale is in range again."""
    x = (torch.randn(200, 64) * 900).half().requires_grad_()
    y = torch.randint(3, (200,))
    scale = 2.0**16
    (got,) = torch.autograd.grad(bstriplet_loss(x, y, impl="native") * scale, x)
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(bstriplet_loss(exact, y, impl="reference") * scale, exact)
    assert (truth / scale).abs().median() < 6e-8  # would be zero or one bit in float16
    assert (got.double() - truth).norm() <= 2e-3 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_casts_what_it_writes_rounds_as_a_cast_after_it(dtype):
    """The backward on CUDA casts within its multiplication; elsewhere after it."""
    gradient = torch.randn(64, 64) * 10.0 ** torch.randint(-12, 6, (64, 64))
    gradient[0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-41])
    scale = torch.tensor(0.3)
    product = torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    assert torch.equal(product.view(torch.int16), (gradient * scale).to(dtype).view(torch.int16))


@pytest.mark.parametrize("retain_graph", [True, False])
def test_batched_upstream_gradients(retain_graph):
    x, y = torch.randn(7, 5, requires_grad=True), torch.arange(7) % 3
    numbers = torch.tensor([1.0, -2.0])
    batched, single = (
        torch.autograd.grad(bstriplet_loss(x, y, impl="native"), x, upstream, **options)[0]
        for upstream, options in (
            (numbers, {"is_grads_batched": True, "retain_graph": retain_graph}),
            (None, {}),
        )
    )
    torch.testing.assert_close(batched, numbers[:, None, None] * single)


def test_opcheck():
    x, y = torch.randn(7, 5), torch.randint(3, (7,))
    name = torch.ops.bstriplet.batch_similarity.default
    for gradient in (False, True):
        torch.library.opcheck(name, (x, y, gradient))
        options = (gradient, 0.6, False, True, -1.0, 1e-6)
        torch.library.opcheck(name, (x, y, *options, x.half(), y, torch.ones(7)))


@pytest.mark.parametrize(
    ("changed", "given"),
    [
        ({}, 0),
        ({"wants_gradient": False}, 1),
        ({"margin": 0.5}, 2),
        ({"reduction": "sum"}, 3),
        ({"reduction": "none"}, 3),
        ({"similarity": SIGNED_SQUARE}, 4),
        ({"sigma": -1.0}, 5),
        ({"eps": 1e-3}, 6),
    ],
)
def test_only_what_is_no_default_is_given(monkeypatch, changed, given):
    """The operator's defaults are the loss's; what is left out of a call must be one of them."""
    spec = Spec(wants_gradient=True)._replace(**changed)
    call, calls = native.CALLS["batch_similarity"], []

    def recorded(*args):
        calls.append((args, call(*args)))
        return calls[-1][1]

    monkeypatch.setitem(native.CALLS, "batch_similarity", recorded)
    x, y = torch.randn(5, 3), torch.arange(5) % 2
    PATHS["native"].forward(x, None, y, None, spec)
    (args, short), *_ = calls
    assert len(args) == 2 + given
    full = torch.ops.bstriplet.batch_similarity(
        x,
        y,
        gradient=spec.wants_gradient and spec.reduction != "none",
        margin=spec.margin,
        mean=spec.reduction == "mean",
        signed=spec.signed,
        sigma=spec.sigma,
        eps=spec.eps,
    )
    assert all(torch.equal(a, b) for a, b in zip(short, full, strict=True))


def test_inactive_batch_has_exactly_no_gradient():
    x = torch.eye(3).repeat_interleave(2, dim=0)
    loss, _, _, grad, _ = operator(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(x))


def test_labels_need_int64_in_full():
    """Labels that agree in their low 32 bits are still different classes."""
    x = torch.randn(4, 3)
    apart = operator(x, torch.tensor([0, 2**32, 2**33, -(2**32)]))
    torch.testing.assert_close(apart, operator(x, torch.arange(4)))


X, Y = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
NONSENSE = {
    "one dimension": ((torch.ones(3), Y), "embeddings must have 2 dimensions"),
    "three dimensions": ((torch.ones(3, 2, 1), Y), "embeddings must have 2 dimensions"),
    "no rows": ((torch.ones(0, 2), Y[:0]), "embeddings must have from 1"),
    "no columns": ((torch.ones(3, 0), Y), "embeddings must have from 1"),
    "integer embeddings": ((X.int(), Y), "embeddings must be float64"),
    "complex embeddings": ((X.to(torch.complex64), Y), "embeddings must be float64"),
    "short labels": ((X, Y[:2]), "labels must have shape"),
    "matrix of labels": ((X, Y[:, None]), "labels must have shape"),
    "int32 labels": ((X, Y.int()), "labels must be Long"),
    "ref_emb alone": ((X, Y, X, None), "both or neither"),
    "ref_labels alone": ((X, Y, None, Y), "both or neither"),
    "ref_emb of other width": ((X, Y, torch.ones(3, 5), Y), "ref_emb must have 2 columns"),
    "short ref_labels": ((X, Y, X, Y[:1]), "ref_labels must have shape"),
    "short upstream": ((X, Y, None, None, torch.ones(2)), "upstream must have shape"),
    "upstream of other dtype": ((X, Y, None, None, torch.ones(3).double()), "upstream must be"),
    "more rows than can be": (
        (torch.ones(1, 1).expand(2**39, 1), Y[:1].expand(2**39)),
        "beyond what can be addressed|cannot allocate",
    ),
    "a similarity beyond memory": (  # told before as much as a row of it is written
        (torch.ones(1, 16).expand(2**33, 16), Y[:1].expand(2**33)),
        "beyond what can be addressed|cannot allocate",
    ),
    "more columns than memory": ((torch.ones(1, 1).expand(2, 2**60), Y[:2]), "from 1 to 2"),
}


@pytest.mark.parametrize(("arguments", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_raises(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments)


def test_other_layouts_raise():
    for bad in (X.to_sparse(), X.to_mkldnn()):
        with pytest.raises(RuntimeError):
            operator(bad, Y)
    with pytest.raises(RuntimeError):
        operator(X, Y.to("meta"))


def test_meaningless_strides_are_not_followed():
    """A dimension of one element may have any stride."""
    row = torch.randn(1, 3).as_strided((1, 3), (2**62, 1))
    column = torch.randn(5).as_strided((5, 1), (1, 2**62))
    y = torch.tensor([1])
    assert operator(row, y, row, y)[0].isfinite()
    assert operator(column, torch.arange(5))[0].isfinite()


def test_module_runs_it():
    x, y = torch.randn(9, 4, requires_grad=True), torch.randint(2, (9,))
    got = BSTripletLoss(impl="native")(x, y)
    torch.testing.assert_close(got, BSTripletLoss(impl="reference")(x, y))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (36, 1280), (37, 45), (64, 300), (5, 2000)])
def test_cuda_agrees_with_the_reference(n, d, dtype):
    embeddings, labels = torch.randn(d, n).to(dtype).t(), torch.randint(3, (n,))
    spec = Spec(reduction="none")
    weight = torch.linspace(-1, 2, n, dtype=accumulation_dtype(embeddings))
    exact = embeddings.double()
    _, rows, _ = reference.forward(exact, None, labels, None, spec)
    grad, _ = reference.backward(weight.double(), exact, None, labels, None, None, (), spec)
    loss, positive, negative, got, _ = (
        t.cpu() for t in operator(embeddings.cuda(), labels.cuda(), upstream=weight.cuda())
    )
    agree(positive, rows.positive, weight.dtype, scale=1.0)
    agree(negative, rows.negative, weight.dtype, scale=1.0)
    agree(loss, reference.forward(exact, None, labels, None, Spec())[0], weight.dtype, scale=1.0)
    # of what cancels where the gradient is 0, as at D = 1
    agree(got, grad, weight.dtype, scale=(1 / exact.norm(dim=1)).norm().item())


@needs_gpu
def test_cuda_graph_replays_the_same_bits():
    x, y = torch.randn(36, 1280, device="cuda"), torch.randint(3, (36,), device="cuda")
    eager = operator(x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(x, y)
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retain_graph", [True, False])
def test_cuda_launches_once_forward_and_once_backward(dtype, retain_graph, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = torch.randn(36, 1280, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.randint(3, (36,), device="cuda")
    upstream = torch.tensor(0.3, device="cuda", dtype=accumulation_dtype(x))

    def step():
        loss = bstriplet_loss(x, y, impl="native")
        return torch.autograd.grad(loss, x, upstream, retain_graph=retain_graph)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    launched = [event.name for event in profile.events() if event.device_type == device]
    assert len(launched) == 2, launched


@needs_gpu
def test_cuda_refuses_what_is_beyond_one_launch():
    x, y = torch.randn(65, 4, device="cuda"), torch.zeros(65, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="up to 64 rows"):
        operator(x, y)
    with pytest.raises(ValueError, match="at most 64 rows"):
        bstriplet_loss(x, y, impl="native")


@pytest.mark.parametrize(
    "operators",
    [
        {"moment_means": ("embeddings labels eps smallest_moment", 6)},
        {"moment_means": ("labels embeddings eps smallest_moment", 7)},
        {"no_such_operator": ("", 1)},
    ],
)
def test_a_library_of_other_sources_is_refused(operators, monkeypatch):
    assert native._older() is None
    monkeypatch.setattr(native, "_OPERATORS", operators)
    assert next(iter(operators)) in native._older()
    assert "reinstall" in native._older()
