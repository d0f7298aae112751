"""Every way of differentiating the loss, under every tracer, for every path: right, or an error.

`python tests/support/tracers.py` prints the whole table, with words the part of it in which each
word is a transform, mode, path or variant; `test_tracers.py` runs all of it eagerly and a subset in
which every pair of choices occurs. Truth is the same transform of plain torch, eagerly.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from oracle import Formula, batch, plain_loss
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bstriplet_kernels import available_impls, bstriplet_loss

N, M, D = 5, 4, 3
MODES = ("eager", "compile eager", "compile aot_eager", "compile inductor")
VARIANTS = ("plain", "ref_emb", "return_stats", "none")
PATHS = ("auto", *available_impls())

Loss = Callable[[Tensor], Tensor]
"""A scalar function of what is differentiated: the embeddings, with ref_emb's rows below them."""


class Case(NamedTuple):
    """One cell of the table."""

    transform: str
    mode: str
    path: str
    variant: str


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [N + M, D] and their labels; M rows are ref_emb's where there is one."""
    return batch(N + M, D, 2, seed)


def loss_of(labels: Tensor, variant: str, loss: Callable[..., Any]) -> Loss:
    """`loss(x, labels, ref, ref_labels, reduction)` as a scalar function of the variant's rows."""

    def scalar(rows: Tensor) -> Tensor:
        if variant == "ref_emb":
            return loss(rows[:N], labels[:N], rows[N:], labels[N:], "mean")
        if variant == "none":
            losses = loss(rows, labels, None, None, "none")
            return (losses * torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)).sum()
        return loss(rows, labels, None, None, "mean")

    return scalar


def ours(path: str, variant: str) -> Callable[..., Tensor]:
    """`bstriplet_loss` by a path."""

    def loss(
        x: Tensor, y: Tensor, ref: Tensor | None, ref_y: Tensor | None, reduction: str
    ) -> Tensor:
        options = {"ref_emb": ref, "ref_labels": ref_y, "reduction": reduction, "impl": path}
        if variant != "return_stats":
            return bstriplet_loss(x, y, **options)
        value, stats = bstriplet_loss(x, y, return_stats=True, **options)
        return value + stats.active_fraction * 0

    return loss


def bare(path: str) -> Callable[..., Tensor]:
    """The operator itself."""

    def loss(
        x: Tensor, y: Tensor, ref: Tensor | None, ref_y: Tensor | None, reduction: str
    ) -> Tensor:
        return torch.ops.bstriplet.loss(x, y, ref, ref_y, reduction=reduction, impl=path)[0]

    return loss


def plain(x: Tensor, y: Tensor, ref: Tensor | None, ref_y: Tensor | None, reduction: str) -> Tensor:
    return plain_loss(x, y, Formula(reduction=reduction), ref, ref_y)


def by_backward(loss: Loss, rows: Tensor) -> Tensor:
    rows = rows.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(rows), rows)[0]


def by_two_backwards(loss: Loss, rows: Tensor) -> Tensor:
    rows = rows.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(rows), rows, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), rows)[0]


def by_many_upstreams(loss: Loss, rows: Tensor) -> Tensor:
    rows = rows.detach().clone().requires_grad_()
    upstreams = torch.tensor([1.0, -2.0], dtype=rows.dtype)
    return torch.autograd.grad(loss(rows), rows, upstreams, is_grads_batched=True)[0]


def by_dual_numbers(loss: Loss, rows: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        return torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent


def by_make_fx(loss: Loss, rows: Tensor) -> Tensor:
    """The graph of the loss alone, from real, fake and symbolic rows, differentiated afterwards."""
    found = [
        by_backward(traced(loss, mode, pre_dispatch)(rows.flip(0)), rows)
        for mode in ("real", "fake", "symbolic")
        for pre_dispatch in (False, True)
    ]
    assert all(torch.equal(gradient, found[0]) for gradient in found)
    return found[0]


def traced(loss: Loss, mode: str, pre_dispatch: bool = False) -> Callable[..., Any]:
    """`make_fx`, with labels that are no argument."""
    return make_fx(loss, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)


def by_make_fx_of_grad(loss: Loss, rows: Tensor) -> Tensor:
    """The graph of the gradient, for other rows than it was traced with."""
    return traced(torch.func.grad(loss), "symbolic")(rows.flip(0))(rows)


def by_jit_trace(loss: Loss, rows: Tensor) -> Tensor:
    return by_backward(torch.jit.trace(loss, (rows.flip(0),), check_trace=False), rows)


class Backbone(torch.nn.Module):
    """Embeds rows, and returns their loss."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(D, D, dtype=torch.float64)
        self.loss = loss

    def forward(self, rows: Tensor) -> Tensor:
        return self.loss(self.linear(rows))


def by_export(loss: Loss, rows: Tensor) -> Tensor:
    """The gradient of a backbone that went through torch.export with its loss, strict and not."""
    model = Backbone(loss)
    found = []
    for strict in (False, True):
        exported = torch.export.export(copy.deepcopy(model), (rows,), strict=strict).module()
        exported(rows).backward()
        found.append(exported.get_parameter("linear.weight").grad)
    assert torch.equal(*found)
    return found[0]


def by_backbone(loss: Loss, rows: Tensor) -> Tensor:
    """What `by_export` must give, without exporting."""
    model = Backbone(loss)
    model(rows).backward()
    return model.linear.weight.grad


func = torch.func
TRANSFORMS: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "backward": by_backward,
    "backward twice": by_two_backwards,
    "is_grads_batched": by_many_upstreams,
    "grad": lambda f, x: func.grad(f)(x),
    "grad_and_value": lambda f, x: func.grad_and_value(f)(x)[0],
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "vmap": lambda f, x: func.vmap(f)(torch.stack((x, x.flip(0)))),
    "vmap(grad)": lambda f, x: func.vmap(func.grad(f))(torch.stack((x, x.flip(0)))),
    "grad(vmap)": lambda f, x: func.grad(lambda z: func.vmap(f)(z).sum())(
        torch.stack((x, x.flip(0)))
    ),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacrev(jacrev)": lambda f, x: func.jacrev(func.jacrev(f))(x),
    "grad of grad": lambda f, x: func.grad(lambda z: func.grad(f)(z).square().sum())(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "dual numbers": by_dual_numbers,
    "dual numbers of grad": lambda f, x: by_dual_numbers(func.grad(f), x),
    "jvp of grad": lambda f, x: func.jvp(func.grad(f), (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(f)(x),
    "export": by_export,
    "make_fx": by_make_fx,
    "make_fx(grad)": by_make_fx_of_grad,
    "jit.trace": by_jit_trace,
    "bare operator": by_backward,
    "bare operator, grad": lambda f, x: func.grad(f)(x),
    "bare operator, jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),))[1],
}
WITHOUT_TRACING = {
    "export": by_backbone,
    "make_fx": by_backward,
    "make_fx(grad)": by_backward,
    "jit.trace": by_backward,
}
"""What the graph of a tracer must give."""
TRACE_THEMSELVES = ("export", "make_fx", "make_fx(grad)", "jit.trace")
"""Of these the graph is compiled, since one tracer does not go through another."""
AUTOGRAD = (
    *("backward", "backward twice", "is_grads_batched", "dual numbers", "dual numbers of grad"),
    "bare operator",
)
"""Of these the loss is compiled: torch.autograd is called from outside."""


def all_cases() -> list[Case]:
    """Every combination that can be asked for."""
    return [Case(*choice) for choice in itertools.product(TRANSFORMS, MODES, PATHS, VARIANTS)]


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    if mode == "eager":
        return function
    torch._dynamo.reset()
    return torch.compile(function, backend=mode.removeprefix("compile "), fullgraph=True)


def compute(case: Case, loss: Callable[..., Tensor], rows: Tensor, labels: Tensor) -> Tensor:
    """What the transform of `loss` gives in that mode."""
    f = loss_of(labels, case.variant, loss)
    transform = TRANSFORMS[case.transform]
    if case.transform in AUTOGRAD:
        return transform(compiled(f, case.mode), rows)
    if case.transform in TRACE_THEMSELVES:
        return transform(f, rows)
    return compiled(lambda z: transform(f, z), case.mode)(rows)


def verdict(case: Case) -> str:
    """ "right", "error: ...", "n/a: ..." where plain torch cannot either, or "WRONG: ..."."""
    rows, labels = inputs()
    truth_of = WITHOUT_TRACING.get(case.transform, TRANSFORMS[case.transform])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            truth = truth_of(loss_of(labels, case.variant, plain), rows)
        except Exception as error:
            return f"n/a: {type(error).__name__}"
        loss = ours(case.path, case.variant)
        if case.transform.startswith("bare operator"):
            loss = bare(case.path)
        try:
            got = compute(case, loss, rows, labels)
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            try:
                compute(case, plain, rows, labels)
            except Exception:
                return f"n/a, plain torch neither: {said}"
            return f"error: {said}"
    if got is None or not torch.allclose(got, truth, rtol=1e-7, atol=1e-10):
        return f"WRONG: {0.0 if got is None else got.norm().item():.3g}, not {truth.norm():.3g}"
    return "right"


def main() -> int:
    """Print the table; 1 where anything is wrong."""
    words = sys.argv[1:]
    found: dict[tuple[str, str], dict[str, int]] = {}
    others = []
    started = time.time()
    for case in all_cases():
        if not all(word in case for word in words):
            continue
        said = verdict(case)
        kind = said.split(":")[0]
        cell = found.setdefault((case.transform, case.mode), {})
        cell[kind] = cell.get(kind, 0) + 1
        if kind != "right":
            others.append(said)
            print(case, said, flush=True)
    seconds = time.time() - started
    print(f"\npaths {PATHS} x variants {VARIANTS} in each cell; {seconds:.0f} s")
    for transform in TRANSFORMS:
        cells = [found.get((transform, mode), {}) for mode in MODES]
        counts = (", ".join(f"{kind} {n}" for kind, n in cell.items()) for cell in cells)
        print(f"| {transform} | " + " | ".join(counts) + " |")
    return any(said.startswith("WRONG") for said in others)


if __name__ == "__main__":
    sys.exit(main())
