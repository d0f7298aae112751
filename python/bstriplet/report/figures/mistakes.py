"""A contact sheet of the most confident mistakes of each scheme on the test images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bstriplet.config import Scheme
from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import INK, short_name
from bstriplet.study.read_runs import Comparison, Run, scheme_label

COLUMNS, ROWS = 3, 3
CAPTION_HEIGHT = 0.36  # of an image's


@dataclass(frozen=True)
class Mistake:
    """A test image that runs misclassify: `wrong` of the `tested` runs.

    `predicted` is the class that most of these runs predict. `confidence` is their mean probability
    of the class that they predict.
    """

    file: str
    true: str
    predicted: str
    confidence: float
    wrong: int
    tested: int

    @property
    def weight(self) -> float:
        """Confidence of the wrong runs, averaged over all runs that were tested on the image."""
        return self.confidence * self.wrong / self.tested


def misclassified(comparison: Comparison) -> Picture:
    """The most confident mistakes of each scheme over its seeds: one panel per scheme."""
    panels, rows = [], []
    for scheme in comparison.schemes:
        runs = comparison.finished_of(scheme)
        found = mistakes(runs)
        pixels = {name: image for run in runs for name, image in run.mistakes.items()}
        shown = [mistake for mistake in found if mistake.file in pixels][: COLUMNS * ROWS]
        if shown:
            panels.append(_sheet(scheme, shown, [pixels[mistake.file] for mistake in shown]))
        rows += [
            (
                scheme_label(scheme),
                mistake.file,
                mistake.true,
                mistake.predicted,
                mistake.confidence,
                mistake.wrong,
                mistake.tested,
            )
            for mistake in found
        ]
    return Picture(
        name="misclassified",
        title="Most confident mistakes",
        caption=(
            "The test images with the most confident wrong answers, averaged over seeds: the true "
            "class, the predicted class, and the number of seeds that are wrong. The CSV names "
            "every misclassified image."
        ),
        panels=tuple(panels),
        size=(4.2, 4.2 / COLUMNS * ROWS * (1 + CAPTION_HEIGHT) + 0.3),
        header=("scheme", "file", "true", "predicted", "confidence", "wrong_runs", "runs"),
        rows=tuple(rows),
    )


def mistakes(runs: list[Run]) -> list[Mistake]:
    """Every test image that some of these runs get wrong, the most confident mistake first."""
    answers: dict[str, list[tuple[int, int, float]]] = {}
    for run in runs:
        found = run.predictions
        columns = (found.labels, found.predicted, found.probabilities.max(axis=1))
        for file, *answer in zip(found.files, *map(np.ndarray.tolist, columns), strict=True):
            answers.setdefault(file, []).append(tuple(answer))
    ranked = [
        _mistake(file, given, runs[0].predictions.classes)
        for file, given in answers.items()
        if any(label != predicted for label, predicted, _ in given)
    ]
    return sorted(ranked, key=lambda mistake: -mistake.weight)


def _mistake(file: str, answers: list[tuple[int, int, float]], classes: tuple[str, ...]) -> Mistake:
    wrong = [(predicted, sure) for label, predicted, sure in answers if label != predicted]
    votes = np.bincount([predicted for predicted, _ in wrong])
    return Mistake(
        file=file,
        true=classes[answers[0][0]],
        predicted=classes[votes.argmax()],
        confidence=float(np.mean([sure for _, sure in wrong])),
        wrong=len(wrong),
        tested=len(answers),
    )


def _sheet(scheme: Scheme, shown: list[Mistake], images: list[NDArray[np.uint8]]) -> Panel:
    def draw(axes: Axes) -> None:
        for place, (mistake, image) in enumerate(zip(shown, images, strict=True)):
            row, left = divmod(place, COLUMNS)
            top = row * (1 + CAPTION_HEIGHT)
            axes.imshow(
                np.squeeze(np.moveaxis(image, 0, -1)),
                cmap="gray",
                vmin=0,
                vmax=255,
                extent=(left + 0.03, left + 0.97, top + 0.97, top + 0.03),
                interpolation="nearest" if image.shape[-1] < 64 else "auto",
            )
            seeds = f", {mistake.wrong}/{mistake.tested} seeds" if mistake.tested > 1 else ""
            axes.text(
                left + 0.03,
                top + 0.99,
                f"is {short_name(mistake.true)}\nas {short_name(mistake.predicted)}\n"
                f"{mistake.confidence:.0%} sure{seeds}",
                va="top",
                fontsize=8,
                linespacing=1.1,
                color=INK,
                clip_on=True,
            )
        axes.set_xlim(0, COLUMNS)
        axes.set_ylim(ROWS * (1 + CAPTION_HEIGHT), 0)
        axes.set_aspect("equal")
        axes.set_axis_off()

    return Panel(scheme_label(scheme), draw)
