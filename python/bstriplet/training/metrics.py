"""Metrics of a classifier on a test set: Eqs. 9-11 of the paper and the area under its ROC."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_score,
    recall_score,
    roc_auc_score,
)

HEALTHY_WORDS = frozenset(
    ("normal", "healthy", "negative", "benign", "control", "clear", "no", "not", "without")
)
CONFIDENCE_BINS = 15
METRICS = ("accuracy", "sensitivity", "specificity", "auc")
"""The numbers of the paper's tables, by their names in :func:`classification_metrics`."""


@dataclass(frozen=True)
class Reliability:
    """Accuracy of the predictions in each bin of confidence; empty bins are left out.

    Confidence is the probability of the predicted class. `confidence` and `accuracy` are float64
    [B], the means of each bin; `count` is int64 [B], the number of its predictions.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]

    @property
    def error(self) -> float:
        """The expected calibration error: |accuracy - confidence|, averaged over predictions."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def classification_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    positive: str | None = None,
) -> dict[str, Any]:
    """All metrics of one run's predictions, ready for JSON.

    Args:
        labels: [N] integers in 0..C-1, the true classes.
        probabilities: [N, C] floats, each row a softmax output; the largest entry is the
            prediction.
        classes: the C class names, in the order of the columns.
        positive: for two classes, the name of the disease. Default: `positive_class(classes)`.

    Returns:
        A dict of Python numbers, strings, lists and None. None, never NaN, stands for a quantity
        that is undefined, such as the AUC of a class without test images.

        - `accuracy`: Σ TP_i / N, the accuracy of the paper's tables (Eq. 9 as printed exceeds 1).
        - `sensitivity`, `specificity`, `auc`: for two classes those of `positive`; for more, the
          macro means of Eqs. 10 and 11 and of the one-vs-rest AUCs, over the classes for which
          the quantity is defined.
        - `positive`: the positive class, None for three classes or more.
        - `ece`: expected calibration error of the predicted class, see `reliability`.
        - `per_class`: one dict per class, in order: `class`, `support`, `sensitivity` (recall),
          `specificity`, `precision`, `f1`, `auc` (that class against all others).
        - `confusion_matrix`: C x C counts; rows are true classes, columns predicted ones.
        - `n_images`: N.

    Raises:
        ValueError: an argument has the wrong shape or range; the message names it.
    """
    names = [str(name) for name in classes]
    true, scores = _checked(labels, probabilities, names)
    if len(names) > 2 and positive is not None:
        raise ValueError(
            f"positive={positive!r} is for two classes, but there are {len(names)}; leave it out"
        )
    if len(names) == 2:
        positive = positive_class(names) if positive is None else positive
        if positive not in names:
            raise ValueError(f"positive={positive!r} is no class; choose one of {names}")

    predicted = scores.argmax(axis=1)
    per_class = _per_class(true, predicted, scores, names)
    headline = per_class if positive is None else [per_class[names.index(positive)]]
    return {
        "n_images": len(true),
        "positive": positive,
        "accuracy": float(accuracy_score(true, predicted)),
        **{
            quantity: _mean_of_defined([row[quantity] for row in headline])
            for quantity in ("sensitivity", "specificity", "auc")
        },
        "ece": reliability(true, scores).error,
        "per_class": per_class,
        "confusion_matrix": confusion_matrix(true, predicted, labels=range(len(names))).tolist(),
    }


def reliability(labels: ArrayLike, probabilities: ArrayLike) -> Reliability:
    """Accuracy by confidence, in `CONFIDENCE_BINS` bins of equal width between 0 and 1.

    Args:
        labels: [N] integers in 0..C-1, N at least 1.
        probabilities: [N, C] floats, each row a softmax output.
    """
    scores = np.asarray(probabilities, dtype=np.float64)
    confidence = np.clip(scores.max(axis=1), 0, 1)
    right = scores.argmax(axis=1) == np.asarray(labels)
    accuracy, mean_confidence = calibration_curve(right, confidence, n_bins=CONFIDENCE_BINS)
    inner_edges = np.linspace(0, 1, CONFIDENCE_BINS + 1)[1:-1]
    counts = np.bincount(np.searchsorted(inner_edges, confidence))
    return Reliability(mean_confidence, accuracy, counts[counts > 0])


def positive_class(classes: Sequence[str]) -> str:
    """The disease, of two classes: the one whose name does not mean health.

    A name means health if one of its words is in `HEALTHY_WORDS` or begins with "non" ("Normal",
    "no finding", "Non-Lyme Disease"). If both names mean health, or neither does, the second class
    is taken.

    Args:
        classes: the two class names.
    """
    diseased = [name for name in classes if not _names_health(name)]
    return diseased[0] if len(diseased) == 1 else classes[-1]


def _names_health(name: str) -> bool:
    words = re.findall(r"[^\W_]+", name.casefold())
    return any(word in HEALTHY_WORDS or word.startswith("non") for word in words)


def _checked(
    labels: ArrayLike, probabilities: ArrayLike, names: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    true = np.asarray(labels)
    scores = np.asarray(probabilities, dtype=np.float64)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"classes={names} must be two or more different names")
    if true.ndim != 1 or true.size == 0 or true.dtype.kind not in "iu":
        raise ValueError(
            f"labels has shape {true.shape} and dtype {true.dtype}; "
            "it must be [N] integers with N >= 1"
        )
    if scores.shape != (len(true), len(names)):
        raise ValueError(
            f"probabilities has shape {scores.shape}; it must be [{len(true)}, {len(names)}]: "
            "one row per image, one column per class"
        )
    if true.min() < 0 or true.max() >= len(names):
        raise ValueError(
            f"labels runs from {true.min()} to {true.max()}; with {len(names)} classes it must "
            f"stay within 0..{len(names) - 1}"
        )
    unsound = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if unsound.size:
        raise ValueError(
            f"probabilities has NaN or infinity in {unsound.size} of {len(true)} rows, first in "
            f"row {unsound[0]}: the model diverged"
        )
    # Rows of half-precision softmax, or printed with few digits, miss 1 by some thousandths.
    if scores.min() < 0 or np.abs(scores.sum(axis=1) - 1).max() > 1e-2:
        raise ValueError(
            "probabilities must be >= 0 and each row must sum to 1; for logits, apply softmax first"
        )
    return true.astype(np.int64), scores


def _per_class(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    scores: NDArray[np.float64],
    names: list[str],
) -> list[dict[str, Any]]:
    each: dict[str, Any] = {"labels": range(len(names)), "average": None, "zero_division": np.nan}
    sensitivity = recall_score(true, predicted, **each)
    precision = precision_score(true, predicted, **each)
    f1 = f1_score(true, predicted, **each)
    matrices = multilabel_confusion_matrix(true, predicted, labels=range(len(names)))
    rows = []
    for index, name in enumerate(names):
        (true_negative, false_positive), (false_negative, true_positive) = matrices[index].tolist()
        support, others = true_positive + false_negative, true_negative + false_positive
        rows.append(
            {
                "class": name,
                "support": support,
                "sensitivity": _number(sensitivity[index]),
                "specificity": true_negative / others if others else None,
                "precision": _number(precision[index]),
                "f1": _number(f1[index]),
                "auc": float(roc_auc_score(true == index, scores[:, index]))
                if support and others
                else None,
            }
        )
    return rows


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean_of_defined(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
