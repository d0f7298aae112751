"""Properties of the loss and its gradient, for every path that can run here."""

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracle import (
    Formula,
    assert_as_exact_as_plain,
    batch,
    formulas,
    loop_loss,
    plain_loss,
    skip_if_refused,
    takes,
    value_and_gradients,
)

from bstriplet_kernels import bstriplet_loss

sizes = st.integers(2, 24)
widths = st.integers(1, 20)
class_counts = st.integers(1, 8)
seeds = st.integers(0, 2**20)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def close(got, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert (got.double() - expected).norm() <= tolerance * (1 + expected.norm())


def loss_and_gradient(impl, x, labels, formula=None, **keywords):
    formula = formula or Formula()
    loss, (grad,) = value_and_gradients(
        lambda x: bstriplet_loss(x, labels, impl=impl, **formula.keywords, **keywords), [x]
    )
    return loss, grad


@given(n=sizes, d=widths, c=class_counts, seed=seeds, formula=formulas)
@example(n=2, d=1, c=1, seed=0, formula=Formula())
def test_agrees_with_loops_over_equations_2_to_4(impl, n, d, c, seed, formula):
    x, labels = batch(n, d, c, seed)
    assume(takes(impl, x, formula))
    close(bstriplet_loss(x, labels, impl=impl, **formula.keywords), loop_loss(x, labels, formula))


@given(
    n=st.integers(1, 20), m=st.integers(1, 20), d=widths, c=class_counts, seed=seeds,
    formula=formulas,
)  # fmt: skip
def test_reference_embeddings_agree_with_loops(impl, n, m, d, c, seed, formula):
    x, labels = batch(n, d, c, seed)
    ref, ref_labels = batch(m, d, c + 1, seed + 1)
    assume(takes(impl, x, formula, ref))
    got = bstriplet_loss(
        x, labels, ref_emb=ref, ref_labels=ref_labels, impl=impl, **formula.keywords
    )
    close(got, loop_loss(x, labels, formula, ref, ref_labels))


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    n=st.integers(2, 80), d=st.integers(1, 150), c=class_counts, seed=seeds,
    spread=st.sampled_from([0.05, 1.0]), formula=formulas,
)  # fmt: skip
def test_as_exact_as_plain_torch_in_the_same_dtype(impl, dtype, n, d, c, seed, spread, formula):
    x, labels = batch(n, d, c, seed, dtype, spread)
    assume(takes(impl, x, formula))
    assert_as_exact_as_plain(impl, x, labels, formula)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    n=st.integers(1, 70), m=st.integers(1, 70), d=st.integers(1, 80), c=class_counts, seed=seeds,
    formula=formulas,
)  # fmt: skip
def test_reference_embeddings_are_as_exact(impl, dtype, n, m, d, c, seed, formula):
    x, labels = batch(n, d, c, seed, dtype)
    ref, ref_labels = batch(m, d, c, seed + 1, dtype)
    assume(takes(impl, x, formula, ref))
    assert_as_exact_as_plain(impl, x, labels, formula, ref, ref_labels)


@given(n=st.integers(2, 9), d=st.integers(1, 5), c=st.integers(1, 4), seed=seeds,
       formula=formulas)  # fmt: skip
def test_gradient_is_the_finite_difference(impl, n, d, c, seed, formula):
    x, labels = batch(n, d, c, seed)
    assume(takes(impl, x, formula))
    _, grad = loss_and_gradient(impl, x, labels, formula)
    losses = torch.tensor(
        loop_loss(x, labels, Formula(**{**formula.keywords, "reduction": "none"}))
    )
    assume(bool(((losses == 0) | (losses > 1e-4)).all()))  # the hinge has no derivative at 0
    generator = torch.Generator().manual_seed(0)
    upstream = 0.5 + torch.rand(
        () if formula.reduction != "none" else (n,), generator=generator, dtype=torch.float64
    )
    step = 1e-6
    numeric = torch.zeros_like(x)
    for i in range(n):
        for k in range(d):
            ahead, behind = x.clone(), x.clone()
            ahead[i, k] += step
            behind[i, k] -= step
            change = torch.tensor(loop_loss(ahead, labels, formula), dtype=torch.float64)
            change = change - torch.tensor(loop_loss(behind, labels, formula), dtype=torch.float64)
            numeric[i, k] = (upstream * change).sum() / (2 * step)
    close(grad, numeric, 1e-5)


@given(n=sizes, d=widths, c=class_counts, seed=seeds, formula=formulas)
def test_order_names_rotation_and_scale_do_not_matter(impl, n, d, c, seed, formula):
    x, labels = batch(n, d, c, seed)
    assume(takes(impl, x, formula))
    formula = Formula(**{**formula.keywords, "reduction": "none"})
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scale = 10.0 ** (4 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 2)
    names = 1000 * torch.randperm(c, generator=generator)[labels] - 3333

    def losses(x, labels):
        return bstriplet_loss(x, labels, impl=impl, **formula.keywords)

    base = losses(x, labels)
    close(losses(x[order], labels[order]), base[order])
    close(losses(x, names), base)
    close(losses(x @ rotation, labels), base)
    close(losses(x * scale, labels), base)
    _, grad = loss_and_gradient(impl, x, labels)
    _, scaled = loss_and_gradient(impl, x * scale, labels)
    close(scaled * scale, grad)


@given(n=sizes, d=widths, c=class_counts, seed=seeds, formula=formulas)
def test_gradient_is_orthogonal_to_its_embedding(impl, n, d, c, seed, formula):
    x, labels = batch(n, d, c, seed)
    assume(takes(impl, x, formula))
    _, grad = loss_and_gradient(impl, x, labels, formula)
    close((grad * x).sum(dim=1), torch.zeros(n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(n=st.integers(2, 40), d=widths, seed=seeds)
def test_norms_from_1e_minus_10_to_1e15_in_one_batch(impl, dtype, n, d, seed):
    x, labels = batch(n, d, 3, seed)
    x = torch.nn.functional.normalize(x, dim=1)
    exponents = torch.randint(-10, 16, (n, 1), generator=torch.Generator().manual_seed(seed))
    scaled = (x * 10.0 ** exponents.double()).to(dtype)
    loss, grad = loss_and_gradient(impl, scaled, labels)
    norm = scaled.double().norm(dim=1, keepdim=True)
    true_loss, true_grad = loss_and_gradient("reference", scaled.double() / norm, labels)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    close(loss, true_loss, tolerance)
    close(grad * norm, true_grad, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_are_similar_to_nothing(impl, dtype):
    x, labels = batch(9, 5, 3, 0, dtype)
    x[0] = 0
    x[4] = 1e-14 if dtype != torch.float16 else 0
    loss, grad = loss_and_gradient(impl, x, labels)
    x[4] = 0
    close(loss, loop_loss(x.double(), labels, Formula()), 1e-2 if dtype.itemsize == 2 else 1e-6)
    assert grad[0].eq(0).all()
    assert grad[4].eq(0).all()
    assert grad.isfinite().all()


def test_eps_is_the_norm_of_a_zero_row(impl):
    x, labels = batch(6, 4, 2, 1)
    x[2] *= 0.01 / x[2].norm()
    as_zero = x.clone()
    as_zero[2] = 0
    loss, grad = loss_and_gradient(impl, x, labels, eps=0.011)
    close(loss, loop_loss(as_zero, labels, Formula()))
    assert grad[2].eq(0).all()
    close(bstriplet_loss(x, labels, impl=impl, eps=0.009), loop_loss(x, labels, Formula()))


@pytest.mark.parametrize(
    ("name", "x", "labels"),
    [
        ("no positives for some", [[1.0, 2], [2, 1], [1, -1]], [0, 0, 1]),
        ("one class", [[1.0, 2], [2, 1], [1, -1]], [5, 5, 5]),
        ("all classes distinct", [[1.0, 2], [2, 1], [1, -1]], [3, 1, 2]),
        ("two rows, one class", [[1.0, 2], [2, 1]], [0, 0]),
        ("two rows, two classes", [[1.0, 2], [2, 1]], [0, 1]),
        ("one column", [[1.0], [-2], [3], [4]], [0, 0, 1, 1]),
        ("duplicates", [[1.0, 2], [1, 2], [1, 2], [1, 2]], [0, 0, 1, 1]),
        ("antipodal pairs", [[1.0, 2], [-1, -2], [2, -1], [-2, 1]], [0, 0, 1, 1]),
        ("all zero", [[0.0, 0], [0, 0], [0, 0]], [0, 0, 1]),
    ],
)
@pytest.mark.parametrize("similarity", ["square", "signed_square", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_corners(impl, name, x, labels, similarity, reduction):
    x, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(labels)
    formula = Formula(similarity=similarity, reduction=reduction)
    skip_if_refused(impl, x, formula)
    loss, grad = loss_and_gradient(impl, x, labels, formula)
    close(loss, loop_loss(x, labels, formula))
    _, (expected,) = value_and_gradients(lambda x: plain_loss(x, labels, formula), [x])
    if name == "all zero":
        expected = torch.zeros_like(x)
    close(grad, expected)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16,
              torch.uint32, torch.uint64]
)  # fmt: skip
def test_any_integer_labels(impl, dtype):
    x, labels = batch(12, 6, 3, 0)
    expected = loop_loss(x, labels, Formula())
    close(bstriplet_loss(x, (labels * 50).to(dtype), impl=impl), expected)
    if dtype.is_signed:
        close(bstriplet_loss(x, (labels * 50 - 100).to(dtype), impl=impl), expected)


def test_boolean_and_extreme_labels(impl):
    x, labels = batch(12, 6, 2, 0)
    expected = loop_loss(x, labels, Formula())
    close(bstriplet_loss(x, labels.bool(), impl=impl), expected)
    extreme = torch.tensor([-(2**63), 2**63 - 1])[labels]
    close(bstriplet_loss(x, extreme, impl=impl), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_expanded_and_shared_inputs(impl, dtype):
    x, labels = batch(10, 6, 3, 0, dtype)
    expected_loss, expected_grad = loss_and_gradient(impl, x, labels)
    wide = torch.empty(20, 13, dtype=dtype)
    wide[::2, 1::2] = x
    for view in (x.T.contiguous().T, wide[::2, 1::2], x.flip(0).contiguous().flip(0)):
        loss, grad = loss_and_gradient(impl, view, labels)
        close(loss, expected_loss, 1e-6)
        close(grad, expected_grad, 1e-2 if dtype.itemsize == 2 else 1e-6)
    expanded = x[:1].expand(4, 6)
    close(bstriplet_loss(expanded, torch.zeros(4, dtype=torch.int64), impl=impl), 0.0, 1e-2)
    strided_labels = labels.repeat_interleave(3)[::3]
    close(bstriplet_loss(x, strided_labels, impl=impl), expected_loss, 1e-6)


def test_expanded_upstream_gradient_retain_graph_and_second_backward(impl):
    x, labels = batch(10, 6, 3, 0)
    x.requires_grad_()
    losses = bstriplet_loss(x, labels, impl=impl, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)  # an expanded upstream
    (again,) = torch.autograd.grad(losses, x, torch.ones(10, dtype=torch.float64))
    assert torch.equal(grad, again)
    loss = bstriplet_loss(x, labels, impl=impl)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward(torch.tensor(2.0, dtype=torch.float64))
    close(x.grad, 3 * first)
    assert torch.equal(first, torch.autograd.grad(bstriplet_loss(x, labels, impl=impl), x)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nan_and_infinity_are_never_hidden(impl, bad, reduction):
    x, labels = batch(8, 5, 3, 0, torch.float32)
    x[3, 2] = bad
    loss = bstriplet_loss(x.requires_grad_(), labels, impl=impl, reduction=reduction)
    assert loss.isnan().all()
    loss.sum().backward()
    assert x.grad.isnan().any()


def test_squares_that_overflow_give_nan_not_a_wrong_number(impl):
    x, labels = batch(8, 5, 3, 0, torch.float32)
    x[3] *= 1e25
    assert bstriplet_loss(x, labels, impl=impl).isnan()
    assert bstriplet_loss(x, labels, impl=impl, reduction="none")[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_result_and_gradient_dtypes(impl, dtype, reduction):
    x, labels = batch(8, 5, 3, 0, dtype)
    loss = bstriplet_loss(x.requires_grad_(), labels, impl=impl, reduction=reduction)
    assert loss.dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
    assert loss.shape == (() if reduction == "mean" else (8,))
    loss.sum().backward()
    assert x.grad.dtype == dtype


def test_a_zero_loss_stays_in_the_graph(impl):
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], requires_grad=True)
    loss = bstriplet_loss(x, torch.tensor([0, 0, 1, 1]), impl=impl)
    assert loss == 0
    loss.backward()
    assert x.grad.eq(0).all()


@given(n=sizes, d=widths, c=class_counts, seed=seeds)
def test_statistics_are_those_of_equation_3(impl, n, d, c, seed):
    x, labels = batch(n, d, c, seed)
    loss, stats = bstriplet_loss(x.requires_grad_(), labels, impl=impl, return_stats=True)
    rows = loop_loss(x, labels, Formula(reduction="none"))
    rows = torch.tensor(rows, dtype=torch.float64)
    close(loss.detach(), rows.mean())
    assert stats.active_fraction == (rows > 0).double().mean()
    assert not any(s.requires_grad for s in stats)
    if stats.active_fraction == 1:
        close(0.9 - stats.positive_similarity + stats.negative_similarity, rows.mean())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_from_run_to_run(impl, dtype):
    x, labels = batch(200, 64, 5, 0, dtype)
    first = loss_and_gradient(impl, x, labels)
    for _ in range(3):
        again = loss_and_gradient(impl, x, labels)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("n", [63, 64, 65, 127, 129, 257])
@pytest.mark.parametrize("d", [1, 31, 130])
def test_sizes_around_tiles(impl, n, d):
    x, labels = batch(n, d, 4, n * d, torch.float32)
    assert_as_exact_as_plain(impl, x, labels, Formula())
