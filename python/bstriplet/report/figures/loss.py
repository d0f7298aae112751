"""Training and validation loss by epoch, as in Figs. 7 and 8."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bstriplet.config import Scheme
from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import looks
from bstriplet.study.read_runs import Comparison, Run, scheme_label


def loss_curves(comparison: Comparison) -> Picture:
    """Training and validation loss by epoch, as in Figs. 7 and 8: one panel per scheme."""
    logged = {
        scheme: [run for run in comparison.runs if run.scheme == scheme and run.log]
        for scheme in comparison.schemes
    }
    limits = _loss_limits([run for runs in logged.values() for run in runs])

    def panel(scheme: Scheme, runs: list[Run]) -> Panel:
        def draw(axes: Axes) -> None:
            colour = looks(comparison.schemes)[scheme].colour
            for name, line, label in (
                ("train_loss", (0, (3, 1.5)), "training"),
                ("validation_loss", "-", "validation"),
            ):
                curves = [_curve(run, name) for run in runs]
                for epochs, losses in curves if len(curves) > 1 else ():
                    axes.plot(epochs, losses, color=colour, linestyle=line, lw=0.6, alpha=0.5)
                shared = min(len(losses) for _, losses in curves)
                mean = np.mean([losses[:shared] for _, losses in curves], axis=0)
                axes.plot(
                    curves[0][0][:shared],
                    mean,
                    color=colour,
                    linestyle=line,
                    marker="o" if shared == 1 else None,
                    label=label,
                )
            axes.set_yscale("log", nonpositive="mask")
            axes.set_ylim(limits)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlabel("epoch")
            axes.set_ylabel("loss (log scale)")
            axes.legend(loc="best")

        return Panel(scheme_label(scheme), draw)

    return Picture(
        name="loss_curves",
        title="Loss curves",
        caption=(
            "The thick line is the mean over seeds, up to the last epoch that all seeds have; thin "
            "lines are single seeds. The loss of a combined scheme is the sum of two terms, so "
            "compare gap and shape between panels rather than height."
        ),
        panels=tuple(panel(scheme, runs) for scheme, runs in logged.items() if runs),
        size=(4.2, 3.2),
        header=("scheme", "seed", "epoch", "train_loss", "validation_loss"),
        rows=tuple(
            (
                scheme_label(run.scheme),
                run.seed,
                epoch["epoch"],
                epoch["train_loss"],
                epoch["validation_loss"],
            )
            for runs in logged.values()
            for run in runs
            for epoch in run.log
        ),
    )


def _curve(run: Run, name: str) -> tuple[list[int], list[float]]:
    values = [np.nan if epoch[name] is None else epoch[name] for epoch in run.log]
    return [epoch["epoch"] for epoch in run.log], values


def _loss_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """One loss axis for all panels, from the least to the greatest finite loss above 0."""
    values = np.array(
        [
            loss
            for run in runs
            for name in ("train_loss", "validation_loss")
            for loss in _curve(run, name)[1]
        ]
    )
    values = values[np.isfinite(values) & (values > 0)]
    return (values.min() / 1.15, values.max() * 1.15) if values.size else (0.1, 1.0)
