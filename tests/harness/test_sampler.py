"""GroupBatchSampler: each promise of its docstring, checked in exact fractions."""

import json
import math
import warnings
import weakref
from collections import Counter
from fractions import Fraction
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from bstriplet.sampler import GroupBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

properties = settings(derandomize=True, deadline=None, max_examples=120)

group_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=9).filter(lambda s: sum(s) >= 2)
batch_sizes = st.integers(2, 24)
seeds = st.integers(0, 2**31)


@st.composite
def samplers(draw, max_replicas=1):
    """A function rank -> sampler with any allowed options, and its group ids."""
    num_replicas = draw(st.integers(1, max_replicas))
    sizes = draw(group_sizes.filter(lambda s: sum(s) >= 2 * num_replicas))
    ids = draw(st.permutations(range(-3, len(sizes) - 3)))
    groups = draw(st.permutations(list(np.repeat(ids, sizes))))
    minimum = draw(st.integers(0, 3))
    batch_size = draw(st.integers(max(2, minimum * len(sizes)), minimum * len(sizes) + 24))
    mode = draw(st.sampled_from(["proportional", "equal"]))
    seed = draw(seeds)

    def make(rank=0):
        return GroupBatchSampler(
            groups,
            batch_size,
            mode=mode,
            min_per_group=minimum,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )

    return make, np.array(groups)


def of_sizes(sizes, *args, **options):
    return GroupBatchSampler(np.repeat(np.arange(len(sizes)), sizes), *args, **options)


def epochs_of(sampler, count):
    """The batches of the first epochs."""
    epochs = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    return epochs


def counts_of(batches, groups):
    """[batches, groups] samples of each group, groups in ascending order."""
    ids, index = np.unique(groups, return_inverse=True)
    return np.array([np.bincount(index[batch], minlength=len(ids)) for batch in batches])


def assert_rounded(count, exact):
    assert math.floor(exact) <= count <= math.ceil(exact), (count, exact)


def assert_keeps_shares(counts, shares):
    """Check each batch for shares rounded down or up, and totals less than one sample off."""
    total = [0] * len(shares)
    for number, row in enumerate(counts.tolist(), start=1):
        for group, (count, share) in enumerate(zip(row, shares, strict=True)):
            assert_rounded(count, share)
            total[group] += count
            assert abs(total[group] - number * share) < 1


# --- shares --------------------------------------------------------------------------------------


@properties
@given(sizes=group_sizes, batch_size=batch_sizes, seed=seeds)
def test_proportional_epoch_has_every_sample_once_at_its_exact_share(sizes, batch_size, seed):
    sampler = of_sizes(sizes, batch_size, min_per_group=0, seed=seed)
    n = sum(sizes)
    shares = [Fraction(batch_size * size, n) for size in sizes]
    assert sampler.ratios == shares

    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(chain(*batches)) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    rest = n % batch_size
    folds = rest == 1 and n > 1
    assert len(batches[-1]) == (batch_size + 1 if folds else rest or batch_size)

    counts = counts_of(batches, np.repeat(np.arange(len(sizes)), sizes))
    assert_keeps_shares(counts[:-1], shares)
    for count, size in zip(counts[-1], sizes, strict=True):
        assert_rounded(count, Fraction(len(batches[-1]) * size, n))


@properties
@given(sizes=group_sizes, minimum=st.integers(1, 3), spare=st.integers(0, 20), seed=seeds)
def test_groups_below_the_minimum_are_lifted_and_the_others_share_the_rest(
    sizes, minimum, spare, seed
):
    batch_size = max(2, minimum * len(sizes) + spare)
    sampler = of_sizes(sizes, batch_size, min_per_group=minimum, seed=seed)
    shares = sampler.ratios
    assert sum(shares) == batch_size
    per_member = {
        share / size for share, size in zip(shares, sizes, strict=True) if share > minimum
    }
    assert len(per_member) <= 1
    for share, size in zip(shares, sizes, strict=True):
        assert share >= minimum
        assert all(size * rate <= minimum for rate in per_member) or share > minimum

    batches = list(sampler)
    assert len(batches) == len(sampler) == math.ceil(sum(sizes) / batch_size)
    assert all(len(batch) == batch_size for batch in batches)
    counts = counts_of(batches, np.repeat(np.arange(len(sizes)), sizes))
    assert counts.min() >= minimum
    assert_keeps_shares(counts, shares)
    if shares == [Fraction(batch_size * size, sum(sizes)) for size in sizes]:
        assert set(chain(*batches)) == set(range(sum(sizes)))


@properties
@given(sizes=group_sizes, batch_size=batch_sizes, seed=seeds)
def test_equal_batches_take_the_same_from_each_group_and_rotate_the_rest(sizes, batch_size, seed):
    sampler = of_sizes(sizes, batch_size, mode="equal", min_per_group=0, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == math.ceil(sum(sizes) / batch_size)
    assert all(len(batch) == batch_size for batch in batches)
    counts = counts_of(batches, np.repeat(np.arange(len(sizes)), sizes))
    assert_keeps_shares(counts, [Fraction(batch_size, len(sizes))] * len(sizes))


def test_chest_2_of_the_paper_six_groups_six_samples_each():
    sizes = [900, 449, 1200, 1500, 700, 483]
    batches = list(of_sizes(sizes, 36, mode="equal"))
    assert (counts_of(batches, np.repeat(np.arange(6), sizes)) == 6).all()


def test_lifting_in_numbers():
    # 10 places, 1 + 1 + 98 samples: the small groups get 1 each instead of 0.1, the large one 8.
    assert of_sizes([1, 1, 98], 10).ratios == [1, 1, 8]
    # Lifting the first leaves 5 places to 12 + 13 + 75 and puts the second below 1 as well.
    assert of_sizes([10, 19, 71], 6).ratios == [1, Fraction(19 * 5, 90), Fraction(71 * 5, 90)]
    assert of_sizes([1, 17, 82], 6).ratios == [1, 1, 4]


@pytest.mark.parametrize("parts", [(6, 7, 6, 7, 6), (11, 10, 10, 11, 6), (8, 13, 10, 13, 12)])
def test_shares_that_need_foresight(parts):
    # Nearly every group is in nearly every batch: earliest deadlines alone, and even with overlaps
    # (the first two PD² rules), leave some group a whole sample behind.
    sizes = [40 * part for part in parts]
    shares = [Fraction(4 * part, sum(parts)) for part in parts]
    for seed in range(5):
        batches = list(of_sizes(sizes, 4, min_per_group=0, seed=seed))
        assert_keeps_shares(counts_of(batches, np.repeat(range(5), sizes)), shares)


def test_shares_of_many_heavy_groups_over_long_epochs():
    rng = np.random.default_rng(5)
    for _ in range(40):
        sizes = rng.integers(1, 400, size=rng.integers(2, 40))
        batch_size = int(rng.integers(2, 3 * len(sizes)))
        sampler = of_sizes(sizes, batch_size, min_per_group=0)
        counts = counts_of(list(sampler)[:-1], np.repeat(np.arange(len(sizes)), sizes))
        ideal, whole = batch_size * sizes, sizes.sum()
        assert (counts >= ideal // whole).all()
        assert (counts <= -(-ideal // whole)).all()
        number = np.arange(1, len(counts) + 1)[:, None]
        assert (np.abs(counts.cumsum(axis=0) * whole - number * ideal) < whole).all()


def test_a_million_samples_in_a_thousand_groups():
    rng = np.random.default_rng(0)
    groups = np.concatenate(
        [np.arange(1000), rng.choice(1000, 999_000, p=rng.dirichlet([5] * 1000))]
    )
    sizes = np.bincount(groups)
    once = GroupBatchSampler(groups, 500, min_per_group=0)
    batches = np.array(list(once))
    assert batches.shape == (len(once), 500) == (2000, 500)
    assert np.array_equal(np.sort(batches.ravel()), np.arange(1_000_000))
    lifted = GroupBatchSampler(groups, 1500)
    for sampler, drawn in [(once, batches), (lifted, np.array(list(lifted)))]:
        shares = sampler.ratios
        whole = math.lcm(*(share.denominator for share in shares))
        ideal = np.array([int(share * whole) for share in shares])
        cells = np.arange(len(drawn))[:, None] * 1000 + groups[drawn]
        counts = np.bincount(cells.ravel(), minlength=len(drawn) * 1000).reshape(-1, 1000)
        assert (counts >= ideal // whole).all()
        assert (counts <= -(-ideal // whole)).all()
        number = np.arange(1, len(drawn) + 1)[:, None]
        assert (np.abs(counts.cumsum(axis=0) * whole - number * ideal) < whole).all()
    assert counts.min() >= 1
    assert min(lifted.ratios) == 1
    assert sizes.min() * 1500 < 1_000_000  # something had to be lifted


def test_groups_of_one_size_meet_ever_different_others():
    sampler = of_sizes([6] * 8, 2, min_per_group=0)
    met = set()
    for epoch in range(12):
        sampler.set_epoch(epoch)
        met |= {frozenset(sample // 6 for sample in batch) for batch in sampler}
    assert met == {frozenset(pair) for pair in combinations(range(8), 2)}


# --- without replacement -------------------------------------------------------------------------


@properties
@given(made=samplers())
def test_no_sample_comes_again_before_its_group_is_used_up(made):
    make, groups = made
    batches = list(make())
    for drawn in [*batches, list(chain(*batches))]:
        times = Counter(drawn)
        for group in set(groups):
            members = np.flatnonzero(groups == group)
            of_each = [times[member] for member in members]
            assert max(of_each) - min(of_each) <= 1


@properties
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=seeds)
def test_a_used_up_group_is_gone_through_in_whole_passes(sizes, seed):
    batch_size = max(2, 3 * len(sizes) - 1)
    batches = list(of_sizes([*sizes, 200], batch_size, mode="equal", min_per_group=0, seed=seed))
    start = 0
    for size in sizes:
        members = range(start, start + size)
        start += size
        # Up to their order within a batch, the draws are one pass over the group after another.
        needed, stock = 0, Counter()
        for batch in batches:
            mine = Counter(sample for sample in batch if sample in members)
            needed += mine.total()
            stock += mine
            passes = [stock[member] for member in members]
            assert set(passes) == {needed // size, -(-needed // size)}


def test_order_is_random_within_groups_and_batches():
    sampler = of_sizes([50, 50], 10, min_per_group=0, seed=3)
    first = list(chain(*sampler))
    assert [sample for sample in first if sample < 50] != list(range(50))
    assert any(batch != sorted(batch, key=lambda sample: sample // 50) for batch in sampler)


# --- order, epochs, replicas ---------------------------------------------------------------------


@properties
@given(made=samplers(), epoch=st.integers(0, 1000))
def test_same_seed_and_epoch_same_order(made, epoch):
    make, _ = made
    one, other = make(), make()
    one.set_epoch(epoch)
    other.set_epoch(7)
    list(other)
    other.set_epoch(epoch)
    assert list(one) == list(other)


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        sampler = of_sizes([40, 60], 10, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(chain(*sampler))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


@properties
@given(made=samplers(max_replicas=5))
def test_replicas_take_turns_in_one_global_order(made):
    make, groups = made
    ranks = [make(rank) for rank in range(make().num_replicas)]
    epochs = [list(sampler) for sampler in ranks]
    assert {len(batches) for batches in epochs} == {len(ranks[0])}
    in_turn = list(chain(*zip(*epochs, strict=True)))
    assert all(len(batch) >= 2 for batch in in_turn)

    sampler = ranks[0]
    counts = counts_of(in_turn, groups)
    if sampler.mode == "equal" or sampler.min_per_group:
        assert all(len(batch) == sampler.batch_size for batch in in_turn)
        assert_keeps_shares(counts, sampler.ratios)
        return
    assert sorted(chain(*in_turn)) == list(range(len(groups)))
    last = counts[-len(ranks) :]
    if all(len(batch) == sampler.batch_size for batch in in_turn):
        assert_keeps_shares(counts, sampler.ratios)
        return
    assert_keeps_shares(counts[: -len(ranks)], sampler.ratios)
    assert last.sum(axis=1).max() - last.sum(axis=1).min() <= 1
    mean_size = Fraction(int(last.sum()), len(ranks))
    for row in last.tolist():
        for count, share in zip(row, sampler.ratios, strict=True):
            assert_rounded(count, share * mean_size / sampler.batch_size)


def test_every_pass_is_another_epoch():
    sampler, wanted = of_sizes([40, 60], 10), epochs_of(of_sizes([40, 60], 10), 9)
    assert [list(sampler) for _ in range(3)] == wanted[:3]
    assert sampler.epoch == 3
    assert [next(iter(sampler)) for _ in range(2)] == [wanted[3][0], wanted[4][0]]  # cut short
    assert sampler.epoch == 4  # of the pass that is under way
    sampler.set_epoch(7)
    assert sampler.epoch == 7
    assert [list(sampler) for _ in range(2)] == wanted[7:]
    sampler.set_epoch(8)  # once more the one that has just ended
    assert list(sampler) == wanted[8]


def test_a_pass_begins_with_its_first_batch():
    sampler = of_sizes([40, 60], 10)
    first, second = iter(sampler), iter(sampler)
    assert list(second) == epochs_of(of_sizes([40, 60], 10), 2)[0]
    assert list(first) == epochs_of(of_sizes([40, 60], 10), 2)[1]


def test_an_older_pass_that_is_read_on_does_not_move_the_place():
    sampler = of_sizes([40, 60], 10)
    whole = epochs_of(sampler, 2)
    sampler.set_epoch(0)
    old = iter(sampler)
    next(old)
    new = iter(sampler)
    next(new)
    assert list(old) == whole[0][1:]
    assert (sampler.epoch, sampler.state_dict()["batches_done"]) == (1, 1)
    assert list(new) == whole[1][1:]


@pytest.mark.parametrize("unsharded", [False, True])
def test_a_pass_that_goes_on_when_its_own_epoch_is_named_keeps_the_place(unsharded):
    # Some trainers call set_epoch after workers have read ahead in that epoch.
    sampler, whole = of_sizes([40, 60], 10), epochs_of(of_sizes([40, 60], 10), 2)
    drawn = iter(sampler.unsharded() if unsharded else sampler)
    assert [next(drawn) for _ in range(2)] == whole[0][:2]
    sampler.set_epoch(0)
    assert sampler.state_dict()["batches_done"] == 0  # as yet it may be another pass
    assert next(drawn) == whole[0][2]
    assert (sampler.epoch, sampler.state_dict()["batches_done"]) == (0, 3)
    assert list(drawn) == whole[0][3:]
    assert list(sampler) == whole[1]


def test_an_epoch_that_is_named_too_late_is_warned_of():
    sampler, whole = of_sizes([40, 60], 10), epochs_of(of_sizes([40, 60], 10), 3)
    drawn = iter(sampler)
    next(drawn)
    sampler.set_epoch(2)
    late = r"set_epoch\(2\) came when batches of epoch 0 had been"
    with pytest.warns(UserWarning, match=late) as said:
        assert list(drawn) == whole[0][1:]
    assert len(said) == 1
    assert list(sampler) == whole[2]

    drawn = iter(sampler)
    next(drawn)
    sampler.set_epoch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(sampler) == whole[0]  # another pass, as the epoch's name meant
        next(drawn)


def test_replicas_are_those_of_the_process_group_when_a_pass_begins(monkeypatch):
    sampler = of_sizes([30, 60], 6)  # made before there is a group
    assert (len(sampler), len(sampler.as_index_sampler())) == (15, 90)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    assert (sampler.num_replicas, sampler.rank) == (3, 2)
    assert (len(sampler), len(sampler.as_index_sampler())) == (5, 30)
    assert list(sampler) == list(of_sizes([30, 60], 6, num_replicas=3, rank=2))
    named = of_sizes([30, 60], 6, num_replicas=2, rank=1)  # goes before the group
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)  # made anew
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    whole = epochs_of(of_sizes([30, 60], 6, num_replicas=2, rank=0), 2)
    assert (len(sampler), list(sampler)) == (8, whole[1])
    assert list(named) == epochs_of(of_sizes([30, 60], 6, num_replicas=2, rank=1), 1)[0]


def test_replicas_that_cannot_be_known_are_asked_for():
    sampler = of_sizes([30, 60], 6, num_replicas=2)
    assert len(sampler) == 8
    with pytest.raises(ValueError, match="num_replicas=2 without a rank"):
        list(sampler)
    with pytest.raises(ValueError, match="rank=1 must be below num_replicas=1"):
        list(of_sizes([30, 60], 6, rank=1))


def test_a_missing_process_group_is_warned_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="WORLD_SIZE=2, but torch.distributed is not initialised"):
        list(of_sizes([30, 60], 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(of_sizes([30, 60], 6, num_replicas=1))


@properties
@given(made=samplers(max_replicas=5), epoch=st.integers(0, 5))
def test_unsharded_are_the_batches_of_all_replicas_in_turn(made, epoch):
    make, _ = made
    ranks = [make(rank) for rank in range(make().num_replicas)]
    sampler = make()
    unsharded = sampler.unsharded()
    for each in (unsharded, *ranks):
        each.set_epoch(epoch)
    assert len(unsharded) == len(ranks) * len(ranks[0])
    drawn = iter(unsharded)
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert [next(drawn) for _ in batches] == list(batches)
        assert sampler.state_dict() == ranks[0].state_dict(batches_done=step + 1) or (
            step + 1 == len(ranks[0])
        )
    assert next(drawn, None) is None
    assert sampler.epoch == epoch + 1


def test_a_step_is_done_when_all_replicas_have_their_batch():
    sampler = of_sizes([40, 60], 10, num_replicas=2, rank=0)
    drawn = iter(sampler.unsharded())
    done = [sampler.state_dict()["batches_done"] for _ in range(5) if next(drawn)]
    assert done == [0, 1, 1, 2, 2]


# --- what other libraries ask of a batch sampler --------------------------------------------------


def test_it_is_a_batch_sampler():
    sampler = of_sizes([40, 60], 10)
    for each in (sampler, sampler.unsharded()):
        assert isinstance(each, BatchSampler)
        assert each.drop_last is False
        each.sampler.set_epoch(3)
        assert sampler.epoch == 3
        sampler.set_epoch(0)
    assert sampler.batch_size == 10
    assert sampler.unsharded().batch_size is None  # or accelerate would fill smaller ones up
    unsharded = sampler.unsharded()
    unsharded.load_state_dict(unsharded.state_dict(batches_done=4))
    assert len(unsharded) == len(sampler) == 6
    with pytest.raises(AttributeError):
        sampler.batch_size = 20  # the shares would still be those of 10


@properties
@given(made=samplers(max_replicas=3))
def test_as_index_sampler_has_the_samples_of_the_batches(made):
    make, _ = made
    for rank in range(make().num_replicas):
        sampler = make(rank)
        whole = epochs_of(make(rank), 2)
        indices = sampler.as_index_sampler()
        assert len(indices) == len(list(chain(*whole[0])))
        assert [list(indices), list(indices)] == [list(chain(*epoch)) for epoch in whole]
        sampler.load_state_dict(sampler.state_dict(batches_done=len(sampler) - 1))
        assert len(indices) == len(whole[1][-1])


def test_batches_are_not_batched_once_more():
    loader = DataLoader(range(100), sampler=of_sizes([40, 60], 10), batch_size=10)
    with pytest.raises(ValueError, match="pass it as batch_sampler="):
        next(iter(loader))


def test_a_pass_keeps_nothing_of_a_training_loop():
    class Loss:
        pass

    loss = Loss()
    old = weakref.ref(loss)
    for _ in of_sizes([40, 60], 10):
        loss = Loss()
        assert old() is None
    del loss


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((SequentialSampler(range(9)),), {"batch_size": 3, "drop_last": False}),
        (([0] * 9, 3), {"sampler": SequentialSampler(range(9))}),
    ],
)
def test_a_trainer_that_rebuilds_it_is_told_what_to_do(arguments, options):
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        GroupBatchSampler(*arguments, **options)


# --- resuming ------------------------------------------------------------------------------------


@properties
@given(made=samplers(max_replicas=2), epoch=st.integers(0, 5), data=st.data())
def test_resuming_gives_exactly_the_remaining_batches(made, epoch, data):
    make, _ = made
    sampler = make()
    sampler.set_epoch(epoch)
    whole = list(sampler)
    done = data.draw(st.integers(0, len(whole) - 1))

    sampler.set_epoch(epoch)
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(done)] == whole[:done]
    state = json.loads(json.dumps(sampler.state_dict()))
    assert state == sampler.state_dict(batches_done=done)

    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(epoch)  # as a training loop does; must not lose the place
    assert len(resumed) == len(whole) - done
    assert list(resumed) == whole[done:]
    assert len(resumed) == len(whole)  # the place is used up: what follows are whole epochs
    sampler.set_epoch(epoch + 1)
    assert list(resumed) == list(sampler)


@pytest.mark.parametrize("saved", ["last batch", "end", "as told"])
@pytest.mark.parametrize("set_epoch", [None, 0, 1])
def test_a_state_of_an_epochs_end_resumes_into_the_next(saved, set_epoch):
    sampler = of_sizes([40, 60], 10)
    epochs = epochs_of(of_sizes([40, 60], 10), 4)
    if saved == "last batch":  # handed out, but the pass does not know yet that there is none left
        iterator = iter(sampler)
        assert [next(iterator) for _ in range(10)] == epochs[0]
    else:
        list(sampler)
    state = sampler.state_dict(batches_done=10 if saved == "as told" else None)
    resumed = of_sizes([40, 60], 10)
    resumed.load_state_dict(state)
    if set_epoch == 0:
        with pytest.warns(UserWarning, match=r"set_epoch\(0\) gives up .* epoch 1, 0 batches done"):
            resumed.set_epoch(0)
    elif set_epoch is not None:
        resumed.set_epoch(set_epoch)
    first = 1 if set_epoch is None else set_epoch
    assert resumed.epoch == first
    assert len(resumed) == 10
    assert [list(resumed) for _ in range(2)] == epochs[first : first + 2]


def test_a_state_of_one_process_is_refused_when_there_turn_out_to_be_several(monkeypatch):
    sampler = of_sizes([30, 60], 6)
    sampler.load_state_dict(sampler.state_dict(batches_done=4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(ValueError, match=r"num_replicas=1 \(here 3\)"):
        list(sampler)
    with pytest.warns(UserWarning, match=r"set_epoch\(1\) gives up the place"):
        sampler.set_epoch(1)
    assert len(list(sampler)) == 5


def test_resuming_twice_in_one_epoch():
    sampler = of_sizes([40, 60], 10)
    whole = list(sampler)
    sampler.set_epoch(0)
    sampler.load_state_dict(sampler.state_dict(batches_done=3))
    iterator = iter(sampler)
    assert [next(iterator), next(iterator)] == whole[3:5]
    again = of_sizes([40, 60], 10)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == whole[5:]


def test_a_state_loaded_after_the_iterator_is_made_counts():
    sampler = of_sizes([40, 60], 10)
    drawn = iter(sampler)
    sampler.load_state_dict(sampler.state_dict(batches_done=4))
    assert next(drawn) == epochs_of(of_sizes([40, 60], 10), 1)[0][4]
    assert len(sampler) == 10  # of the next iterator


def test_leaving_a_restored_epoch_forgets_the_place():
    sampler = of_sizes([40, 60], 10)
    sampler.load_state_dict(sampler.state_dict(batches_done=3))
    with pytest.warns(UserWarning, match="place .* restored: epoch 0, 3 batches done"):
        sampler.set_epoch(1)
    assert len(sampler) == len(list(sampler)) == 10


def test_the_length_of_a_restored_epoch_counts_until_an_iterator_is_made():
    # Lightning asks between the two, once, and cuts every epoch to that length.
    sampler = of_sizes([40, 60], 10)
    for batches, each in ((sampler, 1), (sampler.as_index_sampler(), 10), (sampler.unsharded(), 1)):
        sampler.load_state_dict({**sampler.state_dict(), "epoch": 0, "batches_done": 3})
        assert len(batches) == 7 * each
        iterator = iter(batches)
        assert len(batches) == 10 * each
        assert len(list(iterator)) == 7 * each


def test_resuming_behind_loader_workers_that_read_ahead():
    data = TensorDataset(torch.arange(100))
    sampler = of_sizes([40, 60], 10)
    whole = list(sampler)
    sampler.set_epoch(0)
    batches = iter(DataLoader(data, batch_sampler=sampler, num_workers=2, prefetch_factor=2))
    assert [next(batches)[0].tolist() for _ in range(3)] == whole[:3]
    assert sampler.state_dict()["batches_done"] > 3  # what the workers have asked for
    state = sampler.state_dict(batches_done=3)
    del batches

    resumed = of_sizes([40, 60], 10)
    resumed.load_state_dict(state)
    loader = DataLoader(data, batch_sampler=resumed)
    assert len(loader) == 7
    assert [batch.tolist() for (batch,) in loader] == whole[3:]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed=1 .here 0"),
        ({"batch_size": 12}, "batch_size=12"),
        ({"mode": "equal"}, "mode='equal'"),
        ({"min_per_group": 0}, "min_per_group=0"),
        ({"num_replicas": 2, "rank": 0}, "num_replicas=2"),
        ({"groups": [0] * 41 + [1] * 59}, "groups_crc32"),
    ],
)
def test_a_state_of_another_sampler_is_refused(changed, named):
    options = {"groups": [0] * 40 + [1] * 60, "batch_size": 10}
    state = GroupBatchSampler(**{**options, **changed}).state_dict()
    sampler = GroupBatchSampler(**options)
    with pytest.raises(ValueError, match=named):
        sampler.load_state_dict(state)


def test_a_damaged_state_is_refused_and_changes_nothing():
    sampler = of_sizes([40, 60], 10)
    good = sampler.state_dict()
    with pytest.raises(ValueError, match="lacks batches_done"):
        sampler.load_state_dict({key: good[key] for key in good if key != "batches_done"})
    with pytest.raises(ValueError, match="batches_done=11 exceeds the 10 batches"):
        sampler.load_state_dict({**good, "epoch": 4, "batches_done": 11})
    with pytest.raises(TypeError, match="epoch='2' must be an integer"):
        sampler.load_state_dict({**good, "epoch": "2", "batches_done": 5})
    assert sampler.state_dict() == good
    assert len(sampler) == 10


# --- the edge ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "groups", "options"),
    [
        (TypeError, "groups has dtype float64", [0.0, 1.0], {}),
        (ValueError, r"groups has shape \(2, 1\)", [[0], [1]], {}),
        (ValueError, r"groups has shape \(0,\)", np.zeros(0, int), {}),
        (ValueError, "1 samples, too few", [0], {}),
        (ValueError, "num_replicas=2 the two", [0, 0, 1], {"num_replicas": 2, "rank": 0}),
        (ValueError, "batch_size=1 must be at least 2", [0, 1], {"batch_size": 1}),
        (TypeError, "batch_size=2.5 must be an integer", [0, 1], {"batch_size": 2.5}),
        (ValueError, "mode='even' must be one of", [0, 1], {"mode": "even"}),
        (ValueError, "min_per_group=-1 must be at least 0", [0, 1], {"min_per_group": -1}),
        (ValueError, "seed=-1 must be at least 0", [0, 1], {"seed": -1}),
        (ValueError, "drop_last=True: there is no incomplete batch", [0, 1], {"drop_last": True}),
        (
            ValueError,
            "rank=2 must be below num_replicas=2",
            [0] * 9,
            {"num_replicas": 2, "rank": 2},
        ),
        (ValueError, "raise batch_size, mine fewer groups, or pass min_per_group=0", range(9), {}),
        (ValueError, "need 6 places, but batch_size=5", [0, 1, 2], {"min_per_group": 2}),
        (ValueError, "9 groups", range(9), {"mode": "equal"}),
    ],
)
def test_wrong_arguments_are_named(error, match, groups, options):
    with pytest.raises(error, match=match):
        GroupBatchSampler(groups, **{"batch_size": 5, **options})


def test_more_groups_than_places_work_with_no_minimum():
    batches = list(of_sizes([3] * 9, 5, min_per_group=0))
    assert sorted(chain(*batches)) == list(range(27))


def test_groups_may_be_a_tensor_and_indices_are_plain_integers():
    groups = torch.tensor([5, 5, -1, -1, 5, 9, 9])
    batches = list(GroupBatchSampler(groups, 3))
    assert batches == list(GroupBatchSampler(groups.tolist(), 3))
    assert {type(index) for batch in batches for index in batch} == {int}
