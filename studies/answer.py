"""What the runs of plan.md answer: tables in answer.md and a figure, from the files of the study.

    python -m studies.answer

Every number is a function of the files in `results/does_it_help`; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from bstriplet.config import Scheme
from bstriplet.report.figures.style import GRID, INK, MUTED, STYLE, Look, looks
from bstriplet.storage import write_text
from bstriplet.study.read_runs import scheme_label
from bstriplet.study.statistics import detectable_difference, p_value, paired_test, points
from matplotlib.axes import Axes
from numpy.typing import NDArray

from studies.bootstrap import Interval, paired_interval
from studies.run import (
    BLOOD,
    BST,
    BST_MINED,
    CE,
    CE_MINED,
    LINEAR,
    PARTS,
    PRINTED,
    RESULTS,
    read_rows,
)

# The two comparisons of the primary share an error of 5 %.
PRIMARY_CONFIDENCE = 1 - 0.05 / 2
MATTERS = 0.01  # a difference in accuracy that matters
CURVE = {10: "curve-10", 20: "curve-20", 40: "primary", 80: "curve-80", None: "curve-all"}
CURVE_SEEDS = range(5)


@dataclass(frozen=True)
class Compared:
    """A scheme beside its baseline, over the repetitions that both have."""

    scheme: Scheme
    seeds: tuple[int, ...]
    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]
    interval: Interval

    @property
    def gains(self) -> NDArray[np.float64]:
        """The difference in test accuracy of each repetition."""
        return self.ours - self.theirs


class Study:
    """The files of the study, and comparisons from them."""

    def __init__(self, folder: Path) -> None:
        self.runs = {
            (row["part"], row["scheme"], int(row["seed"])): row
            for row in read_rows(folder / "runs.csv")
        }
        self.labels, self.classes = {}, {}
        for row in read_rows(folder / "labels.csv"):
            self.labels[row["images"]] = digits(row["labels"])
            self.classes[row["images"]] = json.loads(row["classes"])
        self.right = {
            (row["part"], row["scheme"], int(row["seed"])): digits(row["predicted"])
            == self.labels[PARTS[row["part"]].images]
            for row in read_rows(folder / "predictions.csv")
        }
        self.epochs = read_rows(folder / "epochs.csv")

    def seeds(self, part: str, *schemes: Scheme) -> tuple[int, ...]:
        """The repetitions of a part that all of these schemes have."""
        having = [
            {seed for name, text, seed in self.runs if (name, text) == (part, str(scheme))}
            for scheme in schemes
        ]
        return tuple(sorted(set.intersection(*having)))

    def compare(
        self,
        part: str,
        scheme: Scheme,
        *,
        baseline: Scheme = CE,
        baseline_part: str = "",
        among: Iterable[int] | None = None,
        confidence: float = 0.95,
    ) -> Compared | None:
        """A scheme beside a baseline, by default CE of its part; None below two repetitions."""
        baseline_part = baseline_part or part
        seeds = set(self.seeds(part, scheme)) & set(self.seeds(baseline_part, baseline))
        chosen = tuple(sorted(seeds if among is None else seeds & set(among)))
        if len(chosen) < 2:
            return None
        ours = np.stack([self.right[part, str(scheme), seed] for seed in chosen])
        theirs = np.stack([self.right[baseline_part, str(baseline), seed] for seed in chosen])
        labels = self.labels[PARTS[part].images]
        return Compared(
            scheme=scheme,
            seeds=chosen,
            ours=ours.mean(axis=1),
            theirs=theirs.mean(axis=1),
            interval=paired_interval(ours, theirs, labels, confidence=confidence),
        )

    @property
    def complete(self) -> tuple[int, ...]:
        """The repetitions of the primary that all its schemes have."""
        return self.seeds("primary", *PARTS["primary"].schemes)

    def mean(self, scheme: Scheme, measure: str) -> float:
        """The mean of a column of runs.csv over the complete repetitions of the primary."""
        rows = [self.runs["primary", str(scheme), seed] for seed in self.complete]
        return float(np.mean([float(row[measure]) for row in rows]))

    def origins(self) -> str:
        """Where the runs were trained, and how many pairs of one part and seed are not of one."""
        found: dict[tuple[str, ...], int] = {}
        of_pair: dict[tuple[str, int], set[tuple[str, ...]]] = {}
        for (part, _, seed), row in self.runs.items():
            origin = (
                row["device"],
                f"commit {row['commit']}",
                row["versions"].split(";")[1].strip(),
            )
            found[origin] = found.get(origin, 0) + 1
            of_pair.setdefault((part, seed), set()).add(origin)
        mixed = sum(len(origins) > 1 for origins in of_pair.values())
        lines = [f"- {count} runs: {', '.join(origin)}" for origin, count in found.items()]
        return (
            "\n".join([*lines, f"- {mixed} repetitions have runs of more than one of these"]) + "\n"
        )


def digits(text: str) -> NDArray[np.int64]:
    """The numbers of classes in a text of a digit each."""
    return np.array(list(map(int, text)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(values: NDArray[np.float64]) -> str:
    """Mean and standard deviation, in per cent."""
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}"


def bounds(interval: Interval) -> str:
    """An interval in points of accuracy."""
    return f"{points(interval.low)} to {points(interval.high)}"


def row_of(name: str, found: Compared) -> list[str]:
    """Repetitions, accuracies, difference, interval and paired t test of a comparison."""
    test = paired_test(
        dict(zip(found.seeds, found.ours, strict=True)),
        dict(zip(found.seeds, found.theirs, strict=True)),
    )
    return [
        name,
        str(len(found.seeds)),
        percent(found.theirs),
        percent(found.ours),
        points(found.interval.mean),
        bounds(found.interval),
        "-" if test.p is None else p_value(test.p).removeprefix("= "),
    ]


def header(confidence: float) -> tuple[str, ...]:
    """The head of a table of comparisons whose intervals have this confidence."""
    interval = f"{100 * confidence:g} % interval"
    return ("comparison", "pairs", "baseline", "compared", "difference", interval, "p of t")


def verdict(interval: Interval) -> str:
    """The plan's words for the interval of a primary comparison."""
    if interval.low > 0:
        return "helps"
    if interval.high < 0:
        return "hurts"
    within = interval.low > -MATTERS and interval.high < MATTERS
    return "does not matter" if within else "not told apart"


def primary(study: Study, part: str = "primary") -> str:
    """The table of the primary, and the power that its spread leaves."""
    found = [
        comparison
        for scheme in (BST, BST_MINED)
        if (comparison := study.compare(part, scheme, confidence=PRIMARY_CONFIDENCE))
    ]
    rows = [row_of(scheme_label(one.scheme), one) for one in found]
    power = [
        f"{scheme_label(one.scheme)}: **{_verdict_of(one, part)}**. Ahead in "
        f"{(one.gains > 0).sum()} of {len(one.seeds)} pairs. Standard deviation of the differences "
        f"{100 * one.gains.std(ddof=1):.2f} points, of which a paired t test at 2.5 %, which the "
        f"test images' own noise does not enter, finds {100 * _detectable(one):.2f} points in 80 % "
        "of experiments.\n"
        for one in found
    ]
    return table(header(PRIMARY_CONFIDENCE), rows) + "\n" + "\n".join(power)


def _verdict_of(found: Compared, part: str) -> str:
    """The verdict, once all repetitions that the plan asks for are there."""
    planned = PARTS[part].repetitions
    done = len(found.seeds)
    return verdict(found.interval) if done == planned else f"no verdict before {planned} pairs"


def _detectable(found: Compared) -> float:
    spread, level = float(found.gains.std(ddof=1)), 1 - PRIMARY_CONFIDENCE
    return detectable_difference(spread, len(found.seeds), level=level)


def beside(study: Study) -> str:
    """The table of the sampler, the other arms, the other set and the learning curve."""
    rows = []
    for name, scheme, baseline in (
        ("mined batches, CE alone", CE_MINED, CE),
        ("the loss, both on mined batches", BST_MINED, CE_MINED),
    ):
        if found := study.compare("primary", scheme, baseline=baseline):
            rows.append(row_of(name, found))
    for name, part, scheme in (
        ("similarity s", "variants", LINEAR),
        ("sign as printed", "variants", PRINTED),
    ):
        if found := study.compare(part, scheme, baseline_part="primary"):
            rows.append(row_of(name, found))
    for scheme in (BST, BST_MINED):
        if found := study.compare("chest", scheme):
            rows.append(row_of(f"chest, {scheme_label(scheme)}", found))
    for size, part in CURVE.items():
        if found := study.compare(part, BST, among=CURVE_SEEDS):
            rows.append(row_of(f"{size or 'all'} images a class", found))
    return (
        "None of these changes the answer; the intervals are not adjusted for their number. Those "
        "of chest X-rays take images for independent, of which some are of one child.\n\n"
        + table(header(0.95), rows)
    )


WHY: Mapping[str, str] = {
    "cross entropy, training images": "train_ce",
    "cross entropy, validation images": "validation_ce",
    "cross entropy, test images": "test_ce",
    **{
        f"{what} {where}, {part} images": f"{part}_{column}_{where}"
        for part in ("train", "test")
        for what, column in (("mean s²", "mean_square"), ("share of s < 0", "negative"))
        for where in ("within", "between")
    },
    "expected calibration error": "ece",
}
"""What may explain the outcome of the primary: columns of runs.csv by what they are."""


def why(study: Study) -> str:
    """Means over the primary's runs of what may explain its outcome, and gains by class."""
    schemes = (CE, CE_MINED, BST, BST_MINED)
    if not study.complete:
        return "No repetition of the primary is complete.\n"
    rows = [
        [name, *(f"{study.mean(scheme, column):.3f}" for scheme in schemes)]
        for name, column in WHY.items()
    ]
    text = table(("mean over runs", *map(scheme_label, schemes)), rows)
    shares = gradient_shares(study)
    epochs = sorted({epoch for _, epoch in shares})
    text += "\n" + table(
        ("share of the gradient's norm, epoch", *map(str, epochs)),
        [
            [scheme_label(scheme), *(f"{shares[scheme, epoch]:.2f}" for epoch in epochs)]
            for scheme in (BST, BST_MINED)
        ],
    )
    return text + "\n" + table(("class", "CE", *map(scheme_label, (BST, BST_MINED))), gains(study))


def gradient_shares(study: Study) -> dict[tuple[Scheme, int], float]:
    """The metric term's share of the sum of both gradients' norms, by scheme and epoch."""
    found: dict[tuple[Scheme, int], list[float]] = {}
    for row in study.epochs:
        counted = row["part"] == "primary" and int(row["seed"]) in study.complete
        if counted and row["metric_norm"]:
            ce, metric = float(row["ce_norm"]), float(row["metric_norm"])
            key = Scheme.parse(row["scheme"]), int(row["epoch"])
            found.setdefault(key, []).append(metric / (ce + metric))
    return {key: float(np.mean(values)) for key, values in found.items()}


def gains(study: Study) -> list[list[str]]:
    """The mean recall of each class under CE, and the differences of the other schemes to it."""
    labels, rows = study.labels[BLOOD], []
    for number, name in enumerate(study.classes[BLOOD]):
        recall = {
            scheme: np.mean(
                [
                    study.right["primary", str(scheme), seed][labels == number].mean()
                    for seed in study.complete
                ]
            )
            for scheme in (CE, BST, BST_MINED)
        }
        rows.append(
            [name, f"{100 * recall[CE]:.1f}"]
            + [points(float(recall[scheme] - recall[CE])) for scheme in (BST, BST_MINED)]
        )
    return rows


def figure(study: Study, path: Path) -> None:
    """Draw the primary's differences, one dot a repetition, and the learning curve."""
    with plt.rc_context(STYLE):
        canvas, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        look = looks((CE, BST, BST_MINED))
        for place, scheme in enumerate((BST, BST_MINED)):
            if found := study.compare("primary", scheme, confidence=PRIMARY_CONFIDENCE):
                _draw(left, place, found, look[scheme])
        left.set_xticks([0, 1], [scheme_label(BST), scheme_label(BST_MINED)])
        left.set_xlim(-0.5, 1.6)
        left.set_title("40 images a class; intervals of 97.5 %")
        left.set_ylabel("points of test accuracy over CE")
        sizes = list(CURVE)
        for place, size in enumerate(sizes):
            if found := study.compare(CURVE[size], BST, among=CURVE_SEEDS):
                _draw(right, place, found, look[BST])
                right.annotate(
                    f"{100 * found.theirs.mean():.0f} %",
                    (place, 0.02),
                    color=MUTED,
                    ha="center",
                    xycoords=right.get_xaxis_transform(),
                    fontsize=8,
                )
        right.set_xticks(range(len(sizes)), [str(size or "all") for size in sizes])
        right.set_xlabel("images a class; below, the accuracy of CE")
        right.set_title(f"Learning curve, {scheme_label(BST)}; 95 %")
        for axes in (left, right):
            axes.axhline(0, color=INK, lw=0.8)
            axes.grid(axis="x", color=GRID, lw=0)
        canvas.savefig(path, metadata={"Software": None})
        plt.close(canvas)


def _draw(axes: Axes, place: float, found: Compared, look: Look) -> None:
    """Draw the difference of each repetition as a dot, and their mean and interval beside them."""
    places = place + np.linspace(-0.12, 0.12, len(found.gains))
    axes.plot(places, 100 * found.gains, "o", color=look.colour, ms=4, alpha=0.7)
    mean, low, high = (100 * value for value in found.interval)
    axes.errorbar(
        place + 0.25,
        mean,
        [[mean - low], [high - mean]],
        fmt="D",
        color=look.strong,
        ms=5,
        capsize=3,
    )


def main(arguments: list[str] | None = None) -> None:
    """Write answer.md and the figure; print the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    folder = parser.parse_args(arguments).results
    study = Study(folder)
    missing = {
        name: len(part.schemes) * part.repetitions - sum(key[0] == name for key in study.runs)
        for name, part in PARTS.items()
    }
    parts = [
        "# Answers\n",
        f"{len(study.runs)} runs. Missing: "
        + (", ".join(f"{count} of {name}" for name, count in missing.items() if count) or "none")
        + ".\n",
        study.origins(),
        "## Primary\n",
        primary(study),
        "## Beside it\n",
        beside(study),
        "## Why\n",
        why(study),
    ]
    if study.seeds("primary-128", CE, BST):
        parts += ["## Primary at 128 x 128\n", primary(study, "primary-128")]
    text = "\n".join(parts)
    write_text(folder / "answer.md", text)
    figure(study, folder / "answer.png")
    print(text)


if __name__ == "__main__":
    main()
