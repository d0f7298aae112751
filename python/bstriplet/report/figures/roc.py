"""ROC curves with a band over seeds, as in Figs. 11, 13 and 15."""

from __future__ import annotations

from collections import Counter

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import LEGEND_LINE, MUTED, legend_below, looks
from bstriplet.study.read_runs import Comparison, Predictions, scheme_label
from bstriplet.study.statistics import area, spread

RATES = np.linspace(0, 1, 201) ** 2  # dense where good classifiers differ


def roc_curves(comparison: Comparison) -> Picture:
    """ROC curves of all schemes, mean over seeds with a band of one sd, as in Fig. 11.

    For one network, one panel of the whole curves and one of their corner; for several, one panel
    per network.
    """
    curves = {
        scheme: [
            (run, curve)
            for run in comparison.finished_of(scheme)
            if (curve := roc(run.predictions, run.metrics["positive"])) is not None
        ]
        for scheme in comparison.schemes
    }
    curves = {scheme: found for scheme, found in curves.items() if found}

    networks = {comparison.network_of(scheme): None for scheme in curves}
    most = max(Counter(map(comparison.network_of, curves)).values(), default=0)
    drawn_as = looks(comparison.schemes)

    def panel(title: str, highest: float, network: str) -> Panel:
        def draw(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
            for scheme, found in curves.items():
                if comparison.network_of(scheme) != network:
                    continue
                values = np.array([curve for _, curve in found])
                mean, look = values.mean(axis=0), drawn_as[scheme]
                areas = spread([run.metrics["auc"] for run, _ in found])
                if len(values) > 1:
                    sd = values.std(axis=0, ddof=1)
                    low, high = np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1)
                    axes.fill_between(RATES, low, high, color=look.colour, alpha=0.15, linewidth=0)
                axes.plot(
                    RATES,
                    mean,
                    color=look.colour,
                    linestyle=look.line,
                    label=f"{scheme_label(scheme.without('backbone'))}, AUC {area(areas)}",
                )
            axes.set_xlim(-0.01 * highest, highest)
            axes.set_ylim(-0.01, 1.01)
            axes.set_xlabel("false positive rate (1 - specificity)")
            axes.set_ylabel("true positive rate (sensitivity)")
            legend_below(axes)

        return Panel(title, draw)

    if len(networks) == 1:
        (network,) = networks
        panels = [
            panel("Whole curve", 1.0, network),
            panel("Up to 20 % false positives", 0.2, network),
        ]
    else:
        panels = [panel(network, 1.0, network) for network in networks]
    return Picture(
        name="roc",
        title="ROC",
        caption=(
            "Test images. The line is the mean over seeds and the band one standard deviation. "
            "Pale colours are random batches, strong colours mined ones. For three classes or "
            "more, a curve is the mean of the one-against-rest curves."
        ),
        panels=tuple(panels),
        size=(4.2, 3.8 + LEGEND_LINE * most),
        header=("scheme", "seed", "false_positive_rate", "true_positive_rate"),
        rows=tuple(
            (scheme_label(scheme), run.seed, float(x), float(y))
            for scheme, found in curves.items()
            for run, curve in found
            for x, y in zip(RATES, curve, strict=True)
        ),
    )


def roc(predictions: Predictions, positive: str | None) -> NDArray[np.float64] | None:
    """True positive rate at each false positive rate of `RATES`.

    The rate is that of the positive class or, if `positive` is None, the mean over the classes.
    Classes of which the labels have no members, or nothing else, are left out; None if no class is
    left.
    """
    curves = []
    for index, name in enumerate(predictions.classes):
        member = predictions.labels == index
        if positive in (None, name) and member.any() and not member.all():
            false_rate, true_rate, _ = roc_curve(member, predictions.probabilities[:, index])
            curve = np.interp(RATES, false_rate, true_rate)
            curve[0] = 0.0  # where the curve rises at once, interp returns the top of the step
            curves.append(curve)
    return np.mean(curves, axis=0) if curves else None
