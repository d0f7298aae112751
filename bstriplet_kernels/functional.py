"""`bstriplet_loss`: check the input, choose the path, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import operators, plan, reference
from ._torch import (
    PLAIN_TENSORS,
    dispatches_itself,
    is_jit_traced,
    is_traced,
    is_transform_traced_above_autograd,
    numbers_of_shapes,
    without_autocast,
)
from .autograd import BatchSimilarity
from .checks import (
    Options,
    check_batch,
    check_embeddings,
    check_indices,
    check_shape,
    make_options,
    make_spec,
    refuse_input,
    refuse_named_impl,
    remembered_options,
)
from .spec import Rows, Spec, hinge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        similarity: "square"; "signed_square" for s|s| where cosines can be negative; or "linear"
            for s, Eq. 1's own form over a batch, where l_i reaches margin + 2.
        eq3: "corrected", or "printed" for the sign of the negatives' mean as typeset.
        reduction: "mean" (Eq. 4), "sum", or "none" for the [N] values l_i.
        ref_emb: [M, D], M >= 1; compare each row with these instead of with the batch. No
            self-pair is removed, N may then be 1, and gradient flows to both sides.
        ref_labels: [M], the labels of `ref_emb`.
        group: process group; the loss is that of the rows of all ranks together. Every rank must
            call the loss and gets the global one (with "none": its own rows). The backward gives
            world_size times the one-process gradient, because DistributedDataParallel divides by
            world_size: parameters see exactly the gradient of one process on the whole batch.
            Each rank gathers all rows and compares its own with them in plain torch, for any
            sizes: time grows with the square of the whole batch, memory with its size. `impl`
            must be "auto", and there is no second derivative.
        impl: "auto", or one of `available_impls()`: "reference" and "native" compare all pairs,
            "triton" does so in tiles, "gram" takes time linear in N (on a GPU "triton" stands in
            for it where there are few columns, and where ref_emb meets D above 2,048).
            similarity="signed_square" takes time quadratic in N by every path. "linear" runs by
            "gram" and "reference" alone.
        eps: a row of at most this norm is a zero row: similarity 0 to all, gradient 0.
        return_stats: also return `BSTripletStats`.

    Returns:
        The loss, a scalar or [N], float64 where `embeddings` or `ref_emb` is, else float32; with
        `return_stats` a pair (loss, BSTripletStats). NaN or infinity in the embeddings, or norms
        whose square overflows, give NaN.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
        RuntimeError: a named `impl` that cannot run here, saying what is missing; or `group` under
            torch.func or a tracer other than torch.compile.
    """
    given = margin, similarity, eq3, reduction, eps, impl, return_stats
    options = None
    if group is None and not is_dynamo_compiling():
        try:
            options = remembered_options(*given)
        except TypeError:  # of a wrong type, or unhashable: `make_options` raises the proper error
            options = None
    if options is None:
        options = make_options(*given, group)
    return compute(embeddings, labels, options, ref_emb, ref_labels)


_Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # the last two of ref_emb


def compute(
    embeddings: Tensor,
    labels: Tensor,
    options: Options,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, BSTripletStats]:
    """`bstriplet_loss` with checked options: check the tensors, plan, run."""
    if (
        type(embeddings) not in PLAIN_TENSORS
        or type(labels) not in PLAIN_TENSORS
        or (ref_emb is not None and type(ref_emb) not in PLAIN_TENSORS)
        or (ref_labels is not None and type(ref_labels) not in PLAIN_TENSORS)
        or options.group is not None
        or is_traced()
        or embeddings.is_meta
    ):
        return _compute_otherwise((embeddings, labels, ref_emb, ref_labels), options)
    wants_gradient = torch.is_grad_enabled() and (
        embeddings.requires_grad or (ref_emb is not None and ref_emb.requires_grad)
    )
    spec, path = plan.checked_plan(embeddings, labels, ref_emb, ref_labels, options, wants_gradient)
    if labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    if ref_labels is not None:
        ref_labels = ref_labels.to(torch.int64)
    others = labels, ref_labels, spec, path
    if not options.return_stats:
        return BatchSimilarity.apply(embeddings, ref_emb, others)
    loss, *rows = BatchSimilarity.apply(embeddings, ref_emb, others)
    return loss, _stats(Rows(*rows), spec)


def _compute_otherwise(given: _Given, options: Options) -> Tensor | tuple[Tensor, BSTripletStats]:
    """`compute` for subclasses of Tensor, traced calls, meta tensors and `group`."""
    if not is_dynamo_compiling():
        if has_torch_function(given):
            return _compute_by_class(given, options)
        embeddings, labels, ref_emb, ref_labels = plain = tuple(map(_undressed, given))
        if any(new is not old for new, old in zip(plain, given, strict=True)):
            return compute(embeddings, labels, options, ref_emb, ref_labels)
    embeddings, labels, ref_emb, ref_labels = given
    if options.group is None:
        return _compute_traced(*given, options)
    check_embeddings(*given)
    if not is_dynamo_compiling() and (
        is_traced() or embeddings.is_meta or any(map(dispatches_itself, (embeddings, labels)))
    ):
        raise RuntimeError(
            "group cannot be used under torch.export, make_fx, torch.jit.trace, torch.func or "
            "forward-mode AD, nor with meta or fake tensors: ranks exchange rows while the loss "
            "runs. torch.compile is fine"
        )
    return _global_loss(embeddings, labels.to(torch.int64), ref_emb, options)


def _compute_by_class(given: _Given, options: Options) -> Any:
    """Hand the whole call to a class with `__torch_function__`, as torch's own losses do.

    torch refuses to mix unrelated subclasses, so labels of an unrelated one are stripped.
    """
    embeddings, labels, ref_emb, ref_labels = given
    kinds = type(embeddings), type(labels)
    if has_torch_function((embeddings,)) and not (
        issubclass(*kinds) or issubclass(*reversed(kinds))
    ):
        labels = _undressed(labels)
    taken = embeddings, labels, ref_emb, ref_labels
    keywords = options.keywords | {"ref_emb": ref_emb, "ref_labels": ref_labels}
    if not options.return_stats:
        return handle_torch_function(bstriplet_loss, taken, embeddings, labels, **keywords)
    result = handle_torch_function(loss_and_stats, taken, embeddings, labels, **keywords)
    return result[0], BSTripletStats(result[1], result[2], result[3])


def loss_and_stats(embeddings: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """`bstriplet_loss` with `return_stats`, for a class with `__torch_function__`.

    Returns the loss and the three statistics in a plain tuple, where torch finds them to convert.
    """
    loss, stats = bstriplet_loss(embeddings, labels, **options)
    return loss, *stats


def _undressed(given: Any) -> Any:
    """Strip a subclass that overrides only `__torch_function__`; return the rest unchanged."""
    if type(given) in PLAIN_TENSORS or not isinstance(given, Tensor) or dispatches_itself(given):
        return given
    return given.as_subclass(Tensor)


def _compute_traced(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
) -> Tensor | tuple[Tensor, BSTripletStats]:
    """Call the operator, which reads sizes when it runs; here they may be symbols."""
    if is_transform_traced_above_autograd():
        raise RuntimeError(
            "a transform of torch.func traced above autograd (pre_dispatch=True) leaves a graph "
            "of constants; trace with pre_dispatch=False, or without the transform"
        )
    with numbers_of_shapes():
        check_embeddings(embeddings, labels, ref_emb, ref_labels)
        check_batch(embeddings, ref_emb)
        if options.impl != "auto" and not embeddings.is_meta:  # meta may be any device
            refuse_input(options.impl, embeddings, ref_emb, options.spec)
    # torch.jit.trace traces once more under no_grad, and both graphs must be the same.
    wants_gradient = (
        not is_jit_traced()
        and torch.is_grad_enabled()
        and any(side is not None and side.requires_grad for side in (embeddings, ref_emb))
    )
    spec = options.spec._replace(wants_gradient=wants_gradient)
    loss, means = operators.loss_and_means(
        embeddings, labels, ref_emb, ref_labels, spec, options.impl
    )
    return (loss, _stats(Rows(means[0], means[1]), spec)) if options.return_stats else loss


def compute_listed(
    embeddings: Tensor,
    indices_tuple: tuple[Tensor, ...],
    options: Options,
    ref_emb: Tensor | None = None,
) -> Tensor | tuple[Tensor, BSTripletStats]:
    """The loss over a miner's pairs instead of labels; see `BSTripletLoss.forward`."""
    if options.group is not None:
        raise ValueError("indices_tuple cannot be given together with group")
    if options.impl != "reference":
        refuse_named_impl(options.impl, "indices_tuple")
    with numbers_of_shapes():
        check_indices(indices_tuple)
        check_embeddings(embeddings, None, ref_emb, None)
        check_batch(embeddings, ref_emb)
    with without_autocast(embeddings.device):
        loss, rows = reference.listed_pairs_loss(embeddings, ref_emb, indices_tuple, options.spec)
    return (loss, _stats(rows, options.spec)) if options.return_stats else loss


def explain(
    embeddings: Tensor | Sequence[int],
    labels: Tensor | Sequence[int] | int,
    *,
    similarity: str = "square",
    reduction: str = "mean",
    ref_emb: Tensor | Sequence[int] | None = None,
    ref_labels: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> plan.Plan:
    """What `bstriplet_loss(..., impl="auto")` does with this input, forward and backward, and why.

    `print` the result: path, reason, FLOPs, bytes, peak extra memory, Eq. 8's figure, predicted
    times.

    Args:
        embeddings: as in `bstriplet_loss`, or a shape (N, D) without a tensor.
        labels: as in `bstriplet_loss`; their classes are counted, which waits for a GPU. For a
            shape: the number of classes or the size of each, with `ref_emb` those of its rows.
        similarity, reduction: as in `bstriplet_loss`.
        ref_emb: as in `bstriplet_loss`, or a shape (M, D).
        ref_labels: as in `bstriplet_loss`; None for a shape.
        dtype: the dtype of a shape; None is torch.float32.
        device: the device of a shape; None is "cpu". Where there is no GPU, "cuda" is an H200 with
            Triton and the native library.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """
    spec = make_spec(0.9, similarity, "corrected", reduction)._replace(wants_gradient=True)
    if not isinstance(embeddings, Tensor):
        described = check_shape(embeddings, labels, ref_emb, ref_labels, dtype, device)
        return plan.explain_shape(*described, spec)
    if dtype is not None or device is not None:
        raise TypeError("dtype and device belong to a shape; embeddings is a tensor with its own")
    given: tuple[Any, Any, Any, Any] = embeddings, labels, ref_emb, ref_labels
    check_embeddings(*given)
    check_batch(embeddings, given[2])
    return plan.explain_plan(*given, spec)


def _global_loss(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, options: Options
) -> Tensor | tuple[Tensor, BSTripletStats]:
    from .distributed import global_loss

    if ref_emb is not None:
        raise ValueError(
            "group and ref_emb were both given: with group the rows of all ranks are the reference"
        )
    assert options.group is not None
    loss, rows = global_loss(embeddings, labels, options.group, options.spec)
    return (loss, _stats(rows, options.spec)) if options.return_stats else loss


def _stats(rows: Rows, spec: Spec) -> BSTripletStats:
    positive, negative = (means.detach() for means in rows)
    active = hinge(Rows(positive, negative), spec) > 0
    return BSTripletStats(active.to(positive.dtype).mean(), positive.mean(), negative.mean())
