"""The samples of each batch of an epoch, for batches with a fixed share of each group.

Every batch takes from each group its share of the places. Shares are seldom whole numbers: with 2.4
places per batch, a group gets 2 or 3. Choosing the batches that round a group up is the Pfair
scheduling problem (Baruah, Cohen, Plaxton & Varvel, "Proportionate progress", Algorithmica 15,
1996). A batch is a time slot; a group is a task, and its weight is the fractional part of its
share; the places left after every group has its whole part are the processors. The PD² rule
(Anderson & Srinivasan, JCSS 68, 2004) solves the problem exactly, in integers: no group is ever a
whole sample ahead or behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]


class GroupBatches:
    """The batches of any epoch, by seed, epoch and number of replicas.

    A step is one batch on each replica; batch b of the epoch is that of replica b % num_replicas in
    step b // num_replicas.

    Args:
        groups, batch_size, mode, min_per_group: the arguments of
            :class:`bstriplet.sampler.GroupBatchSampler`; the last three must be in range.
    """

    def __init__(self, groups: ArrayLike, batch_size: int, mode: str, min_per_group: int) -> None:
        self.group_of, self._sizes = _group_index(groups)
        self.batch_size = batch_size
        self._share = _share(self._sizes, batch_size, mode, min_per_group)
        self._once = mode == "proportional" and min_per_group == 0

    @property
    def ratios(self) -> list[Fraction]:
        """The exact share of each group, in ascending order of group id; they sum to batch_size."""
        return [Fraction(int(part), self._share.whole) for part in self._share.parts]

    def n_steps(self, num_replicas: int) -> int:
        """Return the number of steps of an epoch: the number of batches on each replica."""
        return self._count_steps(num_replicas)[1]

    def batch_sizes(self, num_replicas: int) -> list[int]:
        """Return the number of samples of each batch of an epoch."""
        full_steps, steps = self._count_steps(num_replicas)
        n_full = full_steps * num_replicas
        sizes = [self.batch_size] * n_full
        if steps > full_steps:
            rest = len(self.group_of) - n_full * self.batch_size
            sizes += [len(range(replica, rest, num_replicas)) for replica in range(num_replicas)]
        return sizes

    def epoch(self, seed: int, epoch: int, num_replicas: int) -> tuple[IntArray, IntArray]:
        """Return all samples of an epoch, batch after batch, and the offsets of the batches.

        Batch b is ``samples[offsets[b] : offsets[b + 1]]``.
        """
        rng = np.random.default_rng([seed, epoch])
        sizes = self.batch_sizes(num_replicas)
        places = self._assign_places(num_replicas, rng)
        by_group = np.argsort(places, kind="stable")
        batch_of_place = np.repeat(np.arange(len(sizes)), sizes)
        samples = np.empty(len(places), dtype=np.int64)
        samples[by_group] = self._draw(places, batch_of_place[by_group], rng)
        return samples, np.concatenate([[0], np.cumsum(sizes)])

    def _count_steps(self, num_replicas: int) -> tuple[int, int]:
        """(steps in which every batch is full, all steps)."""
        full, rest = divmod(len(self.group_of), self.batch_size * num_replicas)
        if not self._once:
            steps = full + (rest > 0)
            return steps, steps
        if rest == 0:
            return full, full
        if rest < 2 * num_replicas:
            return full - 1, full
        return full, full + 1

    def _assign_places(self, num_replicas: int, rng: np.random.Generator) -> NDArray[Any]:
        """The group of every place of the epoch, in random order within a batch."""
        full_steps, steps = self._count_steps(num_replicas)
        n_full = full_steps * num_replicas
        group_ids = np.arange(len(self._sizes), dtype=self.group_of.dtype)
        always = np.repeat(group_ids, self._share.parts // self._share.whole)
        at_times = group_ids[_pfair_schedule(self._share, n_full, rng)]
        full = np.concatenate([np.broadcast_to(always, (n_full, len(always))), at_times], axis=1)
        batches = [rng.permuted(full, axis=1).ravel()]
        if steps > full_steps:
            # Every group is less than one sample off, so its remaining samples are again its exact
            # share rounded down or up. Dealing them in order of group gives each replica a rounded
            # share too.
            left = self._sizes - np.bincount(full.ravel(), minlength=len(self._sizes))
            rest = np.repeat(group_ids, left)
            batches += [rng.permutation(rest[r::num_replicas]) for r in range(num_replicas)]
        return np.concatenate(batches)

    def _draw(
        self, places: NDArray[Any], batch_of_draw: IntArray, rng: np.random.Generator
    ) -> IntArray:
        """Samples for all places of each group, group after group.

        batch_of_draw: [len(places)] the batch of each sample, ascending within a group.
        """
        counts = np.bincount(places, minlength=len(self._sizes))
        order = rng.permutation(len(self.group_of))
        shuffled = order[np.argsort(self.group_of[order], kind="stable")]
        first_member = np.cumsum(self._sizes) - self._sizes
        first_draw = np.cumsum(counts) - counts
        from_shuffled = np.arange(len(places)) + np.repeat(first_member - first_draw, counts)
        drawn = shuffled[np.minimum(from_shuffled, len(shuffled) - 1)]
        for group in np.flatnonzero(counts > self._sizes):
            members = shuffled[first_member[group] :][: self._sizes[group]]
            draws = slice(first_draw[group], first_draw[group] + counts[group])
            drawn[draws] = _draw_with_reuse(members, batch_of_draw[draws], rng)
        return drawn


@dataclass(frozen=True)
class _Share:
    """Places per batch of each group g as the fraction parts[g] / whole: exact, never a float."""

    parts: IntArray
    whole: int


def _share(sizes: IntArray, places: int, mode: str, minimum: int) -> _Share:
    n_groups = len(sizes)
    if n_groups * minimum > places:
        raise ValueError(
            f"{n_groups} groups with min_per_group={minimum} need {n_groups * minimum} places, but "
            f"batch_size={places}: raise batch_size, mine fewer groups, or pass min_per_group=0"
        )
    if mode == "equal":
        return _Share(np.full(n_groups, places), n_groups)
    # Water filling. It ends before all groups are lifted: the places left are on average at least
    # `minimum` for each group that is not lifted.
    lifted = np.zeros(n_groups, dtype=bool)
    while True:
        left = places - minimum * int(lifted.sum())
        whole = int(sizes[~lifted].sum())
        below = ~lifted & (left * sizes < minimum * whole)
        if not below.any():
            return _Share(np.where(lifted, minimum * whole, left * sizes), whole)
        lifted |= below


def _pfair_schedule(share: _Share, n_batches: int, rng: np.random.Generator) -> IntArray:
    """The groups rounded up in each batch: [n_batches, places left if all are rounded down].

    The i-th extra sample of a group with fractional share f = e / p may come in batches
    floor((i-1)/f) to ceil(i/f) - 1 (counted from 0), or the group would be a whole sample off. Each
    batch takes the samples that may come by PD² priority: earliest deadline ceil(i/f); then those
    whose window overlaps the next one of their group; then the latest group deadline, the batch up
    to which a group with f >= 1/2 would lose all freedom. Remaining ties do not matter. They are
    broken at random, so that groups of one size meet different groups each time. Each placed sample
    costs O(log groups).
    """
    period = share.whole
    fraction = share.parts % period
    active = np.flatnonzero(fraction)
    extra_places = int(fraction.sum()) // period
    if not (extra_places and n_batches):
        return np.empty((n_batches, 0), dtype=np.int64)

    n_windows = -(-n_batches * fraction[active] // period)
    first = np.cumsum(n_windows) - n_windows
    group = np.repeat(active, n_windows)
    weight = fraction[group]
    number = np.arange(len(group)) - np.repeat(first, n_windows) + 1
    release = (number - 1) * period // weight
    deadline = -(-number * period // weight)
    overlaps = number * period % weight != 0
    slack = -(-deadline * (period - weight) // period)
    group_deadline = np.where(2 * weight >= period, -(-slack * period // (period - weight)), 0)
    by_priority = np.lexsort((rng.random(len(group)), -group_deadline, ~overlaps, deadline))

    rank = np.empty_like(by_priority)
    rank[by_priority] = np.arange(len(rank))
    successor = np.append(rank[1:], -1)
    successor[first[1:] - 1] = -1
    next_rank = successor[by_priority].tolist()
    release_of = release[by_priority].tolist()
    arriving: list[list[int]] = [[] for _ in range(n_batches + 1)]
    arriving[0] = rank[first].tolist()
    waiting: list[int] = []
    chosen = np.empty((n_batches, extra_places), dtype=np.int64)
    for batch in range(n_batches):
        for window in arriving[batch]:
            heappush(waiting, window)
        taken = [heappop(waiting) for _ in range(extra_places)]
        chosen[batch] = taken
        for window in taken:
            following = next_rank[window]
            if following >= 0:
                arriving[max(release_of[following], batch + 1)].append(following)
    return group[by_priority[chosen]]


def _draw_with_reuse(members: IntArray, batches: IntArray, rng: np.random.Generator) -> IntArray:
    """One member for each entry of `batches` (ascending); used-up `members` are shuffled anew.

    A batch that spans a reshuffle first gets members that it does not hold yet.
    """
    size = len(members)
    n_passes = -(-len(batches) // size)
    stream = rng.permuted(np.tile(members, (n_passes, 1)), axis=1).ravel()
    reshuffles = np.arange(size, len(batches), size)
    starts = np.searchsorted(batches, batches[reshuffles], side="left")
    ends = np.searchsorted(batches, batches[reshuffles], side="right")
    held = (reshuffles - starts) % size  # beyond whole passes, which hold every member alike
    for spanning in np.flatnonzero(held):
        start, end, reshuffle = starts[spanning], ends[spanning], reshuffles[spanning]
        ordered = stream[reshuffle : reshuffle + size].copy()
        repeated = np.isin(ordered, stream[start : start + held[spanning]])
        first = np.argsort(repeated, kind="stable")[: end - reshuffle]
        stream[reshuffle : reshuffle + size] = np.concatenate(
            [ordered[first], np.delete(ordered, first)]
        )
    return stream[: len(batches)]


def _group_index(groups: ArrayLike) -> tuple[NDArray[Any], IntArray]:
    """(position of each sample's group among the sorted group ids; size of each group)."""
    array = np.asarray(groups)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"groups has shape {array.shape}; it must be [N], one group id a sample")
    if array.dtype.kind not in "iub":
        raise TypeError(f"groups has dtype {array.dtype}; group ids must be integers")
    _, index, sizes = np.unique(array, return_inverse=True, return_counts=True)
    # The narrowest type that holds them: up to 16 bits numpy sorts in linear time.
    return index.astype(np.min_scalar_type(len(sizes) - 1)), sizes.astype(np.int64)
