"""Test accuracy over the batch size N_b, as in Fig. 5."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from bstriplet import paper
from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import MUTED, PAPER, looks
from bstriplet.study.read_runs import Comparison
from bstriplet.study.statistics import p_value, summarise_schemes


def batch_sizes(comparison: Comparison) -> Picture:
    """Accuracy of each run by its batch size, the mean over seeds, and the paper's two numbers."""
    found: dict[int, dict[int, float]] = {}
    for run in comparison.finished:
        size = int(run.config["batch_size"])
        found.setdefault(size, {})[run.seed] = run.metrics["accuracy"]
    sizes = sorted(found)
    printed = {size: float(value) / 100 for size, value in paper.batch_size_accuracies().items()}
    colour = looks(comparison.schemes)[comparison.schemes[0]].colour

    def draw(axes: Axes) -> None:
        for seed in comparison.seeds:
            line = [found[size].get(seed, np.nan) for size in sizes]
            axes.plot(sizes, line, "o-", color=colour, lw=0.6, markersize=3, alpha=0.5)
        means = [np.mean(list(found[size].values())) for size in sizes]
        axes.plot(sizes, means, "o-", color=colour, label="mean over seeds")
        axes.plot(
            list(printed),
            list(printed.values()),
            "D",
            color=MUTED,
            markerfacecolor=PAPER,
            label="as printed, on Chest-1",
        )
        axes.set_xticks(sorted({*sizes, *printed}))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("batch size $N_b$", parse_math=True)
        axes.set_ylabel("test accuracy")
        axes.legend(loc="lower right")

    return Picture(
        name="batch_size",
        title="Accuracy over batch size",
        caption=(
            "A thin line is one seed. The diamonds are the two points of the paper's curve that "
            f"its text gives.{_judgement(comparison)}"
        ),
        panels=(Panel("Accuracy over batch size", draw),) if found else (),
        size=(4.8, 3.4),
        header=("batch_size", "seed", "accuracy", "printed_accuracy"),
        rows=tuple(
            (size, seed, value, printed.get(size))
            for size in sizes
            for seed, value in sorted(found[size].items())
        ),
    )


def _judgement(comparison: Comparison) -> str:
    """A sentence on the paired tests of all sizes against the reference; "" without one."""
    if comparison.reference is None:
        return ""
    size_of = {scheme: scheme["batch_size"] for scheme in comparison.schemes}
    reference = f"N_b = {size_of[comparison.reference]}"
    judged = [
        (size_of[summary.scheme], summary.paired, summary.paired.p_holm)
        for summary in summarise_schemes(comparison)
        if summary.paired and summary.paired.p_holm is not None
    ]
    if not judged:
        return f" Too few paired seeds to test any size against {reference}."
    told = [
        f"{size} is {test.verdict} (p {p_value(p)})"
        for size, test, p in judged
        if test.verdict != "not told apart"
    ]
    how = f"paired t tests, Holm's adjustment for {len(judged)}"
    if told:
        return f" Against {reference}, {', '.join(told)}; {how}."
    least = min(p for _, _, p in judged)
    return f" No size is told apart from {reference} (least p {p_value(least)}; {how})."
