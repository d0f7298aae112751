"""Batches that repeat the distribution of the training set (section 2.3, steps 3 and 4)."""

from __future__ import annotations

import operator
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from types import FrameType
from typing import Any, SupportsIndex

import torch.distributed as dist
from numpy.typing import ArrayLike
from torch.utils.data import BatchSampler, Sampler

from bstriplet.group_batches import GroupBatches

MODES = ("proportional", "equal")

_REBUILT = (
    "a GroupBatchSampler cannot be rebuilt around another sampler, and takes its process's share "
    "of the batches itself: pass use_distributed_sampler=False to Lightning's Trainer or to "
    "Fabric's setup_dataloaders, and predict with another loader"
)


class GroupBatchSampler(BatchSampler):
    """Batches with a fixed share for each group, for `DataLoader(batch_sampler=...)`.

    The share of group g, in places per batch, is an exact rational number (`ratios`):

    - `mode="proportional"`: max(min_per_group, λ·n_g), where n_g is the size of the group; λ makes
      the shares sum to `batch_size`. That is batch_size·n_g/N, except that groups below
      `min_per_group` are lifted to it. The other groups then divide the remaining places in
      proportion to their sizes.
    - `mode="equal"`: batch_size/G for G groups. With six groups and 36 places, each batch has six
      samples of each group.

    In each epoch, for every batch b = 1, 2, ... and every group:

    - the batch holds the share rounded down or up, and never fewer than `min_per_group`;
    - the first b batches together hold less than one sample more or less than b times the share.
      With several replicas, b counts the batches of all replicas in turn, and the smaller last
      batches as one;
    - samples come in random order without replacement; a used-up group is shuffled anew. A batch
      has a sample twice only if it needs more samples than the group has.

    Length of an epoch. With `mode="proportional"` and `min_per_group=0` every sample comes exactly
    once. The last batch may then be smaller. With several replicas, the last batch of each may be,
    and their sizes differ by at most one sample. The loss needs two samples per replica: if fewer
    are left, they join the batch before. In all other cases an epoch has
    ceil(N / (batch_size·num_replicas)) full batches per replica, and no sample is left out if no
    group was lifted. Hence `drop_last` is always False.

    Epochs. One pass over the sampler is one epoch; its order is a function of (seed, epoch) alone.
    A pass begins when its first batch is requested; workers request it as soon as their loader has
    an iterator. The next pass is the next epoch, even if this pass was cut short. `set_epoch`
    chooses another epoch.

    Replicas take turns: global batch b belongs to rank b mod `num_replicas`. All have the same
    number of batches. If `num_replicas` or `rank` is not given, it is read from `torch.distributed`
    when a pass begins: a sampler may be made before the process group.

    Resuming. `state_dict` and `load_state_dict` work in the middle of an epoch, also through
    torchdata's `StatefulDataLoader`. A `DataLoader` with workers requests batches ahead of the
    training loop. Only the loop knows how many batches it has used, and gives the number to
    `state_dict(batches_done=...)`.

    In trainers. Trainers do not save the state of a sampler. To resume, set the epoch as below;
    only a `StatefulDataLoader` in Lightning needs no such call.

    - your own loop, with or without DDP, and ignite: nothing to do. To resume, call
      `sampler.set_epoch(epoch)` before each epoch; in ignite, at `Events.EPOCH_STARTED`.
    - Lightning: `Trainer(use_distributed_sampler=False)`. The `Trainer` sets the epoch itself, but
      with `num_workers` above 0 too late for the resumed epoch. To resume, call
      `sampler.set_epoch(epoch)` before `fit`. Loaders of `Fabric` count epochs from 0; to resume,
      iterate over your own loader instead.
    - accelerate: `accelerator.prepare(DataLoader(data, batch_sampler=sampler.unsharded()))`,
      because accelerate distributes the batches itself. To resume, call `loader.set_epoch(epoch)`
      of the prepared loader before each epoch, and before `skip_first_batches`.
    - Hugging Face's `Trainer`: the same loader, from `get_train_dataloader`. To resume within an
      epoch on several processes, call `sampler.set_epoch(epoch)` in a callback's `on_epoch_begin`.
    - trainers that take indices, such as those of pytorch-metric-learning: `as_index_sampler()`. If
      they drop a smaller last batch, keep `min_per_group` above 0: then there is none.

    Args:
        groups: [N] integers, the group of each sample (`mine_groups` makes them); any values.
        batch_size: places in a batch, N_b of the paper; for each replica. At least 2.
        mode: `"proportional"` or `"equal"`.
        min_per_group: least number of samples of each group in a batch; 0 admits more groups than
            places.
        seed: non-negative integer; the same on all replicas.
        num_replicas: processes that share the epoch. Default: the world size of `torch.distributed`
            when a pass begins if it is initialised then, else 1.
        rank: rank of this process. Default: its rank in `torch.distributed`, else 0.
        sampler, drop_last: arguments of `BatchSampler`, which trainers set when they rebuild a
            loader; leave them out.

    Raises:
        TypeError, ValueError: an argument out of range, more groups than a batch can serve, or too
            few samples to give each replica two.
    """

    drop_last = False

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
        sampler: None = None,
        drop_last: bool = False,
    ) -> None:
        if sampler is not None or isinstance(groups, Sampler):
            raise TypeError(_REBUILT)
        if drop_last:
            raise ValueError(
                "drop_last=True: there is no incomplete batch to drop, except with "
                "mode='proportional' and min_per_group=0, where every sample comes once"
            )
        self._batch_size = _at_least(2, "batch_size", batch_size)
        self.min_per_group = _at_least(0, "min_per_group", min_per_group)
        self.seed = _at_least(0, "seed", seed)
        self._num_replicas = (
            None if num_replicas is None else _at_least(1, "num_replicas", num_replicas)
        )
        self._rank = None if rank is None else _at_least(0, "rank", rank)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {MODES}")
        self.mode = mode
        self._batches = GroupBatches(groups, self.batch_size, mode, self.min_per_group)

        self._epoch = 0  # epoch of the latest pass; before any pass, of the first
        self._start = 0  # first step of that pass; above 0 only after load_state_dict
        self._opened = False  # whether an iterator of that pass was made
        self._begun = False  # whether its first batch was requested
        self._position = 0  # number of its steps so far
        self._pass: object = None  # identity of its iterator; other iterators in use are older
        self._again = False  # whether the pass after the next one repeats the epoch
        self._restored_replicas: int | None = None  # num_replicas of the loaded state
        self._check_replicas()
        if num_replicas is not None and rank is not None:
            _ = self.rank  # raises now rather than at the first pass if it is out of range

    @property
    def batch_size(self) -> int:  # type: ignore[override]  # read-only: the shares depend on it
        """Places in a batch of one replica."""
        return self._batch_size

    @property
    def sampler(self) -> Sampler[int]:  # type: ignore[override]
        """The result of :meth:`as_index_sampler`; trainers look for its ``set_epoch``."""
        return self.as_index_sampler()

    @property
    def ratios(self) -> list[Fraction]:
        """The exact share of each group, in ascending order of group id; they sum to batch_size."""
        return self._batches.ratios

    @property
    def num_replicas(self) -> int:
        """Processes that share an epoch, as far as is known now."""
        if self._num_replicas is not None:
            return self._num_replicas
        return dist.get_world_size() if _distributed() else 1

    @property
    def rank(self) -> int:
        """Rank of this process, as far as is known now."""
        num_replicas = self.num_replicas
        rank = dist.get_rank() if self._rank is None and _distributed() else self._rank
        if rank is None and num_replicas > 1:
            raise ValueError(
                f"num_replicas={num_replicas} without a rank, and torch.distributed is not "
                "initialised: pass rank too, or initialise it before the first pass"
            )
        rank = rank or 0
        if rank >= num_replicas:
            raise ValueError(f"rank={rank} must be below num_replicas={num_replicas}")
        return rank

    @property
    def epoch(self) -> int:
        """The epoch that is under way or, between two passes, the next."""
        return self._epoch + self._exhausted

    def __len__(self) -> int:
        """Number of batches that the next iterator yields on this replica.

        After load_state_dict that is the rest of the epoch, until the iterator is made.
        """
        self._check_replicas()
        return self._n_steps - (0 if self._opened else self._start)

    def __iter__(self) -> Iterator[list[int]]:
        _refuse_who_would_regroup(self)
        return self._open(all_replicas=False)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, as with `DistributedSampler`; the passes after it go
        on from there.

        If `load_state_dict` has just restored this epoch, the place in it is kept.
        """
        epoch = _at_least(0, "epoch", epoch)
        if self._restored_replicas is not None and not self._begun and epoch != self._epoch:
            warnings.warn(
                f"set_epoch({epoch}) gives up the place that load_state_dict restored: epoch "
                f"{self._epoch}, {self._start} batches done. If a trainer that counts epochs from "
                "0 made this call, give it the epoch to begin with",
                stacklevel=2,
            )
        if self._begun or epoch != self._epoch:
            under_way = self._pass
            self._go_to(epoch, 0)
            self._pass = under_way  # if it is of this epoch and is read on, it is the next pass

    def as_index_sampler(self) -> Sampler[int]:
        """The samples of the batches one by one, for trainers that take `sampler=`.

        A pass over it is a pass over this sampler; its `len` is the number of samples in a pass.
        The trainer must group the samples by `batch_size`; any other size gives other batches. It
        has no state: a `StatefulDataLoader` resumes in the epoch given to `set_epoch`.
        """
        return _IndexSampler(self)

    def unsharded(self) -> BatchSampler:
        """The batches of all replicas in turn, for accelerate, which distributes them itself.

        Each process gets the same batches as from this sampler. A pass over the result is a pass
        over this sampler.
        """
        return _UnshardedSampler(self)

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """The place in the training run: plain integers and strings, the same for all replicas.

        Args:
            batches_done: number of batches of the latest pass that this replica has used, including
                those before a resumption. Default: the number of batches yielded so far, which is
                larger if workers read ahead.
        """
        epoch, done = self._epoch, self._position
        if batches_done is not None:
            done = self._place("batches_done", batches_done)
        if self._exhausted if batches_done is None else done == self._n_steps:
            epoch, done = epoch + 1, 0
        return {**self._identity(), "epoch": epoch, "batches_done": done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place in `state`: the next pass yields the rest of that epoch or, if no batch
        of it is left, the following epoch.

        Raises:
            ValueError: `state` belongs to a sampler with other groups or options, or is incomplete.
        """
        identity = self._identity()
        missing = [key for key in (*identity, "epoch", "batches_done") if key not in state]
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}: it is no GroupBatchSampler state")
        differing = [key for key, own in identity.items() if state[key] != own]
        if differing:
            raise _other_sampler({key: (state[key], identity[key]) for key in differing})
        epoch = _at_least(0, "epoch", state["epoch"])
        done = self._place("batches_done", state["batches_done"])
        if done < self._n_steps:
            self._go_to(epoch, done)
        else:
            self._go_to(epoch + 1, 0)
            self._again = _restored_in_vain()
        self._restored_replicas = self.num_replicas

    @property
    def _n_steps(self) -> int:
        return self._batches.n_steps(self.num_replicas)

    @property
    def _exhausted(self) -> bool:
        """Whether the latest pass has ended, after its last batch."""
        return self._begun and self._pass is None

    def _go_to(self, epoch: int, start: int) -> None:
        """Let the next pass begin there."""
        self._epoch, self._start, self._position = epoch, start, start
        self._opened = self._begun = self._again = False
        self._pass = self._restored_replicas = None

    def _open(self, all_replicas: bool) -> Iterator[list[int]]:
        self._opened = True
        return self._pass_over(all_replicas)

    def _pass_over(self, all_replicas: bool) -> Iterator[list[int]]:
        """Yield the batches of one pass: those of this replica, or of all in turn."""
        self._check_replicas()
        num_replicas = self.num_replicas
        ranks = range(num_replicas) if all_replicas else [self.rank]
        if self._begun:
            self._go_to(self._epoch + (not self._again), 0)
        elif self._num_replicas is None and not _distributed():
            _warn_of_a_missing_process_group()
        this_pass = self._pass = object()
        self._opened = self._begun = True
        epoch = self._epoch
        samples, offsets = self._batches.epoch(self.seed, epoch, num_replicas)
        for step in range(self._start, self._n_steps):
            for rank in ranks:
                if self._pass is this_pass:
                    if self._epoch != epoch:
                        _warn_of_an_epoch_named_late(self._epoch, epoch)
                        self._pass = None
                    elif rank == ranks[-1]:
                        self._begun, self._position = True, step + 1
                batch = step * num_replicas + rank
                yield samples[offsets[batch] : offsets[batch + 1]].tolist()
        if self._pass is this_pass:
            self._pass = None

    def _n_samples(self) -> int:
        """Number of samples the next pass yields on this replica."""
        self._check_replicas()
        own = self._batches.batch_sizes(self.num_replicas)[self.rank :: self.num_replicas]
        return sum(own[-len(self) :])

    def _check_replicas(self) -> None:
        """Raise if the replicas, as far as they are known now, cannot share these samples."""
        num_replicas, n_samples = self.num_replicas, len(self._batches.group_of)
        if n_samples < 2 * num_replicas:
            raise ValueError(
                f"groups has {n_samples} samples, too few to give each of "
                f"num_replicas={num_replicas} the two that the loss needs: use fewer replicas"
            )
        if self._restored_replicas not in (None, num_replicas):
            raise _other_sampler({"num_replicas": (self._restored_replicas, num_replicas)})

    def _place(self, name: str, batches: int) -> int:
        if _at_least(0, name, batches) > self._n_steps:
            raise ValueError(f"{name}={batches} exceeds the {self._n_steps} batches of an epoch")
        return int(batches)

    def _identity(self) -> dict[str, Any]:
        """All values except the epoch on which the order of batches depends."""
        return {
            "groups_crc32": zlib.crc32(self._batches.group_of.tobytes()),
            "batch_size": self.batch_size,
            "mode": self.mode,
            "min_per_group": self.min_per_group,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
        }


class _IndexSampler(Sampler[int]):
    """The samples of a GroupBatchSampler's batches, one by one."""

    def __init__(self, batches: GroupBatchSampler) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return self._batches._n_samples()

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._batches.set_epoch(epoch)


class _UnshardedSampler(BatchSampler):
    """The batches of all replicas of a GroupBatchSampler, in turn.

    Its batch size is None, which tells accelerate that batches differ in size. Otherwise accelerate
    would fill up smaller batches with repeated samples.
    """

    batch_size = None  # type: ignore[assignment]
    drop_last = False

    def __init__(self, batches: GroupBatchSampler) -> None:
        self._batches = batches
        self.sampler = batches.sampler
        self.set_epoch = batches.set_epoch
        self.state_dict = batches.state_dict
        self.load_state_dict = batches.load_state_dict

    def __len__(self) -> int:
        return len(self._batches) * self._batches.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches._open(all_replicas=True)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _warn_of_a_missing_process_group() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size not in ("", "1"):
        warnings.warn(
            f"WORLD_SIZE={world_size}, but torch.distributed is not initialised: this process gets "
            "all batches, not its share. Initialise it before the first pass, or pass "
            "num_replicas=1 to say that this is meant",
            stacklevel=3,
        )


def _warn_of_an_epoch_named_late(named: int, under_way: int) -> None:
    warnings.warn(
        f"set_epoch({named}) came when batches of epoch {under_way} had been requested: this pass "
        f"remains epoch {under_way}. Workers read ahead from iter(loader) on: call set_epoch "
        "before that",
        stacklevel=3,
    )


def _refuse_who_would_regroup(batches: GroupBatchSampler) -> None:
    """Raise if the caller would distribute the batches a second time, or batch them again.

    Neither fails by itself: the first trains on a part of the samples, the second on batches of
    batches.
    """
    for local in _locals_of_callers("accelerate.data_loader"):
        reader: Any = local.get("self")
        deals_out = type(reader).__name__ in ("BatchSamplerShard", "DataLoaderDispatcher")
        if deals_out and getattr(reader, "state", reader).num_processes > 1:
            raise ValueError(
                "accelerate deals batches out to the processes itself, and needs those of all: "
                "prepare a DataLoader with batch_sampler=sampler.unsharded()"
            )
    batching = ("torch.utils.data.sampler", "torchdata.stateful_dataloader.sampler")
    for local in _locals_of_callers(*batching):
        if getattr(local.get("self"), "sampler", None) is batches:
            raise ValueError(
                "a GroupBatchSampler was passed as sampler=, which takes indices, not batches: "
                "pass it as batch_sampler=, or pass sampler.as_index_sampler()"
            )


def _restored_in_vain() -> bool:
    """Whether a StatefulDataLoader is about to begin the next pass twice.

    With workers, it does so when it resumes from the end of an epoch: the restored iterator reads
    ahead, turns out to be at its end, and is replaced. Its calls here do not show which iterator is
    used; only its own state does, further up the stack.
    """
    for local in _locals_of_callers("torchdata.stateful_dataloader.stateful_dataloader"):
        state = local.get("next_iter_state")
        if isinstance(state, dict):
            return bool(state.get("_iterator_finished"))
    return False


def _locals_of_callers(*modules: str) -> Iterator[dict[str, Any]]:
    """Yield the local variables of the calling functions in `modules`, the nearest first.

    Other functions are not looked at: before Python 3.13, reading a function's variables keeps
    their values alive until it returns, such as the last loss of a training loop.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            break
        if frame.f_globals.get("__name__") in modules:
            yield frame.f_locals
        frame = frame.f_back


def _other_sampler(differing: dict[str, tuple[Any, Any]]) -> ValueError:
    listed = ", ".join(f"{key}={saved!r} (here {own!r})" for key, (saved, own) in differing.items())
    return ValueError(f"state was saved by a sampler with {listed}: build the same one to resume")


def _at_least(least: int, name: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer") from None
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    return number
