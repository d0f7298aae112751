"""Sweeps: experiments whose schemes differ in ``metric_weight`` (λ) and ``margin`` (m)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bstriplet.config import Scheme
from bstriplet.errors import UserError
from bstriplet.loss_registry import BUILT_IN
from bstriplet.storage import write_text
from bstriplet.study.read_runs import Comparison, read_comparison
from bstriplet.study.statistics import Spread, percent, spread, to_csv

HEADER = ("metric_weight", "margin", "seeds", "accuracy_mean", "accuracy_sd")


@dataclass(frozen=True)
class Cell:
    """Test accuracy over seeds at one λ (``weight``) and one m, which is None if not varied."""

    weight: float
    margin: float | None
    accuracy: Spread

    @property
    def row(self) -> tuple[float | None, ...]:
        """The cell as a row below ``HEADER``."""
        return (self.weight, self.margin, self.accuracy.n, self.accuracy.mean, self.accuracy.sd)


def sweep_schemes(
    loss: str, batches: str, weights: Sequence[float], margins: Sequence[float]
) -> tuple[Scheme, ...]:
    """Return the grid of ``weights`` x ``margins``.

    A weight of 0 adds a single scheme, plain cross entropy: the baseline of all others.
    """
    if margins and not (loss in BUILT_IN and BUILT_IN[loss].takes_margin):
        takers = " or ".join(name for name, entry in BUILT_IN.items() if entry.takes_margin)
        raise UserError(f"--margins: the margin is that of {takers}, not of {loss}; leave it out")
    if loss == "ce":
        raise UserError("--loss: ce has nothing to weigh; give a loss such as ce+bst")
    grid = product([w for w in weights if w], margins or (None,))
    varied = [{"metric_weight": w} | ({} if m is None else {"margin": m}) for w, m in grid]
    baseline = (Scheme("ce", batches),) if 0 in weights else ()
    return (*baseline, *(Scheme(loss, batches, **fields) for fields in varied))


def cells(comparison: Comparison) -> list[Cell]:
    """Return the cells of a sweep in its order; none for other comparisons."""
    found = []
    for scheme in comparison.schemes:
        accuracy = spread([run.metrics["accuracy"] for run in comparison.finished_of(scheme)])
        varied = scheme.others
        if scheme.loss == "ce" and not varied:
            found.append(Cell(0.0, None, accuracy))
        elif "metric_weight" in varied and varied.keys() <= {"metric_weight", "margin"}:
            found.append(Cell(varied["metric_weight"], varied.get("margin"), accuracy))
        else:
            return []
    return found if any(cell.weight for cell in found) else []


def write_tables(folder: Path) -> str:
    """Write sweep.csv (one row per cell) and sweep.md (λ by m) into ``folder``; return sweep.md.

    Raises:
        UserError: ``folder`` is no compare folder, cannot be written, or holds a damaged file.
    """
    found = cells(read_comparison(folder))
    table = to_csv(HEADER, [cell.row for cell in found])
    write_text(folder / "sweep.csv", table)
    text = _markdown(found)
    write_text(folder / "sweep.md", text)
    return text


def _markdown(found: Sequence[Cell]) -> str:
    margins = list(dict.fromkeys(cell.margin for cell in found if cell.weight)) or [None]
    lines = [
        "| ACC (%) | " + " | ".join("" if m is None else f"m = {m:g}" for m in margins) + " |",
        "| --- |" + " --- |" * len(margins),
    ]
    for weight in dict.fromkeys(cell.weight for cell in found):
        of_margin = {cell.margin: percent(cell.accuracy) for cell in found if cell.weight == weight}
        name = f"λ = {weight:g}" if weight else "λ = 0 (CE)"
        values = [of_margin.get(margin, of_margin.get(None, "")) for margin in margins]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
