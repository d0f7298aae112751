"""Sweeps over λ and m: the grid, its table and its figure."""

import csv
import re
from pathlib import Path

import pytest
from bstriplet.config import Scheme
from bstriplet.errors import UserError
from bstriplet.report import figures
from bstriplet.study.read_runs import read_comparison
from bstriplet.study.sweep import sweep_schemes, write_tables
from digit_runs import write_comparison
from quick import Command, tiny_flags


def test_the_grid_has_each_pair_once_and_cross_entropy_for_weight_0() -> None:
    schemes = sweep_schemes("ce+bst", "mined", [0, 0.1, 1], [0.5, 0.9])
    assert [str(scheme) for scheme in schemes] == [
        "ce:mined",
        "ce+bst:mined:metric-weight=0.1:margin=0.5",
        "ce+bst:mined:metric-weight=0.1:margin=0.9",
        "ce+bst:mined:metric-weight=1:margin=0.5",
        "ce+bst:mined:metric-weight=1:margin=0.9",
    ]
    assert sweep_schemes("ce+ls", "random", [0.5], []) == (
        Scheme("ce+ls", "random", metric_weight=0.5),
    )


@pytest.mark.usefixtures("no_pictures")
def test_a_sweep_runs_resumes_and_leaves_its_tables(tmp_path: Path, bstriplet: Command) -> None:
    out = tmp_path / "sweep"
    grid = ["--metric-weights", 0, 2, "--margins", 0.5, 0.9, "--seeds", 0, "--batches", "mined"]
    outcome = bstriplet("sweep", *tiny_flags(epochs=1), *grid, "--out", out)
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith((out / "sweep.md").read_text())
    with (out / "sweep.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["metric_weight"], row["margin"]) for row in rows] == [
        ("0.0", ""), ("2.0", "0.5"), ("2.0", "0.9"),
    ]  # fmt: skip
    again = bstriplet("sweep", "--out", out, "--resume")
    assert (again.status, again.out) == (0, outcome.out)
    other = bstriplet("sweep", "--out", out, "--resume", "--margins", 0.7)
    assert other.status == 2
    assert "schemes (ce:mined" in other.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metric-weights", "-1"], ["--metric-weight", "-1"]),
        (["--margins", "2"], ["--margin", "2", "at most 1"]),
        (["--metric-weights", "1", "1"], ["twice"]),
        (["--loss", "ce"], ["--loss", "nothing to weigh"]),
        (["--loss", "ce+triplet", "--margins", "0.5"], ["--margins", "ce+triplet"]),
        (["--loss", "ce+bts"], ["--loss", "did you mean 'ce+bst'"]),
    ],
)
def test_bad_grids(tmp_path: Path, bstriplet: Command, flags: list[str], words: list[str]) -> None:
    outcome = bstriplet("sweep", *tiny_flags(), "--out", tmp_path / "sweep", *flags)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert not (tmp_path / "sweep").exists()


def test_table_and_figure_hold_the_means(tmp_path: Path) -> None:
    schemes = [str(s) for s in sweep_schemes("ce+bst", "mined", [0.0, 0.5, 1.0], [0.5, 0.9])]
    folder = write_comparison(tmp_path / "sweep", schemes, [0, 1])
    comparison = read_comparison(folder)
    assert len(comparison.finished) == 10
    table = write_tables(folder).splitlines()
    assert table[0] == "| ACC (%) | m = 0.5 | m = 0.9 |"
    assert [re.match(r"\| (.*?) \|", line)[1] for line in table[2:]] == [  # type: ignore[index]
        "λ = 0 (CE)", "λ = 0.5", "λ = 1",
    ]  # fmt: skip
    picture = figures.sweep(comparison)
    assert [panel.title for panel in picture.panels] == ["Accuracy by λ", "Mean accuracy"]
    picture.write(tmp_path)
    assert (tmp_path / "sweep.csv").read_text() == (folder / "sweep.csv").read_text()
    by_cell = {row[:2]: row[3] for row in picture.rows}
    runs = comparison.finished_of(Scheme.parse(schemes[1]))
    accuracy = sum(run.metrics["accuracy"] for run in runs) / 2
    assert by_cell[0.5, 0.5] == pytest.approx(accuracy)


def test_a_sweep_of_m_alone_has_its_table_and_figure(tmp_path: Path) -> None:
    schemes = [str(s) for s in sweep_schemes("ce+bst", "mined", [1.0], [0.5, 0.9])]
    folder = write_comparison(tmp_path / "sweep", schemes, [0])
    table = write_tables(folder).splitlines()
    assert table[0] == "| ACC (%) | m = 0.5 | m = 0.9 |"
    assert table[2].startswith("| λ = 1 |")
    picture = figures.sweep(read_comparison(folder))
    assert [panel.title for panel in picture.panels] == ["Accuracy by λ"]
    picture.write(tmp_path)


def test_other_comparisons_have_no_such_figure(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare", ["ce:random", "ce+bst:mined"], [0])
    assert not figures.sweep(read_comparison(folder)).panels


def test_a_loss_without_a_weight_is_no_sweep() -> None:
    with pytest.raises(UserError, match="--loss"):
        sweep_schemes("ce", "random", [1.0], [])
