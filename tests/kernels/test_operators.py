"""torch.ops.bstriplet.*: complete by themselves, and never without a derivative in silence."""

import pytest
import torch
from oracle import Formula, batch, skip_if_refused
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bstriplet_kernels import BSTripletLoss, bstriplet_loss
from bstriplet_kernels.paths import PATHS, native

pytestmark = pytest.mark.usefixtures("brief_kernels")
loss = torch.ops.bstriplet.loss
loss_gradient = torch.ops.bstriplet.loss_gradient
needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def problem(with_ref=False, dtype=torch.float64, n=7, d=4):
    """Positional arguments: embeddings, labels and, where asked for, n - 2 reference ones."""
    x, labels = batch(n, d, 3, 0, dtype)
    return (x, labels, *batch(n - 2, d, 3, 1, dtype)) if with_ref else (x, labels)


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_well_formed(impl, with_ref, reduction):
    tensors = problem(with_ref, torch.float32)
    skip_if_refused(impl, tensors[0], Formula(), tensors[2] if with_ref else None)
    options = {"margin": 0.7, "sigma": -1.0, "reduction": reduction, "impl": impl}
    for gradient in (True, False):
        torch.library.opcheck(loss.default, tensors, options | {"gradient": gradient})
    upstream = torch.ones(7) if reduction == "none" else torch.ones(())
    torch.library.opcheck(loss_gradient.default, (upstream, *tensors), options)


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_every_output_can_be_differentiated(impl, with_ref, gradient):
    x, labels, *ref = problem(with_ref, n=5, d=3)
    assert len(labels.unique()) < len(labels)  # some rows have a positive, and all a negative
    assert len(labels.unique()) > 1
    skip_if_refused(impl, x, Formula(), ref[0] if ref else None)
    sides = (x, *ref[:1])

    def outputs(x, *columns):
        found = loss(x, labels, *columns, *ref[1:], impl=impl, gradient=gradient)
        return found[: 2 + len(sides) * gradient]

    def gradients(upstream, x, *columns):
        found = loss_gradient(upstream, x, labels, *columns, *ref[1:], impl=impl)
        return found[: len(sides)]

    sides = [side.requires_grad_() for side in sides]
    upstream = torch.tensor(1.5, dtype=x.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, sides)
    assert torch.autograd.gradgradcheck(outputs, sides)
    assert torch.autograd.gradcheck(gradients, (upstream, *sides))


def test_gradient_that_came_with_the_loss_and_one_from_the_embeddings(impl):
    x, labels = problem()
    unit = loss(x, labels, impl=impl)[2]
    upstream = torch.tensor(-2.5, dtype=x.dtype)
    torch.testing.assert_close(loss_gradient(upstream, x, labels, impl=impl)[0], -2.5 * unit)
    known = loss_gradient(upstream, x, labels, impl=impl, known=unit)[0]
    assert torch.equal(known, -2.5 * unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_stay_in_float32_until_the_upstream_is_in(impl, dtype):
    x, labels = batch(70, 64, 3, 0, dtype)
    grad = loss(x, labels, impl=impl)[2]
    assert grad.dtype == torch.float32
    scaled = loss_gradient(torch.tensor(2.0**16), x, labels, impl=impl)[0]
    torch.testing.assert_close(scaled, 2.0**16 * grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "maximum"}, "reduction must be one of"),
        ({"margin": 1.5}, r"margin must be in \[0, 1\], got 1.5"),
        ({"sigma": 0.5}, "sigma must be 1 or -1, got 0.5"),
        ({"eps": 0.0}, "eps must be a positive finite number"),
        ({"impl": "fastest"}, "impl must be one of"),
        ({"impl": "gram", "similarity": "signed_square"}, "impl='gram' does not take this input"),
    ],
)
def test_options_are_checked_when_it_runs(options, message):
    with pytest.raises(ValueError, match=message):
        loss(*problem(), **options)


def test_tensors_are_checked_when_it_runs():
    x, labels = problem()
    with pytest.raises(ValueError, match="embeddings has 1 row"):
        loss(x[:1], labels[:1])
    with pytest.raises(TypeError, match="labels must be of an integer dtype"):
        loss(x, labels.double())
    with pytest.raises(ValueError, match="labels must have shape"):
        loss(x, labels[:3])
    assert torch.equal(loss(x, labels.to(torch.int16))[0], loss(x, labels)[0])


def moment_means(x, labels):
    return torch.ops.bstriplet.moment_means(x, labels, 1e-12, 64)[0]


def moment_gradient(x, labels):
    state = torch.ops.bstriplet.moment_means(x.detach(), labels, 1e-12, 64)[2:]
    return torch.ops.bstriplet.moment_gradient(torch.ones(len(x)).to(x), x, *state, 1.0)


def native_loss(x, labels):
    return torch.ops.bstriplet.batch_similarity(x, labels)[0]


@needs_native
@pytest.mark.parametrize("operator", [native_loss, moment_means, moment_gradient])
@pytest.mark.parametrize("compiled", [False, True])
def test_operators_of_csrc_refuse_to_be_differentiated(operator, compiled):
    x, labels = problem()
    operator(x, labels)
    with torch.no_grad():
        operator(x.requires_grad_(), labels)
    run = operator
    if compiled:
        torch.compiler.reset()
        run = torch.compile(operator, backend="eager")
    message = "has no derivative of its own"
    with pytest.raises(Exception, match=message):
        run(x, labels)
    x = x.detach()
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(Exception, match=message):
            transform(lambda x: run(x, labels).sum())(x)


def test_vmap_over_embeddings_labels_and_both(impl):
    x, labels = batch(12, 4, 3, 0)
    xs, ys = torch.stack((x, x.flip(0))), torch.stack((labels, labels.roll(1)))

    def one(x, y):
        return bstriplet_loss(x, y, impl=impl)

    for in_dims, pairs in (
        ((0, None), [(xs[0], labels), (xs[1], labels)]),
        ((None, 0), [(x, ys[0]), (x, ys[1])]),
        ((0, 0), [(xs[0], ys[0]), (xs[1], ys[1])]),
    ):
        given = (xs if in_dims[0] == 0 else x, ys if in_dims[1] == 0 else labels)
        got = torch.vmap(one, in_dims)(*given)
        torch.testing.assert_close(got, torch.stack([one(*pair) for pair in pairs]))


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
    "grad of grad": lambda f, x: torch.func.grad(lambda z: torch.func.grad(f)(z).square().sum())(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_no_derivative(impl, transform, reduction):
    x, labels = problem(dtype=torch.float32)

    def run(x):
        return bstriplet_loss(x, labels, impl=impl, reduction=reduction).sum()

    expected = transform(run, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = transform(run, x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_nothing_of_the_operators(impl, reduction):
    x, labels = problem(dtype=torch.float32)
    upstream = torch.rand(7) if reduction == "none" else torch.tensor(2.0)
    options = {"impl": impl, "reduction": reduction}

    def run():
        return *loss(x, labels, **options), *loss_gradient(upstream, x, labels, **options)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_trace_of_the_backward_alone_follows_its_upstream(impl, reduction):
    x, labels = problem()
    loss_ = bstriplet_loss(x.requires_grad_(), labels, impl=impl, reduction=reduction)
    upstream = torch.ones_like(loss_)

    def gradient(upstream):
        return torch.autograd.grad(loss_, x, upstream, retain_graph=True)[0]

    graph = make_fx(gradient)(upstream)
    torch.testing.assert_close(graph(3 * upstream), 3 * gradient(upstream))


@pytest.mark.parametrize(
    ("grad_mode", "leaf", "expected"),
    [(True, True, True), (False, True, False), (True, False, False)],
)
def test_a_gradient_is_computed_where_a_backward_can_follow(
    impl, monkeypatch, grad_mode, leaf, expected
):
    asked = []
    path = PATHS[impl]

    def forward(*args):
        asked.append(args[-1].wants_gradient)
        return path.forward(*args)

    monkeypatch.setitem(PATHS, impl, path._replace(forward=forward))
    x, labels = problem()
    with torch.set_grad_enabled(grad_mode):
        bstriplet_loss(x.requires_grad_(leaf), labels, impl=impl)
    assert asked == [expected]


def test_an_eager_backward_of_the_operator_computes_nothing_twice(monkeypatch):
    monkeypatch.setattr("bstriplet_kernels.operators.gradients", None)
    x, labels = problem()
    (gradient,) = torch.autograd.grad(3 * loss(x.requires_grad_(), labels)[0], x)
    torch.testing.assert_close(gradient, 3 * loss(x.detach(), labels)[2])


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad, torch.func.jacfwd])
def test_vmap_over_no_batch_at_all(impl, transform):
    _, labels = problem()
    none = torch.empty(0, 7, 4, dtype=torch.float64)

    def shape(loss):
        return torch.vmap(transform(loss))(none).shape

    assert shape(lambda x: bstriplet_loss(x, labels, impl=impl)) == shape(torch.mean)


@pytest.mark.parametrize(
    ("upstream", "options", "message"),
    [
        (torch.ones(7), {}, r"grad_loss must have shape \[\], as the loss has.*got shape \[7\]"),
        (torch.ones(()), {"reduction": "none"}, r"must have shape \[7\], .*got shape \[\]"),
        (torch.ones(7), {"reduction": "none", "known": torch.ones(7, 4)}, "known and known_ref"),
        (torch.ones(()), {"known_ref": torch.ones(7, 4)}, r"got shapes \[None\]"),
        (torch.ones(()), {"known": torch.ones(7, 4), "reduction": "typo"}, "reduction must be one"),
        (torch.ones(()), {"known": torch.ones(7, 3)}, r"shapes \[\[7, 4\]\], got .*\[7, 3\]"),
    ],
)
def test_an_upstream_that_does_not_fit_is_refused(upstream, options, message):
    with pytest.raises(ValueError, match=message):
        loss_gradient(upstream, *problem(), **options)


def test_a_transform_that_a_tracer_would_make_constant_is_refused():
    x, labels = problem()
    gradient = torch.func.grad(lambda x: bstriplet_loss(x, labels))
    with pytest.raises(RuntimeError, match="trace with pre_dispatch=False"):
        make_fx(gradient, pre_dispatch=True)(x)
    torch.testing.assert_close(make_fx(gradient)(x.flip(0))(x), gradient(x))


@needs_native
def test_the_profiler_and_dispatch_modes_see_the_operator_of_csrc():
    x, labels = problem()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bstriplet_loss(x, labels, impl="native")
    assert "bstriplet::batch_similarity" in {event.name for event in profile.events()}
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        bstriplet_loss(x, labels, impl="native")
    assert "bstriplet.batch_similarity.default" in seen


def test_a_penalty_on_a_compiled_gradient_is_an_error_and_no_zero():
    """torch cannot differentiate a compiled backward; it has to see that it should."""
    torch.compiler.reset()
    x, labels = problem()
    x.requires_grad_()
    compiled = torch.compile(BSTripletLoss(), backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x, labels), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(gradient.square().sum() + x.sum(), x)


def test_grad_mode_within_a_transform_holds_at_its_level():
    x, labels = problem()

    def penalty(x):
        return torch.func.grad(lambda z: bstriplet_loss(z, labels))(x).square().sum()

    def constant(x):
        with torch.no_grad():
            return penalty(x)

    assert torch.func.grad(penalty)(x).norm() > 0
    assert torch.func.grad(lambda x: constant(x) + x.sum())(x).eq(1).all()
