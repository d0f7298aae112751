"""impl="triton": kernels for GPUs, on the CPU in Triton's interpreter.

`small` computes a scalar loss of at most 64 rows, without `ref_emb`, in one or two launches.
`pairs` does all else by tiles of S, which it stores whole only for half precision, up to a bounded
size. Triton is imported when the first kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import in_memory
from ...cost import Cost, Work
from ...spec import Kept, Path, Rows, Spec, accumulation_dtype, refuses_linear
from .. import gpu
from . import pairs, pairs_cost, small


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, Kept]:
    """Eqs. 2-4; a small batch keeps dL/df for an upstream of 1."""
    embeddings, ref_emb, labels, ref_labels = _in_memory(embeddings, ref_emb, labels, ref_labels)
    with gpu.current(embeddings):
        if _is_small(embeddings, ref_emb, spec):
            loss, rows, gradient = small.forward(embeddings, labels, spec)
            return loss, rows, Kept((gradient,), True) if spec.wants_gradient else Kept()
        dtype, panels = _one_dtype(embeddings, ref_emb), _by_panels(embeddings, ref_emb)
        given = embeddings, ref_emb, labels, ref_labels
        loss, rows, tensors = pairs.forward(*given, dtype, spec, panels)
        return loss, rows, Kept(tensors)


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
    """dL/df of both sides, from tiles of S."""
    embeddings, ref_emb, grad_loss = _in_memory(embeddings, ref_emb, grad_loss)
    with gpu.current(embeddings):
        sizes, dtype = _sizes(embeddings, ref_emb), _one_dtype(embeddings, ref_emb)
        panels = _by_panels(embeddings, ref_emb)
        return pairs.backward(grad_loss, *sizes, dtype, kept, spec, panels)


def _in_memory(*tensors: Any) -> Any:
    """`in_memory` for what kernels take by its pointer; None stays None."""
    return tuple(None if t is None else in_memory(t) for t in tensors)


def _sizes(embeddings: Tensor, ref_emb: Tensor | None) -> tuple[int, int | None, int]:
    """N, M and D."""
    n, d = embeddings.shape
    return n, None if ref_emb is None else ref_emb.shape[0], d


def _by_panels(embeddings: Tensor, ref_emb: Tensor | None) -> bool:
    return pairs_cost.by_panels(*_sizes(embeddings, ref_emb), _one_dtype(embeddings, ref_emb))


def _is_small(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> bool:
    n, m, _ = _sizes(embeddings, ref_emb)
    return small.takes(n, m, spec.reduction)


def _one_dtype(embeddings: Tensor, ref_emb: Tensor | None) -> torch.dtype:
    """The dtype that both sides are prepared from, since a product takes only one."""
    if ref_emb is None or ref_emb.dtype == embeddings.dtype:
        return embeddings.dtype
    return accumulation_dtype(embeddings, ref_emb)


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """Why no kernel takes this input (its similarity or device), or None."""
    return refuses_linear(spec) or gpu.refuses(embeddings.device)


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """Memory is counted with this GPU's blocks, the rest with fixed ones, as launched."""
    device = gpu.of_type(work.device)
    if small.takes(work.n, work.m, work.reduction):
        found = small.cost(work, device is None or gpu.is_hopper(device))
    else:
        found = pairs_cost.cost(work, device)
    return found._replace(launches=0) if work.device == "cpu" else found


PATH = Path(forward, backward, cost, gpu.missing, refuses)
