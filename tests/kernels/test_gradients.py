"""Derivatives through torch's own machinery: gradcheck, second order, torch.func, compile, AMP."""

import pytest
import torch
from oracle import Formula, batch, plain_loss, skip_if_refused

from bstriplet_kernels import BSTripletLoss, bstriplet_loss


@pytest.mark.parametrize("similarity", ["square", "signed_square", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eq3", ["corrected", "printed"])
def test_gradcheck_and_gradgradcheck(impl, similarity, reduction, eq3):
    x, labels = batch(7, 4, 3, 0)
    formula = Formula(similarity=similarity, reduction=reduction, eq3=eq3)
    skip_if_refused(impl, x, formula)

    def loss(x):
        return bstriplet_loss(x, labels, impl=impl, **formula.keywords)

    x.requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))


def test_gradcheck_of_both_sides(impl):
    x, labels = batch(5, 4, 3, 0)
    ref, ref_labels = batch(6, 4, 3, 1)
    skip_if_refused(impl, x, Formula(), ref)

    def loss(x, ref):
        return bstriplet_loss(x, labels, ref_emb=ref, ref_labels=ref_labels, impl=impl)

    sides = (x.requires_grad_(), ref.requires_grad_())
    assert torch.autograd.gradcheck(loss, sides)
    assert torch.autograd.gradgradcheck(loss, sides)


def test_only_the_side_that_asks_gets_a_gradient(impl):
    x, labels = batch(5, 4, 3, 0)
    ref, ref_labels = batch(6, 4, 3, 1)
    skip_if_refused(impl, x, Formula(), ref)
    bstriplet_loss(
        x.requires_grad_(), labels, ref_emb=ref, ref_labels=ref_labels, impl=impl
    ).backward()
    assert ref.grad is None
    bstriplet_loss(
        x.detach(), labels, ref_emb=ref.requires_grad_(), ref_labels=ref_labels, impl=impl
    ).backward()
    assert ref.grad is not None


def test_the_two_sides_may_differ_in_dtype(impl):
    x, labels = batch(5, 4, 3, 0, torch.float16)
    ref, ref_labels = batch(6, 4, 3, 1, torch.float32)
    skip_if_refused(impl, x, Formula(), ref)
    sides = x.requires_grad_(), ref.requires_grad_()
    loss = bstriplet_loss(x, labels, ref_emb=ref, ref_labels=ref_labels, impl=impl)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [side.grad.dtype for side in sides] == [torch.float16, torch.float32]


@pytest.mark.parametrize("upstream", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_whoever_changes_a_gradient_changes_only_that(impl, upstream, dtype):
    """The last use of a saved gradient may hand it out itself; none before it may."""
    x, labels = batch(7, 4, 3, 0, dtype)
    x.requires_grad_()
    weight = torch.tensor(upstream, dtype=torch.promote_types(dtype, torch.float32))

    def gradient(loss, **options):
        return torch.autograd.grad(loss, x, weight, **options)[0]

    expected = gradient(bstriplet_loss(x, labels, impl="reference")).clone()
    loss = bstriplet_loss(x, labels, impl=impl)
    for _ in range(3):
        kept = gradient(loss, retain_graph=True)
        torch.testing.assert_close(kept, expected)
        kept.fill_(7)
    torch.testing.assert_close(gradient(loss), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradient(loss)


def test_gradients_of_two_losses_accumulate(impl):
    x, labels = batch(7, 4, 3, 0)
    x.requires_grad_()
    first, second = (bstriplet_loss(x, labels, margin=m, impl=impl) for m in (0.9, 0.8))
    expected = torch.autograd.grad(first + second, x, retain_graph=True)[0]
    first.backward()
    second.backward()
    torch.testing.assert_close(x.grad, expected)


def test_func_grad_and_vmap(impl):
    x, labels = batch(9, 5, 3, 0)
    formula = Formula()

    def ours(x):
        return bstriplet_loss(x, labels, impl=impl)

    def plain(x):
        return plain_loss(x, labels, formula)

    expected = torch.func.grad(plain)(x)
    torch.testing.assert_close(torch.func.grad(ours)(x), expected)
    stack = torch.stack([x, 2 * x, x.flip(0)])
    torch.testing.assert_close(torch.vmap(ours)(stack), torch.vmap(plain)(stack))
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(ours))(stack), torch.vmap(torch.func.grad(plain))(stack)
    )


def test_second_derivative_by_func_transforms(impl):
    x, labels = batch(5, 3, 2, 0)
    hessian = torch.func.jacrev(torch.func.grad(lambda x: bstriplet_loss(x, labels, impl=impl)))(x)
    expected = torch.func.hessian(lambda x: plain_loss(x, labels, Formula()))(x)
    torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_ref", [False, True])
def test_many_upstreams_at_once(impl, reduction, with_ref):
    """`is_grads_batched`: what torch.autograd.functional's vectorize=True is made of."""
    x, labels = batch(9, 4, 3, 0)
    ref = batch(5, 4, 3, 1) if with_ref else (None, None)
    skip_if_refused(impl, x, Formula(reduction=reduction), ref[0])
    sides = [side.requires_grad_() for side in (x, ref[0]) if side is not None]
    names = {"reduction": reduction, "ref_emb": ref[0], "ref_labels": ref[1], "impl": impl}
    loss = bstriplet_loss(x, labels, **names)
    upstreams = torch.randn(3, *loss.shape, dtype=x.dtype, requires_grad=True)
    each = [torch.autograd.grad(loss, sides, u, create_graph=True) for u in upstreams]
    expected = [torch.stack(g) for g in zip(*each, strict=True)]
    for options in ({"create_graph": True}, {"retain_graph": True}, {}):
        got = torch.autograd.grad(loss, sides, upstreams, is_grads_batched=True, **options)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)
        if "create_graph" in options:
            second = torch.autograd.grad(got[0].square().sum(), [*sides, upstreams])
    expected = torch.autograd.grad(expected[0].square().sum(), [*sides, upstreams])
    for s, e in zip(second, expected, strict=True):
        torch.testing.assert_close(s, e)


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiles_whole_with_static_and_dynamic_n(impl, dynamic):
    torch.compiler.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, y: bstriplet_loss(x, y, impl=impl),
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )
    for n in (12, 17, 23, 40):
        x, labels = batch(n, 6, 3, n, torch.float32)
        x.requires_grad_()
        loss = compiled(x, labels)
        eager = bstriplet_loss(x, labels, impl=impl)
        torch.testing.assert_close(loss, eager)
        grads = [torch.autograd.grad(loss_, x)[0] for loss_ in (loss, eager)]
        torch.testing.assert_close(*grads)
    assert len(frames) <= {False: 4, True: 1, None: 2}[dynamic]  # no recompile for each batch size


def test_what_a_named_path_refuses_is_refused_while_compiling():
    torch.compiler.reset()
    x, labels = batch(12, 6, 3, 0)

    def loss(x):
        return bstriplet_loss(x, labels, impl="gram", similarity="signed_square")

    with pytest.raises(Exception, match="does not take this input"):
        torch.compile(loss, backend="eager", fullgraph=True)(x)


def test_compiles_with_inductor_inside_a_model(impl):
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    x, labels = batch(12, 6, 3, 0, torch.float32)
    model = torch.nn.Linear(6, 5)
    criterion = BSTripletLoss(impl=impl)

    def step(x, labels):
        return criterion(model(x), labels)

    loss = torch.compile(step, fullgraph=True)(x, labels)
    grads = torch.autograd.grad(loss, model.parameters())
    expected = torch.autograd.grad(step(x, labels), model.parameters())
    torch.testing.assert_close(loss, step(x, labels))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl, dtype):
    x, labels = batch(20, 30, 3, 0, dtype)
    x.requires_grad_()
    plain = bstriplet_loss(x, labels, impl=impl)
    (expected,) = torch.autograd.grad(plain, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bstriplet_loss(x, labels, impl=impl)
        (inside,) = torch.autograd.grad(loss, x, retain_graph=True)
    (outside,) = torch.autograd.grad(loss, x)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert torch.equal(inside, expected)
    assert torch.equal(outside, expected)


def test_inference_mode_and_no_grad(impl):
    x, labels = batch(12, 6, 3, 0)
    expected = bstriplet_loss(x, labels, impl=impl)
    with torch.inference_mode():
        assert torch.equal(bstriplet_loss(x, labels, impl=impl), expected)
    with torch.no_grad():
        assert not bstriplet_loss(x.requires_grad_(), labels, impl=impl).requires_grad


def test_inputs_are_left_alone(impl):
    x, labels = batch(12, 6, 3, 0)
    before = x.clone(), labels.clone()
    bstriplet_loss(x.requires_grad_(), labels, impl=impl).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(labels, before[1])
