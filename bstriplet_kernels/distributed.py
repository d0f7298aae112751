"""The exact loss of a global batch: the rows of all ranks of a process group together.

Embeddings and labels are gathered once. Each rank computes Eq. 3 for its own rows against all,
the row means are gathered, and then each rank computes the *whole* gradient of its own rows itself,
because the weight of a pair needs only a_i and a_j of its two rows. The backward of a scalar
communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .reference import normalise
from .spec import (
    Rows,
    Spec,
    accumulation_dtype,
    denormalise_gradient,
    reduce_losses,
    row_gradient,
)

_DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16
_PANEL_ELEMENTS = 1 << 24
"""Numbers of one panel of S, some own rows x all columns: 64 MiB in float32."""


def global_loss(
    embeddings: Tensor, labels: Tensor, group: dist.ProcessGroup, spec: Spec
) -> tuple[Tensor, Rows]:
    """The loss of the rows of all ranks, and Eq. 3's means of all rows in rank order.

    embeddings [n, D], labels [n] int64; n may differ between ranks and may be 0. "mean" and "sum"
    are the same global scalar on every rank; "none" is this rank's own [n] losses. The backward
    differentiates the sum of all ranks' objectives, and for a scalar it takes the upstream to be
    equal on all ranks: world_size * dL/df, which DistributedDataParallel averages to dL/df.

    Raises ValueError if this rank is not in `group`, if the global batch has fewer than 2 rows, or
    if ranks differ in D or dtype.
    """
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in group; only its members may call the loss")
    sizes = _gather_sizes(embeddings, group)
    loss, positive, negative = _GlobalBatch.apply(embeddings, labels, group, sizes, spec)
    return loss, Rows(positive, negative)


def _gather_sizes(embeddings: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Every rank's number of rows. Shapes are needed on the host, so this waits for the device."""
    own = torch.tensor(
        [*embeddings.shape, _DTYPES.index(embeddings.dtype)], device=embeddings.device
    )
    everyone = torch.stack(_all_gather(own, group)).tolist()
    if len({(d, k) for _, d, k in everyone}) > 1:
        raise ValueError(
            "embeddings must have the same number of columns and dtype on every rank, "
            f"got by rank {', '.join(f'{d} of {_DTYPES[k]}' for _, d, k in everyone)}"
        )
    sizes = [n for n, _, _ in everyone]
    if sum(sizes) < 2:
        raise ValueError(
            f"the global batch has {sum(sizes)} row(s) over {len(sizes)} ranks: at least 2 are "
            "needed. Where the last batch of an epoch is the cause, pass drop_last=True to the "
            "DataLoader"
        )
    return sizes


def _all_gather(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return everyone


def _gather_rows(own: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks in rank order; ranks with fewer rows are padded on the way."""
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: own.shape[0]] = own
    pieces = _all_gather(padded, group)
    return torch.cat([piece[:n] for piece, n in zip(pieces, sizes, strict=True)])


class _GlobalBatch(torch.autograd.Function):
    """(own embeddings, own labels, group, sizes, spec) -> (loss, positive, negative of all)."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
        sizes: list[int],
        spec: Spec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rank = dist.get_rank(group)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        with torch.autocast(embeddings.device.type, enabled=False):
            everyone = _gather_rows(embeddings.detach(), sizes, group)
            unit, inverse = normalise(everyone.to(accumulation_dtype(everyone)), spec.eps)
            all_labels = _gather_rows(labels, sizes, group)
            counts = _pair_counts(all_labels, unit.dtype)
            own_means = _own_row_means(unit, all_labels, counts, own, spec)
            rows = Rows(*_gather_rows(own_means, sizes, group).unbind(dim=1))
            loss = reduce_losses(rows, spec)
        ctx.save_for_backward(unit, inverse, all_labels, counts, *rows)
        ctx.group, ctx.sizes, ctx.own, ctx.spec = group, sizes, own, spec
        ctx.dtype = embeddings.dtype
        ctx.mark_non_differentiable(*rows)
        return (loss[own].clone() if spec.reduction == "none" else loss, *rows)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "bstriplet_loss has no second derivative with group; "
                "call backward without create_graph=True"
            )
        unit, inverse, labels, counts, positive, negative = ctx.saved_tensors
        with torch.autocast(unit.device.type, enabled=False):
            if ctx.spec.reduction == "none":
                upstream = _gather_rows(grad_loss.contiguous(), ctx.sizes, ctx.group)
            else:
                upstream = grad_loss * len(ctx.sizes)
            a = row_gradient(upstream, Rows(positive, negative), ctx.spec)
            grad = _own_gradient(unit, inverse, labels, counts, a, ctx.own, ctx.spec)
        return grad.to(ctx.dtype), None, None, None, None


def _pair_counts(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """N_i+ and N_i- for each row, [N, 2], at least 1 (the sum of an empty mean is 0)."""
    ordered = labels.sort().values
    members = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    counts = torch.stack((members - 1, labels.shape[0] - members), dim=1)
    return counts.clamp_min(1).to(dtype)


def _own_panels(own: slice, n: int) -> list[slice]:
    step = max(1, _PANEL_ELEMENTS // n)
    return [slice(i, min(i + step, own.stop)) for i in range(own.start, own.stop, step)]


def _same_class(labels: Tensor, panel: slice) -> Tensor:
    return labels[panel, None] == labels[None, :]


def _own_row_means(unit: Tensor, labels: Tensor, counts: Tensor, own: slice, spec: Spec) -> Tensor:
    """The two means of Eq. 3 for this rank's rows, [n, 2]."""
    means = unit.new_zeros(own.stop - own.start, 2)
    for panel in _own_panels(own, unit.shape[0]):
        similarity = unit[panel] @ unit.T
        phi = spec.similarity.phi(similarity)
        phi.diagonal(offset=panel.start).zero_()
        same = _same_class(labels, panel)
        sums = torch.stack(((phi * same).sum(dim=1), (phi * ~same).sum(dim=1)), dim=1)
        means[panel.start - own.start : panel.stop - own.start] = sums / counts[panel]
    return means


def _own_gradient(
    unit: Tensor,
    inverse: Tensor,
    labels: Tensor,
    counts: Tensor,
    a: Tensor,
    own: slice,
    spec: Spec,
) -> Tensor:
    """dL/df of this rank's rows: v_i = sum_j w_ij phi'(s_ij) f^_j over all rows, projected."""
    shares = a[:, None] / counts
    grad = unit.new_zeros(own.stop - own.start, unit.shape[1])
    for panel in _own_panels(own, unit.shape[0]):
        similarity = unit[panel] @ unit.T
        slope = spec.similarity.slope(similarity)
        slope.diagonal(offset=panel.start).zero_()
        pairs = shares[panel, None] + shares[None, :]
        weights = torch.where(
            _same_class(labels, panel), -pairs[..., 0], spec.sigma * pairs[..., 1]
        )
        v = (weights * slope) @ unit
        grad[panel.start - own.start : panel.stop - own.start] = denormalise_gradient(
            v, unit[panel], inverse[panel]
        )
    return grad
