"""The rows that stand beside the tables: made from real run folders."""

import csv

import numpy as np
import pytest
from digit_runs import write_comparison
from scipy.stats import ttest_1samp

from studies import what_runs_show


def test_a_row_a_run_and_a_paired_test(tmp_path, capsys):
    folder = write_comparison(tmp_path / "runs", ["ce:random", "ce+bst:mined"], [0, 1, 2])
    what_runs_show.main([str(folder), "--out", str(tmp_path / "runs.csv")])
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["scheme"], row["seed"]) for row in rows] == [
        (scheme, str(seed)) for scheme in ("ce+bst:mined", "ce:random") for seed in range(3)
    ]
    for row in rows:
        run = folder / "runs" / row["scheme"].replace("+", "-").replace(":", "-")
        with np.load(run / f"seed-{row['seed']}" / "embeddings.npz") as stored:
            unit = stored["embeddings"] / np.linalg.norm(stored["embeddings"], axis=1)[:, None]
            labels = stored["labels"]
        pairs = [(i, j) for i in range(len(unit)) for j in range(i) if labels[i] == labels[j]]
        cosines = np.array([unit[i] @ unit[j] for i, j in pairs])
        assert float(row["mean_square_within"]) == pytest.approx((cosines**2).mean(), rel=1e-5)
        assert float(row["negative_within"]) == pytest.approx((cosines < 0).mean(), rel=1e-5)
    printed = capsys.readouterr().out
    assert "ce+bst:mined accuracy" in printed
    assert "3 pairs, p = " in printed
    gains = [float(rows[i]["auc"]) - float(rows[i + 3]["auc"]) for i in range(3)]
    expected = ttest_1samp(gains, 0)
    assert f"auc {np.mean(gains):+.4f}, 3 pairs, p = {expected.pvalue:.3f}\n" in printed


def test_schemes_that_differ_in_a_setting_stay_apart(tmp_path, capsys):
    schemes = ["ce:random", "ce+bst:random:margin=0.3", "ce+bst:random:margin=0.5"]
    folder = write_comparison(tmp_path / "runs", schemes, [0, 1])
    what_runs_show.main([str(folder), "--out", str(tmp_path / "runs.csv")])
    with (tmp_path / "runs.csv").open() as file:
        assert sorted({row["scheme"] for row in csv.DictReader(file)}) == sorted(schemes)
    printed = capsys.readouterr().out
    assert all(f"{scheme} accuracy" in printed for scheme in schemes[1:])


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    folder = write_comparison(tmp_path / "runs", ["ce:random"], [])
    with pytest.raises(SystemExit, match="no finished run"):
        what_runs_show.main([str(folder), "--out", str(tmp_path / "runs.csv")])
