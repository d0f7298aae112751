"""Confusion matrices, as in Fig. 9."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from bstriplet.config import Scheme
from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import (
    GRID,
    INK,
    LABELLED_CLASSES,
    PAPER,
    looks,
    short_name,
)
from bstriplet.study.read_runs import Comparison, Predictions, scheme_label


def confusion_matrices(comparison: Comparison) -> Picture:
    """Confusion matrices summed over seeds, as in Fig. 9: one panel per scheme."""
    panels, rows = [], []
    for scheme in comparison.schemes:
        runs = comparison.finished_of(scheme)
        if not runs:
            continue
        classes = runs[0].predictions.classes
        counts = np.sum([_confusion(run.predictions) for run in runs], axis=0)
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
        strong = looks(comparison.schemes)[scheme].strong
        panels.append(_confusion_panel(scheme, strong, classes, counts, shares, len(runs)))
        rows += [
            (scheme_label(scheme), true, predicted, int(counts[i, j]), float(shares[i, j]))
            for i, true in enumerate(classes)
            for j, predicted in enumerate(classes)
        ]
    return Picture(
        name="confusion_matrix",
        title="Confusion matrices",
        caption=(
            "Test images, summed over seeds. The number is the count. The colour is its share of "
            "the true class; small matrices also print the share in per cent."
        ),
        panels=tuple(panels),
        size=(4.2, 4.0),
        header=("scheme", "true", "predicted", "count", "share_of_true"),
        rows=tuple(rows),
    )


def _confusion(predictions: Predictions) -> NDArray[np.int64]:
    every_class = range(len(predictions.classes))
    return confusion_matrix(predictions.labels, predictions.predicted, labels=every_class)


def _confusion_panel(
    scheme: Scheme,
    strong: str,
    classes: Sequence[str],
    counts: NDArray[np.int64],
    shares: NDArray[np.float64],
    n_runs: int,
) -> Panel:
    # From transparent to the scheme's strong tone: the page, light or dark, shows through.
    ramp = ListedColormap([(*to_rgb(strong), alpha) for alpha in np.linspace(0, 1, 256)])

    def draw(axes: Axes) -> None:
        axes.pcolormesh(shares, cmap=ramp, vmin=0, vmax=1, edgecolors=GRID, linewidth=0.6)
        if len(classes) <= LABELLED_CLASSES:
            places = np.arange(len(classes)) + 0.5
            names = [short_name(name) for name in classes]
            crowded = max(map(len, names)) * len(names) > 36
            axes.set_xticks(places, names, rotation=90 if crowded else 0)
            axes.set_yticks(places, names)
            roomy = len(classes) <= 6
            size = min(11.5, 75 / len(classes))
            for (row, column), count in np.ndenumerate(counts):
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{shares[row, column]:.0%}\n{count}" if roomy else str(count),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color=PAPER if shares[row, column] > 0.65 else INK,
                )
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylim(len(classes), 0)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")

    seeds = "1 seed" if n_runs == 1 else f"{n_runs} seeds"
    return Panel(f"{scheme_label(scheme)}, {seeds}", draw)
