"""What only a GPU can show, without pytest: python -m bench.gpu_check [--impl ...] [--dtype ...]

Prints a line for each path and check. What fails is collected, and the rest goes on; an error that
leaves CUDA unusable ends the process, since all that came after would fail with it. Exit status 0
where all hold, 1 where one fails, 2 where CUDA was lost, 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bstriplet_kernels import available_impls, bstriplet_loss
from bstriplet_kernels.checks import make_spec
from bstriplet_kernels.paths import PATHS
from bstriplet_kernels.paths.moments import on_gpu
from bstriplet_kernels.paths.triton import pairs_cost
from bstriplet_kernels.spec import SIMILARITIES, Spec, work_of

from .cases import DTYPES
from .providers import forced

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
SHAPES = ((2, 1), (17, 5), (36, 1280), (64, 70), (65, 128), (300, 257), (1000, 64))
QUICK_SHAPES = ((36, 100), (60, 33), (70, 33))  # a race detector takes a minute for 36 x 1,280
WIDE, QUICK_WIDE = (1024, 2048), (140, 70)  # where S is multiplied in panels
WIDEST = (300, 2100)  # more columns than a program of class sums holds
MANY = ((7000, 128), (5000, 100), (6000, 300))  # for second moments, narrow and wide
QUICK_MANY = ((500, 16), (300, 16))
BATCHES = ((36, 300), (500, 300), WIDE, MANY[0])  # of the checks of one or two dtypes
KERNELS = {"forward": 2, "backward": 1}  # at most, at N_b = 36 and D = 1280, in one launch
_SMALL = ("native", "triton")  # the paths that serve that batch in one launch
_SHOWN = 5  # failures of one check that are printed in full
HELD, FAILED, LOST, INTERRUPTED = 0, 1, 2, 130


class Subject(NamedTuple):
    """What is checked: a path on a device, in some dtypes; quick: small inputs, once.

    similarities: those that `exact` tries.
    """

    impl: str
    device: str
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)
    quick: bool = False
    similarities: tuple[str, ...] = tuple(SIMILARITIES)

    @property
    def rows(self) -> int:
        """Rows of a batch of 64 columns that the path's own kernels take on a GPU."""
        return 500 if self.impl == "gram" else 20


@dataclass
class Tally:
    """Cases of one check of a subject, and those that failed."""

    subject: Subject
    cases: int = 0
    refused: str = "no input was tried"
    failures: list[str] = field(default_factory=list)

    def inputs(
        self,
        shapes: Iterable[tuple[int, int]],
        dtypes: tuple[torch.dtype, ...] = (torch.float32,),
        **choices: tuple[str, ...],
    ) -> Iterator[tuple[AbstractContextManager[None], Tensor, Tensor, dict[str, str]]]:
        """A case, fresh embeddings and labels, and options, for all that the path takes."""
        choices = {"similarity": ("square", "linear"), **choices}
        for (n, d), dtype, *chosen in itertools.product(shapes, dtypes, *choices.values()):
            options = dict(zip(choices, chosen, strict=True))
            x, labels = fresh(n, d, 4, dtype, self.subject.device)
            if self.takes(x, None, **options):
                yield self.case(f"N={n} D={d} {dtype} {options}"), x, labels, options

    def takes(
        self,
        x: Tensor,
        ref: Tensor | None,
        similarity: str,
        eq3: str = "corrected",
        reduction: str = "mean",
    ) -> bool:
        """Whether the path takes this input; what it takes none of has not passed."""
        path = PATHS[self.subject.impl]
        spec = make_spec(0.9, similarity, eq3, reduction)
        reason = path.missing() or path.refuses(x, ref, spec)
        self.refused = reason or self.refused
        return reason is None

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case: what it raises is collected, but for what leaves CUDA unusable."""
        self.cases += 1
        try:
            yield
        except KeyboardInterrupt:
            before = f"{len(self.failures)} before it failed{self._shown()}"
            raise KeyboardInterrupt(f"stopped in case {self.cases}, {before}") from None
        except Exception as error:
            if _cuda_is_lost():
                raise
            text = str(error).strip() or traceback.format_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {text}")

    def verdict(self, holds: str) -> str:
        """What the check says where every case held; AssertionError with what did not."""
        if not self.cases:
            raise AssertionError(f"no case was run: {self.refused}")
        if self.failures:
            raise AssertionError(f"{len(self.failures)} of {self.cases} cases{self._shown()}")
        return f"{self.cases} cases, {holds}"

    def _shown(self) -> str:
        return "".join(f"\n    {failure[:600]}" for failure in self.failures[:_SHOWN])


def fresh(n: int, d: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Embeddings that lean towards their class, and labels; never the same twice.

    From 2,000 rows on half of them are of classes with ten rows.
    """
    labels = torch.randint(0, classes, (n,))
    if n >= 2000:
        labels = torch.where(torch.rand(n) < 0.5, labels, classes + torch.randint(0, n // 20, (n,)))
        classes += n // 20
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


def is_exact(subject: Subject) -> str:
    """|path - truth| <= 2 |torch in the same dtype - truth| + tolerance, over all options.

    Once as users run it, once with new memory poisoned, where a missed output is NaN.
    """
    impl, device, quick = subject.impl, subject.device, subject.quick
    tally, worst = Tally(subject), 0.0
    shapes = (*QUICK_SHAPES, QUICK_WIDE) if quick else SHAPES
    many = QUICK_MANY if quick else MANY
    if device == "cuda":  # left out on a CPU: too slow in the interpreter
        shapes = (*shapes, *many) if quick else (*shapes, WIDE, WIDEST, *many)
    for (n, d), dtype, similarity, eq3, reduction, with_ref in itertools.product(
        shapes,
        subject.dtypes,
        subject.similarities,
        ("corrected",) if quick else ("corrected", "printed"),
        ("mean", "none"),
        (False, True),
    ):
        options = {"similarity": similarity, "eq3": eq3, "reduction": reduction}
        if device == "cuda" and impl == "gram" and similarity == "square" and (n, d) not in many:
            continue  # squares against few columns are for the kernels of "triton"
        x, labels = fresh(n, d, 3, dtype, device)
        ref = fresh(n + 7, d, 3, dtype, device)[0] if with_ref else None
        if tally.takes(x, ref, **options):
            with tally.case(f"N={n} D={d} {dtype} {options} ref={with_ref}"):
                worst = max(worst, _worst_error(subject, x, labels, ref, options))
    return tally.verdict(f"at worst {worst:.2f} of what is allowed")


def _worst_error(
    subject: Subject, x: Tensor, labels: Tensor, ref: Tensor | None, options: dict[str, str]
) -> float:
    """The largest error over what is allowed; AssertionError where it is more than 1."""
    judge = "cpu" if subject.quick else subject.device  # a sanitizer would look at its kernels too
    given = [t if t is None else t.to(judge) for t in (x, labels, ref)]
    wide = [None if t is None else t.double() for t in (given[0], given[2])]
    truth = evaluate("reference", wide[0], given[1], wide[1], **options)
    plain = evaluate("reference", *given, **options)
    rows = 1 if options["reduction"] == "mean" else len(x)
    scales = [rows, *(rows / len(t) / t.norm(dim=1) for t in wide if t is not None)]
    way = pairs_cost.PANELS if x.shape in (WIDE, QUICK_WIDE) else ""
    worst = 0.0
    for is_poisoned in (False, True):
        with _new_memory_poisoned(is_poisoned), forced(way):
            got = evaluate(subject.impl, x, labels, ref, **options)
        ratio = max(
            _error_ratio(g.to(t.device), p, t, scale, x.dtype)
            for t, p, g, scale in zip(truth, plain, got, scales, strict=True)
        )
        if not ratio <= 1:  # NaN too
            where = " in poisoned memory" if is_poisoned else ""
            raise AssertionError(f"{ratio:.3g} times what is allowed{where}")
        worst = max(worst, ratio)
    return worst


def _error_ratio(
    got: Tensor, plain: Tensor, truth: Tensor, scale: Tensor | int, dtype: torch.dtype
) -> float:
    """The error over what is allowed; NaN where a number is one, as max() alone would drop it."""
    size = truth.norm() + torch.as_tensor(scale).to(truth).norm()
    allowed = 2 * (plain.double() - truth).norm() + TOLERANCE[dtype] * size
    ratio = ((got.double() - truth).norm() / allowed).item()
    return ratio if ratio == ratio else float("inf")


@contextmanager
def _new_memory_poisoned(wanted: bool) -> Iterator[None]:
    """Memory that is allocated and not written holds NaN; torch's algorithms are others then."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def repeats_bits(subject: Subject) -> str:
    """The same bits, run after run."""
    tally = Tally(subject)
    shapes = BATCHES if subject.device == "cuda" else BATCHES[:2]
    for case, x, labels, options in tally.inputs(shapes, (torch.float32, torch.bfloat16)):
        with case:
            first = evaluate(subject.impl, x, labels, **options)
            for _ in range(1 if subject.quick else 20):
                again = evaluate(subject.impl, x, labels, **options)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "moved"
    return tally.verdict("the same bits")


def compiles(subject: Subject) -> str:
    """One graph, static and dynamic, with the eager numbers."""

    def doubled(x: Tensor, labels: Tensor, similarity: str) -> Tensor:
        return 2 * bstriplet_loss(x, labels, similarity=similarity, impl=subject.impl)

    tally = Tally(subject)
    backend = "aot_eager" if subject.device == "cpu" else "inductor"
    shapes = [(subject.rows, 64), (subject.rows + 13, 64)]
    for dynamic in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(doubled, fullgraph=True, dynamic=dynamic, backend=backend)
        for case, x, labels, options in tally.inputs(shapes):
            with case:
                expected = torch.autograd.grad(doubled(x.requires_grad_(), labels, **options), x)
                got = torch.autograd.grad(compiled(x, labels, **options), x)
                torch.testing.assert_close(got, expected)
    return tally.verdict("one graph each")


def never_waits(subject: Subject) -> str:
    """No host synchronisation, forward or backward."""
    tally = Tally(subject)
    for case, x, labels, options in tally.inputs(BATCHES, reduction=("mean", "none")):
        with case:
            evaluate(subject.impl, x, labels, **options)
            torch.cuda.set_sync_debug_mode("error")
            try:
                evaluate(subject.impl, x, labels, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return tally.verdict("no synchronisation")


def is_capturable(subject: Subject) -> str:
    """Captured in a CUDA graph once, replayed on new inputs."""
    tally = Tally(subject)
    for case, x, labels, options in tally.inputs(BATCHES):
        with case:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                evaluate(subject.impl, x, labels, **options)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = evaluate(subject.impl, x, labels, **options)
            x.copy_(fresh(*x.shape, 4, x.dtype, subject.device)[0])
            graph.replay()
            expected = evaluate(subject.impl, x, labels, **options)
            same = [torch.equal(a, b) for a, b in zip(captured, expected, strict=True)]
            assert all(same), "the replay gives other numbers"
    return tally.verdict("captured and replayed")


def launches_few(subject: Subject) -> str:
    """Kernels at N_b = 36, D = 1280, forward and backward; of moments at N = 500, D = 64."""
    tally, texts, is_small = Tally(subject), list[str](), subject.impl in _SMALL
    shape = (36, 1280) if is_small else (subject.rows, 64)
    for case, x, labels, options in tally.inputs([shape], (torch.float32, torch.bfloat16)):
        with case:
            loss_of = functools.partial(
                bstriplet_loss, x.requires_grad_(), labels, impl=subject.impl, **options
            )
            upstream = torch.ones_like(loss_of())
            torch.autograd.grad(loss_of(), x, upstream)
            with _kernels_of() as forward:
                loss = loss_of()
            with _kernels_of() as backward:
                torch.autograd.grad(loss, x, upstream)
            counts = {
                phase: sum(event.device_type.name != "CPU" for event in profile.events())
                for phase, profile in (("forward", forward), ("backward", backward))
            }
            where = f"{str(x.dtype).removeprefix('torch.')}, {options['similarity']}"
            texts.append(
                " and ".join(f"{n} {phase}" for phase, n in counts.items()) + f" in {where}"
            )
            for phase, most in KERNELS.items() if is_small else ():
                assert counts[phase] <= most, f"{counts[phase]} kernels {phase}, at most {most}"
    return tally.verdict(f"kernels: {', '.join(texts)}")


def _kernels_of() -> torch.profiler.profile:
    torch.cuda.synchronize()
    activities = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activities.CPU, activities.CUDA])


def moments_do_not_drift(subject: Subject) -> str:
    """A class of 100,000 rows: tensor cores truncate what they add up, always the same way."""
    n, d = (2000, 32) if subject.quick else (100_000, 128)
    x = 0.3 + torch.randn(n, d).to(subject.device)
    labels = torch.zeros(n, dtype=torch.int64, device=subject.device)
    if subject.impl != "gram":
        return "no moments there"
    if not on_gpu.takes(work_of(x, None, Spec()), x.device):
        raise AssertionError("this input is not for the kernels of moments")
    kept = on_gpu.KeptMoments.of(on_gpu.forward(x, None, labels, None, Spec())[2])
    high, low, scale = (part[0].double() for part in kept.own)
    moment = (high + low) * scale[:, None] * float(moment_kernels().UNIT.value)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    truth = unit.T @ unit
    plain = (unit.float().T @ unit.float()).double()
    worst, of_plain = (
        ((m - truth).abs().max() / truth.abs().max()).item() for m in (moment, plain)
    )
    assert worst <= 1e-6, f"{worst:.1e} of the largest entry"
    return f"{n} rows of one class: {worst:.1e} of the largest entry, torch {of_plain:.1e}"


def moment_kernels() -> ModuleType:
    """Imported late, since it needs Triton."""
    from bstriplet_kernels.paths.moments import kernels as found

    return found


def minds_the_device(subject: Subject) -> str:
    """Tensors on the last GPU while the first is current."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    x, labels = fresh(subject.rows, 64, 3, torch.float32, last)
    for similarity in ("square", "linear") if subject.impl == "gram" else ("square",):
        loss, gradient = evaluate(subject.impl, x, labels, similarity=similarity)
        assert loss.device == gradient.device == torch.device(last)
        expected = evaluate("reference", x, labels, similarity=similarity)[0]
        torch.testing.assert_close(loss, expected)
    return f"{last} with cuda:0 current"


def _cuda_is_lost() -> bool:
    """Whether CUDA answers nothing but its last error, as after an illegal access."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


Check = Callable[[Subject], str]
CHECKS: dict[str, Check] = {
    "exact": is_exact,
    "bits": repeats_bits,
    "waits": never_waits,
    "capture": is_capturable,
    "launches": launches_few,
    "device": minds_the_device,
    "moments": moments_do_not_drift,
    "compile": compiles,
}
ANYWHERE = ("exact", "bits", "compile")
"""The checks that a CPU can make."""


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each path and check; see the module for the exit status."""
    options = _parse(arguments)
    dtypes = tuple(DTYPES[name] for name in options.dtype)
    probe, spec = torch.ones(2, 2, device=options.device), Spec()
    impls = options.impl or [
        name
        for name in available_impls()
        if name != "reference" and PATHS[name].refuses(probe, None, spec) is None
    ]
    checks = options.check or [n for n in CHECKS if options.device == "cuda" or n in ANYWHERE]
    print(f"torch {torch.__version__}, seed {torch.seed()}")
    failed = 0
    for impl, name in itertools.product(impls, checks):
        chosen = dtypes, options.quick, tuple(options.similarity)
        subject, start = Subject(impl, options.device, *chosen), time.monotonic()
        try:
            verdict = CHECKS[name](subject)
        except Exception as error:
            failed += 1
            is_told = isinstance(error, AssertionError)
            verdict = f"FAILED: {error if is_told else traceback.format_exc()}"
        except KeyboardInterrupt as stop:
            print(
                f"{impl:<8} {name:<8} {str(stop) or 'stopped'} ({time.monotonic() - start:.1f} s)",
                flush=True,
            )
            return INTERRUPTED
        print(f"{impl:<8} {name:<8} {verdict} ({time.monotonic() - start:.1f} s)", flush=True)
        if _cuda_is_lost():
            print("CUDA is lost; what comes after is not tried", flush=True)
            return LOST
    print(f"{failed} failed" if failed else "all hold")
    return FAILED if failed else HELD


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What only a GPU can show.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--impl", nargs="+", help="default: all that run there, but the reference")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument(
        "--similarity", nargs="+", default=tuple(SIMILARITIES), choices=tuple(SIMILARITIES),
        help="of the check `exact`; default: all",
    )  # fmt: skip
    parser.add_argument("--check", nargs="+", choices=tuple(CHECKS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="small inputs, once: for a sanitizer")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
