"""Eqs. 1-4 line by line in plain torch: the truth that every other path is judged by.

`forward` and `backward` are the reference path: the forward of Eqs. 2-4 and its analytic backward,
both over explicit N x M matrices and both differentiable. `naive_loss` is the form that the paper
prints (one-hot labels, B, D, a mean for each row; the cost of Eq. 8), left to autograd: the oracle
of the tests and the baseline of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cost import Cost, Work
from .spec import (
    Kept,
    Path,
    Rows,
    Spec,
    accumulation_dtype,
    denormalise_gradient,
    reduce_losses,
    row_gradient,
)


def normalise(embeddings: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """f_i / |f_i| ([N, D]) and 1 / |f_i| ([N]) in the embeddings' own dtype.

    A row of norm <= eps gives zeros and 0. Where |f_i|^2 overflows the dtype both are NaN, since
    scaling by 1 / inf would turn an overflow into a wrong finite similarity.
    """
    squared = (embeddings * embeddings).sum(dim=1, keepdim=True)
    is_zero = squared <= eps * eps
    inverse = torch.where(is_zero, torch.ones_like(squared), squared).rsqrt()
    inverse = torch.where(is_zero, torch.zeros_like(squared), inverse)
    inverse = torch.where(squared == torch.inf, torch.full_like(squared, torch.nan), inverse)
    return embeddings * inverse, inverse.squeeze(1)


def pair_weights(labels: Tensor, ref_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[2, N, M]: 1 where column j is a positive, or a negative, of row i (P_i and Q_i as masks).

    Without `ref_labels` the columns are the rows themselves and no row is its own positive.
    """
    columns = labels if ref_labels is None else ref_labels
    same = labels[:, None] == columns[None, :]
    other = ~same
    if ref_labels is None:
        same = same & ~torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    return torch.stack((same, other)).to(dtype)


def listed_pair_weights(
    indices: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """[2, N, M]: how often each pair is listed as a positive, and as a negative.

    indices: pairs (anchors, positives, anchors, negatives) or triplets (anchors, positives,
    negatives).
    Sums of ones are exact, so the result does not depend on the order of accumulation.
    """
    anchors, positives, *negative_anchors, negatives = indices
    lists = ((anchors, positives), (*(negative_anchors or [anchors]), negatives))
    weights = torch.zeros(2, *shape, dtype=dtype, device=anchors.device)
    for kind, (rows, columns) in enumerate(lists):
        one = torch.ones((), dtype=dtype, device=anchors.device)
        weights[kind].index_put_((rows, columns), one, accumulate=True)
    return weights


def row_means(similarity: Tensor, weights: Tensor, spec: Spec) -> Rows:
    """The two means of phi(S) in Eq. 3 over each row's positives and negatives."""
    phi = spec.similarity.phi(similarity)
    means = (weights * phi).sum(dim=2) / weights.sum(dim=2).clamp_min(1)
    return Rows(*means.unbind())


def similarity_gradient(similarity: Tensor, weights: Tensor, a: Tensor, spec: Spec) -> Tensor:
    """dL/dS [N, M] from a = dL/dl_i [h_i > 0]: each row's own share, not yet symmetrised."""
    slope = spec.similarity.slope(similarity)
    share = weights / weights.sum(dim=2, keepdim=True).clamp_min(1)
    return a[:, None] * (spec.sigma * share[1] - share[0]) * slope


class Units(NamedTuple):
    """Normalised rows [N, D] and columns [M, D] with 1 / norm, [N] and [M]."""

    rows: Tensor
    row_inverse: Tensor
    columns: Tensor
    column_inverse: Tensor


def units(embeddings: Tensor, ref_emb: Tensor | None, eps: float) -> Units:
    """f^ of both sides in the accumulation dtype; without `ref_emb` the columns are the rows."""
    if ref_emb is None:
        own = normalise(embeddings.to(accumulation_dtype(embeddings)), eps)
        return Units(*own, *own)
    dtype = accumulation_dtype(embeddings, ref_emb)
    return Units(*normalise(embeddings.to(dtype), eps), *normalise(ref_emb.to(dtype), eps))


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Rows, Kept]:
    """The reduced loss and the row means; columns are `ref_emb`, or the batch itself where None."""
    unit = units(embeddings, ref_emb, spec.eps)
    weights = pair_weights(labels, ref_labels, unit.rows.dtype)
    rows = row_means(unit.rows @ unit.columns.T, weights, spec)
    return reduce_losses(rows, spec), rows, Kept()


def backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    rows: Rows | None,
    kept: tuple[Tensor, ...],
    spec: Spec,
) -> tuple[Tensor, Tensor | None]:
    """dL/d(embeddings) and dL/d(ref_emb), in the accumulation dtype, by the analytic backward.

    With a_i = dL/dl_i where h_i > 0, else 0, and f^_i = f_i / n_i, without ref_emb:

        v_i = sum_j w_ij phi'(s_ij) f^_j        dL/df_i = (v_i - (v_i . f^_i) f^_i) / n_i
        w_ij = -(a_i / N_i+ + a_j / N_j+)       for another row of i's class
        w_ij = sigma (a_i / N_i- + a_j / N_j-)  for a row of another class

    because S holds each pair twice. With ref_emb only rows have a loss: a row keeps the terms of
    its own a_i, and a column gets those of the rows' a. Everything is computed anew from the
    embeddings, `rows` and `kept` are not used: differentiating this function gives the second
    derivative of the loss.
    """
    unit = units(embeddings, ref_emb, spec.eps)
    similarity = unit.rows @ unit.columns.T
    weights = pair_weights(labels, ref_labels, similarity.dtype)
    rows = row_means(similarity, weights, spec)
    a = row_gradient(grad_loss.to(similarity.dtype), rows, spec)
    ds = similarity_gradient(similarity, weights, a, spec)
    if ref_emb is None:  # S holds each pair twice: in row i and in row j
        v = (ds + ds.T) @ unit.rows
        return denormalise_gradient(v, unit.rows, unit.row_inverse), None
    grad_rows = denormalise_gradient(ds @ unit.columns, unit.rows, unit.row_inverse)
    grad_columns = denormalise_gradient(ds.T @ unit.rows, unit.columns, unit.column_inverse)
    return grad_rows, grad_columns


def listed_pairs_loss(
    embeddings: Tensor, ref_emb: Tensor | None, indices: tuple[Tensor, ...], spec: Spec
) -> tuple[Tensor, Rows]:
    """The loss where the means of Eq. 3 run over listed pairs, each as often as it is listed."""
    unit = units(embeddings, ref_emb, spec.eps)
    similarity = unit.rows @ unit.columns.T
    weights = listed_pair_weights(indices, similarity.shape, similarity.dtype)
    rows = row_means(similarity, weights, spec)
    return reduce_losses(rows, spec), rows


def naive_loss(embeddings: Tensor, labels: Tensor, margin: float = 0.9) -> Tensor:
    """Eqs. 2-4 as the paper computes them, scalar; its operations are those that Eq. 8 counts.

    embeddings [N, D] float, labels [N] integer. In order: normalised rows, S, one-hot labels,
    B = y^ y^T, D = S (2B - 1) without its diagonal (Eq. 2 as the text describes it), and each row's
    means of D+^2 and D-^2 (the second sign of Eq. 3 corrected). The gradient is autograd's.
    """
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    similarity = unit @ unit.T
    _, classes = torch.unique(labels, return_inverse=True)
    one_hot = torch.nn.functional.one_hot(classes).to(unit.dtype)
    b = one_hot @ one_hot.T
    off_diagonal = 1 - torch.eye(len(labels), dtype=unit.dtype, device=unit.device)
    d = similarity * (2 * b - 1) * off_diagonal
    positive = b * off_diagonal
    negative = 1 - b
    positive_mean = (d.square() * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    negative_mean = (d.square() * negative).sum(dim=1) / negative.sum(dim=1).clamp_min(1)
    return torch.relu(margin - positive_mean + negative_mean).mean()


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """The cost of dense matrices in plain torch; the backward computes S anew.

    Each sweep over N x M numbers is a separate operator. On a GPU each operator is a launch.
    """
    pairs, side = work.n * work.columns, work.vectors * work.d * work.accumulated
    own = work.m is None
    casts = len(work.narrow_sides)
    products, sweeps = 1, 12
    launches = (31 if own else 40) + casts
    if work.wants_gradient:
        products, sweeps = (3 if own else 4), 30
        launches += (48 if own else 62) + 2 * casts
    return Cost(
        flops=products * 2 * pairs * work.d + sweeps * pairs,
        bytes=sweeps * pairs * work.accumulated + (3 if work.wants_gradient else 1) * side,
        launches=0 if work.device == "cpu" else launches,
        extra_memory=_extra_memory(work),
    )


def _extra_memory(work: Work) -> int:
    """Peak bytes: N x M matrices, unit rows and columns, O(N).

    The forward ends with S, phi(S), two masks and phi(S) times each. The backward peaks with S, two
    masks, the slope, two shares and the two terms of dL/dS; or, where D is large, with S, two
    masks, dL/dS and the last three temporaries of a side's gradient.
    """
    number = work.accumulated
    pairs, vectors = work.n * work.columns * number, work.n * number
    rows, columns = vectors * work.d, (work.m or 0) * work.d * number
    units = rows + columns
    if not work.wants_gradient:
        widened = sum(work.narrow_sides) * work.d * number  # before any matrix exists
        return units + max(6 * pairs, widened) + 3 * vectors
    forming = 8 * pairs
    ending = 4 * pairs + max(3 * rows, rows + 3 * columns)
    return units + max(forming, ending) + 6 * vectors


PATH = Path(forward, backward, cost, keeps=False)
"""impl="reference"."""
