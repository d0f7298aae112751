"""classification_metrics against a count by loops, and in edge cases."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from bstriplet.training.metrics import (
    CONFIDENCE_BINS,
    classification_metrics,
    positive_class,
    reliability,
)
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = settings(derandomize=True, deadline=None, max_examples=80)


@st.composite
def predictions(draw, most_classes=5):
    """Labels [N], probabilities [N, C] with many ties, and names."""
    n_classes = draw(st.integers(2, most_classes))
    n_images = draw(st.integers(1, 25))
    labels = draw(st.lists(st.integers(0, n_classes - 1), min_size=n_images, max_size=n_images))
    row = st.lists(st.integers(1, 4), min_size=n_classes, max_size=n_classes)
    scores = np.array(draw(st.lists(row, min_size=n_images, max_size=n_images)), dtype=float)
    names = [f"class {index}" for index in range(n_classes)]
    return np.array(labels), scores / scores.sum(axis=1, keepdims=True), names


def count(labels, predicted, index):
    """TP, TN, FP, FN of one class, image by image."""
    counts = {"tp": 0, "tn": 0, "fp": 0, "fn": 0}
    for label, prediction in zip(labels, predicted, strict=True):
        if label == index:
            counts["tp" if prediction == index else "fn"] += 1
        else:
            counts["fp" if prediction == index else "tn"] += 1
    return counts


def pairwise_auc(labels, scores, index):
    """The chance that a member of the class is ranked above a non-member, a tie counting half."""
    wins = pairs = 0.0
    for i, label in enumerate(labels):
        for j, other in enumerate(labels):
            if label == index and other != index:
                pairs += 1
                wins += (scores[i, index] > scores[j, index]) + 0.5 * (
                    scores[i, index] == scores[j, index]
                )
    return wins / pairs if pairs else None


def ratio(numerator, denominator):
    return numerator / denominator if denominator else None


def mean_of_defined(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


@CASES
@given(predictions())
def test_every_number_equals_a_count_by_loops(case):
    labels, scores, names = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = classification_metrics(labels, scores, names)
    predicted = [int(row.argmax()) for row in scores]

    expected = []
    for index, name in enumerate(names):
        c = count(labels, predicted, index)
        expected.append(
            {
                "class": name,
                "support": c["tp"] + c["fn"],
                "sensitivity": ratio(c["tp"], c["tp"] + c["fn"]),
                "specificity": ratio(c["tn"], c["tn"] + c["fp"]),
                "precision": ratio(c["tp"], c["tp"] + c["fp"]),
                "f1": ratio(2 * c["tp"], 2 * c["tp"] + c["fp"] + c["fn"]),
                "auc": pairwise_auc(labels, scores, index),
            }
        )
    for row, wanted in zip(result["per_class"], expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=False)

    for quantity in ("sensitivity", "specificity", "auc"):
        values = [row[quantity] for row in expected]
        wanted = values[-1] if len(names) == 2 else mean_of_defined(values)
        assert result[quantity] == pytest.approx(wanted)
    hits = sum(int(a == b) for a, b in zip(labels, predicted, strict=True))
    assert result["accuracy"] == pytest.approx(hits / len(labels))
    assert result["n_images"] == len(labels)
    for i, row in enumerate(result["confusion_matrix"]):
        for j, cell in enumerate(row):
            pairs = zip(labels, predicted, strict=True)
            assert cell == sum(int(a == i and b == j) for a, b in pairs)


@CASES
@given(predictions())
def test_reliability_equals_a_count_by_loops(case):
    labels, scores, names = case
    bins = {}
    for label, row in zip(labels, scores, strict=True):
        confidence = max(row)
        # bins are closed above, as in Guo et al. (2017)
        number = max(1, math.ceil(round(confidence * CONFIDENCE_BINS, 9)))
        bins.setdefault(number, []).append((confidence, row.argmax() == label))
    found = reliability(labels, scores)
    wanted = [bins[number] for number in sorted(bins)]
    assert found.count.tolist() == [len(members) for members in wanted]
    means = [np.mean(members, axis=0) for members in wanted]
    assert np.allclose(found.confidence, [mean[0] for mean in means])
    assert np.allclose(found.accuracy, [mean[1] for mean in means])
    gaps = sum(len(m) * abs(mean[1] - mean[0]) for m, mean in zip(wanted, means, strict=True))
    assert found.error == pytest.approx(gaps / len(labels))
    assert classification_metrics(labels, scores, names)["ece"] == pytest.approx(found.error)


@CASES
@given(predictions())
def test_the_result_survives_json_unchanged(case):
    result = classification_metrics(*case)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@CASES
@given(predictions(most_classes=2))
def test_of_two_classes_the_other_as_positive_exchanges_sensitivity_and_specificity(case):
    labels, scores, names = case
    last = classification_metrics(labels, scores, names)
    first = classification_metrics(labels, scores, names, positive=names[0])
    assert last["positive"] == names[1]
    assert first["sensitivity"] == last["specificity"]
    assert first["specificity"] == last["sensitivity"]
    # Both columns rank the images by the same number, read from opposite ends.
    assert first["auc"] == pytest.approx(last["auc"])


def test_two_classes_by_hand():
    labels = [0, 0, 0, 1, 1]
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.55, 0.45]])
    result = classification_metrics(labels, scores, ["NORMAL", "PNEUMONIA"])
    assert result["positive"] == "PNEUMONIA"
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["sensitivity"] == pytest.approx(1 / 2)
    assert result["specificity"] == pytest.approx(2 / 3)
    assert result["auc"] == pytest.approx(4 / 6)
    assert result["confusion_matrix"] == [[2, 1], [1, 1]]


def test_a_class_without_test_images_has_no_auc_and_leaves_the_macro_mean():
    scores = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3]])
    result = classification_metrics([0, 1, 0], scores, ["a", "b", "c"])
    absent = result["per_class"][2]
    assert absent["support"] == 0
    assert absent["auc"] is absent["sensitivity"] is absent["precision"] is None
    assert absent["specificity"] == 1.0
    assert result["auc"] == pytest.approx(1.0)
    assert result["sensitivity"] == pytest.approx((0.5 + 1) / 2)


def test_one_image():
    result = classification_metrics([1], [[0.2, 0.8]], ["normal", "sick"])
    assert (result["accuracy"], result["sensitivity"]) == (1.0, 1.0)
    assert result["specificity"] is result["auc"] is None


def test_half_precision_probabilities_are_accepted():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(7), 50).astype(np.float16)
    names = [str(index) for index in range(7)]
    assert classification_metrics(rng.integers(0, 7, 50), scores, names)["n_images"] == 50


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (["NORMAL", "PNEUMONIA"], "PNEUMONIA"),
        (["PNEUMONIA", "NORMAL"], "PNEUMONIA"),
        (["Lyme Disease", "Non-Lyme Disease"], "Lyme Disease"),
        (["Non_Lyme", "Lyme"], "Lyme"),
        (["abnormal", "normal"], "abnormal"),
        (["malignant", "benign"], "malignant"),
        (["No Finding", "Effusion"], "Effusion"),
        (["covid_positive", "covid_negative"], "covid_positive"),
        (["cat", "dog"], "dog"),
        (["healthy", "no finding"], "no finding"),
        (["nodule", "clear"], "nodule"),
    ],
)
def test_the_positive_class_is_the_disease_else_the_last(classes, positive):
    assert positive_class(classes) == positive


GOOD = np.array([[0.5, 0.5], [0.4, 0.6]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probabilities": [[0.5, np.nan], [0.4, 0.6]]}, "NaN.*row 0"),
        ({"probabilities": [[3.0, -2.0], [0.4, 0.6]]}, "softmax"),
        ({"probabilities": [[3.0, 2.0], [0.4, 0.6]]}, "softmax"),
        ({"probabilities": GOOD[:1]}, r"probabilities has shape \(1, 2\)"),
        ({"probabilities": GOOD[:, 0]}, "probabilities has shape"),
        ({"labels": [0, 2]}, "labels runs from 0 to 2"),
        ({"labels": [-1, 0]}, "labels runs from -1"),
        ({"labels": [0.0, 1.0]}, "float64"),
        ({"labels": np.empty(0, int), "probabilities": np.empty((0, 2))}, "N >= 1"),
        ({"classes": ["a"]}, "two or more different names"),
        ({"classes": ["a", "a"]}, "two or more different names"),
        ({"positive": "c"}, "positive='c' is no class"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {"labels": [0, 1], "probabilities": GOOD, "classes": ["a", "b"]} | change
    with pytest.raises(ValueError, match=words):
        classification_metrics(**arguments)


def test_positive_is_refused_for_three_classes():
    with pytest.raises(ValueError, match="positive='a' is for two classes"):
        classification_metrics([0], [[0.2, 0.3, 0.5]], ["a", "b", "c"], positive="a")
