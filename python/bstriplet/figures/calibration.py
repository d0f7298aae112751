"""Reliability diagram: how often predictions of a confidence are right."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bstriplet.config import Scheme
from bstriplet.figures.picture import Panel, Picture
from bstriplet.figures.style import MUTED, scheme_colour
from bstriplet.metrics import Reliability, reliability
from bstriplet.results import Comparison, Run, scheme_label
from bstriplet.summary import percent, spread


def calibration(comparison: Comparison) -> Picture:
    """Accuracy by confidence of each scheme, all seeds together, and how confidence is spread."""
    pooled = {
        scheme: _pooled(runs)
        for scheme in comparison.schemes
        if (runs := comparison.finished_of(scheme))
    }
    errors = {
        scheme: spread([run.metrics["ece"] for run in comparison.finished_of(scheme)])
        for scheme in pooled
    }
    floor = min((float(found.confidence.min()) for found in pooled.values()), default=0.0)
    lowest = np.floor(20 * floor) / 20

    def diagram(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        for scheme, found in pooled.items():
            axes.plot(
                found.confidence,
                found.accuracy,
                color=scheme_colour(scheme),
                linestyle=_line(scheme),
                label=f"{scheme_label(scheme)}, ECE {percent(errors[scheme])} %",
            )
            axes.scatter(
                found.confidence,
                found.accuracy,
                s=4 + 120 * found.count / found.count.sum(),
                color=scheme_colour(scheme),
            )
        axes.set_xlim(lowest, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_xlabel("confidence (probability of the predicted class)")
        axes.set_ylabel("share that is right")
        axes.legend(loc="best")
        _percent_axes(axes)

    def histogram(axes: Axes) -> None:
        for scheme, found in pooled.items():
            axes.plot(
                found.confidence,
                found.count / found.count.sum(),
                color=scheme_colour(scheme),
                linestyle=_line(scheme),
                marker="o",
                markersize=3,
            )
        axes.set_xlim(lowest, 1.01)
        axes.set_ylim(0, None)
        axes.set_xlabel("confidence (probability of the predicted class)")
        axes.set_ylabel("share of test images")
        _percent_axes(axes)

    return Picture(
        name="calibration",
        title="Calibration",
        caption=(
            "Test images of all seeds together, in bins of confidence; a larger dot is a bin of "
            "more images. On the dotted line, confidence is as good as its word; below it, the "
            "network is too sure. ECE is the mean distance from that line, ± its sd over seeds."
        ),
        panels=(
            (
                Panel("Reliability", diagram),
                Panel("How sure the networks are", histogram),
            )
            if pooled
            else ()
        ),
        size=(4.2, 3.9),
        header=("scheme", "mean_confidence", "accuracy", "images"),
        rows=tuple(
            (scheme_label(scheme), float(confidence), float(accuracy), int(count))
            for scheme, found in pooled.items()
            for confidence, accuracy, count in zip(
                found.confidence, found.accuracy, found.count, strict=True
            )
        ),
    )


def _pooled(runs: list[Run]) -> Reliability:
    return reliability(
        np.concatenate([run.predictions.labels for run in runs]),
        np.concatenate([run.predictions.probabilities for run in runs]),
    )


def _line(scheme: Scheme) -> str:
    return "-" if scheme.batches == "mined" else "--"


def _percent_axes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
