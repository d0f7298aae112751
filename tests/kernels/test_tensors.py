"""Tensors of other kinds: what stands for a tensor, what wraps one, what is none of these."""

import io
import warnings

import pytest
import torch
from oracle import Formula, batch, skip_if_refused
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.testing._internal.two_tensor import TwoTensor

from bstriplet_kernels import BSTripletLoss, CrossEntropyBSTripletLoss, bstriplet_loss, explain
from bstriplet_kernels.checks import make_spec
from bstriplet_kernels.paths import PATHS

pytestmark = pytest.mark.usefixtures("brief_kernels")


class Image(torch.Tensor):
    """As libraries mark what a tensor is of: each with `__torch_function__` as it is inherited."""


class Category(torch.Tensor):
    """Not related to Image, with which torch refuses to mix it."""


def gradient(loss, x, labels, **options):
    leaf = x.clone().requires_grad_()
    value = loss(leaf, labels, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_meta(impl, reduction, dtype):
    """No numbers, but shapes and dtypes: how a model is laid out before it has memory."""
    x = torch.empty(6, 4, device="meta", dtype=dtype, requires_grad=True)
    labels = torch.empty(6, device="meta", dtype=torch.int32)
    loss, stats = bstriplet_loss(x, labels, impl=impl, reduction=reduction, return_stats=True)
    loss.sum().backward()
    assert loss.shape == ((6,) if reduction == "none" else ())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert stats.active_fraction.is_meta
    assert (x.grad.shape, x.grad.dtype, x.grad.device) == (x.shape, dtype, x.device)


def test_meta_in_the_modules_and_with_listed_pairs():
    x, labels = torch.empty(6, 3, device="meta"), torch.empty(6, device="meta", dtype=torch.int64)
    pairs = tuple(torch.zeros(2, device="meta", dtype=torch.int64) for _ in range(4))
    assert CrossEntropyBSTripletLoss()(x, x, labels).is_meta
    assert BSTripletLoss()(x, None, pairs).is_meta
    with pytest.raises(ValueError, match="labels have no values"):
        explain(x, labels)
    real = torch.ones(6, 3), torch.zeros(6, dtype=torch.int64)
    with FakeTensorMode():
        unknown = torch.ones(6, 3), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels have no values"):
        explain(*unknown)
    with pytest.raises(ValueError, match="labels have no values"):
        explain(*real, ref_emb=unknown[0], ref_labels=unknown[1])
    with pytest.raises(ValueError, match="embeddings has 1 row"):
        bstriplet_loss(x[:1], labels[:1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_ref", [False, True])
def test_fake_tensors_forward_and_backward(impl, reduction, with_ref):
    ref = batch(5, 4, 3, 1) if with_ref else (None, None)
    skip_if_refused(impl, torch.empty(6, 4), Formula(), ref[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(6, 4, dtype=torch.float64, requires_grad=True)
        labels = torch.zeros(6, dtype=torch.int64)
        loss = bstriplet_loss(
            x, labels, impl=impl, reduction=reduction, ref_emb=ref[0], ref_labels=ref[1]
        )
        loss.sum().backward()
    assert type(x.grad) is FakeTensor
    assert x.grad.shape == (6, 4)


def test_wrapper_subclasses(impl):
    """Classes that take operators themselves: quantised, asynchronous, tracing ones."""
    x, labels = batch(9, 4, 3, 0)
    expected = gradient(bstriplet_loss, x, labels, impl=impl)
    for y in (labels, TwoTensor(labels, labels.clone())):
        got = gradient(bstriplet_loss, TwoTensor(x, x.clone()), y, impl=impl)
        for wrapped, plain in zip(got, expected, strict=True):
            assert type(wrapped) is TwoTensor
            torch.testing.assert_close(wrapped.a, plain)


def test_an_upstream_of_another_class(impl):
    """A plain loss times a number of a class that takes operators itself."""
    x, labels = batch(9, 4, 3, 0)
    scale = torch.tensor(3.0, dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    scaled = bstriplet_loss(leaf, labels, impl=impl) * TwoTensor(scale, scale.clone())
    (got,) = torch.autograd.grad(scaled, leaf)
    torch.testing.assert_close(got.a, 3 * gradient(bstriplet_loss, x, labels, impl=impl)[1])


def test_parameters_are_tensors(impl):
    x, labels = batch(9, 4, 3, 0)
    table = torch.nn.Parameter(x.clone())
    loss = bstriplet_loss(table, labels, impl=impl)
    loss.backward()
    assert type(loss) is torch.Tensor
    torch.testing.assert_close(table.grad, gradient(bstriplet_loss, x, labels, impl=impl)[1])


@pytest.mark.parametrize("classes", [(Image, None), (None, Category), (Image, Image)])
def test_marked_tensors_give_what_cross_entropy_gives(impl, classes):
    x, labels = batch(9, 4, 3, 0)
    expected = gradient(bstriplet_loss, x, labels, impl=impl)
    marked = [t.as_subclass(c) if c else t for t, c in zip((x, labels), classes, strict=True)]
    for module in (False, True):
        loss = BSTripletLoss(impl=impl) if module else bstriplet_loss
        got = gradient(loss, *marked, **({} if module else {"impl": impl}))
        torch.testing.assert_close(got[0].as_subclass(torch.Tensor), expected[0])
        torch.testing.assert_close(got[1].as_subclass(torch.Tensor), expected[1])
        assert type(got[0]) is type(cross_entropy(*marked))


def test_labels_of_an_unrelated_class_are_numbers(impl):
    x, labels = batch(9, 4, 3, 0)
    loss, stats = bstriplet_loss(
        x.as_subclass(Image), labels.as_subclass(Category), impl=impl, return_stats=True
    )
    expected = bstriplet_loss(x, labels, return_stats=True)
    assert type(loss) is Image
    assert type(stats) is type(expected[1])
    for got, value in zip((loss, *stats), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), value)
    both = CrossEntropyBSTripletLoss()(x, x.as_subclass(Image), labels)
    assert type(both) is Image


class Seen(torch.Tensor):
    """Takes calls of whole functions, as `torch.overrides` describes."""

    called: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_class_may_take_the_whole_call():
    x, labels = batch(9, 4, 3, 0)
    seen = x.as_subclass(Seen)
    Seen.called.clear()
    bstriplet_loss(seen, labels)
    assert [name for name in Seen.called if name != "__get__"] == ["bstriplet_loss"]


@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_other_layouts_are_refused_after_a_dense_tensor_of_that_shape_too(impl, convert):
    x, labels = batch(9, 4, 3, 0, torch.float32)
    bstriplet_loss(x, labels, impl=impl)
    other = getattr(x, convert)()
    with pytest.raises(TypeError, match="embeddings must be a dense tensor, got layout"):
        bstriplet_loss(other, labels, impl=impl)
    skip_if_refused(impl, x, Formula(), x)
    bstriplet_loss(x, labels, ref_emb=x, ref_labels=labels, impl=impl)
    with pytest.raises(TypeError, match="ref_emb must be a dense tensor, got layout"):
        bstriplet_loss(x, labels, ref_emb=other, ref_labels=labels, impl=impl)
    with pytest.raises(TypeError, match="labels must be a dense tensor, got layout"):
        bstriplet_loss(x, labels.to_sparse(), impl=impl)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("similarity", ["square", "signed_square", "linear"])
def test_negated_views_are_read_negated(impl, reduction, similarity):
    """torch negates the imaginary part of a conjugate only when somebody reads it."""
    options = {"reduction": reduction, "similarity": similarity, "impl": impl}
    skip_if_refused(impl, torch.empty(9, 4), Formula(similarity=similarity))
    x, labels = batch(9, 4, 3, 0)
    ref, ref_labels = batch(5, 4, 3, 1)

    def run(negate):
        sides = [torch.complex(s, -s).requires_grad_() for s in (x, ref)]
        rows, columns = (negate(s) for s in sides)
        loss = bstriplet_loss(rows, labels, **options)
        if (
            PATHS[impl].refuses(rows, columns, make_spec(0.9, similarity, "corrected", "mean"))
            is None
        ):
            loss = loss + bstriplet_loss(
                rows, labels, ref_emb=columns, ref_labels=ref_labels, **options
            )
        upstream = torch.full_like(loss, 0.5)
        upstream = torch.complex(upstream, -upstream)
        return loss.detach(), *torch.autograd.grad(loss, sides, negate(upstream), allow_unused=True)

    assert torch.ones(1, dtype=torch.complex64).conj().imag.is_neg()
    got, expected = run(lambda t: t.conj().imag), run(lambda t: t.conj().imag.resolve_neg())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_tensors_of_zeros_without_memory(impl):
    x, labels = batch(9, 4, 3, 0)
    x.requires_grad_()
    zeros = torch._efficientzerotensor((9, 4), dtype=x.dtype)
    torch.testing.assert_close(bstriplet_loss(zeros, labels, impl=impl).item(), 0.9)
    for reduction in ("mean", "none"):
        loss = bstriplet_loss(x, labels, impl=impl, reduction=reduction)
        upstream = torch._efficientzerotensor(loss.shape, dtype=loss.dtype)
        assert torch.autograd.grad(loss, x, upstream)[0].eq(0).all()


class Duck:
    """No tensor, but a class that takes the calls of torch's functions, as its docs describe."""

    dtype = torch.float32

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func.__name__, kwargs["margin"]


def test_a_class_that_is_no_tensor_may_take_the_call_and_return_anything():
    assert bstriplet_loss(Duck(), Duck(), margin=0.5) == ("bstriplet_loss", 0.5)
    assert BSTripletLoss(0.5)(Duck(), torch.zeros(3)) == ("bstriplet_loss", 0.5)


def test_symbolic_trace_of_a_model_with_losses():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)
            self.criterion = BSTripletLoss(margin=0.5, return_stats=True)
            self.both = CrossEntropyBSTripletLoss(similarity="signed_square")

        def forward(self, x, labels):
            embeddings = self.linear(x)
            loss, stats = self.criterion(embeddings, labels)
            return loss + stats.positive_similarity + self.both(embeddings, embeddings, labels)

    model, given = Model(), batch(31, 4, 3, 1)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(*given), model(*given))


@pytest.mark.parametrize("compiled", [True, False])
def test_parameters_under_tracers(impl, compiled):
    """Proxies: a parameter that the rows are compared with."""

    class Proxies(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proxies = torch.nn.Parameter(batch(6, 4, 3, 1)[0])

        def forward(self, x, labels):
            ref_labels = torch.arange(6) % 3
            return bstriplet_loss(
                x, labels, ref_emb=self.proxies, ref_labels=ref_labels, impl=impl
            ) + bstriplet_loss(self.proxies, ref_labels, impl=impl)

    torch.compiler.reset()
    skip_if_refused(impl, torch.empty(9, 4), Formula(), torch.empty(6, 4))
    model, given = Proxies(), batch(9, 4, 3, 0)
    if compiled:
        traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        traced = torch.export.export(model, given, strict=True).module()
    grads = [
        torch.autograd.grad(run(*given), next(iter(run.parameters())))[0] for run in (traced, model)
    ]
    torch.testing.assert_close(*grads)


def test_jit_trace_is_right_for_other_sizes_and_says_nothing(impl):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)
            self.criterion = BSTripletLoss(impl=impl, return_stats=True)

        def forward(self, x, labels):
            loss, stats = self.criterion(self.linear(x), labels)
            return loss, stats.active_fraction

    model, file = Step(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, batch(6, 4, 3, 0))
    torch.jit.save(traced, file)
    file.seek(0)
    x, labels = batch(31, 4, 3, 1)
    expected = model(x, labels)
    (truth,) = torch.autograd.grad(expected[0], model.linear.weight)
    for run in (traced, torch.jit.load(file)):
        loss, active = run(x, labels)
        torch.testing.assert_close((loss, active), expected)
        (got,) = torch.autograd.grad(loss, run.linear.weight)
        torch.testing.assert_close(got, truth)


def test_a_path_that_serves_one_device_stands_for_it_on_meta():
    x, labels = torch.empty(6, 4, device="meta"), torch.empty(6, device="meta", dtype=torch.int64)
    for name, path in PATHS.items():
        if path.missing() is None:
            assert bstriplet_loss(x, labels, impl=name).is_meta


@pytest.mark.parametrize(
    ("dtype", "ref_dtype", "wide"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_sides_of_two_dtypes_are_as_if_widened(impl, dtype, ref_dtype, wide):
    """Loss and gradients of both sides; a gradient has its side's dtype."""
    x, labels = batch(9, 20, 3, 0, dtype)
    ref, ref_labels = batch(7, 20, 3, 1, ref_dtype)
    skip_if_refused(impl, x, Formula(), ref)
    found = []
    for sides in ((x, ref), (x.to(wide), ref.to(wide))):
        sides = [side.clone().requires_grad_() for side in sides]
        loss = bstriplet_loss(
            sides[0], labels, impl=impl, ref_emb=sides[1], ref_labels=ref_labels, margin=0.5
        )
        found.append((loss, *torch.autograd.grad(loss, sides)))
    (loss, *grads), (expected, *truth) = found
    assert torch.equal(loss, expected)
    assert loss.dtype == wide
    assert [g.dtype for g in grads] == [dtype, ref_dtype]
    for got, side in zip(grads, truth, strict=True):
        assert torch.equal(got, side.to(got.dtype))
