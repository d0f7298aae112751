"""A row for each run of compare folders, and a paired test of each scheme against cross entropy.

    python -m studies.what_runs_show FOLDER... --out studies/results/table3/runs.csv

A row has accuracy, specificity and AUC on the test images; accuracy on the validation images in the
epoch that was kept; the metric term of the training loss in the first and the last epoch. It also
has two figures of the training images' embeddings, each within classes and between them: the share
of negative cosines, and the mean square of the cosines (Eq. 3's two means over all pairs).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from bstriplet.storage import write_text
from bstriplet.study.read_runs import Run, read_comparison
from bstriplet.study.statistics import p_value, paired_test, to_csv
from numpy.typing import NDArray

BASELINE = "ce:random"
TESTED = ("accuracy", "auc", "specificity", "validation_accuracy")


def row_of(run: Run) -> dict[str, Any]:
    """The row of one finished run."""
    kept = run.log[run.metrics["tested_epoch"] - 1]
    measures = ("accuracy", "specificity", "auc", "tested_epoch")
    return {
        "scheme": str(run.scheme.without("backbone")),
        "backbone": run.config["backbone"],
        "seed": run.seed,
        **{name: run.metrics[name] for name in measures},
        "validation_accuracy": kept["validation_accuracy"],
        "first_metric": run.log[0]["train_metric"],
        "last_metric": run.log[-1]["train_metric"],
        **cosine_measures(run.embeddings.vectors, run.embeddings.labels),
    }


def cosine_measures(vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    """Share of negative cosines and mean square, of all pairs within classes and between them."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    same = labels[:, None] == labels[None, :]
    pairs = {"within": same & ~np.eye(len(labels), dtype=bool), "between": ~same}
    found = {}
    for name, chosen in pairs.items():
        found[f"negative_{name}"] = float((cosines[chosen] < 0).mean())
        found[f"mean_square_{name}"] = float((cosines[chosen] ** 2).mean())
    return found


def tests(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each scheme and measure: the mean difference to cross entropy and its p-value."""
    by_scheme: dict[str, dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_scheme[row["scheme"]][row["backbone"], row["seed"]] = row
    lines = []
    for scheme, found in by_scheme.items():
        if scheme == BASELINE:
            continue
        for measure in TESTED:
            ours, theirs = (
                {pair: row[measure] for pair, row in rows_of.items()}
                for rows_of in (found, by_scheme[BASELINE])
            )
            test = paired_test(ours, theirs)
            if test.p is not None:
                change = f"{test.difference:+.4f}, {test.n} pairs"
                lines.append(f"{scheme} {measure} {change}, p {p_value(test.p)}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Read the folders, write the rows, print the tests and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    runs = [run for folder in options.folders for run in read_comparison(folder).finished]
    if not runs:
        raise SystemExit(f"no finished run in {', '.join(map(str, options.folders))}")
    rows = sorted(
        map(row_of, runs), key=lambda row: [row[n] for n in ("scheme", "backbone", "seed")]
    )
    table = to_csv(rows[0], [tuple(row.values()) for row in rows])
    write_text(options.out, table)
    numbers = [name for name, value in rows[0].items() if isinstance(value, float | int)]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        of_scheme = [row for row in rows if row["scheme"] == scheme]
        means = (
            f"{name} {np.mean([row[name] for row in of_scheme]):.4f}"
            for name in numbers
            if name != "seed" and None not in [row[name] for row in of_scheme]
        )
        print(f"{scheme}, {len(of_scheme)} runs: {', '.join(means)}")
    print("\n".join(tests(rows)))


if __name__ == "__main__":
    main()
