"""The paired bootstrap: exact where it can be, and its coverage by simulation."""

import numpy as np
import pytest
from scipy.stats import binom, norm, t

from studies.bootstrap import paired_interval

ONE_CLASS = np.zeros(400, dtype=np.int64)


def test_repetitions_alone_give_the_t_interval():
    """Where all images of a repetition change alike, only the repetitions vary."""
    rises = np.array([1, 0, 1, 1, 0, -1, 1, 0, 1, 0, 0, 1, 1, -1, 1, 0])
    ours, theirs = np.tile((rises > 0)[:, None], 400), np.tile((rises < 0)[:, None], 400)
    found = paired_interval(ours, theirs, ONE_CLASS)
    assert found.mean == rises.mean()
    half = t.ppf(0.975, len(rises) - 1) * rises.std(ddof=1) / np.sqrt(len(rises))
    assert found.high - found.mean == pytest.approx(half, rel=0.12)
    assert found.mean - found.low == pytest.approx(half, rel=0.12)


def test_images_alone_give_the_normal_interval_within_classes():
    """Where all repetitions are alike, only the images vary, and those of a class among them."""
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    rise = np.where(labels == 0, draw.random(400) < 0.9, draw.random(400) < 0.1)
    ours, theirs = np.tile(rise, (20, 1)), np.zeros((20, 400), dtype=bool)
    found = paired_interval(ours, theirs, labels)
    error = np.sqrt(sum(rise[labels == c].var() / 200 for c in (0, 1))) / 2
    widened = -norm.ppf(norm.cdf(np.sqrt(20 / 19) * t.ppf(0.025, 19)))
    assert (found.high - found.low) / 2 == pytest.approx(widened * error, rel=0.08)


def test_nothing_between_them_is_nothing():
    right = np.random.default_rng(0).random((3, 400)) < 0.7
    assert paired_interval(right, right, ONE_CLASS) == (0, 0, 0)


def test_the_same_seed_gives_the_same_interval_and_more_confidence_a_wider_one():
    draw = np.random.default_rng(0)
    ours, theirs = draw.random((2, 5, 400)) < 0.7
    found = paired_interval(ours, theirs, ONE_CLASS)
    assert found == paired_interval(ours, theirs, ONE_CLASS)
    wider = paired_interval(ours, theirs, ONE_CLASS, confidence=0.99)
    assert wider.low < found.low < found.mean < found.high < wider.high


@pytest.mark.parametrize(
    ("repetitions", "confidence", "of_runs", "of_images"),
    [(5, 0.95, 0.3, 0.0), (5, 0.95, 0.1, 0.4), (15, 0.975, 0.3, 0.0), (15, 0.975, 0.1, 0.4)],
)
def test_it_covers_the_truth(repetitions, confidence, of_runs, of_images):
    """As often as it says, or somewhat more: repetitions vary, and in two cases images do."""
    draw, trials, images = np.random.default_rng(1), 300, 300
    labels, hits = np.arange(images) % 3, 0
    for number in range(trials):
        ability, favour = draw.normal(1, 1, images), draw.normal(0, of_images, images)
        ours, theirs = (
            ability
            + sign * favour
            + draw.normal(0, of_runs, (repetitions, 1))
            + draw.normal(0, 0.3, (repetitions, images))
            > 0
            for sign in (1, -1)
        )
        found = paired_interval(
            ours, theirs, labels, confidence=confidence, resamples=200, seed=number
        )
        hits += found.low <= 0 <= found.high
    low, high = binom.ppf([0.005, 0.995], trials, [confidence, min(1, confidence + 0.03)])
    assert low <= hits <= high


def test_what_is_not_paired_is_refused():
    right = np.ones((3, 400), dtype=bool)
    with pytest.raises(ValueError, match=r"ours \(3, 400\) and theirs \(2, 400\)"):
        paired_interval(right, right[:2], ONE_CLASS)
    with pytest.raises(ValueError, match=r"must both be \[R, 399\]"):
        paired_interval(right, right, ONE_CLASS[1:])
    with pytest.raises(ValueError, match="1 repetitions have no spread"):
        paired_interval(right[:1], right[:1], ONE_CLASS)
