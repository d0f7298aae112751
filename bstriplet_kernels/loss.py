"""The loss as `nn.Module`s: drop-in criteria for a training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import functional
from .checks import check_weight, make_options
from .functional import BSTripletStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BSTripletLoss(nn.Module):
    """The batch-similarity triplet loss, Eqs. 1-4 of Huang et al., Sensors 2021, 21, 764.

    `criterion(embeddings, labels)` with embeddings [N, D] and labels [N] returns the scalar loss.
    It takes the arguments of a pytorch-metric-learning loss; `bstriplet_kernels.metric_learning`
    has the loss on that library's base class. The options are those of `bstriplet_loss`; they are
    checked once, here, and raise the same errors.

    Args:
        margin: m of Eq. 3, in [0, 1].
        similarity: "square", "signed_square" or "linear".
        eq3: "corrected" or "printed".
        reduction: "mean", "sum" or "none".
        group: process group; the rows of all its ranks are the batch. `bstriplet_loss` has the
            cost.
        impl: "auto" or one of `available_impls()`.
        eps: a row of at most this norm is a zero row.
        return_stats: return (loss, BSTripletStats) instead of the loss.
    """

    def __init__(
        self,
        margin: float = 0.9,
        *,
        similarity: str = "square",
        eq3: str = "corrected",
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        impl: str = "auto",
        eps: float = 1e-12,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self._options = make_options(
            margin, similarity, eq3, reduction, eps, impl, return_stats, group
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, BSTripletStats]:
        """The loss of a batch.

        embeddings [N, D], labels [N], ref_emb [M, D], ref_labels [M] as in `bstriplet_loss`.
        indices_tuple: a miner's triplets (anchors, positives, negatives) or pairs (anchors,
        positives, anchors, negatives), int64 or int32. The means of Eq. 3 then run over the listed
        pairs, each as often as it is listed. Labels are not used. A row that is listed nowhere has
        two empty means and counts as the margin. `impl` must be "auto" or "reference", and `group`
        None.
        """
        if indices_tuple is not None:
            return functional.compute_listed(embeddings, indices_tuple, self._options, ref_emb)
        if labels is None:
            raise TypeError("labels is needed where no indices_tuple is given, got None")
        return functional.compute(embeddings, labels, self._options, ref_emb, ref_labels)

    def extra_repr(self) -> str:
        keywords = self._options.keywords
        keywords["group"] = None if keywords["group"] is None else "..."
        return ", ".join(f"{name}={value}" for name, value in keywords.items())


class CrossEntropyBSTripletLoss(nn.Module):
    """Eq. 7: L = L_ce + weight * L_bst, of logits and the embeddings behind them.

    `criterion(logits, embeddings, labels)` with logits [N, C], embeddings [N, D] and labels [N]
    integer in [0, C) returns the scalar loss, in float32 or float64.

    Args:
        weight: lambda of Eq. 7, a number >= 0; 1 in the paper.
        margin: m of Eq. 3, in [0, 1].
        reduction: "mean" or "sum", of both losses.
        similarity, eq3, group, impl, eps: as in `BSTripletLoss`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        margin: float = 0.9,
        *,
        similarity: str = "square",
        eq3: str = "corrected",
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        impl: str = "auto",
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.weight = check_weight(weight)
        if reduction == "none":
            raise ValueError("reduction='none' does not fit a sum of two losses; use BSTripletLoss")
        self.cross_entropy = nn.CrossEntropyLoss(reduction=reduction)
        self.bstriplet = BSTripletLoss(
            margin,
            similarity=similarity,
            eq3=eq3,
            reduction=reduction,
            group=group,
            impl=impl,
            eps=eps,
        )

    def forward(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        """logits [N, C], embeddings [N, D], labels [N] integer in [0, C) -> scalar."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        cross_entropy = self.cross_entropy(logits.to(dtype), labels.to(torch.int64))
        return cross_entropy + self.weight * self.bstriplet(embeddings, labels)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"
