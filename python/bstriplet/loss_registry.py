"""The built-in training losses. A loss of embeddings and labels needs an entry here, and no more.

The command line and its help, the label in tables, the colour in figures and the choice of CUDA
graphs follow from the entry. Colours follow from the order of entries: append new ones. Heavy
packages are imported only when a loss is built. Losses with weights of their own come from
pytorch-metric-learning, by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol


class LossOptions(Protocol):
    """What the metric losses take of a configuration."""

    @property
    def margin(self) -> float:
        """m of Eq. 3."""

    @property
    def similarity(self) -> str:
        """Similarity of a pair."""

    @property
    def eq3(self) -> str:
        """Sign of the negatives' mean."""


@dataclass(frozen=True)
class BuiltInLoss:
    """Cross entropy, alone or with a metric loss beside it (Eq. 7).

    label: its name in tables and figures.
    metric: options of the run -> the module of the metric loss, called with embeddings
        [N, D] and labels [N]; None for cross entropy alone.
    takes_margin: whether the margin changes it.
    capturable: whether a CUDA graph can capture it, because it never waits for the device.
    in_paper: whether the paper's tables have rows for it.
    """

    label: str
    metric: Callable[[LossOptions], Any] | None
    takes_margin: bool = False
    capturable: bool = False
    in_paper: bool = False


def _triplet(options: LossOptions) -> Any:
    """Eq. 1, max(0, 1 - s_ap + s_an) on cosine similarities: its mean over all triplets.

    The paper draws one triplet per anchor; the mean over all triplets has less noise.
    """
    from pytorch_metric_learning import distances, losses, reducers

    return losses.TripletMarginLoss(
        margin=1, distance=distances.CosineSimilarity(), reducer=reducers.MeanReducer()
    )


def _lifted_structure(options: LossOptions) -> Any:
    """The lifted structure loss in its improved, generalised form.

    Mean over anchors of max(0, log sum exp d_ap + log sum exp (1 - d_an)), with Euclidean distances
    of L2-normalised embeddings: it sees all pairs, and is defined for an anchor without positives
    or negatives.
    """
    from pytorch_metric_learning import losses

    return losses.GeneralizedLiftedStructureLoss()


def _bst(options: LossOptions) -> Any:
    """Eqs. 3 and 4 with the margin, the similarity and the sign that are given."""
    from bstriplet_kernels import BSTripletLoss

    return BSTripletLoss(margin=options.margin, similarity=options.similarity, eq3=options.eq3)


BUILT_IN: Mapping[str, BuiltInLoss] = MappingProxyType(
    {
        "ce": BuiltInLoss("CE", None, capturable=True, in_paper=True),
        "ce+triplet": BuiltInLoss("CE+Triplet", _triplet, in_paper=True),
        "ce+ls": BuiltInLoss("CE+LS", _lifted_structure, in_paper=True),
        "ce+bst": BuiltInLoss("CE+BST", _bst, takes_margin=True, capturable=True, in_paper=True),
    }
)
