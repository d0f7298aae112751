"""What the paths are held against: Eqs. 2-4 by loops, plain torch left to autograd, the judge."""

import math
from dataclasses import asdict, dataclass

import pytest
import torch
from hypothesis import strategies as st

from bstriplet_kernels import bstriplet_loss
from bstriplet_kernels.checks import make_spec
from bstriplet_kernels.paths import PATHS

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


@dataclass(frozen=True)
class Formula:
    """Which formula of the loss: those of its options that change its mathematics."""

    margin: float = 0.9
    similarity: str = "square"
    eq3: str = "corrected"
    reduction: str = "mean"

    @property
    def keywords(self):
        return asdict(self)


def loop_losses(rows, labels, columns, column_labels, formula):
    """l_i of Eq. 3 for each row, as Python floats, one pair at a time.

    rows and columns are lists of lists; columns None: the rows themselves without the self-pair.
    """
    is_self = columns is None
    columns, column_labels = (rows, labels) if is_self else (columns, column_labels)
    sigma = 1 if formula.eq3 == "corrected" else -1
    losses = []
    for i, row in enumerate(rows):
        phi = {True: [], False: []}
        for j, column in enumerate(columns):
            if is_self and i == j:
                continue
            norms = math.hypot(*row) * math.hypot(*column)
            zero = math.hypot(*row) <= 1e-12 or math.hypot(*column) <= 1e-12
            s = 0.0 if zero else sum(a * b for a, b in zip(row, column, strict=True)) / norms
            forms = {"square": s * s, "signed_square": s * abs(s), "linear": s}
            phi[labels[i] == column_labels[j]].append(forms[formula.similarity])
        means = {k: math.fsum(v) / len(v) if v else 0.0 for k, v in phi.items()}
        losses.append(max(0.0, formula.margin - means[True] + sigma * means[False]))
    return losses


def loop_loss(x, labels, formula, ref=None, ref_labels=None):
    """The reduced loss by `loop_losses`: a float, or a list of them for "none"."""
    losses = loop_losses(
        x.tolist(),
        labels.tolist(),
        None if ref is None else ref.tolist(),
        None if ref is None else ref_labels.tolist(),
        formula,
    )
    if formula.reduction == "none":
        return losses
    return math.fsum(losses) / (len(losses) if formula.reduction == "mean" else 1)


def plain_loss(x, labels, formula, ref=None, ref_labels=None):
    """The loss as one would first write it in torch, in the inputs' own dtype, for autograd."""
    columns, column_labels = (x, labels) if ref is None else (ref, ref_labels)
    dtype = torch.promote_types(x.dtype, columns.dtype)
    x, columns = x.to(dtype), columns.to(dtype)
    normalize = torch.nn.functional.normalize
    s = normalize(x, dim=1) @ normalize(columns, dim=1).T
    phi = {"square": s * s, "signed_square": s * s.abs(), "linear": s}[formula.similarity]
    positive = labels[:, None] == column_labels[None, :]
    negative = ~positive
    if ref is None:
        positive = positive & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    means = [(phi * m).sum(1) / m.sum(1).clamp_min(1).to(phi.dtype) for m in (positive, negative)]
    sigma = 1 if formula.eq3 == "corrected" else -1
    losses = torch.relu(formula.margin - means[0] + sigma * means[1])
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[formula.reduction]()


def takes(impl, x, formula=None, ref=None):
    """Whether the path takes this input; where it says that it does not, `auto` goes elsewhere."""
    spec = make_spec(**(formula or Formula()).keywords)
    return PATHS[impl].refuses(x, ref, spec) is None


def skip_if_refused(impl, x, formula=None, ref=None):
    """Skip an example test where the path refuses its input; properties assume(takes(...))."""
    if not takes(impl, x, formula, ref):
        pytest.skip(f"{impl} refuses this input")


def value_and_gradients(function, tensors, seed=0):
    """Flattened float64 loss and gradients of `function(*tensors)`, with a random upstream."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.5
    grads = torch.autograd.grad(loss, leaves, upstream.to(loss))
    return loss.detach().double(), [g.double() for g in grads]


def assert_as_exact_as_plain(impl, x, labels, formula, ref=None, ref_labels=None):
    """|path - truth| <= 2 |plain torch in the same dtype - truth| + tolerance * |truth|.

    Truth: the reference in float64 on the same (rounded) inputs. For loss and gradients. Where the
    truth itself cancels (D = 1: the projected gradient is 0), |truth| is no scale to be relative
    to, so the sizes of what cancels are added: 1 for a row's loss, 1 / |f_i| for its gradient.
    """
    tensors = (x,) if ref is None else (x, ref)

    def ours(impl):
        def loss(x, ref=None):
            keywords = {} if ref is None else {"ref_emb": ref, "ref_labels": ref_labels}
            return bstriplet_loss(x, labels, impl=impl, **formula.keywords, **keywords)

        return loss

    def plain(x, ref=None):
        return plain_loss(x, labels, formula, ref, ref_labels)

    truth = value_and_gradients(ours("reference"), [t.double() for t in tensors])
    got = value_and_gradients(ours(impl), tensors)
    naive = value_and_gradients(plain, tensors)
    common = torch.promote_types(tensors[0].dtype, tensors[-1].dtype)
    tolerances = [TOLERANCE[dtype] for dtype in (common, *(t.dtype for t in tensors))]
    total = 1 if formula.reduction == "mean" else len(x)
    scales = [torch.tensor(float(total), device=x.device)] + [
        total / len(t) / t.double().norm(dim=1).clamp_min(1e-300) for t in tensors
    ]
    for what, t, p, n, scale, tolerance in zip(
        ("loss", "gradient", "ref gradient"),
        (truth[0], *truth[1]), (got[0], *got[1]), (naive[0], *naive[1]), scales,
        tolerances,
        strict=False,
    ):  # fmt: skip
        slack = (n - t).norm().nan_to_num(nan=0)  # plain half torch divides zero rows by 0
        error, allowed = (p - t).norm(), 2 * slack + tolerance * (t.norm() + scale.norm())
        assert error <= allowed, f"{impl} {what}: {error:.3g} > {allowed:.3g}"


def batch(n, d, classes, seed, dtype=torch.float64, spread=1.0):
    """Random embeddings [n, d] that lean towards their class's direction, and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    x = centres[labels] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), labels


def sized(sizes, d, seed, dtype=torch.float64):
    """Embeddings in classes of these sizes, shuffled; labels neither dense nor positive."""
    n = sum(sizes)
    x, _ = batch(n, d, 3, seed, dtype)
    labels = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 11, torch.tensor(sizes))
    return x, labels[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


formulas = st.builds(
    Formula,
    margin=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    similarity=st.sampled_from(["square", "signed_square", "linear"]),
    eq3=st.sampled_from(["corrected", "printed"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
