"""What is said of the study's runs is what their files hold."""

import csv
import json
import re

import numpy as np
import pytest

from studies import answer
from studies.answer import Study
from studies.bootstrap import Interval
from studies.run import BLOOD, BST, BST_MINED, CE, CHEST, LINEAR, PARTS, RUN_KEY

N_IMAGES = 160
PARTIAL = ("primary", "variants", "chest", "curve-10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of runs with random predictions: 70 % are right under CE, 80 % with the loss."""
    path, draw = tmp_path_factory.mktemp("results"), np.random.default_rng(0)
    tables = {"runs": [], "predictions": [], "epochs": [], "labels": []}
    labels = {images: draw.integers(4, size=N_IMAGES) for images in (BLOOD, CHEST)}
    for images, of_images in labels.items():
        row = {
            "images": images,
            "classes": json.dumps(["a", "b c", "c", "d"]),
            "labels": "".join(map(str, of_images)),
        }
        tables["labels"].append(row)
    for name in PARTIAL:
        part = PARTS[name]
        for seed in range(part.repetitions):
            for scheme in part.schemes:
                right = draw.random(N_IMAGES) < (0.7 if scheme == CE else 0.8)
                predicted = np.where(right, labels[part.images], (labels[part.images] + 1) % 4)
                key = dict(zip(RUN_KEY, (name, str(scheme), seed), strict=True))
                measures = {"accuracy": right.mean(), "ece": 0.1, "device": "cpu"}
                measures |= {"commit": "a" if seed else "b", "versions": "python 3.12; torch 2.14"}
                for of in ("train", "validation", "test"):
                    measures[f"{of}_ce"] = draw.random()
                    for what in ("mean_square", "negative"):
                        measures |= {
                            f"{of}_{what}_{w}": draw.random() for w in ("within", "between")
                        }
                tables["runs"].append(key | measures)
                tables["predictions"].append(key | {"predicted": "".join(map(str, predicted))})
                for epoch in (1, 100, 200):
                    norms = {"epoch": epoch, "ce_norm": 3.0}
                    norms["metric_norm"] = "" if scheme == CE else epoch / 100
                    tables["epochs"].append(key | norms)
    for name, rows in tables.items():
        with (path / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def study(folder):
    return Study(folder)


def accuracies(folder, part, scheme):
    with (folder / "runs.csv").open(newline="") as stream:
        rows = [
            r for r in csv.DictReader(stream) if (r["part"], r["scheme"]) == (part, str(scheme))
        ]
    return np.array([float(row["accuracy"]) for row in rows])


def test_differences_are_those_of_the_accuracies(folder, study):
    for part, scheme, baseline in (
        ("primary", BST, "primary"),
        ("primary", BST_MINED, "primary"),
        ("variants", LINEAR, "primary"),
        ("chest", BST, "chest"),
    ):
        found = study.compare(part, scheme, baseline_part=baseline)
        ours, theirs = accuracies(folder, part, scheme), accuracies(folder, baseline, CE)
        expected = (ours - theirs[: len(ours)]).mean()
        assert found.interval.mean == pytest.approx(expected)
        assert len(found.seeds) == len(ours)
        assert found.interval.low < found.interval.mean < found.interval.high
    few = study.compare("primary", BST, among=range(5))
    assert few.seeds == (0, 1, 2, 3, 4)
    assert study.compare("curve-all", BST) is None


def test_the_primary_shares_its_error_between_two_comparisons(study):
    text = answer.primary(study)
    strict = study.compare("primary", BST, confidence=0.975).interval
    assert f"| {answer.bounds(strict)} |" in text
    assert answer.bounds(study.compare("primary", BST).interval) not in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.001, 0.02, "helps"),
        (-0.02, -0.001, "hurts"),
        (-0.009, 0.009, "does not matter"),
        (0.0, 0.009, "does not matter"),
        (-0.009, 0.011, "not told apart"),
        (-0.01, 0.005, "not told apart"),
    ],
)
def test_the_plan_s_words(low, high, words):
    assert answer.verdict(Interval((low + high) / 2, low, high)) == words


def test_shares_and_gains_are_means_over_runs(study):
    shares = answer.gradient_shares(study)
    assert shares[BST, 100] == pytest.approx(1 / 4)
    assert shares[BST_MINED, 200] == pytest.approx(2 / 5)
    rows = answer.gains(study)
    assert [row[0] for row in rows] == ["a", "b c", "c", "d"]
    counts = np.bincount(study.labels[BLOOD])
    gain = sum(n * float(row[2]) for n, row in zip(counts, rows, strict=True)) / counts.sum()
    found = study.compare("primary", BST).interval.mean
    assert gain == pytest.approx(100 * found, abs=0.01)


def test_the_page_names_what_is_missing_and_draws_what_is_there(folder, capsys):
    answer.main(["--results", str(folder)])
    text = (folder / "answer.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "95 runs. Missing: 10 of curve-20, 10 of curve-80, 10 of curve-all, 60 of" in text
    assert "| 10 images a class | 5 |" in text
    assert "20 images a class" not in text
    assert re.search(r"- \d+ runs: cpu, commit a, torch 2.14\n", text)
    assert "- 0 repetitions have runs of more than one of these" in text
    assert text.count("**helps**") == 2
    assert (folder / "answer.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"\bnan\b", text)
