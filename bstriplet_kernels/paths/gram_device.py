"""The second-moment path where sizes must not be read: no shape depends on the labels.

Rows are sorted by class, classes without a moment matrix first. At most N / t classes have t
members or more, so a fixed number of moment matrices ("segments", the first of which holds all
smaller classes together) and of row tiles, none of which crosses a segment, serves any labels; what
is over is masked. A smaller class ends less than t rows from any of its members: a tile meets the
rows from t before to t behind it and masks other classes.

A row costs about 1.5 D x D products for the moments and 3 for the means, as much again in the
backward, and 4 and 8 for the band of small classes, whether or not there are any: the price of
asking nothing of the device. Sums have a fixed order: no atomics, the same bits from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import accumulation_dtype
from .second_moments import (
    class_weights,
    inverse_norms,
    others_share,
    own_share,
    through_normalisation,
)

CHUNK_NUMBERS = 1 << 24  # what the tiles computed at once may hold: 64 MiB of float32


class Layout(NamedTuple):
    """Rows in class order, [N] each. State of the path.

    order: the given index of a row. inverse: 1 / norm. members: rows of its class. first: where
    its class begins. segment: its moment matrix; 0 for classes that share the first one.
    """

    order: Tensor
    inverse: Tensor
    members: Tensor
    first: Tensor
    segment: Tensor


class Tiles(NamedTuple):
    """All row tiles: segment [K], rows [K, B] (positions in class order), valid [K, B].

    A row that is not valid has position N.
    """

    segment: Tensor
    rows: Tensor
    valid: Tensor


def smallest_moment(d: int) -> int:
    """Members from which a class has its own moment matrix, and the reach of the band."""
    return max(d, 32)


def segment_count(n: int, d: int) -> int:
    """Classes of `smallest_moment` members or more, one with most of the rows, and the rest."""
    return n // smallest_moment(d) + 2


def empty_outputs(embeddings: Tensor, ref_emb: Tensor | None) -> list[Tensor]:
    """Tensors shaped as what `forward` returns."""
    n, d = embeddings.shape
    dtype = accumulation_dtype(embeddings)
    vector = [embeddings.new_empty(n, dtype=dtype) for _ in range(3)]
    index = [embeddings.new_empty(n, dtype=torch.int64) for _ in range(4)]
    moments = embeddings.new_empty(segment_count(n, d), d, d, dtype=dtype)
    return [*vector[:2], moments, index[0], vector[2], *index[1:]]


def forward(
    embeddings: Tensor,
    ref_emb: Tensor | None,
    labels: Tensor,
    ref_labels: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """[positive [N], negative [N], *state]: the two means of Eq. 3, and what `gradients` wants."""
    batch = Batch(embeddings, make_layout(embeddings, labels, eps))
    ones = torch.ones_like(batch.layout.inverse)
    moments = batch.moments(ones)
    positive, negative = batch.means(moments, ones)
    return [positive, negative, moments, *batch.layout]


def gradients(
    a: Tensor, embeddings: Tensor, ref_emb: Tensor | None, state: list[Tensor], sigma: float
) -> list[Tensor]:
    """[dL/d(embeddings)] for a = dL/dl [h > 0], [N]."""
    moments, *layout = state
    batch = Batch(embeddings, Layout(*layout))
    return [batch.gradient(a[batch.layout.order], moments, sigma)]


def make_layout(embeddings: Tensor, labels: Tensor, eps: float) -> Layout:
    """Sort by class, then classes without a moment matrix of their own to the front."""
    n, d = embeddings.shape
    labels, order = labels.sort(stable=True)
    first = torch.searchsorted(labels, labels)
    members = torch.searchsorted(labels, labels, right=True) - first
    large = (members >= smallest_moment(d)) | (2 * members > n)
    moved = large.to(torch.uint8).sort(stable=True).indices
    here = torch.arange(n, device=labels.device)
    first = here - (moved - first[moved])
    segment = ((first == here) & large[moved]).cumsum(0)
    order = order[moved]
    inverse = inverse_norms(embeddings, eps, accumulation_dtype(embeddings))[order]
    return Layout(order, inverse, members[moved], first, segment)


class Batch:
    """The embeddings [N, D] in class order, cut into tiles."""

    def __init__(self, embeddings: Tensor, layout: Layout) -> None:
        self.embeddings, self.layout = embeddings, layout
        n, d = embeddings.shape
        self.reach = smallest_moment(d)
        self.width = max(16, d // 2)
        self.p, self.q = (
            w.to(layout.inverse.dtype) for w in class_weights(layout.members, n, own=True)
        )
        self.small = layout.segment == 0
        every = torch.arange(segment_count(n, d), device=embeddings.device)
        self.ends = torch.searchsorted(layout.segment, every, right=True)
        self.starts = torch.searchsorted(layout.segment, every)
        at = self.starts.clamp(max=n - 1)
        shared = every == 0
        # The rows of segment 0 have weights of their own; they enter as weights of its rows.
        self.segment_p = self.p[at].masked_fill(shared, 0.0)
        self.segment_q = self.q[at].masked_fill(shared, 1.0)
        self.row_q = torch.where(self.small, self.q, torch.ones_like(self.q))
        self.dominates = (2 * (self.ends - self.starts) > n) & ~shared
        self.tiles = self.make_tiles()

    def make_tiles(self) -> Tiles:
        """ceil(N / B) + one more a segment: as many as any labels can need."""
        n, device = len(self.small), self.small.device
        needed = (self.ends - self.starts + self.width - 1) // self.width
        until = needed.cumsum(0)
        index = torch.arange(-(-n // self.width) + len(needed), device=device)
        segment = torch.searchsorted(until, index, right=True).clamp(max=len(needed) - 1)
        start = self.starts[segment] + (index - (until - needed)[segment]) * self.width
        rows = start[:, None] + torch.arange(self.width, device=device)
        valid = rows < self.ends[segment][:, None]
        return Tiles(segment, rows.masked_fill(~valid, n), valid)

    def chunks(self) -> Iterator[Tiles]:
        """The tiles, some at once."""
        d = self.embeddings.shape[1]
        window = self.width + 2 * self.reach
        size = max(1, CHUNK_NUMBERS // (6 * d * d + 2 * (window + self.width) * (d + self.width)))
        for parts in zip(*(t.split(size) for t in self.tiles), strict=True):
            yield Tiles(*parts)

    def units(self, rows: Tensor) -> Tensor:
        """Unit rows [*rows.shape, D] at positions; zeros at positions outside of 0..N-1."""
        inside = (rows >= 0) & (rows < len(self.small))
        at = rows.clamp(0, len(self.small) - 1)
        unit = self.embeddings[self.layout.order[at]].to(self.layout.inverse.dtype)
        scaled = unit.mul_(self.layout.inverse[at].unsqueeze(-1))
        return scaled.masked_fill_(~inside.unsqueeze(-1), 0.0)

    def moments(self, weights: Tensor) -> Tensor:
        """sum_j w_j u_j u_j^T over each segment, [segments, D, D]; weights [N] in class order."""
        d = self.embeddings.shape[1]
        total = weights.new_zeros(len(self.dominates), d, d)
        for tiles in self.chunks():
            unit = self.units(tiles.rows)
            products = (unit * self.at(weights, tiles).unsqueeze(-1)).mT @ unit
            total += segment_sums(products, tiles.segment, len(total))
        return total

    def at(self, values: Tensor, tiles: Tiles) -> Tensor:
        """Values [N] of the rows of tiles, [K, B]; what stands at rows not valid is not used."""
        return values[tiles.rows.clamp(max=len(values) - 1)]

    def others(self, matrices: Tensor, scale: Tensor) -> Others:
        """Sums over segments of scale * matrix, for all and for all but a dominating one."""
        flat = matrices.flatten(1)
        rest, large = (
            (scale.masked_fill(mask, 0.0) @ flat).view_as(matrices[0])
            for mask in (self.dominates, ~self.dominates)
        )
        return Others(rest, rest + large, matrices, scale)

    def own_and_others(self, others: Others, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """For each tile its class's matrix and the scaled sum of the others, [K, D, D] each.

        Small classes are in the sum of the others: the band takes them out again.
        """
        segment = tiles.segment
        own = others.matrices[segment].masked_fill_((segment == 0)[:, None, None], 0.0)
        without = others.total - own * others.scale[segment][:, None, None]
        return own, torch.where(self.dominates[segment][:, None, None], others.rest, without)

    def band(self, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """Members of small classes near tiles: positions [K, W], units [K, W, D], mask [K, B, W].

        The mask is 1 where row and column are two rows of one small class.
        """
        n, device = len(self.small), self.small.device
        offsets = torch.arange(-self.reach, self.width + self.reach, device=device)
        columns = tiles.rows[:, :1] + offsets
        inside = (columns >= 0) & (columns < n)
        first = self.layout.first[columns.clamp(0, n - 1)]
        same = self.at(self.layout.first, tiles)[:, :, None] == first[:, None, :]
        same &= (self.at(self.small, tiles) & tiles.valid)[:, :, None] & inside[:, None, :]
        same &= tiles.rows[:, :, None] != columns[:, None, :]
        return columns.clamp(0, n - 1), self.units(columns), same

    def means(self, moments: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        """The two means of Eq. 3 for each row, [N] each in the given order."""
        others = self.others(moments, torch.ones_like(self.segment_q))
        result = [ones.new_zeros(len(ones) + 1) for _ in range(2)]
        self_sums = (self.layout.inverse != 0).to(ones.dtype)  # |u|^4
        for tiles in self.chunks():
            unit = self.units(tiles.rows)
            own_sums, other_sums = (
                torch.linalg.vecdot(unit @ m, unit) for m in self.own_and_others(others, tiles)
            )
            _, near, same = self.band(tiles)
            near_sums = torch.where(same, (unit @ near.mT).square_(), 0.0).sum(2)
            small = self.at(self.small, tiles)
            self_sum = self.at(self_sums, tiles)
            positive = torch.where(small, near_sums, own_sums - self_sum)
            negative = torch.where(small, other_sums - near_sums - self_sum, other_sums)
            to = torch.where(tiles.valid, self.given(tiles), len(ones)).flatten()
            for out, sums, weight in zip(
                result, (positive, negative), (self.p, self.q), strict=True
            ):
                out.index_copy_(0, to, (sums * self.at(weight, tiles)).flatten())
        return result[0][:-1].clone(), result[1][:-1].clone()

    def given(self, tiles: Tiles) -> Tensor:
        """Given indices of the rows of tiles, [K, B]."""
        return self.at(self.layout.order, tiles)

    def gradient(self, a: Tensor, moments: Tensor, sigma: float) -> Tensor:
        """dL/d(embeddings), [N, D] in the given order, for a [N] in class order."""
        n, d = self.embeddings.shape
        of_columns = self.others(moments, torch.ones_like(self.segment_q))
        of_rows = self.others(self.moments(a * self.row_q), self.segment_q)
        p, q = self.segment_p[:, None, None], self.segment_q[:, None, None]
        gradient = self.embeddings.new_empty(n + 1, d)
        for tiles in self.chunks():
            unit, segment = self.units(tiles.rows), tiles.segment
            own, others = self.own_and_others(of_columns, tiles)
            v = unit @ own_share(own, others, p[segment], q[segment], sigma)
            v *= self.at(a * self.row_q, tiles).unsqueeze(-1)
            own, others = self.own_and_others(of_rows, tiles)
            v += unit @ others_share(own, others, p[segment], sigma)
            columns, near, same = self.band(tiles)
            pairs = self.at(a, tiles)[:, :, None] + a[columns][:, None, :]
            pairs = torch.where(same, pairs * (unit @ near.mT), 0.0)
            scale = -2 * (self.p + sigma * self.q)
            v += (pairs @ near) * self.at(scale, tiles).unsqueeze(-1)
            inverse = self.at(self.layout.inverse, tiles)
            v = through_normalisation(v.flatten(0, 1), unit.flatten(0, 1), inverse.flatten())
            to = torch.where(tiles.valid, self.given(tiles), n).flatten()
            gradient.index_copy_(0, to, v.to(gradient.dtype))
        return gradient[:n]


class Others(NamedTuple):
    """Sums over segments of scale * matrix: all but the dominating one, and all; [D, D].

    matrices: [segments, D, D]; scale: [segments].
    """

    rest: Tensor
    total: Tensor
    matrices: Tensor
    scale: Tensor


def segment_sums(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sums of values [K, ...] over runs of equal `segment` [K], ascending, -> [count, ...]."""
    every = torch.arange(count + 1, device=segment.device)
    offsets = torch.searchsorted(segment, every)
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True)
