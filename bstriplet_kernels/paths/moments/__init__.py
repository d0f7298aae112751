"""impl="gram": exact, by moments, in time linear in the batch. Nothing of its own is N x M.

similarity="linear" takes first moments, the sums of classes: on a GPU `class_sums_on_gpu` with
Triton kernels, `class_sums` does the rest in plain torch. "square" takes second moments, by the
equations in `mathematics` and one of four schedules. The CPU reads the sizes of classes:
`on_cpu_native` needs the native library and takes no ref_emb, `on_cpu` does the rest. Reading them
would stop a GPU: `on_gpu` has Triton kernels, `anywhere` does the rest in plain torch.

On a GPU impl="triton" takes over, whose time grows with N M: where there are too few columns for
moments to be worth while, and with ref_emb where D is too large for `on_gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...cost import Cost, Work
from ...spec import LINEAR, Kept, Path, Rows, Spec, reduce_losses, row_gradient, work_of
from .. import gpu, native, triton
from . import anywhere, class_sums, class_sums_on_gpu, on_cpu, on_cpu_native, on_gpu


def schedule_of(work: Work, device: torch.device | None) -> ModuleType:
    """The module that does this work and counts its cost. device: None stands for the usual GPU."""
    if work.similarity == LINEAR.name:
        return class_sums_on_gpu if class_sums_on_gpu.takes(work, device) else class_sums
    if on_gpu.takes(work, device):
        return on_gpu
    if work.device == "cpu":
        return on_cpu_native if work.m is None and native.missing() is None else on_cpu
    by_pairs = work.m is not None or on_gpu.has_few_columns(work)
    return triton if by_pairs and gpu.runs_triton(work.device, device) else anywhere


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, Kept]:
    """The loss, Eq. 3's two means of each row, and what `backward` needs."""
    schedule = schedule_of(work_of(embeddings, ref_emb, spec), embeddings.device)
    sides = embeddings, ref_emb, labels, ref_labels
    if schedule is triton:
        return triton.forward(*sides, spec)
    if schedule in (on_gpu, class_sums_on_gpu):  # their kernels have the hinge too
        loss, rows, tensors = schedule.forward(*sides, spec)
        return loss, rows, Kept(tensors)
    rows, tensors = schedule.means(*sides, spec.eps)
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
    """dL/d(embeddings), and dL/d(ref_emb) where given, both in the accumulation dtype."""
    schedule = schedule_of(work_of(embeddings, ref_emb, spec), embeddings.device)
    if schedule is triton:
        sides = embeddings, ref_emb, labels, ref_labels
        return triton.backward(grad_loss, *sides, rows, kept, spec)
    if schedule in (on_gpu, class_sums_on_gpu):
        return schedule.backward(grad_loss, embeddings, ref_emb, kept, spec)
    a = row_gradient(grad_loss.to(rows.positive.dtype), rows, spec)
    return schedule.gradients(a, embeddings, ref_emb, kept, spec.sigma)


def refuses(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str | None:
    """Why no schedule takes these inputs, or None."""
    if spec.signed:
        return 'similarity="signed_square" has no second-moment form'
    if ref_emb is None or embeddings.is_cpu:
        return None
    if schedule_of(work_of(embeddings, ref_emb, spec), embeddings.device) is not anywhere:
        return None
    missing = gpu.missing() or gpu.refuses(embeddings.device)
    return f"with ref_emb it runs on the CPU or by Triton's kernels: {missing}"


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """Cost of the schedule that will run; class_sizes: members of each class among the columns."""
    return schedule_of(work, gpu.of_type(work.device)).cost(work, class_sizes)


PATH = Path(forward, backward, cost, refuses=refuses)
