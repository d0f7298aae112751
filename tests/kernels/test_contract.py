"""The public edge: what is refused, with a message that names argument, value and what is allowed.

Also the modules, and the loss over a miner's pairs.
"""

import inspect
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import Formula, batch, loop_loss

import bstriplet_kernels
from bstriplet_kernels import (
    BSTripletLoss,
    CrossEntropyBSTripletLoss,
    available_impls,
    bstriplet_loss,
)
from bstriplet_kernels.reference import naive_loss

X, Y = batch(6, 4, 2, 0, torch.float32)
REF, REF_Y = batch(5, 4, 2, 1, torch.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"embeddings must be a torch.Tensor, got list", {"embeddings": [[1.0]]}),
        (TypeError, r"embeddings must be float64.*got torch.int64", {"embeddings": X.long()}),
        (TypeError, r"embeddings must be .*got torch.complex64", {"embeddings": X + 0j}),
        (ValueError, r"embeddings must have shape \[N, D\].*\(6, 4, 1\)",
         {"embeddings": X[..., None]}),
        (ValueError, r"embeddings must have shape \[N, D\] with D >= 1", {"embeddings": X[:, :0]}),
        (ValueError, r"1 row, .*drop_last=True", {"embeddings": X[:1], "labels": Y[:1]}),
        (ValueError, r"0 rows, .*drop_last=True", {"embeddings": X[:0], "labels": Y[:0]}),
        (TypeError, r"labels must be a torch.Tensor, got list", {"labels": [0, 1]}),
        (TypeError, r"labels must be of an integer dtype or bool, got torch.float32",
         {"labels": Y.float()}),
        (TypeError, r"labels must be of an integer dtype or bool, got torch.float8",
         {"labels": Y.float().to(torch.float8_e4m3fn)}),
        (ValueError, r"labels must have shape \[6\].*got shape \(5,\)", {"labels": Y[:5]}),
        (ValueError, r"labels must have shape \[6\].*got shape \(6, 1\)", {"labels": Y[:, None]}),
        (ValueError, r"labels is on meta and embeddings on cpu", {"labels": Y.to("meta")}),
        (ValueError, r"margin must be in \[0, 1\], got 1.5", {"margin": 1.5}),
        (ValueError, r"margin must be in \[0, 1\], got nan", {"margin": float("nan")}),
        (TypeError, r"margin must be a number in \[0, 1\], got '0.9' of type str",
         {"margin": "0.9"}),
        (TypeError, r"margin must be a number in \[0, 1\], got True of type bool",
         {"margin": True}),
        (TypeError, r"margin must be a number in \[0, 1\], got \[0.9\] of type list",
         {"margin": [0.9]}),
        (ValueError, r"similarity must be one of 'square', 'signed_square', 'linear', got "
         r"'signed'; did you mean 'signed_square'", {"similarity": "signed"}),
        (TypeError, r"return_stats must be True or False, got \[1\] of type list",
         {"return_stats": [1]}),
        (ValueError, r"eq3 must be one of .*got 'print'; did you mean 'printed'", {"eq3": "print"}),
        (ValueError, r"reduction must be one of .*got 'avg'", {"reduction": "avg"}),
        (ValueError, r"reduction must be one of .*got None", {"reduction": None}),
        (ValueError, r"impl must be one of 'auto', .*'reference'.*did you mean 'reference'",
         {"impl": "refrence"}),
        (ValueError, r"eps must be a positive finite number, got 0", {"eps": 0}),
        (TypeError, r"eps must be a positive finite number, got '1' of type str", {"eps": "1"}),
        (ValueError, r"ref_emb was given without ref_labels", {"ref_emb": REF}),
        (ValueError, r"ref_labels was given without ref_emb", {"ref_labels": REF_Y}),
        (ValueError, r"ref_emb must have as many columns as embeddings, 4, got shape \(5, 3\)",
         {"ref_emb": REF[:, :3], "ref_labels": REF_Y}),
        (ValueError, r"ref_labels must have shape \[5\]", {"ref_emb": REF, "ref_labels": Y}),
        (TypeError, r"ref_emb must be float64", {"ref_emb": REF.int(), "ref_labels": REF_Y}),
        (ValueError, r"ref_emb is on meta and embeddings on cpu",
         {"ref_emb": REF.to("meta"), "ref_labels": REF_Y.to("meta")}),
        (TypeError, r"group must be a torch.distributed process group, got 'world' of type str",
         {"group": "world"}),
        (ValueError, r"similarity must be one of .*, got \['square'\]", {"similarity": ["square"]}),
        (ValueError, r"impl must be one of .*, got \['auto'\]", {"impl": ["auto"]}),
        (ValueError, r"eq3 must be one of", {"eq3": np.array(["corrected", "printed"])}),
        (ValueError, r"ref_emb has no rows; at least 1 is needed",
         {"ref_emb": REF[:0], "ref_labels": REF_Y[:0]}),
        (ValueError, r"embeddings has no rows; at least 1 is needed",
         {"embeddings": X[:0], "labels": Y[:0], "ref_emb": REF, "ref_labels": REF_Y}),
    ],
)  # fmt: skip
def test_refused(error, message, arguments):
    bstriplet_loss(X, Y, margin=1)  # equals True, and options are remembered
    with pytest.raises(error, match=message):
        bstriplet_loss(**{"embeddings": X, "labels": Y, **arguments})


@pytest.mark.parametrize("margin", ["0.9", [0.9]])
def test_an_option_of_a_wrong_type_is_said_once(margin):
    with pytest.raises(TypeError, match="margin must be") as raised:
        bstriplet_loss(X, Y, margin=margin)
    assert raised.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, r"margin must be in \[0, 1\], got -0.1"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"similarity": "cosine"}, "similarity must be one of"),
    ],
)
def test_modules_refuse_when_they_are_made(options, message):
    for module in (BSTripletLoss, CrossEntropyBSTripletLoss):
        with pytest.raises(ValueError, match=message):
            module(**options)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"weight": -1}, "weight must be a finite number >= 0, got -1"),
        (ValueError, {"weight": float("inf")}, "weight must be a finite number >= 0, got inf"),
        (TypeError, {"weight": "1"}, "weight must be a number >= 0, got '1' of type str"),
        (ValueError, {"reduction": "none"}, "reduction='none' does not fit"),
        (TypeError, {"weight": True}, "weight must be a number >= 0, got True of type bool"),
        (TypeError, {"return_stats": True}, "unexpected keyword argument 'return_stats'"),
    ],
)
def test_sum_of_losses_refuses(error, options, message):
    with pytest.raises(error, match=message):
        CrossEntropyBSTripletLoss(**options)


def test_module_is_the_function():
    options = {"margin": 0.7, "similarity": "signed_square", "reduction": "sum", "eps": 1e-6}
    criterion = BSTripletLoss(**options)
    assert torch.equal(criterion(X, Y), bstriplet_loss(X, Y, **options))
    assert torch.equal(
        criterion(X, Y, ref_emb=REF, ref_labels=REF_Y),
        bstriplet_loss(X, Y, ref_emb=REF, ref_labels=REF_Y, **options),
    )
    assert "margin=0.7" in repr(criterion)
    assert not list(criterion.parameters())
    loss, stats = BSTripletLoss(return_stats=True)(X, Y)
    assert loss.ndim == 0
    assert stats._fields == ("active_fraction", "positive_similarity", "negative_similarity")
    with pytest.raises(TypeError, match="labels is needed where no indices_tuple is given"):
        criterion(X)


@pytest.mark.parametrize("weight", [0, 1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equation_7(weight, reduction):
    logits = torch.randn(6, 2, requires_grad=True)
    x = X.clone().requires_grad_()
    loss = CrossEntropyBSTripletLoss(weight, 0.8, reduction=reduction)(logits, x, Y.to(torch.int32))
    expected = torch.nn.functional.cross_entropy(logits, Y, reduction=reduction)
    expected = expected + weight * bstriplet_loss(x, Y, margin=0.8, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert (x.grad.norm() > 0) == (weight > 0)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2)])
def test_any_number_is_a_weight(number):
    logits = torch.randn(6, 2)
    criterion = CrossEntropyBSTripletLoss(number, margin=np.float32(0.5))
    expected = CrossEntropyBSTripletLoss(float(number), 0.5)
    assert torch.equal(criterion(logits, X, Y), expected(logits, X, Y))
    assert type(criterion.weight) is float


def test_options_of_the_sum_are_those_of_the_loss():
    options = inspect.signature(BSTripletLoss).parameters
    own = inspect.signature(CrossEntropyBSTripletLoss).parameters
    assert list(own) == ["weight", *(name for name in options if name != "return_stats")]
    assert all(own[name].default == options[name].default for name in own if name != "weight")


@pytest.mark.parametrize("impl", ["native", "gram"])
def test_a_named_path_that_would_not_run_is_refused(impl):
    if impl not in available_impls():
        pytest.skip(f"{impl} is not here")
    pairs = tuple(torch.tensor(i) for i in ([0], [1], [0], [4]))
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot be combined with indices_tuple"):
        BSTripletLoss(impl=impl)(X, None, pairs)
    expected = BSTripletLoss()(X, None, pairs)
    assert torch.equal(BSTripletLoss(impl="reference")(X, None, pairs), expected)


def test_equation_7_in_half_precision_is_float32():
    loss = CrossEntropyBSTripletLoss()(torch.randn(6, 2).half(), X.half(), Y)
    assert loss.dtype == torch.float32


def test_triplets_and_pairs_listed_once_give_the_loss_of_the_labels():
    n = len(X)
    same = Y[:, None] == Y[None, :]
    pos = (same & ~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    neg = (~same).nonzero(as_tuple=True)
    x = X.clone().requires_grad_()
    for options in ({}, {"similarity": "signed_square", "reduction": "none", "eq3": "printed"}):
        criterion = BSTripletLoss(**options)
        listed, by_label = criterion(x, Y, (*pos, *neg)), criterion(x, Y)
        torch.testing.assert_close(listed, by_label)
        grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (listed, by_label)]
        torch.testing.assert_close(*grads)
    a, p, k = (
        i.flatten() for i in torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij")
    )  # all triplets list each pair of an anchor equally often
    keep = same[a, p] & (a != p) & ~same[a, k]
    torch.testing.assert_close(BSTripletLoss()(X, None, (a[keep], p[keep], k[keep])),
                               bstriplet_loss(X, Y))  # fmt: skip


def test_listed_pairs_count_as_often_as_listed_and_unlisted_rows_as_the_margin():
    unit = torch.nn.functional.normalize(X.double(), dim=1)
    s2 = (unit @ unit.T).square()
    pairs = tuple(torch.tensor(i) for i in ([0, 0, 0, 1], [1, 1, 2, 3], [0], [4]))
    losses = BSTripletLoss(margin=1.0, reduction="none")(X.double(), None, pairs)
    expected = torch.ones(6, dtype=torch.float64)
    expected[0] += s2[0, 4] - (2 * s2[0, 1] + s2[0, 2]) / 3
    expected[1] -= s2[1, 3]
    torch.testing.assert_close(losses, expected.clamp_min(0))
    loss, stats = BSTripletLoss(margin=1.0, return_stats=True)(X, None, pairs)
    torch.testing.assert_close(loss.double(), expected.clamp_min(0).mean(), atol=1e-6, rtol=0)
    assert stats.active_fraction == 1


def test_listed_pairs_with_reference_embeddings_and_their_gradient():
    pairs = tuple(torch.tensor(i) for i in ([0, 2], [4, 1], [0, 5], [3, 2]))
    x, ref = X.double().requires_grad_(), REF.double().requires_grad_()

    def loss(x, ref):
        return BSTripletLoss()(x, None, pairs, ref, None)

    assert torch.autograd.gradcheck(loss, (x, ref))
    assert torch.autograd.gradgradcheck(loss, (x, ref))


@pytest.mark.parametrize(
    ("error", "indices", "message"),
    [
        (ValueError, (torch.tensor([0]),) * 2, "indices_tuple must be triplets .* got 2 entries"),
        (ValueError, 5, "indices_tuple must be triplets .* got int"),
        (TypeError, ([0], [1], [2]),
         r"indices_tuple\[0\] must be an int64 or int32 tensor, got list"),
        (TypeError, (torch.tensor([0.5]),) * 3, r"indices_tuple\[0\] must be .*got torch.float32"),
        (ValueError, (torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([3])),
         r"got shape \(2,\) of indices_tuple\[1\] and \(1,\) of indices_tuple\[0\]"),
        (ValueError, (torch.zeros(1, 2, dtype=torch.int64),) * 3,
         r"one-dimensional .*got shape \(1, 2\) of indices_tuple\[0\]"),
    ],
)  # fmt: skip
def test_bad_indices(error, indices, message):
    with pytest.raises(error, match=message):
        BSTripletLoss()(X, Y, indices)


def test_naive_form_agrees_with_loops():
    x, labels = batch(12, 5, 3, 0)
    assert abs(naive_loss(x, labels).item() - loop_loss(x, labels, Formula())) < 1e-12


def test_public_names():
    assert "reference" in available_impls()
    for name in bstriplet_kernels.__all__:
        assert getattr(bstriplet_kernels, name).__doc__


def test_import_needs_torch_alone():
    """Neither triton nor anything of the training extra is imported, nor needed."""
    code = (
        "import sys\n"
        "for name in ('triton', 'timm', 'sklearn', 'bstriplet', 'pytorch_metric_learning'):\n"
        "    sys.modules[name] = None\n"
        "import torch, bstriplet_kernels as b\n"
        "x = torch.randn(4, 3, requires_grad=True)\n"
        "b.bstriplet_loss(x, torch.tensor([0, 0, 1, 1])).backward()\n"
        "print(x.grad.isfinite().all().item())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "True"
