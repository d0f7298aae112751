"""The loss for users of pytorch-metric-learning (2.5 or newer, below 3): `BSTripletLoss` on its
base class, and its two wrappers that admit losses by name.

Nothing else in the package imports this module, or that library. Miners, reducers, `MultipleLosses`
and `DistributedLossWrapper` are used as the library ships them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.reducers import BaseReducer, MeanReducer
    from pytorch_metric_learning.utils import common_functions as c_f
    from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
except ImportError as error:
    raise ImportError(
        "bstriplet_kernels.metric_learning needs version 2 of pytorch-metric-learning, from 2.5 "
        "on: pip install pytorch-metric-learning~=2.5"
    ) from error

from .functional import BSTripletStats
from .loss import BSTripletLoss as Criterion

__all__ = ["BSTripletLoss", "CrossBatchMemory", "SelfSupervisedLoss"]

Losses = dict[str, dict[str, Any]]
"""What the library's reducers take: values, indices and kind of each part of the loss."""


class BSTripletLoss(losses.BaseMetricLossFunction):
    """The batch-similarity triplet loss as a loss of pytorch-metric-learning.

    `loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`, with embeddings
    [N, D], labels [N], ref_emb [M, D] and ref_labels [M]; the equations are those of
    `bstriplet_loss`. A reducer takes the N losses l_i of Eq. 3. The default is their mean, which
    has the value and the gradient of `bstriplet_kernels.BSTripletLoss`.

    The library's habits hold:

    - labels and indices_tuple are moved to the embeddings' device.
    - Without ref_emb, or where `ref_labels is labels`, row i is not compared with column i; other
      references are compared with every row.
    - indices_tuple, a miner's pairs or triplets, replaces the labels. The means of Eq. 3 run over
      the listed pairs, and a row without listed pairs counts as the margin. If nothing at all is
      listed the loss is 0, still attached to the embeddings.

    The loss of half-precision embeddings is float32, with three exceptions of the library, where
    the result has the embeddings' dtype: nothing is listed, no row passes a reducer's threshold, or
    `MultipleReducers` (used for embedding_regularizer) adds up its parts.

    For several processes wrap it in the library's `DistributedLossWrapper`, which needs batches of
    equal size. It returns world_size times the loss of all ranks' rows, and DistributedDataParallel
    averages to the gradient of one process on them. With `efficient=True` it takes the mean of each
    rank's own rows and holds the other ranks' constant, which gives another gradient. Only
    `bstriplet_kernels.BSTripletLoss` has the option `group`.

    Args:
        margin: m of Eq. 3, in [0, 1]; read-only as an attribute.
        similarity: "square", "signed_square" or "linear".
        eq3: "corrected" or "printed".
        impl: "auto" or one of `available_impls()`.
        eps: a row of at most this norm is a zero row.
        distance: None or the library's `CosineSimilarity()` with p=2 and power=1.
        reducer: makes the N losses a scalar; None is `MeanReducer()`, Eq. 4. `AvgNonZeroReducer()`
            takes the mean over the rows with l_i > 0.
        embedding_regularizer: a regularizer of the library; its value is added to the loss.
        embedding_reg_weight: the factor of that value.
        collect_stats: keep the fields of the last call's `BSTripletStats` as attributes, in floats,
            which waits for a GPU. None is the library's global setting.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
        RuntimeError: a named `impl` that cannot run here, saying what is missing.
    """

    def __init__(
        self,
        margin: float = 0.9,
        *,
        similarity: str = "square",
        eq3: str = "corrected",
        impl: str = "auto",
        eps: float = 1e-12,
        distance: CosineSimilarity | None = None,
        reducer: BaseReducer | None = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(
            distance=distance,
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
        )
        _check_distance(self.distance)

        def criterion(reduction: str) -> Criterion:
            return Criterion(
                margin,
                similarity=similarity,
                eq3=eq3,
                reduction=reduction,
                impl=impl,
                eps=eps,
                return_stats=bool(self.collect_stats),
            )

        self.mean_loss, self.row_losses = criterion("mean"), criterion("none")
        self._margin = float(margin)
        self.add_to_recordable_attributes(name="margin", is_stat=False)
        self.add_to_recordable_attributes(list_of_names=list(BSTripletStats._fields), is_stat=True)

    @property
    def margin(self) -> float:
        return self._margin

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> Losses:
        """The losses for the reducer: embeddings [N, D], labels [N], ref_emb [M, D].

        The library's `forward` calls this, with ref_emb = embeddings where none was given.
        """
        is_self = ref_labels is labels
        if indices_tuple is None and labels is not None and is_self and ref_emb is not embeddings:
            indices_tuple = lmu.get_all_pairs_indices(labels, ref_labels)  # without (i, i)
        if indices_tuple is not None:
            if all(len(index) == 0 for index in indices_tuple):
                return self.zero_losses()
            indices_tuple = tuple(c_f.to_device(index, embeddings) for index in indices_tuple)
        if self.distance.collect_stats:
            self._record_norms(embeddings, ref_emb)
        columns = (None, None) if is_self and ref_emb is embeddings else (ref_emb, ref_labels)
        result = self._criterion()(embeddings, labels, indices_tuple, *columns)
        if isinstance(result, tuple):
            result, stats = result
            for name, value in stats._asdict().items():
                setattr(self, name, value.item())
        return {"loss": _as_reducers_take_it(result)}

    def _criterion(self) -> Criterion:
        """`mean_loss` for a plain `MeanReducer`, as loss and gradient are then one call.

        A reducer that collects statistics needs the single losses to count them.
        """
        is_mean = type(self.reducer) is MeanReducer and not self.reducer.collect_stats
        return self.mean_loss if is_mean else self.row_losses

    def _record_norms(self, embeddings: Tensor, ref_emb: Tensor) -> None:
        """Record the statistics of `CosineSimilarity`, whose matrix is never computed here."""
        unit = (self.distance.normalize(side.detach()) for side in (embeddings, ref_emb))
        self.distance.set_default_stats(embeddings, ref_emb, *unit)


class CrossBatchMemory(losses.CrossBatchMemory):
    """The library's `CrossBatchMemory`, which admits losses by name, with `BSTripletLoss` added.

    `loss(embeddings, labels, indices_tuple=None, enqueue_mask=None)` compares the batch with a
    queue of the last `memory_size` rows, the batch included; gradient flows to the batch as rows,
    never to the queue. No row is compared with its own copy; the library itself misses that copy
    in a batch of one row. Arguments are the library's. `BSTripletLoss` of `bstriplet_kernels` has
    the same name and is admitted too. Pairs are listed here, so `impl` must be "auto" or
    "reference". The library reads the columns of a given indices_tuple as places in the queue.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), "BSTripletLoss"]

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Write the rows in the queue's dtype, which the library does not match under autocast."""
        super().add_to_memory(
            embeddings.to(self.embedding_memory.dtype),
            labels.to(self.label_memory.dtype),
            batch_size,
        )

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...]:
        """The pairs or triplets of rows and places in the queue, none of a row and its copy."""
        indices = super().create_indices_tuple(
            embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons=False
        )
        if not do_remove_self_comparisons:  # the rows that are compared are not enqueued
            return indices
        anchors, positives, *others = indices
        other_rows = positives != self.curr_batch_idx[anchors]
        if len(others) == 1:
            return tuple(index[other_rows] for index in indices)
        return anchors[other_rows], positives[other_rows], *others


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """The library's `SelfSupervisedLoss`, which admits losses by name, with `BSTripletLoss` added.

    `loss(embeddings, ref_emb)` with both [N, D]: row i of each is an augmentation of image i, and
    the two are each other's only positive. Arguments are the library's. `BSTripletLoss` of
    `bstriplet_kernels` has the same name and is admitted too, but only on the CPU, where this
    wrapper makes its labels.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.SelfSupervisedLoss.supported_losses(), "BSTripletLoss"]


def _check_distance(distance: Any) -> None:
    """Raise unless `distance` is the cosine itself: a subclass's changes would be ignored."""
    if type(distance) is not CosineSimilarity:
        raise TypeError(f"distance must be CosineSimilarity() or None, got {distance!r}")
    if (distance.p, distance.power) != (2, 1):
        raise ValueError(
            "distance must be CosineSimilarity() with p=2 and power=1, "
            f"got p={distance.p} and power={distance.power}"
        )


def _as_reducers_take_it(values: Tensor) -> dict[str, Any]:
    """A scalar, or one loss a row, as a part of `Losses`."""
    if values.dim() == 0:
        return {"losses": values, "indices": None, "reduction_type": "already_reduced"}
    rows = c_f.torch_arange_from_size(values)
    return {"losses": values, "indices": rows, "reduction_type": "element"}
