"""impl="native": the operator of csrc/, one call for loss and gradient, built when installing.

`torch.ops.bstriplet.batch_similarity` is declared in C++ on torch's stable ABI; this module
registers its shapes for tracing and calls it. Differentiating it raises; `torch.ops.bstriplet.loss`
has the derivative. On the CPU it runs the widest of AVX-512, AVX2 and the architecture's baseline
that the processor has; the environment variable BSTRIPLET_INSTRUCTION_SET (avx512, avx2, baseline),
read at the first call, selects a narrower one. On CUDA it takes small batches, in one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from .._torch import (
    below_autograd,
    call_below_autograd,
    have_tangents,
    register_autograd_kernel,
    require_grad,
)
from ..cost import Cost, Work, round_up
from ..spec import Kept, Path, Rows, Spec, accumulation_dtype, reduce_losses, refuses_linear
from . import gpu

_REINSTALL = (
    "reinstall bstriplet-kernels where torch and a C++ compiler are, with "
    "`pip install --no-build-isolation`"
)


CUDA_ROWS = 64
"""Rows of the largest batch, which the CUDA kernel holds in shared memory, in one launch."""
_CUDA_CAPABILITY = 8  # the first that setup.py compiles for

_OPERATORS = {
    "batch_similarity": (
        "embeddings labels gradient margin mean signed sigma eps ref_emb ref_labels upstream",
        4,
    ),
    "moment_means": ("embeddings labels eps smallest_moment", 7),
    "moment_gradient": ("a embeddings table small slots order inverse sigma", 1),
}
"""The operators that this package calls: their arguments, and how many tensors each returns."""


def _load(name: str) -> str | None:
    """Load a compiled library; return what went wrong, or None."""
    package = File(__file__).parent.parent
    files = sorted(f for f in package.glob(f"{name}.*") if f.suffix in (".so", ".pyd"))
    if not files:
        return f"{name} was not built; {_REINSTALL}"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        return f"{name} does not load ({error}); {_REINSTALL}"
    return None


def _older() -> str | None:
    """How the loaded library shows that it was built from other sources than these, or None."""
    for name, expected in _OPERATORS.items():
        operator = getattr(torch.ops.bstriplet, name, None)
        schema = None if operator is None else operator.default._schema
        if schema is None or expected != (
            " ".join(argument.name for argument in schema.arguments),
            len(schema.returns),
        ):
            return f"_native was built from other sources, its {name} differs; {_REINSTALL}"
    return None


_MISSING = _load("_native") or _older()
_MISSING_CUDA = "this torch has no CUDA" if torch.version.cuda is None else _MISSING
if _MISSING_CUDA is None:
    _MISSING_CUDA = _load("_native_cuda")


def _shapes(
    embeddings: Tensor,
    labels: Tensor,
    gradient: bool = True,
    margin: float = 0.9,
    mean: bool = True,
    signed: bool = False,
    sigma: float = 1.0,
    eps: float = 1e-12,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes that `batch_similarity` returns, for torch's tracers."""
    others = (ref_emb, labels, ref_labels, upstream)
    if any(t is not None and t.device != embeddings.device for t in others):
        raise RuntimeError("batch_similarity needs all its tensors on the device of embeddings")
    n, d = embeddings.shape
    sides = (embeddings,) if ref_emb is None else (embeddings, ref_emb)
    dtype = accumulation_dtype(*sides)
    shapes: list[tuple[int, ...]] = [(), (2, n), (n, d) if gradient else (0,)]
    shapes.append((ref_emb.shape[0], d) if gradient and ref_emb is not None else (0,))
    return tuple(embeddings.new_empty(shape, dtype=dtype) for shape in shapes)


def _refuse_derivatives(operator: Any) -> None:
    """Make the operator raise where it is differentiated, instead of giving no gradient."""

    def kernel(keyset: Any, *args: Any) -> Any:
        numbers = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if require_grad(*numbers) or have_tangents(*numbers):
            raise RuntimeError(
                f"{operator._schema.name} has no derivative of its own; differentiate "
                "bstriplet_kernels.bstriplet_loss or torch.ops.bstriplet.loss"
            )
        return call_below_autograd(operator, keyset, *args)

    register_autograd_kernel(operator, kernel)


CALLS: dict[str, Callable[..., Any]] = {}
"""`_OPERATORS` by name, to call within `below_autograd`; 0.2 us faster than through torch.ops."""

if _MISSING is None:
    torch.library.register_fake("bstriplet::batch_similarity", _shapes)
    for _name in _OPERATORS:
        _operator = getattr(torch.ops.bstriplet, _name).default
        _refuse_derivatives(_operator)
        CALLS[_name] = _operator._op


def missing() -> str | None:
    """Why the operator is not there, or None."""
    return _MISSING


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """Why the operator cannot take this input (similarity, device, size on CUDA), or None."""
    device = embeddings.device.type
    if device == "cpu" or refuses_linear(spec):
        return refuses_linear(spec)
    if device != "cuda":
        return f"the native operator runs on the CPU and on CUDA, the embeddings are on {device}"
    if _MISSING_CUDA is not None and not gpu.is_imagined():
        return _MISSING_CUDA
    if ref_emb is not None or embeddings.shape[0] > CUDA_ROWS:
        return f"on CUDA the native operator takes at most {CUDA_ROWS} rows and no ref_emb"
    # Where there is no GPU, a tensor on one is fake: another machine will run the kernel.
    if (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability(embeddings.device)[0] < _CUDA_CAPABILITY
    ):
        return f"its CUDA kernel needs compute capability {_CUDA_CAPABILITY}.0 or later"
    return None


def instruction_set() -> str:
    """The CPU instruction set in use: "avx512", "avx2" or "baseline" (SSE2, or NEON on arm64)."""
    return torch.ops.bstriplet.instruction_set()


def _options(spec: Spec) -> tuple[object, ...]:
    """The operator's arguments from `gradient` to `eps`."""
    gradient = spec.wants_gradient and spec.reduction != "none"
    mean = spec.reduction == "mean"
    return gradient, spec.margin, mean, spec.signed, spec.sigma, spec.eps


@functools.lru_cache(maxsize=256)
def _given_options(spec: Spec) -> tuple[object, ...]:
    """`_options` without the operator's defaults at the end: each argument takes time."""
    options = _options(spec)
    defaults = [
        argument.default_value
        for argument in torch.ops.bstriplet.batch_similarity.default._schema.arguments[2:]
    ]
    while options and options[-1] == defaults[len(options) - 1]:
        options = options[:-1]
    return options


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows | None, Kept]:
    """One call, which also computes the gradient of a scalar loss if a backward can follow."""
    scalar = spec.reduction != "none"
    with_gradient = scalar and spec.wants_gradient
    call = CALLS["batch_similarity"]
    with below_autograd():
        if ref_emb is None:
            results = call(embeddings, labels, *_given_options(spec))
        else:
            results = call(embeddings, labels, *_options(spec), ref_emb, ref_labels)
    loss, means, grad, grad_ref = results
    # Splitting the means costs as much as a small batch's arithmetic.
    rows = None if with_gradient and not spec.wants_rows else Rows(*means.unbind())
    if with_gradient:
        return loss, rows, Kept((grad,) if ref_emb is None else (grad, grad_ref), is_gradient=True)
    assert rows is not None
    return loss if scalar else reduce_losses(rows, spec), rows, Kept()


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows | None,
    kept: tuple[Tensor, ...],
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """One call, with an upstream for each row."""
    n = embeddings.shape[0]
    upstream = grad_loss / n if spec.reduction == "mean" else grad_loss
    options = _options(spec._replace(reduction="sum", wants_gradient=True))
    call = CALLS["batch_similarity"]
    with below_autograd():
        *_, grad, grad_ref = call(
            embeddings, labels, *options, ref_emb, ref_labels, upstream.expand(n)
        )
    return grad, None if ref_emb is None else grad_ref


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """One product for S, one for the gradient of each side, and a sweep over S with each."""
    if work.device != "cpu":
        return _cost_on_gpu(work)
    pairs = work.n * work.columns
    products = 1 if not work.wants_gradient else 2 if work.m is None else 3
    return Cost(
        flops=products * (2 * work.d + 7) * pairs,
        bytes=products * (work.embedding_bytes + pairs * work.accumulated) + work.gradient_bytes,
        launches=0,
        extra_memory=_extra_memory(work, len(class_sizes)),
    )


def _cost_on_gpu(work: Work) -> Cost:
    """One launch computes loss and gradient from half of S, in shared memory. In the backward
    another multiplies the gradient by the upstream and casts it.

    Embeddings are counted as read once, as a cluster of blocks reads them.
    """
    scalar = work.reduction != "none"
    # Without a scalar loss torch computes the hinge, the backward launches the kernel anew, and
    # another launch casts.
    calls = 1 if scalar or not work.wants_gradient else 2
    again = work.gradient_bytes + (work.cast_bytes or work.gradient_bytes)
    return Cost(
        flops=(calls + 2 * work.wants_gradient) * work.n * work.columns * work.d,
        bytes=calls * work.embedding_bytes
        + work.gradient_bytes
        + (again if scalar or work.casts else 0),
        launches=(1 if scalar else 5) + work.wants_gradient * (1 if scalar else 1 + work.casts),
        extra_memory=work.gradient_bytes + work.cast_bytes + (2 * work.n + 1) * work.accumulated,
    )


_PAD = 16  # numbers: the widest vector, to which rows are padded (csrc/kernels/kernels.h)
_ROW_GROUP = 96  # rows of the gradient in one unit of work, with one panel of columns
_PANEL_BYTES = {"avx512": 128, "avx2": 64, "baseline": 32}  # of one row, by instruction set
_THREAD_OPERATIONS = 1 << 18  # multiply-adds that justify starting a thread


def panel_columns(work: Work) -> int:
    """Columns of a matrix that the kernels compute at once; as with AVX-512 if not built."""
    chosen = "avx512" if _MISSING is not None else instruction_set()
    return _PANEL_BYTES[chosen] // work.accumulated


def threads(units: int, multiply_adds: int) -> int:
    """How many threads share these units of work, of so many multiply-adds each."""
    grain = max(1, _THREAD_OPERATIONS // multiply_adds)
    return min(torch.get_num_threads(), -(-units // grain))


def _extra_memory(work: Work, classes: int) -> int:
    """On the CPU: S, rows that have to be copied, the gradient, thread scratch.

    All exist while the gradient is written. A gradient of half rows is cast after S is freed.
    """
    n, m, d, number = work.n, work.columns, work.d, work.accumulated
    similarities = n * _stride(m)
    if work.m is not None and work.wants_gradient:
        similarities += m * _stride(n)  # the transpose
    copies = (work.vectors if d % _PAD else sum(work.narrow_sides)) * round_up(d, _PAD)
    vectors = 2 * n + 5 * (round_up(n, _PAD) + (0 if work.m is None else round_up(m, _PAD)))
    labels = 8 * (m + 2 * classes)
    scratch = 0
    if work.wants_gradient:
        panel, group = panel_columns(work), min(n, _ROW_GROUP)
        units = -(-n // _ROW_GROUP) * -(-d // panel)
        scratch = threads(units, group * panel * m) * (max(n, m) * panel + _PAD)
    return (similarities + copies + vectors + scratch) * number + work.gradient_bytes + labels


def _stride(columns: int) -> int:
    """Numbers from one row of S to the next: whole vectors, and an odd number of cache lines."""
    padded = round_up(columns, _PAD)
    return padded if padded % (2 * _PAD) else padded + _PAD


PATH = Path(forward, backward, cost, missing, refuses, keeps=False, heeds_autocast=False)
