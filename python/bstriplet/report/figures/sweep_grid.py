"""Test accuracy over λ and m."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import CLASS_COLOURS, GRID, INK, LOSS_HUES, MUTED, PAPER
from bstriplet.study.read_runs import Comparison
from bstriplet.study.sweep import HEADER, cells


def sweep(comparison: Comparison) -> Picture:
    """Accuracy by λ, one line per m, and a map if both are varied.

    Plain cross entropy is a horizontal line. There are no panels for other comparisons.
    """
    found = [cell for cell in cells(comparison) if cell.accuracy.n]
    weights = sorted({cell.weight for cell in found if cell.weight})
    margins = sorted({cell.margin for cell in found if cell.margin is not None})
    places = {weight: place for place, weight in enumerate(weights)}
    baseline = next((cell.accuracy for cell in found if not cell.weight), None)

    def lines(axes: Axes) -> None:
        if baseline and baseline.mean is not None:
            axes.axhline(baseline.mean, color=MUTED, linestyle="--", label="CE (λ = 0)")
            low, high = baseline.mean - (baseline.sd or 0), baseline.mean + (baseline.sd or 0)
            axes.axhspan(low, high, color=MUTED, alpha=0.12, linewidth=0)
        for number, margin in enumerate(margins or [None]):
            line = [cell for cell in found if cell.weight and cell.margin == margin]
            axes.errorbar(
                [places[cell.weight] + 0.06 * (number - len(margins) // 2) for cell in line],
                [cell.accuracy.mean or 0 for cell in line],
                [cell.accuracy.sd or 0 for cell in line],
                color=CLASS_COLOURS[number % len(CLASS_COLOURS)],
                marker="o",
                markersize=5,
                capsize=3,
                label=None if margin is None else f"m = {margin:g}",
            )
        axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axes.set_xlabel("λ")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("test accuracy")
        if margins or baseline:
            axes.legend(loc="best")

    def heat(axes: Axes) -> None:
        means = np.full((len(margins), len(weights)), np.nan)
        for cell in found:
            if cell.weight and cell.margin is not None:
                means[margins.index(cell.margin), places[cell.weight]] = cell.accuracy.mean
        strong = to_rgb(LOSS_HUES["ce+bst"][1])
        ramp = ListedColormap([(*strong, alpha) for alpha in np.linspace(0.05, 1, 256)])
        axes.pcolormesh(means, cmap=ramp, edgecolors=GRID, linewidth=0.6)
        low, high = np.nanmin(means), np.nanmax(means)
        for (row, column), mean in np.ndenumerate(means):
            if np.isfinite(mean):
                dark = mean > low + 0.6 * (high - low)
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{mean:.1%}",
                    ha="center",
                    va="center",
                    color=PAPER if dark else INK,
                )
        axes.set_xticks(np.arange(len(weights)) + 0.5, [f"{weight:g}" for weight in weights])
        axes.set_yticks(np.arange(len(margins)) + 0.5, [f"{margin:g}" for margin in margins])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("λ")
        axes.set_ylabel("m")

    panels = [Panel("Accuracy by λ", lines)] if weights else []
    if len(weights) > 1 and len(margins) > 1:
        panels.append(Panel("Mean accuracy", heat))
    return Picture(
        name="sweep",
        title="λ and m",
        caption="Test images, mean and one standard deviation over seeds.",
        panels=tuple(panels),
        size=(4.2, 3.4),
        header=HEADER,
        rows=tuple(cell.row for cell in found),
    )
