"""mine_groups: properties of every grouping, clusters that it must find, and wrong arguments."""

import warnings

import numpy as np
import pytest
import torch
from bstriplet import mining
from bstriplet.mining import mine_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_info, threadpool_limits

properties = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@st.composite
def labelled_features(draw):
    """Few samples of few values, so that duplicates, small classes and constant ones are common."""
    n = draw(st.integers(1, 24))
    shape = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    dtype = draw(
        st.sampled_from([np.uint8, np.int64, np.float16, np.float32, np.float64, np.bool_])
    )
    values = st.integers(0, 1 if dtype is np.bool_ else 3)
    features = draw(arrays(np.int64, (n, *shape), elements=values)).astype(dtype)
    labels = draw(arrays(np.int64, n, elements=st.integers(-1, 2)))
    return features, labels


def clouds(rng, centres, n, scale=0.1):
    """n samples around each of the centres [k, D], and the number of each sample's centre."""
    centres = np.asarray(centres, dtype=np.float64)
    which = np.repeat(np.arange(len(centres)), n)
    return centres[which] + scale * rng.standard_normal((len(which), centres.shape[1])), which


# --- what a grouping must be ---------------------------------------------------------------------


@properties
@given(
    data=labelled_features(),
    n_groups=st.one_of(st.integers(1, 5), st.just("auto"), st.lists(st.integers(1, 5), min_size=4)),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_split_classes_without_gaps(data, n_groups, seed):
    features, labels = data
    if isinstance(n_groups, list):
        n_groups = {label: n_groups[label + 1] for label in set(labels.tolist())}
    groups = mine_groups(features, labels, n_groups, seed=seed)
    assert groups.shape == labels.shape
    assert groups.dtype == np.int64
    assert np.array_equal(np.unique(groups), np.arange(groups.max() + 1))
    assert np.array_equal(groups, mine_groups(features, labels, n_groups, seed=seed))

    for group in range(groups.max() + 1):
        assert len(set(labels[groups == group])) == 1
    seen = [groups[labels == label] for label in np.unique(labels)]
    in_order = np.concatenate([list(dict.fromkeys(of_class.tolist())) for of_class in seen])
    assert np.array_equal(in_order, np.arange(groups.max() + 1))

    for label, of_class in zip(np.unique(labels).tolist(), seen, strict=True):
        rows = features[labels == label].reshape(len(of_class), -1)
        n_distinct = len(np.unique(rows, axis=0))
        if n_groups == "auto":
            assert len(set(of_class)) <= min(mining.MAX_AUTO_GROUPS, n_distinct)
        else:
            wanted = n_groups[label] if isinstance(n_groups, dict) else n_groups
            assert len(set(of_class)) == min(wanted, n_distinct)
        for row in np.unique(rows, axis=0):  # equal samples share a group
            assert len(set(of_class[(rows == row).all(axis=1)])) == 1


@pytest.mark.parametrize("n_dims", [3, 400])
def test_duplicates_of_few_samples_make_as_many_groups_as_samples(n_dims):
    distinct = np.random.default_rng(0).random((3, n_dims))
    features = distinct[np.arange(90) % 3]
    assert np.array_equal(mine_groups(features, np.zeros(90, int), 5), np.arange(90) % 3)


def test_zeros_of_either_sign_are_the_same_sample():
    assert mine_groups([[0.0], [-0.0], [1.0]], [0, 0, 0], 3).tolist() == [0, 0, 1]


# --- what it finds -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", [2, 40, 1000])
@pytest.mark.parametrize("n_groups", [3, {0: 3, 1: 3}, "auto"])
def test_separate_clouds_are_found_in_each_class(n_dims, n_groups):
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((6, n_dims))
    features, cloud = clouds(rng, centres, 60, scale=0.02)
    order = rng.permutation(len(features))
    groups = mine_groups(features[order], cloud[order] % 2, n_groups)
    assert adjusted_rand_score(cloud[order], groups) == 1


def test_no_worse_than_k_means_of_all_pixels():
    digits = load_digits()
    wide = np.kron(digits.images, np.ones((4, 4)))  # 32 x 32: goes through PCA
    groups = mine_groups(wide.astype(np.uint8), digits.target, 3, seed=0)
    assert groups.max() + 1 == 30
    ours = theirs = 0.0
    for digit in range(10):
        rows = wide[digits.target == digit].reshape(-1, 1024)
        of_digit = groups[digits.target == digit]
        for group in np.unique(of_digit):
            members = rows[of_digit == group]
            ours += ((members - members.mean(axis=0)) ** 2).sum()
        theirs += KMeans(3, n_init=4, random_state=1).fit(rows).inertia_
    assert ours < 1.01 * theirs


def test_large_classes_go_through_mini_batches_to_the_same_clouds(monkeypatch):
    rng = np.random.default_rng(2)
    features, cloud = clouds(rng, [[0, 0], [0, 4], [4, 0]], 400)
    monkeypatch.setattr(mining, "MINI_BATCH_ABOVE", 1000)
    monkeypatch.setattr(mining, "KMeans", None)
    assert np.array_equal(mine_groups(features, np.zeros(1200, int), 3), cloud)


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_origin_and_unit_of_features_do_not_matter(offset, unit):
    rng = np.random.default_rng(3)
    features, cloud = clouds(rng, [[0, 0], [40, 0]], 50)
    assert np.array_equal(mine_groups((features + offset) * unit, np.zeros(100, int)), cloud)


def test_chosen_rows_are_grouped_as_their_copies_would_be():
    images = load_digits().images
    rows = np.random.default_rng(8).choice(len(images), 900, replace=False)
    labels = load_digits().target[rows] % 3
    for features in (images.astype(np.uint8), np.kron(images, np.ones((1, 3, 3)))):
        copied = mine_groups(features[rows], labels, 3, seed=5)
        assert np.array_equal(mine_groups(features, labels, 3, rows=rows, seed=5), copied)
        assert not np.array_equal(mine_groups(features[:900], labels, 3, seed=5), copied)


def test_rows_are_taken_in_chunks_with_the_same_result(monkeypatch):
    images = load_digits().images
    labels = np.arange(len(images)) % 2
    wide = np.kron(images, np.ones((1, 3, 3)))
    whole = mine_groups(wide, labels, 4)
    monkeypatch.setattr(mining, "_CHUNK_VALUES", 5000)
    assert adjusted_rand_score(whole, mine_groups(wide, labels, 4)) > 0.99


@pytest.mark.parametrize("n_dims", [1, 2, 20])
def test_auto_leaves_a_single_cloud_whole(n_dims):
    rng = np.random.default_rng(4)
    cloud = rng.standard_normal((300, n_dims)) * np.linspace(1, 3, n_dims)
    labels = np.zeros(300, int)
    assert [mine_groups(cloud, labels, "auto", seed=seed).max() for seed in range(3)] == [0, 0, 0]


def test_auto_counts_the_clouds_of_each_class_apart():
    rng = np.random.default_rng(5)
    corners = 8 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    parts = [clouds(rng, corners[:k], 80, scale=1)[0] for k in (1, 2, 4)]
    labels = np.repeat([0, 1, 2], [len(part) for part in parts])
    groups = mine_groups(np.concatenate(parts), labels, "auto")
    assert [len(np.unique(groups[labels == label])) for label in range(3)] == [1, 2, 4]


def test_auto_with_one_two_and_three_samples():
    labels = [0, 1, 1, 2, 2, 2]
    groups = mine_groups([[0.0], [1.0], [9.0], [0.0], [0.1], [5.0]], labels, "auto")
    assert groups[0] == 0
    assert groups[1] == groups[2] == 1  # two samples tell nothing about clusters


# --- inputs and determinism ----------------------------------------------------------------------


def test_k_means_runs_on_one_thread(monkeypatch):
    # With more, the order of its sums, and so the last bits of a centre, would vary.
    threads = []

    class Watched(KMeans):
        def fit_predict(self, *args):
            threads.extend(p["num_threads"] for p in threadpool_info() if p["user_api"] == "openmp")
            return super().fit_predict(*args)

    monkeypatch.setattr(mining, "KMeans", Watched)
    with threadpool_limits(2, user_api="openmp"):
        mine_groups(load_digits().data, load_digits().target)
    assert set(threads) == {1}


def test_tensors_lists_and_class_names():
    rng = np.random.default_rng(6)
    features, cloud = clouds(rng, [[0, 0], [0, 4], [4, 0], [4, 4]], 20)
    names = np.array(["covid", "normal"])[cloud // 2]
    expected = mine_groups(features, cloud // 2).tolist()
    assert mine_groups(features.tolist(), names.tolist()).tolist() == expected
    assert mine_groups(features, names, {"normal": 2, "covid": 2}).tolist() == expected
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.tensor(features, dtype=dtype, requires_grad=True)
        assert mine_groups(tensor, torch.tensor(cloud // 2)).tolist() == expected


def test_input_is_left_as_it_was():
    features = np.random.default_rng(7).random((50, 300), dtype=np.float32)
    before = features.copy()
    mine_groups(features, np.zeros(50, int))
    assert np.array_equal(features, before)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(wrong):
    features = np.zeros((6, 2, 2))
    features[[3, 5], 1, 0] = wrong
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 6 rows, the first is row 3"):
        mine_groups(features, [0] * 6)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"labels has shape \(3,\); 4 rows of features", {"labels": [0, 0, 1]}),
        (ValueError, r"labels has shape \(4, 1\)", {"labels": [[0], [0], [1], [1]]}),
        (TypeError, "labels has dtype float64", {"labels": [0.0, 0.0, 1.0, 1.0]}),
        (TypeError, "features has dtype complex128", {"features": [1j] * 4}),
        (TypeError, "features has dtype <U1", {"features": ["a"] * 4}),
        (ValueError, r"features has shape \(0, 2\)", {"features": np.zeros((0, 2)), "labels": []}),
        (ValueError, r"features has shape \(4, 0\)", {"features": np.zeros((4, 0))}),
        (ValueError, "beyond float64: scale it down", {"features": [-1.7e308, 1.7e308, 0, 1]}),
        (ValueError, "n_groups == 0, must be >= 1", {"n_groups": 0}),
        (TypeError, "n_groups must be an instance of int", {"n_groups": 2.0}),
        (TypeError, "n_groups must be an instance of int", {"n_groups": None}),
        (ValueError, "n_groups='many' must be", {"n_groups": "many"}),
        (ValueError, r"n_groups lacks \[1\]", {"n_groups": {0: 2}}),
        (ValueError, r"n_groups names \[7, 'x'\]", {"n_groups": {0: 2, 1: 2, 7: 1, "x": 1}}),
        (ValueError, r"n_groups\[1\] == -2, must be >= 1", {"n_groups": {0: 2, 1: -2}}),
        (TypeError, r"rows is float64 of shape \(4,\); it must be", {"rows": np.arange(4.0)}),
        (TypeError, r"rows is float64 of shape \(0,\)", {"rows": []}),
        (ValueError, "rows holds 0 to 4; features has rows 0 to 3", {"rows": [0, 1, 2, 4]}),
        (ValueError, "rows holds -1 to 2; features has rows", {"rows": [0, 1, 2, -1]}),
        (ValueError, r"labels has shape \(4,\); 2 rows of features", {"rows": [0, 1]}),
        (ValueError, "seed == -1, must be >= 0", {"seed": -1}),
        (ValueError, "seed == 4294967296, must be <=", {"seed": 2**32}),
    ],
)
def test_wrong_arguments_are_named(error, match, changed):
    arguments = {"features": [0.0, 1.0, 2.0, 3.0], "labels": [0, 0, 1, 1], **changed}
    with pytest.raises(error, match=match):
        mine_groups(**arguments)
