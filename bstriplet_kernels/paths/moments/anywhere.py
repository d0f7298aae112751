"""Second moments in plain torch on any device. The host never waits: no shape depends on labels.

Rows are sorted by class: small classes first, a class that holds most rows last. A class of t
members or more is large and has a moment matrix, its segment; all small classes share segment 0. At
most N / t classes are large, so a fixed number of segments serves any labels, and so does a fixed
number of row tiles, none of which crosses a segment. What is left over is masked. A small class
ends less than t rows behind any of its members, so each block of rows meets the t rows behind it,
and each pair counts for both rows.

A row costs 5.75 products with a D x D matrix forward: 1.5 for its class's moments and 1.5 for its
form of them (tiles are padded), 1.5 for the moments of all others, 1.25 for the band of small
classes, whether or not there are any. The backward costs 9.5. That is the price of asking nothing
of the device. Sums have a fixed order, so the bits are the same from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...cost import Cost, Work, round_up
from ...spec import Rows, accumulation_dtype, denormalise_gradient
from .mathematics import class_weights, inverse_norms

CHUNK_NUMBERS = 1 << 24  # of what is computed at once: 64 MiB of float32


class Layout(NamedTuple):
    """Rows in class order, [N] each.

    order: the row's index in the batch. inverse: 1 / norm. members: how many rows its class has.
    first: where its class begins. segment: the number of its moment matrix, 0 for small classes.
    """

    order: Tensor
    inverse: Tensor
    members: Tensor
    first: Tensor
    segment: Tensor


class Tiles(NamedTuple):
    """Row tiles: segment [K], rows [K, B] as positions in class order; N where there is none."""

    segment: Tensor
    rows: Tensor


class BandBlocks(NamedTuple):
    """Consecutive blocks of rows, each with the rows behind it that may share its small classes.

    start: the first position. own: unit rows of each block, [k, b, D]. near: the same and those
    behind, [k, W, D]. apart: [k, b, W], whether two rows are one, or not of one small class.
    """

    start: int
    own: Tensor
    near: Tensor
    apart: Tensor


class SplitMoments(NamedTuple):
    """A sum over all segments in two parts, [D, D] each: without a dominating one, and that one."""

    rest: Tensor
    dominating: Tensor


def smallest_moment(d: int) -> int:
    """Members of the smallest large class; the band reaches as many rows."""
    return max(d, 32)


def segment_count(n: int, d: int) -> int:
    """Segments for as many large classes as there can be, a dominating one, and segment 0."""
    return n // smallest_moment(d) + 2


def numbers_at_once(n: int, d: int) -> int:
    """How many numbers are computed at once.

    From 2^26 numbers of embeddings on it is a quarter of them, so that launches stop growing.
    """
    return max(CHUNK_NUMBERS, n * d // 4)


def tiles_at_once(n: int, d: int) -> int:
    """Row tiles of a chunk: each has four arrays of its rows and two [D, D] matrices."""
    width = max(16, d // 2)
    return max(1, numbers_at_once(n, d) // (2 * d * d + 4 * width * d))


def blocks_at_once(n: int, d: int) -> int:
    """Blocks of a chunk: each has six arrays of its rows and four of its band of S."""
    block = max(16, d // 4)
    window = block + round_up(smallest_moment(d), block)
    return max(1, numbers_at_once(n, d) // (block * (4 * window + 6 * d)))


def means(
    embeddings: Tensor,
    ref_emb: None,
    labels: Tensor,
    ref_labels: None,
    eps: float,
) -> tuple[Rows, tuple[Tensor, ...]]:
    """The two means of Eq. 3, and what `gradients` needs."""
    batch = TiledRows(embeddings, make_layout(embeddings, labels, eps))
    moments = batch.moments()
    return batch.means(moments), (moments, *batch.layout)


def gradients(
    a: Tensor, embeddings: Tensor, ref_emb: None, kept: tuple[Tensor, ...], sigma: float
) -> tuple[Tensor, None]:
    """dL/d(embeddings) for a = dL/dl [h > 0], [N]."""
    moments, *layout = kept
    batch = TiledRows(embeddings, Layout(*layout))
    return batch.gradient(a[batch.layout.order], moments, sigma), None


def make_layout(embeddings: Tensor, labels: Tensor, eps: float) -> Layout:
    """Sort by class, small classes first and a dominating one last."""
    n, d = embeddings.shape
    labels, order = labels.sort(stable=True)
    first = torch.searchsorted(labels, labels)
    members = torch.searchsorted(labels, labels, right=True) - first
    dominates = dominating(members, n)
    large = (members >= smallest_moment(d)) | dominates
    moved = (large.to(torch.uint8) + dominates).sort(stable=True).indices
    here = torch.arange(n, device=labels.device)
    first = here - (moved - first[moved])
    segment = ((first == here) & large[moved]).cumsum(0)
    order = order[moved]
    inverse = inverse_norms(embeddings, eps, accumulation_dtype(embeddings))[order]
    return Layout(order, inverse, members[moved], first, segment)


def dominating(members: Tensor, n: int) -> Tensor:
    """Whether a class has most of the n rows, so that T - T_c would cancel."""
    return 2 * members > n


class TiledRows:
    """The embeddings [N, D] in class order, cut into tiles and into blocks.

    Blocks reach beyond N. What they look up there is a row of the batch without NaN or inf, scaled
    by 0 (0 times NaN is NaN) and in no small class.
    """

    def __init__(self, embeddings: Tensor, layout: Layout) -> None:
        self.embeddings, self.layout = embeddings, layout
        n, d = embeddings.shape
        self.width = max(16, d // 2)
        self.block = max(16, d // 4)
        self.blocks_behind = -(-smallest_moment(d) // self.block)
        self.p, self.q = (
            w.to(layout.inverse.dtype) for w in class_weights(layout.members, n, own=True)
        )
        self.small = layout.segment == 0
        self.row_dominates = dominating(layout.members, n)
        every = torch.arange(segment_count(n, d), device=embeddings.device)
        self.ends = torch.searchsorted(layout.segment, every, right=True)
        self.starts = torch.searchsorted(layout.segment, every)
        self.dominates = dominating(self.ends - self.starts, n) & (every != 0)
        self.tiles = self.make_tiles()
        beyond = (0, -n % self.block + self.blocks_behind * self.block)
        finite = layout.inverse.isfinite().to(torch.uint8).argmax(0, keepdim=True)
        self.source = torch.cat([layout.order, layout.order[finite].expand(beyond[1])])
        self.inverse = pad(layout.inverse, beyond)
        alone = -1 - torch.arange(n + beyond[1], device=embeddings.device)
        self.key = torch.where(pad(self.small, beyond), pad(layout.first, beyond), alone)

    def make_tiles(self) -> Tiles:
        """ceil(N / B) + one more for each segment: as many tiles as any labels can need.

        Tiles that are left over belong to the last segment with rows, so that numbers of segments
        have no gap.
        """
        n, device = len(self.small), self.small.device
        needed = (self.ends - self.starts + self.width - 1) // self.width
        until = needed.cumsum(0)
        index = torch.arange(-(-n // self.width) + len(needed), device=device)
        segment = torch.searchsorted(until, index, right=True).minimum(self.layout.segment[-1])
        start = self.starts[segment] + (index - (until - needed)[segment]) * self.width
        rows = start[:, None] + torch.arange(self.width, device=device)
        return Tiles(segment, rows.masked_fill(rows >= self.ends[segment][:, None], n))

    def chunks(self) -> Iterator[Tiles]:
        """The tiles, a chunk at a time."""
        size = tiles_at_once(*self.embeddings.shape)
        for parts in zip(*(t.split(size) for t in self.tiles), strict=True):
            yield Tiles(*parts)

    def blocks(self) -> Iterator[BandBlocks]:
        """All rows in blocks, a chunk at a time; rows beyond N are zeros of no class."""
        n, d = self.embeddings.shape
        behind = self.blocks_behind * self.block
        window = self.block + behind
        size = blocks_at_once(n, d)
        for start in range(0, n, size * self.block):
            count = min(size, -(-(n - start) // self.block))
            rows = slice(start, start + count * self.block + behind)
            unit, key = self.units(rows), self.key[rows]
            own = slice(count * self.block)
            apart = key[own].view(count, -1, 1) != key.unfold(0, window, self.block)[:, None]
            apart.diagonal(dim1=1, dim2=2).fill_(True)  # no row is its own pair
            yield BandBlocks(
                start,
                unit[own].view(count, self.block, d),
                unit.unfold(0, window, self.block).mT,
                apart,
            )

    def units(self, rows: Tensor | slice) -> Tensor:
        """Unit rows [*rows.shape, D] at positions; zeros at positions from N on."""
        unit = self.embeddings[self.source[rows]].to(self.inverse.dtype)
        return unit.mul_(self.inverse[rows].unsqueeze(-1))

    def moments(self, weights: Tensor | None = None) -> Tensor:
        """sum_j w_j u_j u_j^T over each segment, [segments, D, D]; weights: w [N] in class order.

        None: all weights are 1. A chunk first sums its tiles by segment, in their order. Then
        `index_add_` adds at most one number other than 0 to each place, so that its atomics cannot
        change the bits.
        """
        d = self.embeddings.shape[1]
        if weights is not None:
            weights = pad(weights, (0, 1))
        total = self.inverse.new_zeros(len(self.dominates), d, d)
        count = torch.arange(len(self.tiles.segment) + 1, device=total.device)
        for tiles in self.chunks():
            unit = self.units(tiles.rows)
            weighted = unit if weights is None else unit * weights[tiles.rows].unsqueeze(-1)
            segment = tiles.segment[:1] + count[: len(tiles.segment) + 1]
            ends = torch.searchsorted(tiles.segment, segment)
            sums = torch.segment_reduce(
                weighted.mT @ unit, "sum", offsets=ends, axis=0, unsafe=True
            )
            total.index_add_(0, segment[:-1].clamp(max=len(total) - 1), sums)
        return total

    def together(self, matrices: Tensor, scale: Tensor) -> SplitMoments:
        """The sum over segments of scale [segments] times matrix [segments, D, D]."""
        scales = torch.stack([scale.masked_fill(m, 0.0) for m in (self.dominates, ~self.dominates)])
        return SplitMoments(*(scales @ matrices.flatten(1)).unflatten(1, matrices.shape[1:]))

    def times(self, blocks: BandBlocks, moments: SplitMoments) -> Tensor:
        """Rows [k b, D] times all moments; rows of a dominating class without that one's."""
        unit = blocks.own.flatten(0, 1)
        product = unit @ moments.rest
        few = min((len(self.small) + 1) // 2 - blocks.start, len(unit))  # rows of others come first
        if few > 0:
            aside = self.row_dominates[blocks.start :][:few]
            few = len(aside)
            add = (unit[:few] @ moments.dominating).masked_fill_(aside.unsqueeze(1), 0.0)
            product[:few].add_(add)
        return product

    def means(self, moments: Tensor) -> Rows:
        """The two means of Eq. 3 for each row, in the given order."""
        n = len(self.small)
        own = moments.new_zeros(n + 1)
        for tiles in self.chunks():
            unit = self.units(tiles.rows)
            forms = torch.linalg.vecdot(unit @ moments[tiles.segment], unit)
            own.index_copy_(0, tiles.rows.flatten(), forms.flatten())
        own = own[:n]
        whole = self.together(moments, torch.ones_like(moments[:, 0, 0]))
        every, near = moments.new_zeros(2, n + (self.blocks_behind + 1) * self.block)
        for blocks in self.blocks():
            unit = blocks.own.flatten(0, 1)
            here = slice(blocks.start, blocks.start + len(unit))
            every[here] = torch.linalg.vecdot(self.times(blocks, whole), unit)
            squares = (blocks.own @ blocks.near.mT).square_().masked_fill_(blocks.apart, 0.0)
            near[here].add_(squares.sum(2).flatten())
            self.add_behind(near[blocks.start :], squares[:, :, self.block :].sum(1))
        every, near = every[:n], near[:n]
        itself = (self.layout.inverse != 0).to(own.dtype)  # |u|^4
        positive = torch.where(self.small, near, own - itself)
        taken_out = torch.where(self.small, near + itself, own.masked_fill(self.row_dominates, 0.0))
        positive, negative = positive * self.p, (every - taken_out) * self.q
        return Rows(self.given(positive), self.given(negative))

    def add_behind(self, total: Tensor, parts: Tensor) -> None:
        """total[(k + s) b + r] += parts[k, (s - 1) b + r] for each block k and each s behind it."""
        for s, part in enumerate(parts.split(self.block, dim=1), start=1):
            total[s * self.block :][: len(parts) * self.block].unflatten(0, part.shape[:2]).add_(
                part
            )

    def given(self, values: Tensor) -> Tensor:
        """Values [N] in the given order."""
        return torch.empty_like(values).index_copy_(0, self.layout.order, values)

    def gradient(self, a: Tensor, moments: Tensor, sigma: float) -> Tensor:
        """dL/d(embeddings), [N, D] in the given order, for a [N] in class order."""
        n, d = self.embeddings.shape
        gradient = a.new_empty(n + 1, d)
        self.write_others_share(gradient, a, moments, sigma)
        # A row's weight of its own T_c and A_c: -2 p, and -2 sigma q to take them out of the sums
        # over all classes. The sums for a dominating class are without it.
        of_row = -2 * (self.p + (sigma * self.q).masked_fill(self.row_dominates, 0.0))
        first = self.starts.clamp(max=n - 1)
        shared = torch.arange(len(first), device=first.device) == 0
        of_segment = of_row[first].masked_fill(shared, 0.0)
        back = self.moments(a * torch.where(self.small, self.q, 1.0))
        whole = self.together(back, self.q[first].masked_fill(shared, 1.0))
        back.mul_(of_segment[:, None, None]).add_(2 * sigma * whole.rest)
        back.addcmul_(2 * sigma * whole.dominating, (~self.dominates)[:, None, None].to(back.dtype))
        scale = pad(a * of_segment[self.layout.segment], (0, 1))
        order = pad(self.layout.order, (0, 1), value=n)
        for tiles in self.chunks():
            unit, to = self.units(tiles.rows), order[tiles.rows]
            scaled = unit * scale[tiles.rows].unsqueeze(-1)
            v = gradient[to]
            torch.baddbmm(v, scaled, moments[tiles.segment], out=v)
            torch.baddbmm(v, unit, back[tiles.segment], out=v)
            v, unit = v.flatten(0, 1), unit.flatten(0, 1)
            v = denormalise_gradient(v, unit, self.inverse[tiles.rows].flatten())
            gradient.index_copy_(0, to.flatten(), v)
        return gradient[:n]

    def write_others_share(
        self, gradient: Tensor, a: Tensor, moments: Tensor, sigma: float
    ) -> None:
        """Write dL/d(unit rows): own shares from all moments, and pairs within small classes."""
        n, d = self.embeddings.shape
        behind = self.blocks_behind * self.block
        whole = self.together(moments, torch.ones_like(moments[:, 0, 0]))
        padded = pad(a, (0, behind + self.block))
        of_pairs = (-2 * (self.p + sigma * self.q)).unsqueeze(1)
        of_all = (2 * sigma * a * self.q).unsqueeze(1)
        carried = moments.new_zeros(behind, d)
        gradient[n:].zero_()
        for blocks in self.blocks():
            count, rows = len(blocks.own), blocks.own.shape[0] * blocks.own.shape[1]
            near_a = padded[blocks.start :][: rows + behind]
            pairs = near_a[:rows].view(count, -1, 1) + near_a.unfold(
                0, behind + self.block, self.block
            ).unsqueeze(1)
            pairs.mul_(blocks.own @ blocks.near.mT).masked_fill_(blocks.apart, 0.0)
            v = pad(carried, (0, 0, 0, rows))
            v[:rows].add_((pairs @ blocks.near).flatten(0, 1))
            self.add_behind(v, pairs[:, :, self.block :].mT @ blocks.own)
            carried = v[rows:].clone()
            here = slice(blocks.start, min(blocks.start + rows, n))
            v = v[: here.stop - here.start].mul_(of_pairs[here])
            v.addcmul_(self.times(blocks, whole)[: len(v)], of_all[here])
            gradient.index_copy_(0, self.layout.order[here], v)


class Extent(NamedTuple):
    """Sizes and numbers of the schedule's pieces."""

    width: int
    block: int
    window: int
    segments: int
    tiles: int
    tile_chunks: int
    block_chunks: int


def extent(n: int, d: int) -> Extent:
    """Those of n rows of d numbers, for any labels."""
    width, block = max(16, d // 2), max(16, d // 4)
    segments = segment_count(n, d)
    tiles = -(-n // width) + segments
    return Extent(
        width,
        block,
        block + round_up(smallest_moment(d), block),
        segments,
        tiles,
        -(-tiles // tiles_at_once(n, d)),
        -(-n // (blocks_at_once(n, d) * block)),
    )


def cost(work: Work, class_sizes: Sequence[int]) -> Cost:
    """What `means` and, where a gradient is wanted, `gradients` do; the same for any classes.

    flops: of products alone. bytes: what every operator reads and writes, as if nothing stayed in a
    cache. launches: one for each operator, though a sort, a scan or a reduction over segments is
    several kernels. The hinge and the reduction of the loss, a dozen launches, are not counted.
    """
    parts = [_forward_counts(work), *([_backward_counts(work)] if work.wants_gradient else ())]
    flops, bytes_, launches = (sum(each) for each in zip(*parts, strict=True))
    return Cost(flops, bytes_, launches, _extra_memory(work))


class _Counts(NamedTuple):
    flops: int
    bytes: int
    launches: int


def _forward_counts(work: Work) -> _Counts:
    n, d, number = work.n, work.d, work.accumulated
    e = extent(n, d)
    rows, blocked = e.tiles * e.width, round_up(n, e.block)
    tiles, matrices, band = e.tiles * d * d, e.segments * d * d, blocked * e.window
    read = 2 * _unit_bytes(work, rows) + _unit_bytes(work, blocked + _overlap(e))
    numbers = 9 * tiles + 2 * matrices + 8 * rows * d + 12 * n * d + 7 * band
    per_row = n * (_LAYOUT_BYTES + _SETUP_BYTES) + n * d * work.dtype.itemsize
    of_tiles, of_blocks = 19 + 2 * work.casts, 14 + work.casts + _blocks_behind(e)
    return _Counts(
        flops=2 * d * (d * (2 * rows + blocked + (n + 1) // 2 + 2 * e.segments) + band),
        bytes=read + number * numbers + 2 * band + per_row,
        launches=_setup_launches(work, 106)
        + of_tiles * e.tile_chunks
        + of_blocks * e.block_chunks
        + 3 * _chunks_aside(work, e),
    )


def _backward_counts(work: Work) -> _Counts:
    n, d, number = work.n, work.d, work.accumulated
    e = extent(n, d)
    rows, blocked = e.tiles * e.width, round_up(n, e.block)
    tiles, matrices, band = e.tiles * d * d, e.segments * d * d, blocked * e.window
    behind = _blocks_behind(e)
    read = 2 * _unit_bytes(work, rows) + _unit_bytes(work, blocked + _overlap(e))
    numbers = 12 * tiles + 9 * matrices + 25 * rows * d + (22 + 4 * behind) * n * d + 10 * band
    of_tiles, of_blocks = 30 + 2 * work.casts, 17 + work.casts + behind
    products = 3 * rows + blocked + (n + 1) // 2 + 4 * e.segments
    return _Counts(
        flops=2 * d * (d * products + 2 * band + blocked * (e.window - e.block)),
        bytes=read + number * numbers + 2 * band + n * _SETUP_BYTES,
        launches=_setup_launches(work, 104)
        + of_tiles * e.tile_chunks
        + of_blocks * e.block_chunks
        + 3 * _chunks_aside(work, e),
    )


_LAYOUT_BYTES = 380  # a row, to sort labels, count members and move small classes to the front
_SETUP_BYTES = 400  # a row, for weights of classes, tiles, and what is looked up by position


def _setup_launches(work: Work, launches: int) -> int:
    """Launches outside of chunks: two more where float64 weights of classes are cast to float32."""
    return launches + (2 if work.accumulated < 8 else 0)


def _unit_bytes(work: Work, rows: int) -> int:
    """To gather rows, to cast them from half precision, and to scale them."""
    item, number = work.dtype.itemsize, work.accumulated
    return rows * work.d * (2 * item + (item + number if work.casts else 0) + 2 * number)


def _blocks_behind(e: Extent) -> int:
    return (e.window - e.block) // e.block


def _overlap(e: Extent) -> int:
    """How many rows are read by two chunks of blocks."""
    return e.block_chunks * (e.window - e.block)


def _chunks_aside(work: Work, e: Extent) -> int:
    """How many chunks of blocks can hold rows outside a dominating class."""
    return -(-((work.n + 1) // 2) // (blocks_at_once(work.n, work.d) * e.block))


def _extra_memory(work: Work) -> int:
    """The gradient included; the same whatever the classes are.

    A chunk of tiles holds unit rows (and weighted copies), their products and the sums of these. A
    chunk of blocks holds a band of S, its mask, and either the band once more or what it adds to
    the rows of the block and of those behind. Two chunks overlap for a moment.
    """
    n, d, number = work.n, work.d, work.accumulated
    e = extent(n, d)
    kept = n * (6 * 8 + 6 * number) + e.tiles * e.width * 8
    widened = n * d * number if work.casts else 0  # half rows in float32, for their norms
    both = work.wants_gradient  # the backward has one more of moments, rows and S
    matrices = ((1 + both) * e.segments + 2) * d * d
    of_tile = d * d + e.width * d + max(d * d + both * e.width * d, (1 + both) * e.width * d)
    in_tiles = _peak(e.tiles, tiles_at_once(n, d), of_tile, d * d + e.width * d)
    window, behind = e.window, _blocks_behind(e)
    in_band = window + window / number + (max(window + d, (behind + 3) * d) if both else 3 * d)
    rows, rows_at_once = round_up(n, e.block), blocks_at_once(n, d) * e.block
    in_blocks = _peak(rows, rows_at_once, in_band, window + d)
    working = int((matrices + max(in_tiles, in_blocks)) * number)
    return kept + max(widened, work.gradient_bytes + max(working, work.cast_bytes))


def _peak(count: int, at_once: int, each: float, left: float) -> float:
    """The most that a loop over chunks holds; `left` of `each` outlives its chunk."""
    first = min(count, at_once)
    second = min(count - first, at_once)
    return max(first * each, first * left + second * each)
