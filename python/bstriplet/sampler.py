"""Batches that repeat the distribution of the training set (section 2.3, steps 3 and 4).

Every batch takes from each group its share of the places, and shares are seldom whole numbers: with
2.4 places a batch a group gets 2 or 3. Which batch rounds which group up is the Pfair scheduling
problem (Baruah, Cohen, Plaxton & Varvel, "Proportionate progress", Algorithmica 15, 1996): a batch
is a time slot, a group a task whose weight is the fractional part of its share, and the places left
after every group has its whole part are the processors. The PD² rule (Anderson & Srinivasan, JCSS
68, 2004) solves it exactly, in integers: no group is ever a whole sample ahead of or behind.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from typing import Any, SupportsIndex

import numpy as np
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

MODES = ("proportional", "equal")
IntArray = NDArray[np.int64]


class GroupBatchSampler(Sampler[list[int]]):
    """Batches with a fixed share for each group, for `DataLoader(batch_sampler=...)`.

    The share of group g, in places a batch, is an exact rational number (`ratios`):

    - `mode="proportional"`: max(min_per_group, λ·n_g), n_g the group's size and λ such that the
      shares add up to `batch_size`. That is batch_size·n_g/N, except that groups below
      `min_per_group` are lifted to it and the others divide the remaining places in proportion to
      their sizes.
    - `mode="equal"`: batch_size/G. Six groups and 36 places are six samples of each.

    In each epoch, for every batch b = 1, 2, ... and every group:

    - the batch holds the share rounded down or up, and never fewer than `min_per_group`;
    - the first b batches together hold less than one sample more or less than b times the share
      (with several replicas b counts the batches of all, in turn; the smaller last ones as one);
    - samples come in random order without replacement; a group that is used up is shuffled anew.
      A batch has a sample twice only where it needs more samples than the group has.

    Each epoch begins afresh, so its order is a function of (seed, epoch) alone.

    Length of an epoch. With `mode="proportional"` and `min_per_group=0` every sample comes exactly
    once. The last batch is then smaller (with several replicas: the last batch of each, as even as
    can be); samples too few to give every replica two, without which the loss is undefined, join
    the batch before instead. In all other cases an epoch has ceil(N / (batch_size·num_replicas))
    batches a replica, all full, and if no group had to be lifted no sample is left out. Hence there
    is no `drop_last`.

    Resuming. `state_dict` and `load_state_dict` work in the middle of an epoch. A `DataLoader` with
    workers asks for batches ahead of the training loop, and only the loop knows how many it has
    used: it says so with `state_dict(batches_done=...)`.

    Args:
        groups: [N] integers, the group of each sample (`mine_groups` makes them); any values.
        batch_size: places in a batch, N_b of the paper; for each replica. At least 2.
        mode: `"proportional"` or `"equal"`.
        min_per_group: least number of samples of each group in a batch; 0 admits more groups than
            places.
        seed: non-negative integer; the same on all replicas.
        num_replicas: processes that share the epoch. Default: the world size of `torch.distributed`
            if it is initialised, else 1. Replicas take turns: global batch b belongs to rank b mod
            num_replicas. All have the same number of batches.
        rank: which of them this is. Default: its rank in `torch.distributed`, else 0.

    Raises:
        TypeError, ValueError: an argument out of range, more groups than a batch can serve, or too
            few samples to give each replica two.
    """

    def __init__(
        self,
        groups: ArrayLike,
        batch_size: int = 36,
        *,
        mode: str = "proportional",
        min_per_group: int = 1,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if distributed else 1
        if rank is None:
            rank = dist.get_rank() if distributed else 0
        self.batch_size = _at_least(2, "batch_size", batch_size)
        self.min_per_group = _at_least(0, "min_per_group", min_per_group)
        self.seed = _at_least(0, "seed", seed)
        self.num_replicas = _at_least(1, "num_replicas", num_replicas)
        self.rank = _at_least(0, "rank", rank)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank={rank} must be below num_replicas={num_replicas}")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {MODES}")
        self.mode = mode
        self.epoch = 0

        self._group_of, self._sizes = _group_index(groups)
        if len(self._group_of) < 2 * self.num_replicas:
            raise ValueError(
                f"groups has {len(self._group_of)} samples, too few to give each of "
                f"num_replicas={self.num_replicas} the two that the loss needs: use fewer replicas"
            )
        self._share = _share(self._sizes, self.batch_size, mode, self.min_per_group)
        self._once = mode == "proportional" and self.min_per_group == 0
        self._full_steps, self._steps = self._count_steps()
        self._start = 0  # where the next iterator begins: above 0 only after load_state_dict
        self._position = 0  # how far the latest iterator has come

    @property
    def ratios(self) -> list[Fraction]:
        """The exact share of each group, in ascending order of group id; they sum to batch_size."""
        return [Fraction(int(part), self._share.whole) for part in self._share.parts]

    def __len__(self) -> int:
        """Number of batches the next iterator yields on this replica."""
        return self._steps - self._start

    def __iter__(self) -> Iterator[list[int]]:
        self._position = self._start
        return self._remaining_batches()

    def _remaining_batches(self) -> Iterator[list[int]]:
        samples, offsets = self._plan_epoch()
        for step in range(self._start, self._steps):
            batch = step * self.num_replicas + self.rank
            self._position = step + 1
            yield samples[offsets[batch] : offsets[batch + 1]].tolist()
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator yields. Call it before each epoch, as with
        `DistributedSampler`; without it every epoch has the order of the first.

        Naming the epoch that `load_state_dict` has just restored keeps the place in it.
        """
        epoch = _at_least(0, "epoch", epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self._start = self._position = 0

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """The place in the training run: plain integers and strings, the same for all replicas.

        Args:
            batches_done: batches of this epoch that this replica has used, those before a
                resumption included. Default: those handed out so far, which is the same only where
                nothing reads ahead (`num_workers=0`).
        """
        done = self._position if batches_done is None else batches_done
        return {
            **self._identity(),
            "epoch": self.epoch,
            "batches_done": self._place("batches_done", done),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that `state` names: the next iterator yields the rest of that epoch.

        Raises:
            ValueError: `state` belongs to a sampler with other groups or options, or is incomplete.
        """
        identity = self._identity()
        missing = [key for key in (*identity, "epoch", "batches_done") if key not in state]
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}: it is no GroupBatchSampler state")
        differing = [key for key, own in identity.items() if state[key] != own]
        if differing:
            listed = ", ".join(
                f"{key}={state[key]!r} (here {identity[key]!r})" for key in differing
            )
            raise ValueError(
                f"state was saved by a sampler with {listed}: build the same one to resume"
            )
        epoch = _at_least(0, "epoch", state["epoch"])
        self._start = self._position = self._place("batches_done", state["batches_done"])
        self.epoch = epoch

    def _place(self, name: str, batches: int) -> int:
        if _at_least(0, name, batches) > self._steps:
            raise ValueError(f"{name}={batches} exceeds the {self._steps} batches of an epoch")
        return int(batches)

    def _identity(self) -> dict[str, Any]:
        """All that the order of batches depends on beside the epoch."""
        return {
            "groups_crc32": zlib.crc32(self._group_of.tobytes()),
            "batch_size": self.batch_size,
            "mode": self.mode,
            "min_per_group": self.min_per_group,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
        }

    def _count_steps(self) -> tuple[int, int]:
        """(steps in which every batch is full, all steps); a step is one batch on each replica."""
        full, rest = divmod(len(self._group_of), self.batch_size * self.num_replicas)
        if not self._once:
            steps = full + (rest > 0)
            return steps, steps
        if rest == 0:
            return full, full
        if rest < 2 * self.num_replicas:
            return full - 1, full
        return full, full + 1

    def _plan_epoch(self) -> tuple[IntArray, IntArray]:
        """(all samples of the epoch, batch after batch; where each of these batches begins)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        places, batch_sizes = self._assign_places(rng)
        by_group = np.argsort(places, kind="stable")
        batch_of_place = np.repeat(np.arange(len(batch_sizes)), batch_sizes)
        samples = np.empty(len(places), dtype=np.int64)
        samples[by_group] = self._draw(places, batch_of_place[by_group], rng)
        return samples, np.concatenate([[0], np.cumsum(batch_sizes)])

    def _assign_places(self, rng: np.random.Generator) -> tuple[NDArray[Any], list[int]]:
        """(group of every place of the epoch, in random order within a batch; batch sizes)."""
        n_full = self._full_steps * self.num_replicas
        group_ids = np.arange(len(self._sizes), dtype=self._group_of.dtype)
        always = np.repeat(group_ids, self._share.parts // self._share.whole)
        at_times = group_ids[_pfair_schedule(self._share, n_full, rng)]
        full = np.concatenate([np.broadcast_to(always, (n_full, len(always))), at_times], axis=1)
        batches = [rng.permuted(full, axis=1).ravel()]
        if self._steps > self._full_steps:
            # Every group is less than one sample off, so what is left of it is again its exact
            # share rounded down or up. Dealt in order of group, so is each replica's part of it.
            left = self._sizes - np.bincount(full.ravel(), minlength=len(self._sizes))
            rest = np.repeat(group_ids, left)
            batches += [
                rng.permutation(rest[r :: self.num_replicas]) for r in range(self.num_replicas)
            ]
        sizes = [self.batch_size] * n_full + [len(batch) for batch in batches[1:]]
        return np.concatenate(batches), sizes

    def _draw(
        self, places: NDArray[Any], batch_of_draw: IntArray, rng: np.random.Generator
    ) -> IntArray:
        """As many samples of each group as it has places, group after group.

        batch_of_draw: [len(places)] the batch that each of them is for, ascending within a group.
        """
        counts = np.bincount(places, minlength=len(self._sizes))
        order = rng.permutation(len(self._group_of))
        shuffled = order[np.argsort(self._group_of[order], kind="stable")]
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
    """Places a batch of each group g as the fraction parts[g] / whole: exact, never a float."""

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
    # Water filling. It ends with a group that is not lifted, for the places left are at least
    # `minimum` for each of the others on average.
    lifted = np.zeros(n_groups, dtype=bool)
    while True:
        left = places - minimum * int(lifted.sum())
        whole = int(sizes[~lifted].sum())
        below = ~lifted & (left * sizes < minimum * whole)
        if not below.any():
            return _Share(np.where(lifted, minimum * whole, left * sizes), whole)
        lifted |= below


def _pfair_schedule(share: _Share, n_batches: int, rng: np.random.Generator) -> IntArray:
    """The groups rounded up in each batch: [n_batches, places that rounding all down leaves].

    The i-th extra sample of a group with fractional share f = e / p may come in batches
    floor((i-1)/f) to ceil(i/f) - 1 (counted from 0), or the group would be a whole sample off. Each
    batch takes the samples that may come by PD² priority: earliest deadline ceil(i/f); then those
    whose window overlaps the next one of their group; then the latest group deadline, the batch up
    to which a group with f >= 1/2 would lose all freedom. Remaining ties do not matter and are
    broken at random, so that groups of one size meet ever different others. Costs O(log groups) for
    each sample placed.
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
    """One draw for each entry of `batches` (ascending), shuffling `members` anew whenever used up.

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


def _at_least(least: int, name: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer") from None
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    return number
