"""The reproduction of the paper's tables and figures: its runs, how targets share and draw them."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from bstriplet import paper
from bstriplet.config import Scheme, TrainConfig
from bstriplet.errors import UserError
from bstriplet.report import page as report
from bstriplet.report import reproduce
from bstriplet.training.run_folder import locked_folder
from digit_runs import write_comparison, write_run
from quick import TINY, Command, snapshot, tiny_flags
from scipy import stats

FOUR = ["ce:random", "ce:mined", "ce+bst:random", "ce+bst:mined"]
SMALL = reproduce.SMALL


def as_small(folder: Path, **changes: object) -> Path:
    """Change the runs of a compare folder to runs of the paper's small network."""
    for path in folder.glob("runs/*/*/config.json"):
        config = json.loads(path.read_text()) | {"backbone": SMALL} | changes
        path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce") / "compare"
    return as_small(write_comparison(folder, FOUR, [0, 1, 2]))


# -- the targets


def test_the_command_names_every_target():
    assert tuple(reproduce.TARGETS) == paper.REPRODUCIBLE


def test_each_target_is_a_table_or_a_picture_and_every_scheme_is_a_configuration():
    for target in reproduce.TARGETS.values():
        assert (target.table is None) != (target.draw is None)
        assert target.data_set in paper.DATA_SETS
        configs = [TrainConfig(**scheme) for scheme in target.schemes]
        assert len(set(configs)) == len(target.schemes)
        assert len({target.shown(scheme) for scheme in target.schemes}) == len(target.schemes)


@pytest.mark.parametrize("name", ["table3", "table4", "table6", "table8", "table10"])
def test_a_table_has_a_scheme_for_each_number_that_is_printed(name):
    target = reproduce.TARGETS[name]
    rows = [
        paper.printed_metrics(target.table, scheme["backbone"], scheme.loss, scheme.batches)
        for scheme in target.schemes
    ]
    assert all(rows)
    printed = paper.table(target.table)
    assert len(rows) == (len(printed.header) - 1 if name == "table3" else len(printed.rows))


def test_chest2_takes_six_images_from_each_of_six_groups():
    for name in ("table6", "figure11"):
        for scheme in reproduce.TARGETS[name].schemes:
            config = TrainConfig(**scheme)
            if config.loss == "ce+bst":
                assert (config.batches, config.group_share) == ("mined", "equal")
                assert config.groups_per_class * 2 * 6 == config.batch_size


def test_the_two_small_sets_are_augmented():
    for target in reproduce.TARGETS.values():
        configs = {TrainConfig(**scheme).augment for scheme in target.schemes}
        small = target.data_set in ("rash", "osteosarcoma")
        assert configs == {"copies" if small else "none"}


def test_options_take_the_place_of_settings_and_schemes_that_become_one_are_run_once():
    (table,) = reproduce.targets_named(["table4"], {"backbone": "test_efficientnet"}).values()
    assert [str(scheme) for scheme in table.schemes] == [
        "ce:random",
        "ce+triplet:random",
        "ce+ls:random",
        "ce+bst:mined",
    ]
    assert set(reproduce.targets_named(["all"], {})) == set(reproduce.TARGETS)
    with pytest.raises(UserError, match="table5"):
        reproduce.targets_named(["table5"], {})


# -- from runs that are there


def test_a_table_is_drawn_from_compare_folders(finished, tmp_path, bstriplet: Command):
    # As after two machines trained half of the seeds each.
    halves = [tmp_path / "a", tmp_path / "b"]
    for half in halves:
        shutil.copytree(finished, half)
    for path in halves[0].glob("runs/*/seed-2"):
        shutil.rmtree(path)
    for path in halves[1].glob("runs/*/seed-[01]"):
        shutil.rmtree(path)
    before = [snapshot(half) for half in halves]
    out = tmp_path / "out"
    outcome = bstriplet("reproduce", "table3", "--from", *halves, "--out", out)
    assert (outcome.status, outcome.err) == (0, "")
    assert [snapshot(half) for half in halves] == before

    with (out / "table3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["batches"]) for row in rows] == [
        tuple(text.split(":")) for text in FOUR
    ]
    assert [row["accuracy_printed"] for row in rows] == ["0.9270", "0.9391", "0.9405", "0.9495"]
    for row, text in zip(rows, FOUR, strict=True):
        runs = finished.glob(f"runs/{Scheme.parse(text).slug}/*/metrics.json")
        accuracies = [json.loads(path.read_text())["accuracy"] for path in runs]
        assert float(row["accuracy_mean"]) == pytest.approx(sum(accuracies) / 3)
        assert row["runs"] == "3"
    text = (out / "table3.md").read_text()
    assert text in outcome.out
    mean, sd = (100 * float(rows[0][f"accuracy_{part}"]) for part in ("mean", "sd"))
    assert f"| MobileNet-V3-Small | CE (RS) | 3 | {mean:.2f} ± {sd:.2f} (92.70) |" in text
    assert "of Chest-1 (Normal, Pneumonia, Covid-19); these runs are of digits (0, 1, 2)" in text
    assert "is found in 80 % of experiments" in text
    page = (out / "report.html").read_text()
    assert "(92.70)" in page
    assert "bstriplet reproduce table3 --from" in page


def test_a_figure_is_drawn_and_runs_of_other_settings_are_left_out(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "compare")
    other = write_run(folder / "runs" / "other" / "seed-9", Scheme("ce", "random"), 9)
    shutil.copy(other / "config.json", tmp_path / "config.json")
    targets = reproduce.targets_named(["figure7"], {})
    (figure,) = reproduce.draw_targets(targets, None, [folder], tmp_path / "out")
    assert {run.seed for run in figure.comparison.runs} == {0, 1, 2}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"figure7.{ending}" for ending in ("md", "png", "svg", "csv")
    }


def test_figure_5_shows_each_batch_size_beside_the_two_printed_numbers(tmp_path):
    folder = tmp_path / "compare"
    for size in (6, 12, 36):
        for seed in (0, 1):
            write_run(folder / "runs" / str(size) / f"seed-{seed}", Scheme("ce+bst", "mined"), seed)
        for path in folder.glob(f"runs/{size}/*/config.json"):
            config = json.loads(path.read_text()) | {"backbone": SMALL, "batch_size": size}
            path.write_text(json.dumps(config))
    targets = reproduce.targets_named(["figure5"], {})
    (figure,) = reproduce.draw_targets(targets, None, [folder], tmp_path / "out")
    with (tmp_path / "out" / "figure5.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch_size"], row["seed"]) for row in rows] == [
        (size, seed) for size in ("6", "12", "36") for seed in "01"
    ]
    assert [row["printed_accuracy"] for row in rows[::2]] == ["0.9331", "", "0.9495"]
    assert sum("not started" in note for note in figure.notes) == 6


def test_figure_5_tests_each_batch_size_against_that_of_the_paper(tmp_path):
    folder, rng = tmp_path / "compare", np.random.default_rng(0)
    gains = {6: -0.2, 12: 0.0, 36: 0.0}
    accuracies = {size: 0.7 + gain + rng.normal(0, 0.01, 5) for size, gain in gains.items()}
    for size, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = write_run(
                folder / "runs" / str(size) / f"seed-{seed}", Scheme("ce+bst", "mined"), seed
            )
            for name, more in (
                ("config.json", {"backbone": SMALL, "batch_size": size}),
                ("metrics.json", {"accuracy": accuracy}),
            ):
                path = run / name
                path.write_text(json.dumps(json.loads(path.read_text()) | more))
    targets = reproduce.targets_named(["figure5"], {})
    (figure,) = reproduce.draw_targets(targets, None, [folder], tmp_path / "out")
    p = stats.ttest_rel(accuracies[6], accuracies[36]).pvalue
    other = stats.ttest_rel(accuracies[12], accuracies[36]).pvalue
    assert 2 * p < 0.001 < 0.05 < other
    text = (tmp_path / "out" / "figure5.md").read_text()
    assert "CE+BST (DM), N_b 6 is worse than CE+BST (DM), N_b 36: -" in text
    assert "N_b 12 is not told apart from CE+BST (DM), N_b 36: " in text
    assert f"p = {other:.3f}" in text
    assert "Against N_b = 36, 6 is worse (p < 0.001); paired t tests, Holm's" in text
    assert "N_b 36 is" not in text

    for path in folder.glob("runs/6"):
        shutil.rmtree(path)
    (figure,) = reproduce.draw_targets(targets, None, [folder], tmp_path / "out")
    assert f"No size is told apart from N_b = 36 (least p = {other:.3f};" in figure.picture.caption
    (one,) = reproduce.targets_named(["figure5"], {"batch_size": 12}).values()
    assert reproduce.draw("figure5", one, None, (), tmp_path).verdicts == ()


def test_a_folder_without_runs_and_a_run_given_twice_are_errors(finished, tmp_path):
    targets = reproduce.targets_named(["table3"], {})
    with pytest.raises(UserError, match="no run lies in"):
        reproduce.draw_targets(targets, None, [tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="hold the same scheme and seed"):
        reproduce.draw_targets(targets, None, [finished, finished], tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": {"margin": 1}}', "{"])
def test_a_damaged_state_is_named(tmp_path, bstriplet: Command, content):
    (tmp_path / "reproduce.json").write_text(content)
    outcome = bstriplet("reproduce", "table3", "--out", tmp_path, *tiny_flags())
    assert outcome.status == 2
    assert str(tmp_path / "reproduce.json") in outcome.err
    assert outcome.err.count("\n") == 1


def test_runs_of_other_classes_are_not_drawn_together(finished, tmp_path):
    other = as_small(write_comparison(tmp_path / "other", FOUR[:1], [7], ("a", "b")))
    targets = reproduce.targets_named(["figure9"], {})
    with pytest.raises(
        UserError, match=r"figure9: .*seed-0 has the classes 0, 1, 2, .*seed-7 a, b"
    ):
        reproduce.draw_targets(targets, None, [finished, other], tmp_path / "out")


def test_an_output_folder_that_cannot_be_made_is_named(finished, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"cannot write .*out"):
        reproduce.draw_targets({}, None, [finished], tmp_path / "out")


def test_a_command_that_no_page_can_hold_is_shown_with_escapes(finished, tmp_path):
    targets = reproduce.targets_named(["table3"], {})
    drawn = reproduce.draw_targets(targets, None, [finished], tmp_path)
    page = report.write_reproduction(drawn, "bstriplet --out norm\udce9", tmp_path)
    assert r"--out norm\xe9" in page.read_text(encoding="utf-8")


def test_from_takes_no_training_options(finished, tmp_path, bstriplet: Command):
    outcome = bstriplet(
        "reproduce", "table3", "--from", finished, "--out", tmp_path / "out", "--epochs", 3
    )
    assert (outcome.status, outcome.out) == (2, "")
    assert "--from takes runs as they are" in outcome.err


# -- data


def counts_of(name: str) -> dict[str, dict[str, int]]:
    train, test = (dict(paper.data_set(name).counts[part]) for part in ("train", "test"))
    held_out = {label: n // 5 for label, n in train.items()}
    return {
        "train": {label: n - held_out[label] for label, n in train.items()},
        "validation": held_out,
        "test": test,
    }


@pytest.mark.parametrize("name", paper.DATA_SETS)
def test_images_as_the_paper_counts_them_are_not_worth_a_note(finished, tmp_path, name):
    targets = reproduce.targets_named(["table3"], {})
    (drawn,) = reproduce.draw_targets(targets, None, [finished], tmp_path)
    images = {
        part: {label.upper().replace(" ", "_"): n for label, n in counts.items()}
        for part, counts in counts_of(name).items()
    }

    def notes():
        runs = [
            replace(run, environment={"data": {"images": images}}) for run in drawn.comparison.runs
        ]
        return reproduce.data_notes(name, replace(drawn.comparison, runs=tuple(runs)))

    assert notes() == []
    label = next(iter(images["train"]))
    images["train"][label] -= 3
    (note,) = notes()
    expected = next(iter(paper.data_set(name).counts["train"].values()))
    assert f"{label} {expected - 3} instead of {expected}" in note
    images["test"][label] += 1
    assert len(notes()) == 2


def test_class_folders_of_the_rash_set_are_those_of_the_paper_and_digits_are_not(
    finished, tmp_path
):
    targets = reproduce.targets_named(["table3"], {})
    (drawn,) = reproduce.draw_targets(targets, None, [finished], tmp_path)
    counts = counts_of("rash")

    def notes(names):
        images = {
            part: {names[label]: n for label, n in found.items()} for part, found in counts.items()
        }
        runs = [
            replace(run, environment={"data": {"images": images}}) for run in drawn.comparison.runs
        ]
        return reproduce.data_notes("rash", replace(drawn.comparison, runs=tuple(runs)))

    healthy, ill = paper.data_set("rash").classes
    assert notes({ill: "Lyme_Positive", healthy: "Lyme_Negative"}) == []
    assert notes({ill: "lyme", healthy: "other rashes"}) == []
    (note,) = notes({ill: "1", healthy: "0"})
    assert "so do not compare the two" in note
    assert "(0, 1)" in note or "(1, 0)" in note


# -- training


def test_what_is_missing_is_trained_once_and_shared(tmp_path, bstriplet: Command):
    out = tmp_path / "out"
    flags = ["--data", "digits", *tiny_flags(epochs=1), "--out", out]
    first = bstriplet("reproduce", "figure6", "--seeds", 1, *flags)
    assert first.status == 0, first.err
    note = first.err.index("note: figure6: The paper's numbers are of Chest-1 (Normal, Pneumonia,")
    assert note < first.err.index("[1/2] ")  # before hours of training
    assert "[2/2] CE+BST (DM), seed 0" in first.err
    trained = snapshot(out / "runs")
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["ce-bst-mined", "ce-random"]

    second = bstriplet("reproduce", "table3", "figure7", "--seeds", 1, *flags)
    assert second.status == 0, second.err
    after = snapshot(out / "runs")
    assert {name: after[name] for name in trained} == trained
    assert len(list((out / "runs").iterdir())) == 4
    for name in ("figure6.png", "figure7.svg", "figure7.csv", "table3.md", "table3.csv"):
        assert (out / name).stat().st_size > 0
    assert "Not as in the paper: " in second.out
    assert f"--batch-size {TINY['batch_size']}" in second.out

    other = bstriplet("reproduce", "table3", "--seeds", 1, *flags, "--lr", 0.01)
    assert other.status == 2
    assert "another configuration: lr (0.01 here, 0.001 there)" in other.err


def test_a_folder_in_use_is_refused_before_images_are_read(tmp_path, bstriplet: Command):
    with locked_folder(tmp_path / "out"):
        outcome = bstriplet("reproduce", "table3", "--data", "no", "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "another process is writing" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table5", "--out", "x"], "table5"),
        (["table3", "--out", "x", "--seeds", "0"], "--seeds: 0"),
        (["--out", "x"], "TARGET"),
    ],
)
def test_mistakes_at_the_command_line_are_named(
    arguments, words, bstriplet: Command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outcome = bstriplet("reproduce", *arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_printed_numbers_are_shown_as_printed():
    found = paper.printed_metrics(6, "peleenet", "ce+bst")
    assert str(found["auc"]) == "0.9649"
    assert found["accuracy"] == Decimal("91.03")
