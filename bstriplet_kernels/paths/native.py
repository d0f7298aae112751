"""impl="native": the operator of csrc/, one call for loss and gradient, built when installing.

`torch.ops.bstriplet.batch_similarity` is declared in C++ on torch's stable ABI; here it gets its
shapes for tracing (`torch.compile`, fake tensors) and is called. On the CPU it runs AVX-512, AVX2
or the architecture's baseline, the widest that the processor has; the environment variable
BSTRIPLET_INSTRUCTION_SET (avx512, avx2, baseline), read at the first call, asks for less.
"""

from __future__ import annotations

from pathlib import Path as File

import torch
from torch import Tensor

from ..spec import Gradients, Path, Rows, Spec, State, accumulation_dtype, reduce_losses

_REINSTALL = (
    "reinstall bstriplet-kernels where torch and a C++ compiler are, with "
    "`pip install --no-build-isolation`"
)


def _load() -> str | None:
    """Load the compiled operator; what is wrong where that fails, else None."""
    package = File(__file__).parent.parent
    files = sorted(f for f in package.glob("_native.*") if f.suffix in (".so", ".pyd"))
    if not files:
        return f"the native operator was not built; {_REINSTALL}"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        return f"the native operator does not load ({error}); {_REINSTALL}"
    return None


_MISSING = _load()


def _shapes(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    upstream: Tensor | None,
    margin: float,
    sigma: float,
    signed: bool,
    eps: float,
    mean: bool,
    gradient: bool,
) -> tuple[Tensor, ...]:
    """What `batch_similarity` returns, unfilled: torch's tracers run this instead of it."""
    others = (ref_emb, labels, ref_labels, upstream)
    if any(t is not None and t.device != embeddings.device for t in others):
        raise RuntimeError("batch_similarity needs all its tensors on the device of embeddings")
    n, d = embeddings.shape
    sides = (embeddings,) if ref_emb is None else (embeddings, ref_emb)
    dtype = accumulation_dtype(*sides)
    shapes: list[tuple[int, ...]] = [(), (n,), (n,), (n, d) if gradient else (0,)]
    shapes.append((ref_emb.shape[0], d) if gradient and ref_emb is not None else (0,))
    return tuple(embeddings.new_empty(shape, dtype=dtype) for shape in shapes)


if _MISSING is None:
    torch.library.register_fake("bstriplet::batch_similarity", _shapes)
    _batch_similarity = torch.ops.bstriplet.batch_similarity.default


def missing() -> str | None:
    """Why the operator is not there, or None."""
    return _MISSING


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """Devices that it was not built for."""
    if embeddings.device.type == "cpu":
        return None
    return f"the native operator runs on the CPU, the embeddings are on {embeddings.device}"


def instruction_set() -> str:
    """The CPU instruction set in use: "avx512", "avx2" or "baseline" (SSE2, or NEON on arm64)."""
    return torch.ops.bstriplet.instruction_set()


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, State]:
    """One call, which brings the gradient too where one number will come from upstream."""
    scalar = spec.reduction != "none"
    loss, positive, negative, *grads = _batch_similarity(
        embeddings,
        ref_emb,
        labels,
        ref_labels,
        None,
        *spec[:3],
        spec.eps,
        spec.reduction == "mean",
        spec.wants_gradient and scalar,
    )
    rows = Rows(positive, negative)
    if not scalar:
        return reduce_losses(rows, spec), rows, ()
    if not spec.wants_gradient:
        return loss, rows, ()
    return loss, rows, Gradients(grads[: 1 if ref_emb is None else 2])


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows,
    state: State,
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """The forward's gradient times the upstream number, or a call with an upstream for each row."""
    if state:
        return Gradients(state).times(grad_loss, embeddings, ref_emb)
    n = embeddings.shape[0]
    upstream = grad_loss / n if spec.reduction == "mean" else grad_loss
    *_, grad, grad_ref = _batch_similarity(
        embeddings,
        ref_emb,
        labels,
        ref_labels,
        upstream.expand(n),
        *spec[:3],
        spec.eps,
        False,
        True,
    )
    return grad.to(embeddings.dtype), None if ref_emb is None else grad_ref.to(ref_emb.dtype)


PATH = Path(forward, backward, missing, refuses)
