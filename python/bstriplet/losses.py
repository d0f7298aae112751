"""The training losses by name: cross entropy, alone or with a metric loss beside it (Eq. 7)."""

from typing import NamedTuple

from torch import Tensor, nn

from bstriplet.backbones import Output
from bstriplet.config import TrainConfig
from bstriplet_kernels import BSTripletLoss


class LossTerms(NamedTuple):
    """Scalars of one batch: the loss that is minimised, and its parts (bst None where absent)."""

    total: Tensor
    ce: Tensor
    bst: Tensor | None


class TrainingLoss(nn.Module):
    """The loss that a configuration names: CE, or CE + lambda BST (Eq. 7).

    ``criterion(output, labels)`` with labels int64 [N] returns :class:`LossTerms`.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss()
        self.bst_weight = config.bst_weight
        self.bst = BSTripletLoss(margin=config.margin) if config.loss == "ce+bst" else None

    def forward(self, output: Output, labels: Tensor) -> LossTerms:
        ce = self.cross_entropy(output.logits, labels)
        if self.bst is None:
            return LossTerms(total=ce, ce=ce, bst=None)
        bst = self.bst(output.embeddings, labels)
        return LossTerms(total=ce + self.bst_weight * bst, ce=ce, bst=bst)
