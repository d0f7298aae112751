"""The pictures of a comparison, and the data of each as CSV.

A `Picture` is some panels and the numbers that they show. It is drawn twice from one description:
all panels together for figures/NAME.png and .svg, and each panel by itself for the report, where
they stand side by side on a desk and one below the other on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix, roc_curve

from bstriplet.config import Scheme
from bstriplet.results import Comparison, Predictions, Run, scheme_label
from bstriplet.runs import write_atomic
from bstriplet.summary import area, spread, to_csv

INK, MUTED, GRID, PAPER = "#1f2430", "#5c6370", "#d9dde3", "#ffffff"
# A hue a loss, a tone a way to draw batches: (random, mined). Blue against orange, and pale
# against strong, stay apart in all common colour blindness and in grey print.
SCHEME_COLOURS = {
    "ce": ("#6aa5d8", "#1f5fa8"),
    "ce+bst": ("#ea9a55", "#b8430f"),
    "ce+triplet": ("#b08bd0", "#6b3fa0"),
    "ce+lifted": ("#5fb39a", "#14705a"),
}
OTHER_COLOURS = ("#9aa0a8", "#4a4f57")
DARK = {
    INK: "#e8eaee",
    MUTED: "#a3abb8",
    GRID: "#343a46",
    PAPER: "#14171c",
    "#6aa5d8": "#4f8abf",
    "#1f5fa8": "#8fc6f7",
    "#ea9a55": "#c07a3a",
    "#b8430f": "#ffb27a",
    "#b08bd0": "#8d68b0",
    "#6b3fa0": "#d0b0f2",
    "#5fb39a": "#3f9079",
    "#14705a": "#8fdcc4",
    "#9aa0a8": "#7b828c",
    "#4a4f57": "#c3c9d1",
}
# Okabe and Ito's colours, and three more of middle lightness: seen on white and on black.
CLASS_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#8c6bb1", "#8a8f98", "#a6761d", "#66a61e",
)  # fmt: skip
CLASS_MARKERS = "o^sDvP<X>"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5 bill"
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "bstriplet",
}
RATES = np.linspace(0, 1, 201) ** 2  # dense where good classifiers differ
LEGEND_CLASSES = 20
LABELLED_CLASSES = 25


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title and the function that draws into it."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    `name` is its file name without ending, `size` the width and height of a panel in inches,
    `header` and `rows` the numbers that it shows.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    size: tuple[float, float]
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def write(self, folder: Path) -> None:
        """Write NAME.png, NAME.svg and NAME.csv into an existing folder, each atomically."""
        write_atomic(folder / f"{self.name}.png", _render(self.panels, self.size, "png"))
        svg = _follow_colour_scheme(_render(self.panels, self.size, "svg").decode())
        write_atomic(folder / f"{self.name}.svg", svg.encode())
        write_atomic(folder / f"{self.name}.csv", to_csv(self.header, self.rows).encode())

    def panel_svgs(self) -> list[str]:
        """Each panel as an SVG document of its own that follows the reader's light or dark mode."""
        return [
            _follow_colour_scheme(_render((panel,), self.size, "svg").decode())
            for panel in self.panels
        ]


def scheme_colour(scheme: Scheme) -> str:
    """The colour of a scheme in every picture; `DARK` has its counterpart on a dark page."""
    return SCHEME_COLOURS.get(scheme.loss, OTHER_COLOURS)[scheme.batches == "mined"]


def pictures(comparison: Comparison) -> list[Picture]:
    """All pictures that the runs so far allow, in the order of the report."""
    drawn = [
        accuracies(comparison),
        loss_curves(comparison),
        embeddings(comparison),
        confusion_matrices(comparison),
        roc_curves(comparison),
    ]
    return [picture for picture in drawn if picture.panels]


def accuracies(comparison: Comparison) -> Picture:
    """Test accuracy of each run, a line through the runs of one seed; none for a single run."""
    schemes = [scheme for scheme in comparison.schemes if comparison.finished_of(scheme)]
    table = {
        scheme: {run.seed: run.metrics["accuracy"] for run in comparison.finished_of(scheme)}
        for scheme in schemes
    }

    def draw(axes: Axes) -> None:
        for seed in comparison.seeds:
            line = [table[scheme].get(seed, np.nan) for scheme in schemes]
            axes.plot(line, range(len(schemes)), color=MUTED, linewidth=0.7, alpha=0.6)
        for row, scheme in enumerate(schemes):
            values, colour = list(table[scheme].values()), scheme_colour(scheme)
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
            "A dot is one run; a thin line joins the runs of one seed, which share the split and "
            "the initial weights: the pairs of the test. The bar is the mean."
        ),
        panels=(Panel("Test accuracy, every run", draw),) if shown else (),
        size=(4.2, 1.1 + 0.45 * len(schemes)),
        header=("scheme", "seed", "accuracy"),
        rows=tuple(
            (scheme_label(scheme), seed, value)
            for scheme in schemes
            for seed, value in table[scheme].items()
        ),
    )


def loss_curves(comparison: Comparison) -> Picture:
    """Training and validation loss by epoch, as in Figs. 7 and 8: a panel a scheme."""
    logged = {
        scheme: [run for run in comparison.runs if run.scheme == scheme and run.log]
        for scheme in comparison.schemes
    }
    limits = _loss_limits([run for runs in logged.values() for run in runs])

    def panel(scheme: Scheme, runs: list[Run]) -> Panel:
        def draw(axes: Axes) -> None:
            colour = scheme_colour(scheme)
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
            axes.set_xlabel("epoch")
            axes.set_ylabel("loss (log scale)")
            axes.legend(loc="best")

        return Panel(scheme_label(scheme), draw)

    return Picture(
        name="loss_curves",
        title="Loss curves",
        caption=(
            "The thick line is the mean over seeds, as far as every seed has run; thin lines are "
            "the seeds. The loss of a combined scheme holds both of its terms, so compare gap "
            "and shape between panels rather than height."
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


def embeddings(comparison: Comparison) -> Picture:
    """Embeddings on their first two principal components, as in Fig. 6: a panel a scheme."""
    panels, rows = [], []
    for run in _first_runs(comparison):
        found = run.embeddings
        if min(found.vectors.shape) < 2:
            continue
        plane, shares = principal_plane(found.vectors)
        panels.append(_embedding_panel(run, plane, shares))
        rows += [
            (scheme_label(run.scheme), run.seed, found.classes[label], float(x), float(y))
            for label, (x, y) in zip(found.labels, plane, strict=True)
        ]
    return Picture(
        name="embeddings",
        title="Embeddings",
        caption=(
            "Training images, as in the paper's Fig. 6: L2-normalised embeddings, which is what "
            "cosine similarity sees, on the first two principal components of each scheme by "
            "itself. One seed. Axes of different panels are not the same directions."
        ),
        panels=tuple(panels),
        size=(4.2, 4.4),
        header=("scheme", "seed", "class", "component_1", "component_2"),
        rows=tuple(rows),
    )


def principal_plane(vectors: NDArray[np.floating]) -> tuple[NDArray[np.float64], list[float]]:
    """L2-normalise embeddings and project them on their first two principal components.

    Args:
        vectors: [N, D] finite floats, N and D at least 2. A zero row stays zero.

    Returns:
        The projection [N, 2], and the share of the variance along each of its two axes (0 where
        all embeddings coincide).
    """
    raw = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    unit = np.divide(raw, norms, out=np.zeros_like(raw), where=norms > 0)
    with np.errstate(invalid="ignore"):  # 0 / 0 for a network that maps all images to one point
        pca = PCA(n_components=2, random_state=0).fit(unit)
    return pca.transform(unit), np.nan_to_num(pca.explained_variance_ratio_).tolist()


def confusion_matrices(comparison: Comparison) -> Picture:
    """Confusion matrices summed over seeds, as in Fig. 9: a panel a scheme."""
    panels, rows = [], []
    for scheme in comparison.schemes:
        runs = comparison.finished_of(scheme)
        if not runs:
            continue
        classes = runs[0].predictions.classes
        counts = np.sum([_confusion(run.predictions) for run in runs], axis=0)
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
        panels.append(_confusion_panel(scheme, classes, counts, shares, len(runs)))
        rows += [
            (scheme_label(scheme), true, predicted, int(counts[i, j]), float(shares[i, j]))
            for i, true in enumerate(classes)
            for j, predicted in enumerate(classes)
        ]
    return Picture(
        name="confusion_matrix",
        title="Confusion matrices",
        caption=(
            "Test images, summed over seeds. The number is the count; the colour, and the "
            "percentage where there is room, is its share of the true class."
        ),
        panels=tuple(panels),
        size=(4.2, 4.0),
        header=("scheme", "true", "predicted", "count", "share_of_true"),
        rows=tuple(rows),
    )


def roc_curves(comparison: Comparison) -> Picture:
    """ROC curves of all schemes, mean over seeds with a band of one sd, as in Fig. 11."""
    curves = {
        scheme: [
            (run, curve)
            for run in comparison.finished_of(scheme)
            if (curve := roc(run.predictions, run.metrics["positive"])) is not None
        ]
        for scheme in comparison.schemes
    }
    curves = {scheme: found for scheme, found in curves.items() if found}

    def panel(title: str, highest: float) -> Panel:
        def draw(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
            for scheme, found in curves.items():
                values = np.array([curve for _, curve in found])
                mean, colour = values.mean(axis=0), scheme_colour(scheme)
                areas = spread([run.metrics["auc"] for run, _ in found])
                if len(values) > 1:
                    sd = values.std(axis=0, ddof=1)
                    low, high = np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1)
                    axes.fill_between(RATES, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(
                    RATES,
                    mean,
                    color=colour,
                    linestyle="-" if scheme.batches == "mined" else "--",
                    label=f"{scheme_label(scheme)}, AUC {area(areas)}",
                )
            axes.set_xlim(-0.01 * highest, highest)
            axes.set_ylim(-0.01, 1.01)
            axes.set_xlabel("false positive rate (1 - specificity)")
            axes.set_ylabel("true positive rate (sensitivity)")
            axes.legend(loc="lower right")

        return Panel(title, draw)

    return Picture(
        name="roc",
        title="ROC",
        caption=(
            "Test images. The line is the mean over seeds and the band one standard deviation; "
            "dashes are random batches. For three classes or more, the mean of the "
            "one-against-rest curves of the classes."
        ),
        panels=(
            panel("Whole curve", 1.0),
            panel("Up to 20 % false positives", 0.2),
        )
        if curves
        else (),
        size=(4.2, 3.9),
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

    Of the positive class or, where `positive` is None, the mean over the classes that have both
    members and others among the labels. None where no class has.
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


def _first_runs(comparison: Comparison) -> list[Run]:
    """A finished run a scheme: of the first seed that all have finished, else of each its first."""
    by_scheme = [comparison.finished_of(scheme) for scheme in comparison.schemes]
    by_scheme = [runs for runs in by_scheme if runs]
    finished = [{run.seed for run in runs} for runs in by_scheme]
    shared = [seed for seed in comparison.seeds if all(seed in seeds for seeds in finished)]
    return [
        next((run for run in runs if shared and run.seed == shared[0]), runs[0])
        for runs in by_scheme
    ]


def _embedding_panel(run: Run, plane: NDArray[np.float64], shares: Sequence[float]) -> Panel:
    classes, labels = run.embeddings.classes, run.embeddings.labels
    marker_size = float(np.clip(90 / np.sqrt(len(labels)), 2.5, 6))

    def draw(axes: Axes) -> None:
        for index, name in enumerate(classes):
            axes.plot(
                *plane[labels == index].T,
                CLASS_MARKERS[index % len(CLASS_MARKERS)],
                color=CLASS_COLOURS[index % len(CLASS_COLOURS)],
                markersize=marker_size,
                markeredgewidth=0,
                alpha=0.85,
                label=_short(name),
                rasterized=True,  # as vectors, thousands of points weigh megabytes
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"component 1 ({shares[0]:.0%} of variance)")
        axes.set_ylabel(f"component 2 ({shares[1]:.0%} of variance)")
        if len(classes) <= LEGEND_CLASSES:
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.14),
                ncols=5 if max(map(len, classes)) < 6 else 2,
                markerscale=6 / marker_size,
                handletextpad=0.2,
                columnspacing=1.0,
            )

    return Panel(f"{scheme_label(run.scheme)}, seed {run.seed}", draw)


def _confusion(predictions: Predictions) -> NDArray[np.int64]:
    predicted = predictions.probabilities.argmax(axis=1)
    return confusion_matrix(predictions.labels, predicted, labels=range(len(predictions.classes)))


def _confusion_panel(
    scheme: Scheme,
    classes: Sequence[str],
    counts: NDArray[np.int64],
    shares: NDArray[np.float64],
    n_runs: int,
) -> Panel:
    # From nothing to the scheme's strong tone: what shows through is the page, light or dark.
    strong = SCHEME_COLOURS.get(scheme.loss, OTHER_COLOURS)[1]
    ramp = ListedColormap([(*to_rgb(strong), alpha) for alpha in np.linspace(0, 1, 256)])

    def draw(axes: Axes) -> None:
        axes.pcolormesh(shares, cmap=ramp, vmin=0, vmax=1, edgecolors=GRID, linewidth=0.6)
        if len(classes) <= LABELLED_CLASSES:
            places = np.arange(len(classes)) + 0.5
            names = [_short(name) for name in classes]
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


def _short(name: str) -> str:
    """A class name that fits a tick or a legend; legends leave out what begins with "_"."""
    short = name if len(name) <= 18 else f"{name[:17]}…"
    return f" {short}" if short.startswith("_") else short


def _render(panels: Sequence[Panel], size: tuple[float, float], form: str) -> bytes:
    """Draw panels side by side, at most two in a row, as PNG or SVG."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for index, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, index)
            axes.set_title(panel.title)
            panel.draw(axes)
        buffer = io.BytesIO()
        if form == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _follow_colour_scheme(svg: str) -> str:
    """Let an SVG take the colours of `DARK` where its reader prefers dark.

    Every colour becomes a CSS variable that falls back to the light colour, so that a program
    that knows no variables, or no dark mode, shows the light picture.
    """
    for light in DARK:
        svg = svg.replace(light, f"var(--c{light[1:]}, {light})")
    dark = " ".join(f"--c{light[1:]}: {colour};" for light, colour in DARK.items())
    style = (
        "<style>svg { color-scheme: light dark; } "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    head, tag, rest = svg.partition("<svg ")
    attributes, end, body = rest.partition(">")
    return head + tag + attributes + end + style + body
