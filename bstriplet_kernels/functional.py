"""`bstriplet_loss`: check the input, choose the path, run it."""

from __future__ import annotations

import difflib
import functools
import math
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import plan, reference
from .autograd import batch_similarity
from .paths import PATHS
from .spec import Rows, Spec, hinge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NUMBER = (float, Real)  # float first: asking an abstract class takes microseconds
_SIGNED = {"square": False, "signed_square": True}
_SIGMA = {"corrected": 1.0, "printed": -1.0}
_REDUCTIONS = ("mean", "sum", "none")


class BSTripletStats(NamedTuple):
    """What the loss saw, as detached scalars on the embeddings' device (no synchronisation).

    active_fraction: the share of rows with h_i > 0. positive_similarity, negative_similarity: the
    two means of Eq. 3, averaged over the rows (an empty mean is 0), so that where every row is
    active the mean loss is margin - positive_similarity + sigma * negative_similarity.
    """

    active_fraction: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


def bstriplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.9,
    similarity: str = "square",
    eq3: str = "corrected",
    reduction: str = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    group: ProcessGroup | None = None,
    impl: str = "auto",
    eps: float = 1e-12,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, BSTripletStats]:
    """The batch-similarity triplet loss (Huang et al., Sensors 2021, 21, 764, Eqs. 1-4).

    For each row i, with s_ij the cosine similarity of rows i and j, P_i the other rows of its class
    and Q_i the rows of other classes (a mean over nothing is 0):

        l_i = max(0, margin - mean_{j in P_i} s_ij^2 + mean_{k in Q_i} s_ik^2)

    Args:
        embeddings: [N, D] float64, float32, float16 or bfloat16, any strides, any device; N >= 2.
        labels: [N] of any integer dtype or bool, any values, on the same device.
        margin: m of Eq. 3, in [0, 1].
        similarity: "square", or "signed_square" for s|s| where cosines can be negative.
        eq3: "corrected", or "printed" for the sign of the negatives' mean as typeset.
        reduction: "mean" (Eq. 4), "sum", or "none" for the [N] values l_i.
        ref_emb: [M, D]; compare each row with these instead of with the batch. No self-pair is
            removed, N may then be 1, and gradient flows to both sides.
        ref_labels: [M], the labels of `ref_emb`.
        group: process group; the loss is that of the rows of all ranks together. Every rank must
            call, and gets, the global loss (with "none": its own rows). The backward gives
            world_size times the one-process gradient, because DistributedDataParallel divides by
            world_size: parameters see exactly the gradient of one process on the whole batch.
        impl: "auto", or one of `available_impls()`.
        eps: a row of at most this norm is a zero row: similarity 0 to all, gradient 0.
        return_stats: also return `BSTripletStats`.

    Returns:
        The loss, float32 for half inputs, else in the embeddings' dtype; with `return_stats` a
        pair (loss, BSTripletStats). NaN or infinity in the embeddings, or norms whose square
        overflows, give NaN.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
        RuntimeError: a named `impl` that cannot run here, saying what is missing.
    """
    options = margin, similarity, eq3, reduction, eps, impl, return_stats
    target = None
    if group is None and not is_dynamo_compiling():
        try:
            target = _remembered_target(*options)
        except TypeError:  # an option of a wrong type, hashable or not: to be said below, once
            target = None
    if target is None:
        target = make_target(*options, group)
    return compute(embeddings, labels, target, ref_emb, ref_labels)


class Target(NamedTuple):
    """The checked options of a loss: what to compute, by which path, for which batch."""

    spec: Spec
    impl: str
    group: ProcessGroup | None
    return_stats: bool


def make_target(
    margin: float,
    similarity: str,
    eq3: str,
    reduction: str,
    eps: float,
    impl: str,
    return_stats: bool,
    group: ProcessGroup | None = None,
) -> Target:
    """The options of `bstriplet_loss`, checked."""
    check_impl(impl)
    return Target(make_spec(margin, similarity, eq3, reduction, eps), impl, group, return_stats)


_REMEMBERED = 4096
_remembered_target = functools.lru_cache(_REMEMBERED, typed=True)(make_target)  # 1 is no True


def compute(
    embeddings: Tensor,
    labels: Tensor,
    target: Target,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, BSTripletStats]:
    """`bstriplet_loss` for options that have been checked: check the tensors, plan, run."""
    if target.group is not None:
        check_embeddings(embeddings, labels, ref_emb, ref_labels)
        return _global_loss(embeddings, _as_int64(labels), ref_emb, target)
    spec, path = _checked_plan(embeddings, labels, target, ref_emb, ref_labels)
    if labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    if ref_labels is not None:
        ref_labels = _as_int64(ref_labels)
    loss, rows = batch_similarity(embeddings, ref_emb, labels, ref_labels, spec, path)
    return loss if rows is None or not target.return_stats else (loss, _stats(rows, spec))


_planned: dict[tuple[object, ...], tuple[Spec, str]] = {}


def _checked_plan(
    embeddings: Tensor,
    labels: Tensor,
    target: Target,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> tuple[Spec, str]:
    """What to run for these inputs and by which path, or what is wrong with them.

    Remembered by all that decides it, so that in a training loop check and choice are a look-up.
    """
    key: tuple[object, ...] | None = None
    if type(embeddings) is Tensor and type(labels) is Tensor and not is_dynamo_compiling():
        key = (  # where it says True for a device, which takes longer to make and to compare
            embeddings.shape,
            embeddings.dtype,
            embeddings.is_cpu or embeddings.device,
            embeddings.requires_grad,
            labels.shape,
            labels.dtype,
            labels.is_cpu or labels.device,
            target,
            torch.is_grad_enabled(),
        )
        if ref_emb is not None or ref_labels is not None:
            key = (*key, _form(ref_emb), _form(ref_labels))
        planned = _planned.get(key)
        if planned is not None:
            return planned
    check_embeddings(embeddings, labels, ref_emb, ref_labels)
    _check_batch(embeddings, ref_emb)
    wanted = embeddings.requires_grad or (ref_emb is not None and ref_emb.requires_grad)
    spec = target.spec._replace(
        wants_gradient=wanted and torch.is_grad_enabled(), wants_rows=target.return_stats
    )
    planned = spec, _path(target.impl, embeddings, ref_emb, spec)
    if key is not None:
        if len(_planned) >= _REMEMBERED:
            _planned.clear()
        _planned[key] = planned
    return planned


def _form(given: Tensor | None) -> object:
    """What checks and plans see of a tensor; of anything else, its type."""
    if isinstance(given, Tensor):
        return given.shape, given.dtype, given.device, given.requires_grad
    return type(given)


def compute_listed(
    embeddings: Tensor,
    indices_tuple: tuple[Tensor, ...],
    target: Target,
    ref_emb: Tensor | None = None,
) -> Tensor | tuple[Tensor, BSTripletStats]:
    """The loss over a miner's pairs instead of labels; see `BSTripletLoss.forward`."""
    if target.group is not None:
        raise ValueError("indices_tuple cannot be given together with group")
    check_indices(indices_tuple)
    check_embeddings(embeddings, None, ref_emb, None)
    _check_batch(embeddings, ref_emb)
    with torch.autocast(embeddings.device.type, enabled=False):
        loss, rows = reference.listed_pairs_loss(embeddings, ref_emb, indices_tuple, target.spec)
    return (loss, _stats(rows, target.spec)) if target.return_stats else loss


def explain(
    embeddings: Tensor,
    labels: Tensor,
    *,
    similarity: str = "square",
    reduction: str = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> plan.Plan:
    """What `bstriplet_loss(..., impl="auto")` does with this input, forward and backward, and why.

    Arguments as there. `print` the result: path, reason, FLOPs, bytes, peak extra memory, Eq. 8's
    figure, predicted times. Counts the classes, so on a GPU it waits for the device.
    """
    spec = make_spec(0.9, similarity, "corrected", reduction)._replace(wants_gradient=True)
    check_embeddings(embeddings, labels, ref_emb, ref_labels)
    _check_batch(embeddings, ref_emb)
    return plan.explain_plan(embeddings, _as_int64(labels), ref_emb, ref_labels, spec)


def available_impls() -> tuple[str, ...]:
    """The names that `impl` can take here, beside "auto"."""
    return tuple(name for name, path in PATHS.items() if path.missing() is None)


def make_spec(margin: float, similarity: str, eq3: str, reduction: str, eps: float = 1e-12) -> Spec:
    """The options checked and turned into numbers."""
    if isinstance(margin, bool) or not isinstance(margin, _NUMBER):
        raise TypeError(f"margin must be a number in [0, 1], got {type(margin).__name__}")
    if not 0 <= margin <= 1:
        raise ValueError(f"margin must be in [0, 1], got {margin}")
    if similarity not in _SIGNED:
        raise _unknown("similarity", similarity, tuple(_SIGNED))
    if eq3 not in _SIGMA:
        raise _unknown("eq3", eq3, tuple(_SIGMA))
    if reduction not in _REDUCTIONS:
        raise _unknown("reduction", reduction, _REDUCTIONS)
    if isinstance(eps, bool) or not isinstance(eps, _NUMBER):
        raise TypeError(f"eps must be a positive finite number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, got {eps}")
    return Spec(float(margin), _SIGMA[eq3], _SIGNED[similarity], reduction, float(eps))


def check_impl(impl: str) -> None:
    """Raise unless `impl` is "auto" or a path that can run here."""
    if impl == "auto":
        return
    if impl not in PATHS:
        raise _unknown("impl", impl, ("auto", *PATHS))
    missing = PATHS[impl].missing()
    if missing is not None:
        raise RuntimeError(
            f"impl={impl!r} cannot run here: {missing}. "
            f"Available: {', '.join(('auto', *available_impls()))}"
        )


def check_embeddings(
    embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> None:
    """Raise unless shapes, dtypes and devices fit together; `labels` None: no labels are used."""
    _check_matrix("embeddings", embeddings)
    if labels is not None:
        _check_labels("labels", labels, "embeddings", embeddings)
        if (ref_emb is None) != (ref_labels is None):
            given, absent = ("ref_emb", "ref_labels")[:: 1 if ref_labels is None else -1]
            raise ValueError(f"{given} was given without {absent}; give both or neither")
    if ref_emb is None:
        return
    _check_matrix("ref_emb", ref_emb)
    if ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"ref_emb must have as many columns as embeddings, {embeddings.shape[1]}, "
            f"got shape {tuple(ref_emb.shape)}"
        )
    if ref_emb.device != embeddings.device:
        raise ValueError(
            f"ref_emb is on {ref_emb.device} and embeddings on {embeddings.device}; "
            "move one to the other's device"
        )
    if ref_labels is not None:
        _check_labels("ref_labels", ref_labels, "ref_emb", ref_emb)


def check_indices(indices_tuple: tuple[Tensor, ...]) -> None:
    """Raise unless the tuple holds three or four one-dimensional integer index tensors."""
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        got = (
            f"{len(indices_tuple)} entries"
            if isinstance(indices_tuple, tuple | list)
            else type(indices_tuple).__name__
        )
        raise ValueError(
            "indices_tuple must be triplets (anchors, positives, negatives) or pairs "
            f"(anchors, positives, anchors, negatives), got {got}"
        )
    for i, index in enumerate(indices_tuple):
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"indices_tuple[{i}] must be an int64 tensor, got {kind}")
    partners = (0, 0, 0) if len(indices_tuple) == 3 else (0, 0, 2, 2)
    for i, partner in enumerate(partners):
        own, other = (indices_tuple[k].shape for k in (i, partner))
        if own != other or len(own) != 1:
            raise ValueError(
                f"the index tensors of a pair must be one-dimensional and of one length: "
                f"indices_tuple[{i}] has {own.numel()} entries "
                f"and indices_tuple[{partner}] {other.numel()}"
            )


def _check_matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape [N, D] with D >= 1, got shape {tuple(value.shape)}"
        )


def _check_labels(name: str, labels: Tensor, of: str, matrix: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise TypeError(f"{name} must be of an integer dtype or bool, got {labels.dtype}")
    if labels.dim() != 1 or labels.shape[0] != matrix.shape[0]:
        raise ValueError(
            f"{name} must have shape [{matrix.shape[0]}], one label for each row of {of}, "
            f"got shape {tuple(labels.shape)}"
        )
    if labels.device != matrix.device:
        raise ValueError(
            f"{name} is on {labels.device} and {of} on {matrix.device}; "
            "move one to the other's device"
        )


def _check_batch(embeddings: Tensor, ref_emb: Tensor | None) -> None:
    n = embeddings.shape[0]
    if n < (2 if ref_emb is None else 1):
        raise ValueError(
            f"embeddings has {n} row{'' if n == 1 else 's'}, and a row is compared with the others "
            "of its batch: at least 2 are needed. Where the last batch of an epoch is the cause, "
            "pass drop_last=True to the DataLoader"
        )


def _path(impl: str, embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str:
    """The path that `impl` means for this input."""
    if impl == "auto":
        return plan.choose(embeddings, ref_emb, spec)
    reason = PATHS[impl].refuses(embeddings, ref_emb, spec)
    if reason is not None:
        raise ValueError(f'impl={impl!r} does not take this input: {reason}; use impl="auto"')
    return impl


def _unknown(name: str, value: object, allowed: tuple[str, ...]) -> ValueError:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def _as_int64(labels: Tensor) -> Tensor:
    return labels if labels.dtype == torch.int64 else labels.to(torch.int64)


def _global_loss(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, target: Target
) -> Tensor | tuple[Tensor, BSTripletStats]:
    from .distributed import global_loss

    if ref_emb is not None:
        raise ValueError(
            "group and ref_emb were both given: with group the rows of all ranks are the reference"
        )
    assert target.group is not None
    loss, rows = global_loss(embeddings, labels, target.group, target.spec)
    return (loss, _stats(rows, target.spec)) if target.return_stats else loss


def _stats(rows: Rows, spec: Spec) -> BSTripletStats:
    positive, negative = (means.detach() for means in rows)
    active = hinge(Rows(positive, negative), spec) > 0
    return BSTripletStats(active.to(positive.dtype).mean(), positive.mean(), negative.mean())
