"""What only a GPU can show, without pytest: python -m bench.gpu_check [--quick] [--device cpu]

Every path that runs there, against the reference in float64 on fresh inputs; the same bits twice;
no synchronisation; CUDA graph capture; kernels launched; another device than the current one;
`torch.compile`. One line for each check; exit status 1 where one fails. --quick: small inputs
through each path once, for compute-sanitizer. --device cpu: what of it a CPU can do.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from bstriplet_kernels import available_impls, bstriplet_loss
from bstriplet_kernels.checks import make_spec
from bstriplet_kernels.paths import PATHS
from bstriplet_kernels.spec import Spec

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
SHAPES = ((2, 1), (17, 5), (36, 1280), (64, 70), (65, 128), (300, 257), (1000, 64))
WIDE = (1024, 2048)  # where S goes through torch.mm in panels
KERNELS = {"forward": 2, "backward": 1}  # at most, at N_b = 36 and D = 1280


def fresh(n: int, d: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Embeddings that lean towards their class, and labels; never the same twice."""
    labels = torch.randint(0, classes, (n,))
    x = torch.randn(classes, d)[labels] + torch.randn(n, d)
    return x.to(device, dtype), labels.to(device)


def evaluate(
    impl: str, x: Tensor, labels: Tensor, ref: Tensor | None = None, **options: str
) -> list[Tensor]:
    """The loss and the gradients of all sides, for an upstream of ones."""
    sides = [t.detach().requires_grad_() for t in (x, ref) if t is not None]
    if ref is not None:
        keywords = {"ref_emb": sides[1], "ref_labels": torch.arange(len(ref), device=x.device) % 3}
        loss = bstriplet_loss(sides[0], labels, impl=impl, **keywords, **options)
    else:
        loss = bstriplet_loss(sides[0], labels, impl=impl, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), sides)]


def is_exact(impl: str, device: str, quick: bool) -> str:
    """|path - truth| <= 2 |torch in the same dtype - truth| + tolerance, over all options."""
    worst, cases = 0.0, 0
    shapes = ((36, 70), (70, 33)) if quick else SHAPES
    if device == "cuda":  # too slow in the interpreter
        shapes = (*shapes, WIDE)
    for (n, d), dtype, similarity, eq3, reduction, with_ref in itertools.product(
        shapes,
        TOLERANCE,
        ("square", "signed_square"),
        ("corrected",) if quick else ("corrected", "printed"),
        ("mean", "none"),
        (False, True),
    ):
        options = {"similarity": similarity, "eq3": eq3, "reduction": reduction}
        x, labels = fresh(n, d, 3, dtype, device)
        ref = fresh(n + 7, d, 3, dtype, device)[0] if with_ref else None
        if PATHS[impl].refuses(x, ref, make_spec(0.9, similarity, eq3, reduction)) is not None:
            continue
        wide = None if ref is None else ref.double()
        truth = evaluate("reference", x.double(), labels, wide, **options)
        plain = evaluate("reference", x, labels, ref, **options)
        got = evaluate(impl, x, labels, ref, **options)
        rows = 1 if reduction == "mean" else n
        scales = [
            rows,
            *(rows / len(t) / t.double().norm(dim=1) for t in (x, ref) if t is not None),
        ]
        for t, p, g, scale in zip(truth, plain, got, scales, strict=True):
            size = t.norm() + torch.as_tensor(scale).to(t).norm()
            allowed = 2 * (p.double() - t).norm() + TOLERANCE[dtype] * size
            worst = max(worst, ((g.double() - t).norm() / allowed).item())
            if not worst <= 1:
                raise AssertionError(f"N={n} D={d} {dtype} {options} ref={with_ref}: {worst:.2f}")
        cases += 1
    return f"{cases} cases, at worst {worst:.2f} of what is allowed"


def repeats_bits(impl: str, device: str, quick: bool) -> str:
    """The same bits, run after run."""
    shapes = ((36, 300), (500, 300), *([WIDE] if device == "cuda" else []))
    for (n, d), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        x, labels = fresh(n, d, 4, dtype, device)
        first = evaluate(impl, x, labels)
        for _ in range(1 if quick else 20):
            again = evaluate(impl, x, labels)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (n, dtype)
    return "same bits"


def compiles(impl: str, device: str, quick: bool) -> str:
    """One graph, static and dynamic, with the eager numbers."""
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, labels: bstriplet_loss(x, labels, impl=impl) * 2,
            fullgraph=True,
            dynamic=dynamic,
            backend="aot_eager" if device == "cpu" else "inductor",
        )
        for n in (20, 33):
            x, labels = fresh(n, 64, 3, torch.float32, device)
            x.requires_grad_()
            expected = torch.autograd.grad(2 * bstriplet_loss(x, labels, impl=impl), x)[0]
            torch.testing.assert_close(torch.autograd.grad(compiled(x, labels), x)[0], expected)
    return "fullgraph, static and dynamic"


def never_waits(impl: str, device: str, quick: bool) -> str:
    """No host synchronisation, forward or backward."""
    for (n, d), reduction in itertools.product(((36, 300), (500, 300), WIDE), ("mean", "none")):
        x, labels = fresh(n, d, 4, torch.float32, device)
        evaluate(impl, x, labels, reduction=reduction)
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(impl, x, labels, reduction=reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "no synchronisation"


def is_capturable(impl: str, device: str, quick: bool) -> str:
    """Captured in a CUDA graph once, replayed on new inputs."""
    for n, d in ((36, 300), (500, 300), WIDE):
        x, labels = fresh(n, d, 4, torch.float32, device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            evaluate(impl, x, labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = evaluate(impl, x, labels)
        x.copy_(fresh(n, d, 4, torch.float32, device)[0])
        graph.replay()
        expected = evaluate(impl, x, labels)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True)), n
    return "captured and replayed"


def launches_few(impl: str, device: str, quick: bool) -> str:
    """Kernels at N_b = 36, D = 1280, forward and backward."""
    x, labels = fresh(36, 1280, 3, torch.float32, device)
    leaf = x.requires_grad_()
    upstream = torch.ones((), device=device)
    torch.autograd.grad(bstriplet_loss(leaf, labels, impl=impl), leaf, upstream)
    counts = {}
    with _kernels_of() as forward:
        loss = bstriplet_loss(leaf, labels, impl=impl)
    with _kernels_of() as backward:
        torch.autograd.grad(loss, leaf, upstream)
    for phase, profile in (("forward", forward), ("backward", backward)):
        counts[phase] = sum(e.device_type.name != "CPU" for e in profile.events())
        if impl == "triton" and counts[phase] > KERNELS[phase]:
            raise AssertionError(f"{counts[phase]} kernels {phase}, at most {KERNELS[phase]}")
    return f"{counts['forward']} kernels forward, {counts['backward']} backward"


def _kernels_of() -> torch.profiler.profile:
    torch.cuda.synchronize()
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def minds_the_device(impl: str, device: str, quick: bool) -> str:
    """Tensors on the last GPU while the first is current."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    x, labels = fresh(36, 64, 3, torch.float32, last)
    loss, gradient = evaluate(impl, x, labels)
    assert loss.device == gradient.device == torch.device(last)
    torch.testing.assert_close(loss, evaluate("reference", x, labels)[0])
    return f"{last} with cuda:0 current"


Check = Callable[[str, str, bool], str]
ANYWHERE: tuple[Check, ...] = (is_exact, repeats_bits, compiles)
ON_A_GPU: tuple[Check, ...] = (never_waits, is_capturable, launches_few, minds_the_device)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each path and check; 1 where one fails."""
    parser = argparse.ArgumentParser(description="What only a GPU can show.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--impl", nargs="*", help="default: all that run there, but the reference")
    parser.add_argument("--quick", action="store_true", help="small inputs, once: for a sanitizer")
    options = parser.parse_args(arguments)
    checks = (is_exact,) if options.quick else ANYWHERE
    if options.device == "cuda" and not options.quick:
        checks += ON_A_GPU
    probe, spec = torch.ones(2, 2, device=options.device), Spec()
    impls = options.impl or [
        name
        for name in available_impls()
        if name != "reference" and PATHS[name].refuses(probe, None, spec) is None
    ]
    print(f"torch {torch.__version__}, seed {torch.seed()}")
    failed = 0
    for impl, check in itertools.product(impls, checks):
        torch.use_deterministic_algorithms(check is is_exact, warn_only=True)  # poisons new memory
        try:
            verdict = check(impl, options.device, options.quick)
        except Exception:
            failed += 1
            verdict = "FAILED\n" + traceback.format_exc()
        print(f"{impl:<8} {check.__name__:<17} {verdict}", flush=True)
    print(f"{failed} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
