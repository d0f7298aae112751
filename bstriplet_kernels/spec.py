"""What every path takes and returns, and the O(N) arithmetic that all paths share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cost import Cost, Work


class Similarity(NamedTuple):
    """phi, whose means Eq. 3 takes; `name` is a value of the option `similarity`."""

    name: str

    def phi(self, s: Tensor) -> Tensor:
        """phi(s): s^2, s|s| or s."""
        if self == LINEAR:
            return s
        return s * (s.abs() if self == SIGNED_SQUARE else s)

    def slope(self, s: Tensor) -> Tensor:
        """phi'(s): 2s, 2|s| or 1."""
        if self == LINEAR:
            return torch.ones_like(s)
        return 2 * (s.abs() if self == SIGNED_SQUARE else s)


SQUARE, SIGNED_SQUARE, LINEAR = map(Similarity, ("square", "signed_square", "linear"))
SIMILARITIES = {each.name: each for each in (SQUARE, SIGNED_SQUARE, LINEAR)}


class Spec(NamedTuple):
    """The options of the loss as paths take them.

    margin: m of Eq. 3. sigma: +1 (corrected) or -1 (as printed), the sign of the negatives' mean.
    similarity: phi. reduction: "mean" (Eq. 4), "sum" or "none". eps: rows of at most this norm
    count as zero rows. wants_gradient: whether a backward can follow, so that a path may compute
    the gradient together with a scalar loss. wants_rows: whether the caller wants Eq. 3's two means
    for each row.
    """

    margin: float = 0.9
    sigma: float = 1.0
    similarity: Similarity = SQUARE
    reduction: str = "mean"
    eps: float = 1e-12
    wants_gradient: bool = False
    wants_rows: bool = False

    @property
    def signed(self) -> bool:
        """Whether phi(s) is s|s| and not s^2, for kernels that take either."""
        return self.similarity == SIGNED_SQUARE


class Rows(NamedTuple):
    """The two means of Eq. 3 for each row, [N] each; an empty mean is 0."""

    positive: Tensor
    negative: Tensor


class Kept(NamedTuple):
    """What a path's forward keeps for the backward.

    tensors: what the path's `backward` needs, in an order of its own. is_gradient: the tensors are
    the gradients, for an upstream of 1, of the embeddings and of ref_emb if there is one. The
    caller then multiplies them by the upstream number and does not call `backward`.
    """

    tensors: tuple[Tensor, ...] = ()
    is_gradient: bool = False


def _nothing_missing() -> None:
    return None


def _refuses_nothing(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> None:
    return None


class Path(NamedTuple):
    """One way of computing the loss, as functions of tensors and numbers.

    forward(embeddings [N, D], ref_emb [M, D] or None, labels [N] int64, ref_labels [M] int64 or
    None, spec) -> (loss, rows, kept): the reduced loss, Eq. 3's two means for each row, and what
    the backward needs. rows may be None if the gradient is kept and spec does not want the rows.
    backward(grad_loss, embeddings, ref_emb, labels, ref_labels, rows, kept.tensors, spec) ->
    (gradient of the embeddings, gradient of ref_emb or None), both in the accumulation dtype: in
    half precision they could underflow before the upstream, such as a loss scale, is multiplied in.
    cost(work, class_sizes) -> the Cost of the schedule that will run; class_sizes: members of each
    class among the columns.
    missing() -> which requirement of the path is not installed and how to get it, or None.
    refuses(embeddings, ref_emb, spec) -> why the path cannot take this input, or None; it looks
    only at the spec and at shapes, dtypes and devices.
    keeps: whether `backward` needs rows and kept.tensors; otherwise they may be None and ().
    heeds_autocast: whether autocast would change the dtype of products in `forward`.
    """

    forward: Callable[..., tuple[Tensor, Rows | None, Kept]]
    backward: Callable[..., tuple[Tensor, Tensor | None]]
    cost: Callable[[Work, Sequence[int]], Cost]
    missing: Callable[[], str | None] = _nothing_missing
    refuses: Callable[[Tensor, Tensor | None, Spec], str | None] = _refuses_nothing
    keeps: bool = True
    heeds_autocast: bool = True


def work_of(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> Work:
    """The Work of these tensors and this spec."""
    (n, d), m, dtype = embeddings.shape, None, embeddings.dtype
    side_dtypes: tuple[torch.dtype, ...] = ()
    if ref_emb is not None:
        m = ref_emb.shape[0]
        if ref_emb.dtype != dtype:
            side_dtypes = dtype, ref_emb.dtype
            dtype = torch.promote_types(*side_dtypes)
    what = spec.reduction, spec.wants_gradient, embeddings.device.type, spec.similarity.name
    return Work(n, m, d, dtype, *what, side_dtypes)


def denormalise_gradient(v: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """dL/df_i = (v_i - (v_i . f^_i) f^_i) / n_i, the normalisation's backward, from v = dL/df^.

    v and unit [N, D], inverse = 1 / n_i [N].
    """
    along = torch.linalg.vecdot(v, unit).unsqueeze(1)
    return torch.addcmul(v, unit, along, value=-1.0).mul_(inverse.unsqueeze(1))


def refuses_linear(spec: Spec) -> str | None:
    """Why a path over pairs refuses similarity="linear"; None for the others."""
    if spec.similarity == LINEAR:
        return 'it has no kernels for similarity="linear": impl="gram" takes sums of classes'
    return None


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is float64, else float32: half products have three digits."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def hinge(rows: Rows, spec: Spec) -> Tensor:
    """h_i of Eq. 3 before max(0, .): m - positive + sigma * negative, [N]."""
    return spec.margin - rows.positive + spec.sigma * rows.negative


def reduce_losses(rows: Rows, spec: Spec) -> Tensor:
    """Eq. 3's max(0, h_i), then Eq. 4's mean, the sum, or the [N] rows. NaN stays NaN."""
    losses = torch.relu(hinge(rows, spec))
    if spec.reduction == "mean":
        return losses.mean()
    return losses.sum() if spec.reduction == "sum" else losses


def row_gradient(grad_loss: Tensor, rows: Rows, spec: Spec) -> Tensor:
    """a_i = dL/dl_i [h_i > 0], [N]: 0 at h_i = 0 as for relu; NaN rows count as active."""
    n = rows.positive.shape[0]
    upstream = grad_loss / n if spec.reduction == "mean" else grad_loss
    return torch.where(hinge(rows, spec) <= 0, torch.zeros_like(rows.positive), upstream)
