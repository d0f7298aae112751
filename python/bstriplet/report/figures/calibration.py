"""Reliability diagram: accuracy of the predictions by confidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bstriplet.config import Scheme
from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import LEGEND_LINE, MUTED, Look, legend_below, looks
from bstriplet.study.read_runs import Comparison, Run, scheme_label
from bstriplet.study.statistics import percent, spread
from bstriplet.training.metrics import Reliability, reliability


def calibration(comparison: Comparison) -> Picture:
    """Accuracy by confidence of each scheme over all seeds, and the distribution of confidence.

    One pair of panels per network.
    """
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
    networks = Counter(map(comparison.network_of, pooled))
    drawn_as = looks(comparison.schemes)

    def of_network(network: str) -> Iterator[tuple[Scheme, Reliability, Look]]:
        for scheme, found in pooled.items():
            if comparison.network_of(scheme) == network:
                yield scheme, found, drawn_as[scheme]

    def diagram(network: str, axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        for scheme, found, look in of_network(network):
            name = scheme_label(scheme.without("backbone"))
            axes.plot(
                found.confidence,
                found.accuracy,
                color=look.colour,
                linestyle=look.line,
                label=f"{name}, ECE {percent(errors[scheme])} %",
            )
            axes.scatter(
                found.confidence,
                found.accuracy,
                s=4 + 120 * found.count / found.count.sum(),
                color=look.colour,
            )
        axes.set_xlim(lowest, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_xlabel("confidence (probability of the predicted class)")
        axes.set_ylabel("share that is right")
        legend_below(axes)
        _percent_axes(axes)

    def histogram(network: str, axes: Axes) -> None:
        for _, found, look in of_network(network):
            axes.plot(
                found.confidence,
                found.count / found.count.sum(),
                color=look.colour,
                linestyle=look.line,
                marker="o",
                markersize=3,
            )
        axes.set_xlim(lowest, 1.01)
        axes.set_ylim(0, None)
        axes.set_xlabel("confidence (probability of the predicted class)")
        axes.set_ylabel("share of test images")
        _percent_axes(axes)

    def panels(network: str) -> tuple[Panel, Panel]:
        of = f", {network}" if len(networks) > 1 else ""
        return (
            Panel(f"Reliability{of}", partial(diagram, network)),
            Panel(f"How sure{of or ' the networks are'}", partial(histogram, network)),
        )

    return Picture(
        name="calibration",
        title="Calibration",
        caption=(
            "Test images of all seeds together, in bins of confidence; a larger dot is a bin of "
            "more images. On the dotted line, accuracy equals confidence; below it, the network is "
            "too sure. ECE is the mean distance from that line, ± its sd over seeds."
        ),
        panels=tuple(panel for network in networks for panel in panels(network)),
        size=(4.2, 3.8 + LEGEND_LINE * max(networks.values(), default=0)),
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


def _percent_axes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
