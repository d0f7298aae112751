"""The loss over pairs of rows, in a few launches; kernels are in `pair_kernels`.

Both sides are prepared once: brought to one scale, cast to the dtype of products, and padded. A
tile of S then needs no masks. The forward turns tiles into sums of rows, which one small kernel
finishes. The backward forms S anew and goes one of two ways. `_by_tiles` multiplies each tile of
weights with its columns at once and stores nothing of size N x M, but forms S anew for each slice
of D. `_by_panels` writes weights in the dtype of products, a bounded panel at a time, and one
product serves all of D. For half precision where all of S fits a panel, the forward keeps S, and
nothing is formed anew. Prepared rows, about as many bytes as the embeddings, are kept too.

float32 is multiplied as high + low, two float16 numbers that hold 22 bits of rows of one scale:
three half-precision products, exact to float32's own rounding. Where torch may round products
(`torch.set_float32_matmul_precision("high")`), high alone has tf32's bits, and one product is
enough. Half-precision and float64 rows are multiplied as they are.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...cost import round_up
from ...spec import Rows, Spec
from .blocks import (
    ROWS,
    Form,
    form_of,
    gradient_blocks,
    half_blocks,
    half_tiles,
    is_split,
    keeps_similarities,
    panel_rows,
    parts,
    product_blocks,
    product_parts,
    row_blocks,
    sum_blocks,
    weight_blocks,
)

PREPARED = 8
"""Rows that one program prepares."""
LABELS = 1024
"""Labels that such a program reads at once."""
FINISHED = 32
"""Rows whose sums one program finishes."""
_LARGEST_WEIGHT = 13  # its log2: four of such weights are below float16's largest number


@functools.cache
def kernels() -> ModuleType:
    """`pair_kernels`, imported when its first kernel runs."""
    from . import pair_kernels

    return pair_kernels


class Side(NamedTuple):
    """Rows or columns of S, padded with zeros to whole blocks; kernels take it as it is.

    high: [N', D']. float64: unit rows. float32: unit rows times 256, rounded to float16. Half
    precision: f_i times the power of two next above 1 / n_i, which rounds only elements below
    2^-14 n_i.
    low: what the rounding left, or [0] where one product is enough.
    scales: [2, N']: the factor from prepared to unit rows, for half precision alone; and that from
    f_i to prepared rows, without the 256.
    classes: [2, N'] int32: the first column with the row's label, M if none has it, -1 in padding;
    and, where the rows are columns, the size of each class at its first column.
    """

    high: Tensor
    low: Tensor
    scales: Tensor
    classes: Tensor

    @property
    def rows(self) -> int:
        """N', a multiple of `ROWS`."""
        return self.high.shape[0]


class Weights(NamedTuple):
    """The weights of rows' losses in dL/dS, for reduction "none" times the upstream.

    of_rows: [2, N'], for a row's positives and for its negatives; 0 if the row is not active.
    scale: scalar, the power of two that brings weights into float16's range.
    """

    of_rows: Tensor
    scale: Tensor


class Panel(NamedTuple):
    """Weights of some rows with all columns, as high + low; low is unused without split."""

    high: Tensor
    low: Tensor


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    dtype: torch.dtype,
    spec: Spec,
    panels: bool,
) -> tuple[Tensor, Rows, tuple[Tensor, ...]]:
    """The loss, Eq. 3's means, and what `backward` needs; panels: whether that goes by panels.

    dtype: see `Form`; where a side has another, its elements are widened as they are read.
    `backward` needs the rows' pulls (see `finish_rows`), their scale, the prepared rows, and the
    prepared columns or, without `ref_emb`, S if it is kept.
    """
    n, d = embeddings.shape
    m, own = n, True
    form = form_of(d, dtype, is_split(dtype), embeddings.device)
    side = columns = _prepare(form, embeddings, labels, ref_labels, spec.eps)
    more: tuple[Tensor, ...] = ()
    if ref_emb is not None and ref_labels is not None:
        m, own = ref_emb.shape[0], False
        more = columns = _prepare(form, ref_emb, ref_labels, None, spec.eps)
    if half_tiles(form, side.rows, own):
        keeps = panels and spec.wants_gradient and keeps_similarities(form, side.rows, own)
        slots, similarities = _own_row_sums(form, side, spec.signed, keeps)
        more = (similarities,) if keeps else ()
    else:
        slots = _row_sums(form, side, columns, own, spec.signed)
    row_loss, positive, negative = (slots.new_empty(n) for _ in range(3))
    pull, scale = slots.new_empty(2, side.rows), slots.new_empty(())
    mean = int(spec.reduction == "mean")
    kernels().finish_rows[(side.rows // FINISHED,)](
        slots, side, columns, row_loss, positive, negative, pull,
        n, m, columns.rows, slots.shape[1], int(own), mean, spec.margin, spec.sigma,
        PHI_SCALE=form.scale**-4, BLOCK_N=FINISHED, BLOCK_T=16, num_warps=4,
    )  # fmt: skip
    loss = row_loss
    if spec.reduction != "none":
        loss = row_loss.new_empty(())
        kernels().reduce_losses[(1,)](
            row_loss, pull, loss, scale, n, side.rows, mean,
            LARGEST=largest_weight(form), BLOCK_N=2048, num_warps=8,
        )  # fmt: skip
    return loss, Rows(positive, negative), (pull, scale, *side, *more)


def backward(
    upstream: Tensor,
    n: int,
    m: int | None,
    d: int,
    dtype: torch.dtype,
    kept: tuple[Tensor, ...],
    spec: Spec,
    panels: bool,
) -> tuple[Tensor, Tensor | None]:
    """dL/df of rows [n, d] and of `ref_emb` [m, d] or None, from what `forward` kept."""
    pull, scale, *tensors = kept
    side, more = Side(*tensors[:4]), tensors[4:]
    form = form_of(d, dtype, side.low.numel() > 0, side.high.device)
    weights = Weights(pull, scale)
    if spec.reduction == "none":
        weights = _weights_of(form, side, pull, upstream)
    own = side, weights
    if m is None:
        if more or panels:
            partial = _by_panels(form, *own, *own, True, spec.signed, *more)
        else:
            partial = _by_tiles(form, *own, *own, True, spec.signed)
        return _normalised(form, side, partial, weights.scale, upstream, n, d), None
    way = _by_panels if panels else _by_tiles
    columns = Side(*more)
    others = columns, Weights(pull.new_zeros(2, columns.rows), weights.scale)
    partial = way(form, *own, *others, False, spec.signed)
    gradient = _normalised(form, side, partial, weights.scale, upstream, n, d)
    del partial
    partial = way(form, *others, *own, False, spec.signed)
    return gradient, _normalised(form, columns, partial, weights.scale, upstream, m, d)


def _prepare(
    form: Form, embeddings: Tensor, labels: Tensor, column_labels: Tensor | None, eps: float
) -> Side:
    """The side of embeddings [N, D] with labels [N] against columns with `column_labels` [M].

    Without them the rows are the columns.
    """
    are_columns, labels = column_labels is None, labels.contiguous()
    column_labels = labels if column_labels is None else column_labels.contiguous()
    n, d = embeddings.shape
    rows = round_up(n, ROWS)
    high = embeddings.new_empty((rows, form.width), dtype=form.operand)
    side = Side(
        high,
        high.new_empty((rows, form.width) if form.split else 0),
        embeddings.new_empty((2, rows), dtype=form.accumulated),
        labels.new_empty((2, rows), dtype=torch.int32),
    )
    kernels().prepare_rows[(rows // PREPARED,)](
        embeddings, labels, column_labels, side,
        n, column_labels.shape[0], d, form.width, *embeddings.stride(), eps * eps,
        SCALE=form.scale, **form.constants, COLUMNS=are_columns,
        BLOCK_N=PREPARED, BLOCK_M=LABELS, BLOCK_D=row_blocks(form).d, num_warps=4,
    )  # fmt: skip
    return side


def _row_sums(form: Form, rows: Side, columns: Side, own: bool, signed: bool) -> Tensor:
    """Partial sums of phi over P_i and Q_i, times scale^4: [2, parts, N']."""
    blocks = sum_blocks(form)
    row_tiles, column_tiles = rows.rows // blocks.n, columns.rows // blocks.m
    shares = parts(row_tiles, column_tiles, form.processors)
    slots = rows.scales.new_empty(2, shares, rows.rows)
    kernels().tile_sums[row_tiles, shares](
        rows, columns, slots, form.width, column_tiles, int(signed),
        OWN=own, WHOLE=blocks.d == form.width, **form.constants,
        **blocks.options("BLOCK_N", "BLOCK_M", "BLOCK_D"),
    )  # fmt: skip
    return slots


def _own_row_sums(form: Form, side: Side, signed: bool, kept: bool) -> tuple[Tensor, Tensor]:
    """As `_row_sums` of rows with themselves, from half of S; and S in float16, [N', N'].

    kept: whether to write S, in tiles up to the diagonal. Without it S is [0].
    """
    blocks = half_blocks(form, side.rows)
    tiles = side.rows // blocks.n
    slots = side.scales.new_empty(2, tiles, side.rows)
    similarities = side.high.new_empty((side.rows,) * 2 if kept else 0, dtype=torch.float16)
    kernels().half_tile_sums[(tiles * (tiles + 1) // 2,)](
        side, slots, similarities, tiles, form.width,
        SIGNED=signed, KEPT=kept, **form.constants, **blocks.options("BLOCK_N", "BLOCK_D"),
    )  # fmt: skip
    return slots, similarities


def largest_weight(form: Form) -> int:
    """log2 of the size to which `Weights.scale` brings the largest weight."""
    # less those of scale^2, see `_pair_weights`
    return _LARGEST_WEIGHT - 2 * (int(form.scale).bit_length() - 1)


def _weights_of(form: Form, side: Side, pull: Tensor, upstream: Tensor) -> Weights:
    """Pulls [2, N'] times dL/dl_i [N]."""
    weight, scale = torch.empty_like(pull), pull.new_empty(())
    kernels().weigh_rows[(1,)](
        pull, upstream, weight, scale, upstream.shape[0], side.rows, upstream.stride(0),
        LARGEST=largest_weight(form), BLOCK_N=2048, num_warps=8,
    )  # fmt: skip
    return Weights(weight, scale)


def _by_tiles(
    form: Form,
    rows: Side,
    row_weights: Weights,
    columns: Side,
    column_weights: Weights,
    own: bool,
    signed: bool,
) -> Tensor:
    """Partial weighted sums of columns, [parts, N', D']: see `tile_gradient`."""
    blocks = gradient_blocks(form)
    row_tiles, slices = rows.rows // blocks.n, form.width // blocks.v
    column_tiles = columns.rows // blocks.m
    shares = parts(row_tiles * slices, column_tiles, form.processors)
    partial = rows.scales.new_empty(shares, rows.rows, form.width)
    kernels().tile_gradient[row_tiles, slices, shares](
        rows, row_weights, columns, column_weights, partial, form.width, column_tiles, int(signed),
        OWN=own, WHOLE=blocks.d == blocks.v == form.width, **form.constants,
        **blocks.options("BLOCK_N", "BLOCK_M", "BLOCK_D", "BLOCK_V"),
    )  # fmt: skip
    return partial


def _by_panels(
    form: Form,
    rows: Side,
    row_weights: Weights,
    columns: Side,
    column_weights: Weights,
    own: bool,
    signed: bool,
    similarities: Tensor | None = None,
) -> Tensor:
    """As `_by_tiles`, through panels of weights; similarities: S, where the forward kept it."""
    kept = similarities is not None
    step = panel_rows(form, rows.rows, columns.rows)
    blocks = weight_blocks(form, kept)
    high = rows.high.new_empty(step, columns.rows)
    panel = Panel(high, torch.empty_like(high) if form.split else rows.low)
    shares = product_parts(form, step, columns.rows)
    partial = rows.scales.new_empty(shares, rows.rows, form.width)
    mirrored = own and step == rows.rows
    column_tiles = columns.rows // blocks.m
    for first in range(0, rows.rows, step):
        last = min(first + step, rows.rows)
        row_tiles = (last - first) // blocks.n
        tiles = row_tiles * (row_tiles + 1) // 2 if mirrored else row_tiles * column_tiles
        kernels().tile_weights[(tiles,)](
            rows, row_weights, columns, column_weights, similarities, panel,
            form.width, first, rows.rows // blocks.n, column_tiles, int(signed),
            OWN=own, MIRRORED=mirrored, KEPT=kept, **form.constants,
            **blocks.options("BLOCK_N", "BLOCK_M", "BLOCK_D"),
        )  # fmt: skip
        if form.split:
            _add_products(form, partial, panel, columns, first, last)
        else:
            _multiply(high[: last - first], columns.high, partial[0, first:last])
    return partial


def _add_products(
    form: Form, partial: Tensor, panel: Panel, columns: Side, first: int, last: int
) -> None:
    """partial[:, first:last] = the panel's weights times the columns."""
    blocks = product_blocks(form)
    grid = (last - first) // blocks.n, form.width // blocks.v, partial.shape[0]
    kernels().weighted_rows[grid](
        panel, columns, partial, partial.shape[1], columns.rows // blocks.m, form.width, first,
        SPLIT=True, **blocks.options("BLOCK_N", "BLOCK_M", "BLOCK_V"),
    )  # fmt: skip


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; half-precision operands are accumulated in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and torch.version.hip is None:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _normalised(
    form: Form, side: Side, partial: Tensor, scale: Tensor, upstream: Tensor, n: int, d: int
) -> Tensor:
    """dL/df [n, d] in the accumulation dtype, from what `_by_tiles` or `_by_panels` returned.

    upstream: a scalar, which is multiplied in here, or [n], which the weights include already.
    """
    gradient = partial.new_empty(n, d)
    blocks = row_blocks(form)
    kernels().normalise_gradient[(-(-n // blocks.n),)](
        partial, side, scale, upstream, gradient,
        n, d, form.width, side.rows, partial.shape[0], int(upstream.dim() == 0),
        SCALE=form.scale, **form.constants, **blocks.options("BLOCK_N", "BLOCK_D"),
    )  # fmt: skip
    return gradient
