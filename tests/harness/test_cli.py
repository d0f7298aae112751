"""The command line: each mistake of the user is one clear line; evaluate and predict."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from bstriplet import cli
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.report import page
from bstriplet.storage import write_output
from bstriplet.study.read_runs import read_comparison
from bstriplet.training.loop import train
from bstriplet.training.run_folder import RunFolder, load_checkpoint, save_checkpoint
from PIL import Image
from quick import TINY, Command, MakeTree, Outcome, snapshot, tiny_flags

pytestmark = pytest.mark.usefixtures("no_pictures")

TREE_FLAGS = tiny_flags(train_per_class=0, epochs=1)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run on digits."""
    folder = tmp_path_factory.mktemp("runs")
    config = TrainConfig(**TINY | {"epochs": 1})  # type: ignore[arg-type]
    task = split_dataset(load_dataset("digits", config.image_size), config)
    train(config, task, RunFolder(folder / "run"))
    return folder


def one_clear_line(outcome: Outcome, *words: object) -> None:
    """Check that the outcome is status 2 and one line that has all ``words``."""
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("bstriplet: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    for word in words:
        assert str(word) in outcome.err


# --- data ---------------------------------------------------------------------------------------


def empty(root: Path) -> tuple[str, ...]:
    shutil.rmtree(root)
    root.mkdir()
    return (str(root), "is empty", "train/CLASS/*")


def missing(root: Path) -> tuple[str, ...]:
    shutil.rmtree(root)
    return (str(root), "does not exist", "--data")


def without_train(root: Path) -> tuple[str, ...]:
    (root / "train").rename(root / "learn")
    return (str(root), "no folder 'train'", "train/CLASS/*")


def without_classes(root: Path) -> tuple[str, ...]:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return (str(root / "train"), "no class folders", "train/CLASS/*")


def class_without_images(root: Path) -> tuple[str, ...]:
    (root / "train/zebra").mkdir()
    (root / "train/zebra/notes.txt").write_text("none yet")
    return (str(root / "train/zebra"), "no images", "fill it or remove it")


def one_class(root: Path) -> tuple[str, ...]:
    shutil.rmtree(root / "train/class_1")
    return (str(root), "one class only", "'class_0'", "add images of other classes")


def truncated(root: Path) -> tuple[str, ...]:
    file = root / "train/class_1/3.png"
    file.write_bytes(file.read_bytes()[:-40])
    return ("1 of 24 images", "train/class_1/3.png", str(root), "--skip-broken")


def text_named_png(root: Path) -> tuple[str, ...]:
    (root / "test/class_0/1.png").write_text("hello")
    return ("1 of 24 images", "test/class_0/1.png (not an image)", str(root), "--skip-broken")


def unknown_test_class(root: Path) -> tuple[str, ...]:
    (root / "test/class_1").rename(root / "test/class_9")
    return (
        str(root / "test/class_9"),
        "class class_9 is not among the training classes",
        "class_0, class_1",
        "rename or remove",
    )


def damaged_manifest(root: Path) -> tuple[str, ...]:
    (root / "manifest.csv").write_bytes(b"file,patient\n\xff\xfe\n")
    return (str(root / "manifest.csv"), "mend or remove it")


def too_few(root: Path) -> tuple[str, ...]:
    for file in sorted((root / "train/class_1").iterdir())[1:]:
        file.unlink()
    return ("class 'class_1' has 1 image", "2 or more")


@pytest.mark.parametrize(
    "spoil",
    [
        empty,
        missing,
        without_train,
        without_classes,
        class_without_images,
        one_class,
        truncated,
        text_named_png,
        unknown_test_class,
        damaged_manifest,
        too_few,
    ],
    ids=lambda spoil: spoil.__name__,
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_data(
    tmp_path: Path,
    make_tree: MakeTree,
    bstriplet: Command,
    earlier: Path,
    command: str,
    spoil: Callable[[Path], tuple[str, ...]],
) -> None:
    root = make_tree()
    words = spoil(root)
    before = snapshot(earlier)
    out = earlier / "new"
    one_clear_line(bstriplet(command, *TREE_FLAGS, "--data", root, "--out", out), *words)
    assert snapshot(earlier) == before
    assert not out.exists()


def test_broken_images_are_skipped_by_choice_named_and_counted(
    tmp_path: Path, make_tree: MakeTree, bstriplet: Command
) -> None:
    root = make_tree()
    truncated(root)
    text_named_png(root)
    out = tmp_path / "run"
    outcome = bstriplet("train", *TREE_FLAGS, "--data", root, "--out", out, "--skip-broken")
    assert outcome.status == 0
    assert "note: 2 images that cannot be read were left out" in outcome.err
    notes = json.loads((out / "environment.json").read_text())["data"]["notes"]
    assert "train/class_1/3.png" in notes[0]
    assert "test/class_0/1.png" in notes[0]
    again = bstriplet("evaluate", "--run", out)  # without the option: as it was trained
    assert again.status == 0
    assert "note: 2 images that cannot be read were left out" in again.err


def test_data_are_described(make_tree: MakeTree, bstriplet: Command) -> None:
    root = make_tree()
    (root / "test/class_0/0.png").write_bytes((root / "train/class_0/7.png").read_bytes())
    outcome = bstriplet("data", root, "--image-size", 32, "--validation-fraction", 0.25)
    assert outcome.status == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["layout", "class", "tree"] in lines
    assert ["images", "24,", "grey"] in lines
    assert ["patients", "unknown"] in lines
    assert lines[lines.index(["class_0", "class_1", "all"]) + 1 :][:3] == [
        ["train", "6", "6", "12"],
        ["validation", "2", "2", "4"],
        ["test", "4", "4", "8"],
    ]
    assert "note: 1 test images are exact copies of train" in outcome.out
    refused = bstriplet("data", root, "--image-size", 32, "--max-pixels", 479)  # of 20 x 24
    one_clear_line(refused, "24 of 24 images cannot be read", "--max-pixels 480")


def test_a_description_counts_patients_copies_and_broken_images(
    make_tree: MakeTree, bstriplet: Command
) -> None:
    root = make_tree(train=6, test=2, colour=True)
    for number in (1, 2):
        content = (root / "train/class_0/0.png").read_bytes()
        (root / f"train/class_0/{number}.png").write_bytes(content)
    (root / "train/class_1/5.png").write_text("no image")
    listed = [f"train/class_1/{number}.png,p{number // 3}\n" for number in range(5)]
    (root / "manifest.csv").write_text("file,patient\n" + "".join(listed))
    outcome = bstriplet("data", root, "--image-size", 32, "--split-by", "image", "--skip-broken")
    assert outcome.out.splitlines()[:10] == [
        "layout      class tree",
        "images      15, RGB",
        "patients    12",
        "copies      2 images are exact copies of another",
        "broken      1 images cannot be read",
        "",
        "            class_0  class_1  all",
        "train             5        4    9",
        "validation        1        1    2",
        "test              2        2    4",
    ]
    notes = outcome.out.splitlines()[10:]
    assert len(notes) == 2
    assert notes[0].startswith("note: 1 images that cannot be read were left out: ")
    assert notes[1].startswith("note: 10 images have no patient, others have: ")


def test_a_description_sets_the_papers_counts_beside_those_found(
    tmp_path: Path, make_tree: MakeTree, bstriplet: Command
) -> None:
    root = make_tree(classes=3)
    for part in ("train", "test"):
        for number, label in enumerate(("COVID19", "NORMAL", "PNEUMONIA")):
            (root / part / f"class_{number}").rename(root / part / label)
    outcome = bstriplet("data", root, "--image-size", 32)
    assert outcome.status == 0
    assert "Chest-1" in outcome.out
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["Table", "2", "found", "paper", "difference"] in lines
    assert ["test", "Covid-19", "4", "116", "-112"] in lines
    assert ["train", "Pneumonia", "8", "3,418", "-3,410"] in lines


# --- output folders, names and options ----------------------------------------------------------


def test_an_existing_run_folder_is_not_touched(bstriplet: Command, earlier: Path) -> None:
    before = snapshot(earlier)
    for command in ("train", "compare"):
        outcome = bstriplet(command, *tiny_flags(), "--out", earlier / "run")
        one_clear_line(outcome, earlier / "run", "already exists", "--resume", "another --out")
    assert snapshot(earlier) == before


@pytest.mark.parametrize("where", ["file", "below_a_file", "/proc/bstriplet/run"])
@pytest.mark.parametrize("command", ["train", "compare", "demo"])
def test_an_unwritable_output_folder(
    tmp_path: Path, bstriplet: Command, command: str, where: str
) -> None:
    (tmp_path / "file").write_text("precious")
    out = {"file": tmp_path / "file", "below_a_file": tmp_path / "file/run"}.get(where, Path(where))
    flags = [] if command == "demo" else tiny_flags()
    one_clear_line_at_the_end(bstriplet(command, *flags, "--out", out), out)
    assert (tmp_path / "file").read_text() == "precious"


def one_clear_line_at_the_end(outcome: Outcome, *words: object) -> None:
    """Like ``one_clear_line``, after the lines that a demo prints about its setting."""
    lines = outcome.err.splitlines(keepends=True)
    one_clear_line(Outcome(outcome.status, outcome.out, lines[-1]), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backbone", "mobilnetv3_small_100"], ["--backbone", "'mobilenetv3_small_100'", "timm"]),
        (["--loss", "ce+bts"], ["--loss", "did you mean 'ce+bst'", "ce, ce+triplet"]),
        (["--batches", "minde"], ["--batches", "did you mean 'mined'"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--margin", "2"], ["--margin", "2.0", "at least 0 and at most 1"]),
        (["--backbone", "vit_tiny_patch16_224"], ["--backbone", "--image-size 224", "not of 32"]),
        (["--image-size", "100000"], ["--image-size", "100000", "at most 2048"]),
        (["--epoch-count", "3"], ["--epoch-count", "--help"]),
        (["--train-per-class", "1"], ["class '0' has 1 image", "2 or more"]),
        (["--folds", "1"], ["--folds 1", "2 folds or more"]),
        (["--folds", "3", "--fold", "4"], ["--folds 3 --fold 4", "one of them"]),
    ],
)
def test_bad_options(
    tmp_path: Path, bstriplet: Command, flags: list[str], words: list[str]
) -> None:
    out = tmp_path / "run"
    one_clear_line(bstriplet("train", *tiny_flags(), *flags, "--out", out), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--schemes", "ce+bts:mined"], ["ce+bts:mined", "did you mean 'ce+bst'"]),
        (["--schemes", "ce"], ["scheme 'ce'", "LOSS:BATCHES"]),
        (["--schemes", "ce:mined", "ce:mined"], ["--schemes", "twice"]),
        (["--schemes", "ce:mined", "ce:mined:lr=0.004"], ["--schemes", "the same run", "twice"]),
        (
            ["--schemes", "ce:mined:ema=0.5:lr=1", "ce:mined:lr=1:ema=0.5"],
            ["--schemes", "the same run", "twice"],
        ),
        (["--seeds", "1", "1"], ["--seeds", "twice"]),
        (["--seeds", "-1"], ["--seed", "-1"]),
        (["--backbone", "nothing_like_it"], ["--backbone", "timm.list_models()"]),
    ],
)
def test_bad_comparisons(
    tmp_path: Path, bstriplet: Command, flags: list[str], words: list[str]
) -> None:
    out = tmp_path / "compare"
    one_clear_line(bstriplet("compare", *tiny_flags(), "--out", out, *flags), *words)
    assert not out.exists()


def test_no_command_and_an_unknown_one(bstriplet: Command) -> None:
    one_clear_line(bstriplet(), "COMMAND", "--help")
    one_clear_line(bstriplet("trian"), "trian", "train", "--help")


def test_the_installed_command_ends_like_main(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bstriplet", "train", "--loss", "bts", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    one_clear_line(Outcome(done.returncode, done.stdout, done.stderr), "--loss", "'bts'")


# --- checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def run_copy(earlier: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    shutil.copytree(earlier / "run", tmp_path / "copy")
    return tmp_path / "copy"


def unfinished(run: Path) -> Path:
    (run / "metrics.json").unlink()
    return run


@pytest.mark.parametrize("spoil", ["cut", "noise", "empty", "other", "pickle"])
def test_a_corrupted_checkpoint(run_copy: Path, bstriplet: Command, spoil: str) -> None:
    unfinished(run_copy)
    for name in ("last.pt", "model.pt"):
        whole = (run_copy / name).read_bytes()
        spoiled = {
            "cut": whole[: len(whole) // 2],
            "noise": b"\x00\x01" * 500,
            "empty": b"",
        }.get(spoil)
        if spoiled is not None:
            (run_copy / name).write_bytes(spoiled)
        elif spoil == "other":
            save_checkpoint(run_copy / name, {"weights": torch.zeros(3)})
        else:  # code in a pickle is not run: weights_only refuses it
            torch.save({"config": Path("x")}, run_copy / name)
    before = snapshot(run_copy)
    resumed = bstriplet("train", "--out", run_copy, "--resume")
    one_clear_line(resumed, run_copy / "last.pt")
    one_clear_line(bstriplet("evaluate", "--run", run_copy), run_copy / "model.pt")
    assert snapshot(run_copy) == before


def test_a_checkpoint_from_another_configuration(run_copy: Path, bstriplet: Command) -> None:
    unfinished(run_copy)
    for name in ("last.pt", "model.pt"):
        checkpoint = load_checkpoint(run_copy / name)
        checkpoint["config"]["margin"] = 0.5
        save_checkpoint(run_copy / name, checkpoint)
    before = snapshot(run_copy)
    words = ("another configuration", "margin (0.9 here, 0.5 there)")
    one_clear_line(bstriplet("train", "--out", run_copy, "--resume"), run_copy / "last.pt", *words)
    one_clear_line(bstriplet("evaluate", "--run", run_copy), run_copy / "model.pt", *words)
    assert snapshot(run_copy) == before


def test_resuming_with_other_options_is_refused(run_copy: Path, bstriplet: Command) -> None:
    before = snapshot(run_copy)
    outcome = bstriplet("train", "--out", run_copy, "--resume", "--margin", "0.5", "--seed", "1")
    one_clear_line(outcome, run_copy, "margin (0.5 here, 0.9 there)", "seed (1 here, 0 there)")
    assert snapshot(run_copy) == before


def test_resuming_on_changed_images_is_refused(
    tmp_path: Path, make_tree: MakeTree, bstriplet: Command
) -> None:
    root, out = make_tree(), tmp_path / "run"
    assert bstriplet("train", *TREE_FLAGS, "--data", root, "--out", out).status == 0
    (root / "train/class_0/0.png").unlink()
    before = snapshot(out)
    one_clear_line(bstriplet("train", "--out", out, "--resume"), "images have changed", out)
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "content", ["{}", '{"data": []}', '{"data": null}', "[]", '{"data": {"notes": []}}']
)
def test_a_run_that_lost_what_it_began_with(
    run_copy: Path, bstriplet: Command, content: str
) -> None:
    (run_copy / "environment.json").write_text(content)
    words = (run_copy / "environment.json", "which images", "restore it")
    one_clear_line(bstriplet("train", "--out", run_copy, "--resume"), *words)
    one_clear_line(bstriplet("evaluate", "--run", run_copy), *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"marginn": 1}', b"\xff"])
def test_a_damaged_config(run_copy: Path, bstriplet: Command, content: bytes) -> None:
    (run_copy / "config.json").write_bytes(content)
    one_clear_line(bstriplet("train", "--out", run_copy, "--resume"))
    one_clear_line(bstriplet("evaluate", "--run", run_copy))


def test_a_folder_of_other_things_is_not_resumed_into(tmp_path: Path, bstriplet: Command) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.txt").write_text("sun")
    before = snapshot(tmp_path)
    outcome = bstriplet("train", *tiny_flags(), "--out", tmp_path / "photos", "--resume")
    one_clear_line(outcome, tmp_path / "photos", "go on from", "another --out")
    assert snapshot(tmp_path) == before


# --- evaluate and predict -----------------------------------------------------------------------


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "image.png"]])
def test_no_run_no_model(tmp_path: Path, bstriplet: Command, command: list[str]) -> None:
    one_clear_line(bstriplet(*command, "--run", tmp_path / "no"), tmp_path / "no", "not exist")
    one_clear_line(bstriplet(*command, "--run", tmp_path), tmp_path, "not a run folder")


def test_evaluate_gives_the_metrics_of_the_run(bstriplet: Command, earlier: Path) -> None:
    metrics = json.loads((earlier / "run/metrics.json").read_text())
    outcome = bstriplet("evaluate", "--run", earlier / "run")
    assert outcome.status == 0
    for name in ("accuracy", "sensitivity", "specificity"):
        assert f"{name:<12} {100 * metrics[name]:.2f} %" in outcome.out
    assert f"auc          {metrics['auc']:.4f}" in outcome.out


def test_a_run_on_a_gpu_is_evaluated_without_one(
    run_copy: Path, bstriplet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = bstriplet("evaluate", "--run", run_copy)
    config = json.loads((run_copy / "config.json").read_text()) | {"device": "cuda"}
    (run_copy / "config.json").write_text(json.dumps(config))
    checkpoint = torch.load(run_copy / "model.pt", weights_only=True)
    torch.save(checkpoint | {"config": config}, run_copy / "model.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bstriplet("evaluate", "--run", run_copy) == on_cpu
    assert on_cpu.status == 0


@pytest.fixture
def tree_run(tmp_path: Path, make_tree: MakeTree, bstriplet: Command) -> tuple[Path, Path]:
    """A run on a tree, and the tree."""
    root = make_tree(train=10, test=6)
    out = tmp_path / "run"
    assert bstriplet("train", *TREE_FLAGS, "--data", root, "--out", out).status == 0
    return out, root


def test_evaluate_on_a_folder(tree_run: tuple[Path, Path], bstriplet: Command) -> None:
    run, root = tree_run
    own = bstriplet("evaluate", "--run", run)
    assert own.status == 0
    for data in (root, root / "test"):
        assert bstriplet("evaluate", "--run", run, "--data", data).out == own.out
    (root / "test/class_1").rename(root / "test/other")
    one_clear_line(bstriplet("evaluate", "--run", run, "--data", root), root / "test/other")
    one_clear_line(bstriplet("evaluate", "--run", run, "--data", root / "no"), root / "no")


def test_a_run_is_evaluated_on_the_test_set_it_began_with_or_told_of_the_change(
    tmp_path: Path, make_tree: MakeTree, bstriplet: Command
) -> None:
    root, out = make_tree(train=10), tmp_path / "run"  # no test: one image more deals anew
    (root / "train/class_0/notes.txt").write_text("seen by two readers")
    assert bstriplet("train", *TREE_FLAGS, "--data", root, "--out", out).status == 0
    own = bstriplet("evaluate", "--run", out)
    assert own.status == 0
    assert own.err.startswith("note: 1 ")
    new = root / "train/class_0/10.png"
    new.write_bytes((root / "train/class_0/9.png").read_bytes())
    words = ("images have changed", out, "--data")
    one_clear_line(bstriplet("evaluate", "--run", out), *words)
    new.unlink()
    assert bstriplet("evaluate", "--run", out) == own
    (root / "train/class_0/0.png").write_bytes(b"cut")
    one_clear_line(bstriplet("evaluate", "--run", out), "class_0/0.png", "--skip-broken")
    one_clear_line(bstriplet("evaluate", "--run", out, "--skip-broken"), *words)
    (root / "train/class_0/0.png").unlink()
    limited = bstriplet("evaluate", "--run", out, "--max-pixels", 0)
    one_clear_line(limited, *words, "leave --max-pixels as the run had it")


def test_predict_gives_the_probabilities_of_the_run(
    tree_run: tuple[Path, Path], bstriplet: Command, tmp_path: Path
) -> None:
    run, root = tree_run
    table = tmp_path / "out.csv"
    printed = bstriplet("predict", "--run", run, root / "test")
    assert printed.status == 0
    stored = bstriplet("predict", "--run", run, root / "test", "--output", table)
    assert (stored.status, stored.out) == (0, "")
    assert table.read_text() == printed.out
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    with (run / "predictions.csv").open(newline="") as stream:
        tested = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [str(root / row["file"]) for row in tested]
    for row, test in zip(rows, tested, strict=True):
        assert list(row) == ["file", "predicted", "prob_class_0", "prob_class_1"]
        assert row["predicted"] == test["predicted"]
        for name in ("prob_class_0", "prob_class_1"):
            assert float(row[name]) == pytest.approx(float(test[name]), abs=1e-6)
    single = bstriplet("predict", "--run", run, root / "test/class_1/2.png")
    assert len(single.out.splitlines()) == 2


def test_predict_takes_colour_for_a_grey_model(
    tree_run: tuple[Path, Path], bstriplet: Command, tmp_path: Path
) -> None:
    run, root = tree_run
    with Image.open(root / "test/class_1/2.png") as image:
        image.convert("RGB").save(tmp_path / "colour.png")
    lines = [
        bstriplet("predict", "--run", run, path).out.splitlines()[1].split(",")[1:]
        for path in (root / "test/class_1/2.png", tmp_path / "colour.png")
    ]
    assert lines[0] == lines[1]


def test_predict_names_broken_and_missing_images(
    tree_run: tuple[Path, Path], bstriplet: Command, tmp_path: Path
) -> None:
    run, root = tree_run
    bad = root / "test/class_0/0.png"
    bad.write_bytes(bad.read_bytes()[:50])
    table = tmp_path / "out.csv"
    table.write_text("precious")
    outcome = bstriplet("predict", "--run", run, root / "test", "--output", table)
    one_clear_line(outcome, "1 of 12 images", bad, "--skip-broken")
    assert table.read_text() == "precious"
    skipped = bstriplet("predict", "--run", run, root / "test", "--skip-broken")
    assert skipped.status == 0
    assert len(skipped.out.splitlines()) == 12
    assert str(bad) in skipped.err
    one_clear_line(bstriplet("predict", "--run", run, bad, "--skip-broken"), "no image")
    one_clear_line(bstriplet("predict", "--run", run, tmp_path / "no.png"), "no.png", "not exist")
    (tmp_path / "void").mkdir()
    one_clear_line(bstriplet("predict", "--run", run, tmp_path / "void"), "void", "no images")
    unwritable = bstriplet(
        "predict", "--run", run, root / "test/class_1", "--output", table / "below.csv"
    )
    one_clear_line(unwritable, table / "below.csv", "cannot write")


def test_predict_and_evaluate_say_what_they_left_out_or_read_otherwise(
    tree_run: tuple[Path, Path], bstriplet: Command
) -> None:
    run, root = tree_run
    folder = root / "test/class_0"
    (folder / "notes.txt").write_text("seen by two readers")
    (folder / "1.png").write_bytes(b"cut")
    Image.new("LA", (50, 40), (9, 0)).save(folder / "0.png")
    for command in (("predict", root / "test"), ("evaluate", "--data", root)):
        outcome = bstriplet(command[0], "--run", run, *command[1:], "--skip-broken")
        assert outcome.status == 0
        notes = outcome.err.splitlines()
        assert all(note.startswith("note: 1 ") for note in notes)
        for what in ("cannot be read", "kinds that are not read", "transparent everywhere"):
            assert any(what in note for note in notes), what
        refused = bstriplet(command[0], "--run", run, *command[1:], "--max-pixels", 1999)
        one_clear_line(refused, folder / "0.png" if command[0] == "predict" else "0.png", 2000)
        wrong = bstriplet(command[0], "--run", run, *command[1:], "--max-pixels", -1)
        one_clear_line(wrong, "--max-pixels", -1)


def test_train_says_what_is_left_out_and_keeps_all_of_it_on_disk(
    tmp_path: Path, make_tree: MakeTree, bstriplet: Command
) -> None:
    root = make_tree(train=10, test=6)
    names = [f"a_rather_long_name_of_a_text_{number}.txt" for number in range(30)]
    for name in names:
        (root / "train/class_1" / name).write_text("no image")
    out = tmp_path / "run"
    outcome = bstriplet("train", *TREE_FLAGS, "--data", root, "--out", out)
    assert (
        "note: 30 files of kinds that are not read were left out: train/class_1/a_" in outcome.err
    )
    assert all(len(line) < 700 for line in outcome.err.splitlines())
    assert "all in the report" in outcome.err
    for text in (
        (out / "environment.json").read_text(),
        bstriplet("data", root, "--image-size", 32).out,
    ):
        assert all(name in text for name in names)


def test_predict_tries_its_output_before_it_reads_an_image(
    earlier: Path, tmp_path: Path, bstriplet: Command
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    linked = tmp_path / "linked.csv"
    try:
        linked.symlink_to(tmp_path / "no/out.csv")
    except OSError:
        linked = tmp_path / "no/linked.csv"  # links cannot be made here
    for output in (tmp_path / "no/out.csv", tmp_path, linked):
        predicted = bstriplet("predict", "--run", earlier / "run", broken, "--output", output)
        one_clear_line(predicted, f"cannot write {output}")


def test_predict_writes_where_a_link_leads(
    tree_run: tuple[Path, Path], tmp_path: Path, bstriplet: Command
) -> None:
    run, root = tree_run
    link, table = tmp_path / "link.csv", tmp_path / "table.csv"
    try:
        link.symlink_to(table)
    except OSError:
        pytest.skip("links cannot be made here")
    assert bstriplet("predict", "--run", run, root / "test", "--output", link).status == 0
    assert link.is_symlink()
    assert table.read_text(encoding="utf-8").startswith("file,predicted,")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_predict_writes_into_a_pipe(
    tree_run: tuple[Path, Path], tmp_path: Path, bstriplet: Command
) -> None:
    run, root = tree_run
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    printed = bstriplet("predict", "--run", run, root / "test").out
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        bstriplet("predict", "--run", run, root / "test", "--output", pipe)
        if not pipe.is_fifo():
            reader.kill()
        assert reader.communicate()[0] == printed
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        try:
            write_output(pipe, "caf\udce9.png")  # of a file system that is not UTF-8
            assert reader.communicate(timeout=60)[0] == b"caf\xe9.png"
        finally:
            reader.kill()


def test_a_name_does_not_command_the_terminal(tmp_path: Path, bstriplet: Command) -> None:
    outcome = bstriplet("data", tmp_path / "red\x1b[31m")
    one_clear_line(outcome, r"red\x1b[31m does not exist")


def test_a_path_that_the_system_refuses_is_one_clear_line(
    earlier: Path, bstriplet: Command
) -> None:
    name = "x" * 300  # no file system takes it
    for command in (
        ("data", name),
        ("data", f"{name}.csv"),
        ("data", f"{name}.npz"),
        ("evaluate", "--run", name),
        ("evaluate", "--run", earlier / "run", "--data", name),
        ("predict", "--run", earlier / "run", name),
        ("predict", "--run", earlier / "run", earlier, "--output", name),
        ("predict", "--run", earlier / "run", earlier, "--output", f"{name}/out.csv"),
        ("train", *tiny_flags(), "--out", name),
        ("train", *tiny_flags(), "--out", name, "--resume"),
        ("compare", *tiny_flags(), "--out", name, "--resume"),
        ("reproduce", "table3", "--out", name),
        ("reproduce", "table3", "--from", name, "--out", "out"),
    ):
        one_clear_line(bstriplet(*command), name)
    with pytest.raises(UserError, match=f"{name} is neither"):
        read_comparison(name)


# --- names and screens that are not UTF-8 -------------------------------------------------------


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on a tree, and the tree. Its folders and files have names in Chinese and not UTF-8."""
    if os.name == "nt":
        pytest.skip("names of files are Unicode here")
    root = tmp_path_factory.mktemp("odd") / os.fsdecode(b"d\xe9")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for label in ("肺炎", os.fsdecode(b"norm\xe9")):
            try:
                (root / part / label).mkdir(parents=True)
            except OSError:
                pytest.skip("this file system has no such names")
            for number in range(count):
                pixels = generator.integers(0, 256, (20, 24), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    root / part / label / os.fsdecode(b"\xff%d.png" % number)
                )
    run = root.with_name(os.fsdecode(b"r\xe9"))
    flags = [*TREE_FLAGS, "--data", str(root), "--out", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda folder: folder / "report.html")
        patch.setenv("BSTRIPLET_CACHE", str(root.with_name("cache")))
        with redirect_stdout(TextIOWrapper(BytesIO(), encoding="ascii")):
            assert cli.main(["train", *flags]) == 0
            assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    return run, root


def test_results_of_names_that_are_not_utf_8_are_read_back(odd_run: tuple[Path, Path]) -> None:
    folder, root = odd_run
    (run,) = read_comparison(folder).runs
    found = run.predictions
    assert set(found.classes) == {"norm\udce9", "肺炎"}
    assert all((root / file).is_file() for file in found.files)
    assert run.mistakes.keys() == {
        file
        for file, label, predicted in zip(found.files, found.labels, found.predicted, strict=True)
        if label != predicted
    }
    assert (
        found.classes == run.embeddings.classes == tuple(run.environment["data"]["images"]["test"])
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_names_come_out_on_any_screen(
    odd_run: tuple[Path, Path],
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, root = odd_run
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding=encoding))
    assert cli.main(["predict", "--run", str(run), str(root / "test")]) == 0
    content = sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert content.count(b"\n") == 9
    assert os.fsencode(root) + b"/test/norm\xe9/\xff0.png," in content
    assert ("肺炎".encode() if encoding == "utf-8" else rb"\u80ba\u708e") in content
    assert ("names are escaped" in capsys.readouterr().err) == (encoding != "utf-8")
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding=encoding))
    assert cli.main(["data", str(root), "--image-size", "32"]) == 0


@pytest.mark.parametrize(
    ("encoding", "text", "written", "whole"),
    [
        ("ascii", "肺\udce9炎\udcff", rb"\u80ba" + b"\xe9" + rb"\u708e" + b"\xff", False),
        ("ascii", "\udce9", b"\xe9", True),
        ("utf-8", "\ud800", rb"\ud800", False),
        ("utf-16", "肺\udce9", r"肺\udce9".encode("utf-16"), False),
    ],
)
def test_bytes_of_names_and_escapes_stand_side_by_side(
    encoding: str, text: str, written: bytes, whole: bool
) -> None:
    screen = TextIOWrapper(BytesIO(), encoding=encoding)
    assert cli._write(screen, text) is whole
    assert screen.buffer.getvalue() == written  # type: ignore[attr-defined]


class Cell:
    """A standard output as in a notebook: no other methods than these, and ASCII only."""

    encoding = "ascii"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text.encode(self.encoding).decode()

    def flush(self) -> None:
        pass


def test_streams_of_notebooks_and_none_at_all(
    odd_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root = odd_run
    command = ["predict", "--run", str(run), str(root / "test")]
    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    assert cli.main(command) == 0
    assert r"\u80ba\u708e" in cell.text
    assert cell.text.count("\n") == 9
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(command) == 0
    assert cli.main(["predict"]) == 2


def test_standard_error_names_a_file_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed command to continue with can then be copied."""
    screen = TextIOWrapper(BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", screen)
    assert cli.main(["evaluate", "--run", str(tmp_path / "norm\udce9")]) == 2
    assert b"/norm\xe9 does not exist" in screen.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_screen_that_would_write_question_marks_gets_escapes(
    odd_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root = odd_run
    screen = TextIOWrapper(BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(["predict", "--run", str(run), str(root / "test")]) == 0
    content = screen.buffer.getvalue()  # type: ignore[attr-defined]
    assert rb"\u80ba\u708e" in content
    assert b"?" not in content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device here")
def test_an_output_without_room_is_one_clear_line(
    odd_run: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, root = odd_run
    monkeypatch.setattr(sys, "argv", ["bstriplet", "data", str(root), "--image-size", "32"])
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main() == 2
        full.flush()  # as Python does at its end
    assert capsys.readouterr().err.startswith("bstriplet: cannot write standard output: No space")


def test_results_are_on_disk_before_anything_is_printed(
    tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    built = []
    monkeypatch.setattr(page, "write_report", lambda folder: built.append(folder) or folder)
    monkeypatch.setattr(sys, "stdout", Closed())
    flags = [*TREE_FLAGS, "--data", str(make_tree())]
    out = tmp_path / "train"
    assert cli.main(["train", *flags, "--out", str(out)]) == 1
    sweep = tmp_path / "sweep"
    swept = ["--metric-weights", "0", "1", "--seeds", "0", "--out", str(sweep)]
    assert cli.main(["sweep", *flags, *swept]) == 1
    assert built == [out, sweep]
    assert (sweep / "sweep.csv").is_file()
    again = tmp_path / "again"
    assert cli.main(["reproduce", "figure9", "--from", str(sweep), "--out", str(again)]) == 1
    assert (again / "report.html").is_file()


# --- a process that goes on ---------------------------------------------------------------------


def test_main_runs_in_a_thread_and_leaves_the_process_as_it_was(
    tmp_path: Path, bstriplet: Command
) -> None:
    def state() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
            random.getstate(),
            signal.getsignal(signal.SIGTERM),
        )

    before = state()
    for command in (
        ["train", *tiny_flags(epochs=1), "--out", tmp_path / "run"],
        ["evaluate", "--run", tmp_path / "run"],
    ):
        ended: list[int] = []
        thread = threading.Thread(
            target=lambda c, e: e.append(bstriplet(*c).status), args=(command, ended)
        )
        thread.start()
        thread.join()
        assert ended == [0]
        assert state() == before
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert bstriplet("evaluate", "--run", tmp_path / "run").status == 0  # in the main thread
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_class_names_with_commas_and_quotes_survive(
    tmp_path: Path, make_tree: MakeTree, bstriplet: Command
) -> None:
    root = make_tree()
    for part in ("train", "test"):
        (root / part / "class_0").rename(root / part / 'odd, "name"')
    out = tmp_path / "run"
    assert bstriplet("train", *TREE_FLAGS, "--data", root, "--out", out).status == 0
    with (out / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["label"] for row in rows} == {'odd, "name"', "class_1"}
    assert 'prob_odd, "name"' in rows[0]
    with np.load(out / "embeddings.npz") as saved:
        assert 'odd, "name"' in saved["classes"]
