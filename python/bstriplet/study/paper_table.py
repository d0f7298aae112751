"""A results table of the paper from runs: mean ± sd over seeds, the printed number in brackets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from bstriplet import paper
from bstriplet.config import Scheme
from bstriplet.study.read_runs import Comparison, scheme_label
from bstriplet.study.statistics import (
    SchemeSummary,
    area,
    p_value,
    percent,
    points,
    summarise_schemes,
    to_csv,
)
from bstriplet.training.metrics import METRICS

HEADER = (
    "Model",
    "Scheme",
    "Seeds",
    *(paper.COLUMNS[name] for name in METRICS),
    "ACC - CE",
    "95 % CI",
    "p",
    "Verdict",
    "Detectable",
)
NOTE = (
    "Mean ± standard deviation over seeds; in brackets the paper's printed number, from one run. "
    "ACC - CE: accuracy minus that of cross entropy with the same model on random batches, in "
    "points, paired by seed. p: paired t test with Holm's adjustment for all tests of the table; "
    "the interval is not adjusted. Detectable: the true difference, in points, that the test finds "
    "at 5 % in 80 % of experiments with as many seeds and as large a spread."
)


@dataclass(frozen=True)
class Row:
    """One row: a scheme, the results of its runs, and the paper's (in per cent, except for auc)."""

    model: str
    summary: SchemeSummary
    printed: dict[str, Decimal]

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `HEADER`."""
        test = self.summary.paired
        shown = {name: (area if name == "auc" else percent) for name in METRICS}
        measured = [
            shown[name](self.summary.metrics[name])
            + (f" ({self.printed[name]})" if name in self.printed else "")
            for name in METRICS
        ]
        row = (self.model, self.name, str(self.summary.n_runs), *measured)
        if test is None or test.difference is None:
            return (*row, "-", "-", "-", "-", "-")
        if test.p is None or test.p_holm is None or test.low is None or test.high is None:
            return (*row, points(test.difference), "-", "-", test.verdict, "-")
        return (
            *row,
            points(test.difference),
            f"{points(test.low)} to {points(test.high)}",
            p_value(test.p_holm).removeprefix("= "),
            test.verdict,
            f"{100 * (test.detectable or 0):.2f}",
        )

    @property
    def name(self) -> str:
        """The scheme as the paper writes it, the model left out."""
        return scheme_label(self.summary.scheme.without("backbone"))


def table_rows(comparison: Comparison, number: int, backbones: Mapping[Scheme, str]) -> list[Row]:
    """The rows of table `number` of the paper, one per scheme; `backbones` are their networks."""
    rows = []
    for summary in summarise_schemes(comparison):
        scheme, backbone = summary.scheme, backbones[summary.scheme]
        printed = paper.printed_metrics(number, backbone, scheme.loss, scheme.batches)
        rows.append(Row(paper.BACKBONES.get(backbone, backbone), summary, printed))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, all numbers as fractions of 1; undefined or unprinted numbers are empty."""
    tested = ("n", "difference", "low", "high", "p", "p_holm", "detectable", "verdict")
    header = ["model", "loss", "batches", "runs"]
    for name in METRICS:
        header += [f"{name}_mean", f"{name}_sd", f"{name}_printed"]
    header += [f"paired_{name}" for name in tested]
    body = []
    for row in rows:
        scheme, test = row.summary.scheme, row.summary.paired
        line: list[Any] = [row.model, scheme.loss, scheme.batches, row.summary.n_runs]
        for name in METRICS:
            spread, printed = row.summary.metrics[name], row.printed.get(name)
            line += [spread.mean, spread.sd, _fraction(name, printed)]
        line += [getattr(test, name) if test else None for name in tested]
        body.append(line)
    return to_csv(header, body)


def _fraction(name: str, printed: Decimal | None) -> Decimal | None:
    return printed if printed is None or name == "auc" else printed.scaleb(-2)
