"""impl="gram": exact, in time linear in the batch, by moments. Nothing is N x M.

similarity="linear" takes first moments, sums of classes, by `class_sums`. "square" takes second
ones. One mathematics (`mathematics`), four schedules. On the CPU, where sizes can be read,
`on_cpu_native` where the native library is, else `on_cpu`. Where reading them would stop a GPU,
`on_gpu` in thirteen launches, and `anywhere` in plain torch for what these do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from ...cost import Operations, Work
from ...spec import LINEAR, Kept, Path, Rows, Spec, reduce_losses, row_gradient
from .. import native
from . import anywhere, class_sums, on_cpu, on_cpu_native, on_gpu
from .mathematics import form_fraction, moment_fraction

_BYTES_A_ROW = 96  # order, inverse norms, means, a and the vectors that make them


def _is_on_gpu(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> bool:
    return spec.similarity != LINEAR and on_gpu.takes(embeddings, ref_emb)


def _schedule(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> ModuleType:
    """The module that serves this input, where `on_gpu` does not."""
    if spec.similarity == LINEAR:
        return class_sums
    if on_cpu_native.takes(embeddings, ref_emb):
        return on_cpu_native
    return on_cpu if embeddings.is_cpu else anywhere


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, Kept]:
    """Moments of the columns, then two forms a row; see `mathematics` and `class_sums`."""
    if _is_on_gpu(embeddings, ref_emb, spec):
        loss, rows, tensors = on_gpu.forward(embeddings, labels, spec, ref_emb, ref_labels)
        return loss, rows, Kept(tensors)
    schedule = _schedule(embeddings, ref_emb, spec)
    positive, negative, *tensors = schedule.forward(
        embeddings, ref_emb, labels, ref_labels, spec.eps
    )
    rows = Rows(positive, negative)
    return reduce_losses(rows, spec), rows, Kept(tuple(tensors))


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows,
    kept: tuple[Tensor, ...],
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """One matrix a class where its rows share one weight, else two; see `mathematics`."""
    if _is_on_gpu(embeddings, ref_emb, spec):
        gradient = on_gpu.backward(grad_loss, embeddings, kept, spec)
        n = len(embeddings)
        return (gradient, None) if ref_emb is None else (gradient[:n], gradient[n:])
    a = row_gradient(grad_loss.to(rows.positive.dtype), rows, spec)
    schedule = _schedule(embeddings, ref_emb, spec)
    gradient, *ref_gradient = schedule.gradients(a, embeddings, ref_emb, list(kept), spec.sigma)
    return gradient, ref_gradient[0] if ref_gradient else None


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """What has no moments, or no schedule."""
    if spec.signed:
        return 'similarity="signed_square" has no second-moment form'
    if spec.similarity == LINEAR:
        return None
    if ref_emb is None or embeddings.is_cpu or on_gpu.takes(embeddings, ref_emb):
        return None
    return "with ref_emb it runs on the CPU, and on a GPU where its Triton kernels take the input"


def operations(work: Work, class_sizes: Sequence[int]) -> Operations:
    """Of the schedule that will run; the columns' classes are those that have moments."""
    if work.similarity == LINEAR.name:
        return class_sums.operations(work)
    if work.device != "cpu":
        if on_gpu.serves(work):
            return on_gpu.operations(work, class_sizes)
        return anywhere.operations(work)
    n, d = max(work.n, work.columns), work.d
    counted = flops(n, d, class_sizes, work.reduction != "none", _by_native(work))
    return Operations(counted, traffic(n, d, work.dtype.itemsize), 0)


def flops(
    n: int, d: int, class_sizes: Sequence[int], one_weight: bool = True, by_native: bool = False
) -> int:
    """Floating-point operations of the products of forward and backward on the CPU.

    class_sizes: members of each class, summing to n. one_weight: all rows have h > 0 (or none), and
    the reduction is a scalar; otherwise the weighted moments and a second product are added.
    by_native: by the native operators, which compute less of what is symmetric.
    """
    schedule = on_cpu_native if by_native else on_cpu
    smallest = schedule.smallest_moment(d)
    half = moment_fraction(d, on_cpu_native.PANEL)
    large = [s for s in class_sizes if s >= smallest or 2 * s > n]
    blocks = [s for s in class_sizes if not (s >= smallest or 2 * s > n)]
    moments = n * (half if by_native else moment_fraction(d))
    forms = sum(2 * s * (half if by_native else form_fraction(d, s)) for s in large)
    forms += sum(blocks) * (half if by_native else form_fraction(d, n))
    pairs = schedule.BLOCK_PRODUCTS * sum(s * s for s in blocks if s > 1)
    products = (moments + forms + n) * d * d + pairs * d
    if not one_weight:
        products += (moments + n) * d * d
    return int(2 * products)


def traffic(n: int, d: int, itemsize: int = 4) -> int:
    """Bytes to and from memory, forward and backward: norms, three readings, a gradient written.

    Writing a row of the gradient out of order reads its cache lines first.
    """
    return n * (6 * d * itemsize + _BYTES_A_ROW)


def extra_memory(work: Work, class_sizes: Sequence[int]) -> int:
    """Peak bytes beyond the inputs, the gradient included, of the schedule that will run."""
    if work.similarity == LINEAR.name:
        return class_sums.extra_memory(work, class_sizes)
    if work.device != "cpu":
        if on_gpu.serves(work):
            return on_gpu.extra_memory(work, class_sizes)
        return anywhere.extra_memory(work, class_sizes)
    return (on_cpu_native if _by_native(work) else on_cpu).extra_memory(work, class_sizes)


def _by_native(work: Work) -> bool:
    """Whether the native operators serve this work on the CPU."""
    return work.m is None and native.missing() is None


PATH = Path(forward, backward, operations, extra_memory, refuses=refuses)
