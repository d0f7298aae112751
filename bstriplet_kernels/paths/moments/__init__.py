"""impl="gram": exact, in time linear in the batch, by moments. Nothing is N x M.

similarity="linear" takes first moments, sums of classes, by `class_sums`. "square" takes second
ones. One mathematics (`mathematics`), four schedules. On the CPU, where sizes can be read,
`on_cpu_native` where the native library is, else `on_cpu`. Where reading them would stop a GPU,
`on_gpu` in thirteen launches, and `anywhere` in plain torch for what these do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...cost import Cost, Work
from ...spec import LINEAR, Kept, Path, Rows, Spec, reduce_losses, row_gradient, work_of
from .. import gpu, native
from . import anywhere, class_sums, on_cpu, on_cpu_native, on_gpu


def schedule_of(work: Work, device: torch.device | None) -> ModuleType:
    """The module that computes this and counts it, on a device or, where that is None, on the
    usual GPU.
    """
    if work.similarity == LINEAR.name:
        return class_sums
    if on_gpu.takes(work, device):
        return on_gpu
    if work.device != "cpu":
        return anywhere
    return on_cpu_native if work.m is None and native.missing() is None else on_cpu


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, Kept]:
    """Moments of the columns, then two forms a row; see `mathematics` and `class_sums`."""
    schedule = schedule_of(work_of(embeddings, ref_emb, spec), embeddings.device)
    if schedule is on_gpu:  # its kernels have the hinge too
        loss, rows, tensors = on_gpu.forward(embeddings, ref_emb, labels, ref_labels, spec)
        return loss, rows, Kept(tensors)
    rows, tensors = schedule.means(embeddings, ref_emb, labels, ref_labels, spec.eps)
    return reduce_losses(rows, spec), rows, Kept(tensors)


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
    schedule = schedule_of(work_of(embeddings, ref_emb, spec), embeddings.device)
    if schedule is on_gpu:
        return on_gpu.backward(grad_loss, embeddings, kept, spec)
    a = row_gradient(grad_loss.to(rows.positive.dtype), rows, spec)
    return schedule.gradients(a, embeddings, ref_emb, kept, spec.sigma)


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """What has no moments, or no schedule."""
    if spec.signed:
        return 'similarity="signed_square" has no second-moment form'
    if ref_emb is None or embeddings.is_cpu:
        return None
    if schedule_of(work_of(embeddings, ref_emb, spec), embeddings.device) is not anywhere:
        return None
    return "with ref_emb it runs on the CPU, and on a GPU where its Triton kernels take the input"


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """Of the schedule that will run; class_sizes: members of each class among the columns."""
    return schedule_of(work, gpu.of_type(work.device)).cost(work, class_sizes)


PATH = Path(forward, backward, cost, refuses=refuses)
