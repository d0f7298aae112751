"""The summary table of a comparison, and report.html for a comparison or a single run."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Template

from bstriplet.config import RECIPES, TrainConfig, flag, with_recipe
from bstriplet.report.figures import DARK, Picture, looks, pictures
from bstriplet.report.reproduce import FEW_SEEDS, Reproduction
from bstriplet.storage import cannot_write, write_text
from bstriplet.study.paper_table import HEADER
from bstriplet.study.paper_table import NOTE as TABLE_NOTE
from bstriplet.study.read_runs import Comparison, Run, read_comparison, scheme_label
from bstriplet.study.statistics import (
    SchemeSummary,
    Spread,
    area,
    metrics_note,
    per_class_csv,
    percent,
    runs_csv,
    schemes_csv,
    spread,
    summarise_schemes,
    text_table,
    verdicts,
)
from bstriplet.text import printable
from bstriplet.training.metrics import METRICS

REPORT = "report.html"


def write_summary(directory: Path | str) -> str:
    """Summarise the finished runs of a compare folder.

    Writes three files into it, each atomically: summary.csv (one row per run),
    summary_by_scheme.csv (means, standard deviations and the paired test) and per_class.csv (one
    row per run and class). Their numbers are fractions of 1.

    Args:
        directory: the compare folder, finished or not.

    Returns:
        The table of mean ± sd over seeds, the verdict on each scheme against its baseline, and the
        missing runs, as text for a terminal.

    Raises:
        UserError: the folder is no compare folder, cannot be written, or holds a damaged file.
    """
    comparison = read_comparison(directory)
    write_text(comparison.folder / "summary.csv", runs_csv(comparison))
    by_scheme = schemes_csv(summarise_schemes(comparison))
    write_text(comparison.folder / "summary_by_scheme.csv", by_scheme)
    write_text(comparison.folder / "per_class.csv", per_class_csv(comparison))
    return text_table(comparison)


def write_report(directory: Path | str) -> Path:
    """Draw the figures of a compare folder or of a run folder, and write its report.html.

    figures/ receives each figure as PNG, SVG and CSV. The report is one file that needs no other
    file, no network and no script. It names the unfinished runs; a folder without a finished run
    gets a report too.

    Args:
        directory: a compare folder (compare.json) or a run folder (config.json).

    Returns:
        The path of report.html.

    Raises:
        UserError: the folder is neither, cannot be written, or holds a damaged file.
    """
    comparison = read_comparison(directory)
    figures = comparison.folder / "figures"
    try:
        figures.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(figures, error) from error
    drawn = pictures(comparison)
    for picture in drawn:
        picture.write(figures)
    path = comparison.folder / REPORT
    write_text(path, printable(_page(comparison, drawn)))
    return path


def write_reproduction(drawn: Sequence[Reproduction], command: str, out: Path) -> Path:
    """Write report.html with tables and figures of the paper that were drawn from runs.

    Args:
        drawn: the tables and figures, in the order of the page.
        command: the typed command that made them.
        out: an existing folder.

    Returns:
        The path of report.html.
    """
    runs = [run for reproduction in drawn for run in reproduction.comparison.runs]
    names = dict.fromkeys(Path(run.config["data"]).name for run in runs)
    page = _template("reproduction.html.j2").render(
        title="Tables and figures of the paper, from runs",
        lead=f"{', '.join(names)} · {_count(len({run.folder for run in runs}), 'run')}",
        header=HEADER[1:],
        table_note=TABLE_NOTE,
        parts=[
            {
                "title": reproduction.target.title,
                "models": [
                    (model, [row.cells[1:] for row in rows])
                    for model, rows in groupby(reproduction.rows, key=lambda row: row.model)
                ],
                "picture": reproduction.picture and _inlined(reproduction.picture),
                "verdicts": reproduction.verdicts,
                "notes": reproduction.notes,
            }
            for reproduction in drawn
        ],
        command=command,
        configuration=_settings(run.config for run in runs),
        environment=_settings(_without_counts(run.environment) for run in runs),
    )
    path = out / REPORT
    write_text(path, printable(page))
    return path


def _template(name: str) -> Template:
    return Environment(loader=PackageLoader("bstriplet.report"), autoescape=True).get_template(name)


def _page(comparison: Comparison, drawn: Sequence[Picture]) -> str:
    summaries = summarise_schemes(comparison)
    return _template("report.html.j2").render(
        title=_title(comparison),
        lead=_lead(comparison),
        colours={
            scheme_label(scheme): (look.colour, DARK[look.colour])
            for scheme, look in looks(comparison.schemes).items()
        },
        verdicts=verdicts(comparison, summaries),
        gaps=comparison.gaps(),
        results=[
            {"scheme": summary.label, "seeds": summary.n_runs, "cells": _cells(summary)}
            for summary in summaries
        ],
        results_note=metrics_note(comparison),
        pictures=[_inlined(picture) for picture in drawn],
        per_class=_per_class(comparison),
        runs=[_run_row(run) for run in comparison.runs],
        notes=_notes(comparison, summaries),
        command=_command(comparison),
        images=_images(comparison),
        configuration=_settings(run.config for run in comparison.runs),
        environment=_settings(_without_counts(run.environment) for run in comparison.runs),
    )


def _title(comparison: Comparison) -> str:
    names = [scheme_label(scheme) for scheme in comparison.schemes]
    if len(names) == 1 and len(comparison.seeds) == 1:
        return f"{names[0]}, seed {comparison.seeds[0]}"
    return " against ".join(names) if len(names) <= 2 else f"{len(names)} training schemes"


def _lead(comparison: Comparison) -> str:
    parts = []
    if comparison.runs:
        config = comparison.runs[0].config
        parts += [config["backbone"], Path(config["data"]).name]
    if comparison.finished:
        metrics = comparison.finished[0].metrics
        parts.append(f"{len(metrics['per_class'])} classes, {metrics['n_images']} test images")
    asked = len(comparison.schemes) * len(comparison.seeds)
    parts.append(f"{len(comparison.finished)} of {asked} runs finished")
    return " · ".join(parts)


def _cells(summary: SchemeSummary) -> list[str]:
    return [
        area(summary.metrics[name]) if name == "auc" else percent(summary.metrics[name])
        for name in METRICS
    ]


def _inlined(picture: Picture) -> dict[str, Any]:
    return {
        "title": picture.title,
        "caption": picture.caption,
        "panels": [
            {
                "title": panel.title,
                "source": "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
            }
            for panel, svg in zip(picture.panels, picture.panel_svgs(), strict=True)
        ],
    }


def _per_class(comparison: Comparison) -> list[dict[str, Any]]:
    if not comparison.finished:
        return []
    columns: tuple[tuple[str, Callable[[Spread], str]], ...] = (
        ("precision", percent),
        ("sensitivity", percent),
        ("f1", percent),
        ("specificity", percent),
        ("auc", area),
    )

    def support(label: str) -> str:
        counts = _of_class(comparison.finished, label, "support")
        return _range(min(counts), max(counts))

    # By name: runs on other data, which a scheme may set, have other classes or another order.
    return [
        {
            "name": label,
            "support": support(label),
            "rows": [
                {
                    "scheme": scheme_label(scheme),
                    "cells": [
                        shown(spread(_of_class(comparison.finished_of(scheme), label, name)))
                        for name, shown in columns
                    ],
                }
                for scheme in comparison.schemes
                if _of_class(comparison.finished_of(scheme), label, "support")
            ],
        }
        for label in dict.fromkeys(name for run in comparison.finished for name in run.classes)
    ]


def _of_class(runs: Sequence[Run], label: str, name: str) -> list[Any]:
    """The defined values of a quantity of one class, over runs."""
    rows = [dict(zip(run.classes, run.metrics["per_class"], strict=True)) for run in runs]
    values = [found[label][name] for found in rows if label in found]
    return [value for value in values if value is not None]


def _run_row(run: Run) -> dict[str, Any]:
    return {
        "scheme": scheme_label(run.scheme),
        "seed": run.seed,
        "accuracy": f"{100 * run.metrics['accuracy']:.2f}" if run.finished else "not finished",
        "tested_epoch": run.metrics.get("tested_epoch", "-"),
        "epochs": len(run.log),
    }


def _notes(comparison: Comparison, summaries: Sequence[SchemeSummary]) -> list[str]:
    """Reservations that a reader of the numbers should know."""
    notes = []
    fewest = min(summary.n_runs for summary in summaries)
    if fewest < FEW_SEEDS:
        notes.append(
            f"Means rest on as few as {_count(fewest, 'finished seed')}. On small sets accuracy "
            "often varies by a point or two from seed to seed, so few seeds tell little."
        )
    tests = [summary.paired for summary in summaries if summary.paired]
    if tests:
        notes.append(
            "The test is a two-sided paired t test of accuracy over seeds, judged at 5 %. More "
            "seeds are not more patients: the verdict holds for these images, not for others. The "
            "true difference given with a verdict is the one that this test finds at 5 %, before "
            "any adjustment, in 80 % of such experiments, given the spread of these differences."
        )
    if len(tests) > 1:
        notes.append(
            f"{len(tests)} schemes are compared with cross entropy; the verdicts rest on p-values "
            "with Holm's adjustment for that. The confidence intervals are not adjusted."
        )
    if any(run.config["validation"] == "test" for run in comparison.runs):
        notes.append(
            "Validation images were part of the test set, as in the paper. Where they decided when "
            "training stopped, or which epoch was tested, the test numbers are too good by an "
            "unknown amount."
        )
    absent = _absent_classes(comparison.finished)
    if absent:
        notes.append(
            f"Classes without test images in some run: {', '.join(absent)}. Their sensitivity and "
            "AUC are undefined there and left out of the means."
        )
    if comparison.finished and not any(run.mistakes for run in comparison.finished):
        notes.append("No run has kept misclassified images: there is no sheet of mistakes.")
    notes.append(
        "Accuracy is the share of images classified right. Eq. 9 of the paper, as printed, also "
        "counts true negatives and would exceed 1 for more than two classes."
    )
    return notes


def _absent_classes(runs: Iterable[Run]) -> list[str]:
    found = {
        row["class"]: None for run in runs for row in run.metrics["per_class"] if not row["support"]
    }
    return list(found)


def _command(comparison: Comparison) -> str:
    """The command that makes these runs: the recipe nearest to theirs, and what differs from it."""
    if not comparison.runs:
        return ""
    # A field that only some schemes set is that of the experiment in the others.
    config = {**comparison.runs[0].config, **comparison.shared}
    varied = {"seed", *set.intersection(*map(set, comparison.schemes))}
    words = ["bstriplet", "compare", "--schemes", *map(str, comparison.schemes)]
    words += ["--seeds", *map(str, comparison.seeds)]
    if len(comparison.schemes) == len(comparison.seeds) == 1:
        words, varied = ["bstriplet", "train"], set()
    written = [_options(recipe, config, varied) for recipe in RECIPES]
    return shlex.join([*words, *min(written, key=len)])


def _options(recipe: str, config: dict[str, Any], varied: set[str]) -> list[str]:
    """The options that give ``config``, except its ``varied`` fields, from a recipe."""
    given = {name: config[name] for name in ("data", "epochs")}
    defaults = TrainConfig(**with_recipe(recipe, given)).to_dict()
    defaults |= {"data": TrainConfig.data, "epochs": RECIPES[recipe]["epochs"]}
    words = ["--recipe", recipe]
    for name, default in defaults.items():
        value = config[name]
        if value == default or name in varied:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            words += [flag(name), str(value)]
    return words


def _images(comparison: Comparison) -> dict[str, Any]:
    """Images of each class (columns) in each part (rows); "701-704" where runs differ."""
    each_run = [run.environment.get("data", {}).get("images") for run in comparison.runs]
    found = [images for images in each_run if images]
    if not found:
        return {}
    classes = list(dict.fromkeys(name for images in found for name in next(iter(images.values()))))
    rows = []
    for part in found[0]:
        each = np.array([[images[part].get(name, 0) for name in classes] for images in found])
        each = np.column_stack([each, each.sum(axis=1)])
        rows.append((part, [_range(column.min(), column.max()) for column in each.T]))
    return {"classes": classes, "rows": rows}


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _without_counts(environment: dict[str, Any]) -> dict[str, Any]:
    """The environment without the image counts, which have a table of their own."""
    data = {name: value for name, value in environment.get("data", {}).items() if name != "images"}
    return environment | ({"data": data} if data else {})


def _settings(each: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and value of every setting; where runs differ, all values in order of appearance."""
    values: dict[str, dict[str, None]] = {}
    for settings in each:
        for name, value in _flat(settings):
            values.setdefault(name, {})[str(value)] = None
    return [(name, ", ".join(found)) for name, found in values.items()]


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings in rows: nested names joined by dots, and an innermost dict on one row."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        nested = isinstance(value, dict) and any(
            isinstance(inner, dict | list) for inner in value.values()
        )
        if nested:
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            rows.append((prefix + name, ", ".join(f"{k}: {inner}" for k, inner in value.items())))
        elif isinstance(value, list):
            rows.append((prefix + name, "; ".join(map(str, value)) or "none"))
        else:
            rows.append((prefix + name, value))
    return rows


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
