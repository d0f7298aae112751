"""The description of a data set that ``bstriplet data`` prints."""

import numpy as np

from bstriplet.data.dataset import Dataset, Task
from bstriplet.data.layouts import PARTS, Count

Rows = list[list[object]]


def describe(dataset: Dataset, task: Task) -> str:
    """Return the recognised layout, the number of images of each class in each part, and notes.

    For a set of the paper, the counts of the paper's table are printed too. The notes are those
    that a run would write.
    """
    images = dataset.images
    n_copies = len(images) - len(set(dataset.digests))
    colour = "grey" if images.pixels.shape[1] == 1 else "RGB"
    patients = "unknown"
    if dataset.patients is not None:
        patients = f"{len(np.unique(dataset.patients)):,}"
    counts = task.summary()["images"]
    rows: Rows = [["", *dataset.classes, "all"]]
    rows += [[part, *counts[part].values(), sum(counts[part].values())] for part in PARTS]
    lines = [
        f"layout      {dataset.layout}",
        f"images      {len(images):,}, {colour}",
        f"patients    {patients}",
        f"copies      {n_copies:,} images are exact copies of another",
        f"broken      {len(dataset.broken):,} images cannot be read",
        "",
        *_aligned(rows),
    ]
    if dataset.counts:
        lines += ["", *_aligned(_beside_the_paper(dataset.counts))]
    return "\n".join([*lines, *(f"note: {note}" for note in task.notes)])


def _beside_the_paper(counts: tuple[Count, ...]) -> Rows:
    """Return the rows of found counts and the paper's counts."""
    return [
        [counts[0].table, "found", "paper", "difference"],
        *([f"{c.part} {c.label}", c.found, c.paper, f"{c.found - c.paper:+,}"] for c in counts),
    ]


def _aligned(rows: Rows) -> list[str]:
    """Return rows as lines: the first column to the left, numbers to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(max(width, 10))
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
