"""Splits by class, by group and in folds: labels and groups in, masks or folds out."""

import warnings

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def hold_out(labels: Ints, fraction: float, generator: np.random.Generator) -> Mask:
    """Return a mask of ``fraction`` of each class: at least one sample, and not all.

    labels: [N], at least two of each class.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[:count]] = True
    return held_out


def hold_out_groups(
    labels: Ints, groups: Ints, fraction: float, generator: np.random.Generator
) -> Mask | None:
    """Return a mask of whole groups, nearly ``fraction`` of each class.

    None if some class would have no samples on one side.
    """
    dealt = _deal(labels, groups, round(1 / fraction), generator)
    if dealt is None:
        return None
    for fold in range(round(1 / fraction)):
        if _every_class_on_both_sides(labels, dealt == fold):
            return dealt == fold
    return None


def folds(labels: Ints, count: int, generator: np.random.Generator) -> Ints:
    """Return the fold of each sample, 0 to ``count`` - 1, each with its share of each class.

    labels: [N], at least ``count`` of each class.
    """
    splitter = StratifiedKFold(count, shuffle=True, random_state=_random_state(generator))
    fold_of = np.empty(len(labels), dtype=np.int64)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels)):
        fold_of[held_out] = fold
    return fold_of


def group_folds(
    labels: Ints, groups: Ints, count: int, generator: np.random.Generator
) -> Ints | None:
    """Return the fold of each sample as :func:`folds` does, each group in one fold.

    None if some class would be missing in a fold or outside it.
    """
    dealt = _deal(labels, groups, count, generator)
    if dealt is None or not all(
        _every_class_on_both_sides(labels, dealt == fold) for fold in range(count)
    ):
        return None
    return dealt


def _deal(labels: Ints, groups: Ints, count: int, generator: np.random.Generator) -> Ints | None:
    """Return the fold of each sample; None where every class has fewer samples than folds."""
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=_random_state(generator))
    fold_of = np.empty(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes smaller than the number of folds
        try:
            for fold, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
                fold_of[held_out] = fold
        except ValueError:
            return None
    return fold_of


def _every_class_on_both_sides(labels: Ints, held_out: Mask) -> bool:
    n_classes = len(np.unique(labels))
    return len(np.unique(labels[held_out])) == len(np.unique(labels[~held_out])) == n_classes


def _random_state(generator: np.random.Generator) -> int:
    return int(generator.integers(2**31))
