"""Test accuracy of every run."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import MUTED, looks
from bstriplet.study.read_runs import Comparison, scheme_label


def accuracies(comparison: Comparison) -> Picture:
    """Test accuracy of each run, with a line per seed; without panels for a single run."""
    schemes = [scheme for scheme in comparison.schemes if comparison.finished_of(scheme)]
    table = {
        scheme: {run.seed: run.metrics["accuracy"] for run in comparison.finished_of(scheme)}
        for scheme in schemes
    }

    drawn_as = looks(comparison.schemes)
    longest = max((len(scheme_label(scheme)) for scheme in schemes), default=0)

    def draw(axes: Axes) -> None:
        for seed in comparison.seeds:
            line = [table[scheme].get(seed, np.nan) for scheme in schemes]
            axes.plot(line, range(len(schemes)), color=MUTED, linewidth=0.7, alpha=0.6)
        for row, scheme in enumerate(schemes):
            values, colour = list(table[scheme].values()), drawn_as[scheme].colour
            axes.plot(values, [row] * len(values), "o", color=colour, markersize=5, alpha=0.75)
            axes.plot(
                np.mean(values), row, marker="|", color=colour, markersize=22, markeredgewidth=2.5
            )
        axes.set_yticks(range(len(schemes)), [scheme_label(scheme) for scheme in schemes])
        axes.set_ylim(len(schemes) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("test accuracy")
        axes.grid(axis="y", visible=False)

    shown = len(comparison.finished) > 1
    return Picture(
        name="accuracy",
        title="Accuracy",
        caption=(
            "A dot is one run. A thin line joins the runs of one seed, which share the split and "
            "the initial weights; these are the pairs of the test. The bar is the mean."
        ),
        panels=(Panel("Test accuracy, every run", draw),) if shown else (),
        size=(max(4.2, 2.9 + 0.08 * longest), 1.1 + 0.45 * len(schemes)),
        header=("scheme", "seed", "accuracy"),
        rows=tuple(
            (scheme_label(scheme), seed, value)
            for scheme in schemes
            for seed, value in table[scheme].items()
        ),
    )
