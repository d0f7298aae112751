"""Experiments: the compare folder, resuming, and the demo's experiment."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bstriplet.config import PAPER, STRONG, Scheme, TrainConfig, with_recipe
from bstriplet.data.dataset import ImageSet, Task
from bstriplet.report import page
from bstriplet.study import compare as compare_module
from bstriplet.study.compare import Experiment, compare, read_experiment, run_folder
from bstriplet.study.demo import demo_experiment, linear_model
from bstriplet.study.read_runs import read_comparison
from bstriplet.training.run_folder import RunFolder
from quick import Command, MakeTree, snapshot, tiny_flags

SCHEMES = (Scheme("ce", "random"), Scheme("ce+bst", "mined"))


def test_a_comparison_leaves_runs_table_and_report(tmp_path: Path, bstriplet: Command) -> None:
    out = tmp_path / "compare"
    outcome = bstriplet("compare", *tiny_flags(epochs=2), "--seeds", 0, 1, "--out", out)
    assert outcome.status == 0
    assert "CE (RS)" in outcome.out
    assert "CE+BST (DM)" in outcome.out
    assert outcome.out.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert (out / "report.html").stat().st_size > 1000
    assert (out / "summary.csv").exists()
    stored = json.loads((out / "compare.json").read_text())
    assert stored["schemes"] == ["ce:random", "ce+bst:mined"]
    assert stored["seeds"] == [0, 1]
    for scheme in SCHEMES:
        for seed in (0, 1):
            run = RunFolder(run_folder(out, scheme, seed))
            assert run.finished
            config = run.config()
            assert (config.loss, config.batches, config.seed) == (
                scheme.loss, scheme.batches, seed,
            )  # fmt: skip


@pytest.mark.usefixtures("no_pictures")
def test_resume_trains_only_what_is_missing(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment(replace(tiny, epochs=1), SCHEMES, (0, 1))
    said: list[str] = []
    compare(experiment, tmp_path / "whole", said.append)
    assert [line[:5] for line in said] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]

    finished_runs = 0
    train = compare_module.train

    def cut_after_two(*arguments: object) -> object:
        nonlocal finished_runs
        if finished_runs == 2:
            raise KeyboardInterrupt
        finished_runs += 1
        return train(*arguments)  # type: ignore[arg-type]

    out = tmp_path / "cut"
    monkeypatch.setattr(compare_module, "train", cut_after_two)
    with pytest.raises(KeyboardInterrupt):
        compare(experiment, out, said.append)
    monkeypatch.setattr(compare_module, "train", train)
    # Seed by seed: an interrupted experiment has complete pairs.
    assert RunFolder(run_folder(out, SCHEMES[0], 0)).finished
    assert RunFolder(run_folder(out, SCHEMES[1], 0)).finished
    times = {path: path.stat().st_mtime_ns for path in out.rglob("seed-0/*.*")}
    compare(experiment, out, said.append)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("seed-0/*.*")} == times
    for name in ("predictions.csv", "metrics.json", "embeddings.npz", "model.pt"):
        for path in (tmp_path / "whole").rglob(name):
            assert path.read_bytes() == (out / path.relative_to(tmp_path / "whole")).read_bytes()


def test_schemes_may_differ_in_any_field(tiny: TrainConfig, tmp_path: Path) -> None:
    """Runs are told apart by the fields that schemes set; each gets its own images."""
    texts = ("ce:random", "ce:random:lr=0.01", "ce:random:backbone=test_resnet:image-size=40")
    experiment = Experiment(replace(tiny, epochs=1), tuple(map(Scheme.parse, texts)), (0,))
    compare(experiment, tmp_path, lambda text: None)
    assert read_experiment(tmp_path) == experiment
    comparison = read_comparison(tmp_path)
    assert [run.scheme for run in comparison.finished] == list(experiment.schemes)
    assert [
        (run.config["lr"], run.config["backbone"], run.config["image_size"])
        for run in comparison.finished
    ] == [(1e-3, tiny.backbone, 32), (0.01, tiny.backbone, 32), (1e-3, "test_resnet", 40)]
    table = page.write_summary(tmp_path)
    for label in ("CE (RS) ", "CE (RS), lr 0.01 ", "CE (RS), test_resnet, image size 40 "):
        assert label in table


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--epochs", "3"], "epochs (3 here, 2 there)"),
        (["--seeds", "0", "1"], "seeds (0 there)"),
        (["--schemes", "ce:random", "ce:mined"], "schemes (ce:random ce+bst:mined there)"),
    ],
)
def test_another_plan_is_not_mixed_in(
    tmp_path: Path, bstriplet: Command, changes: list[str], message: str
) -> None:
    out = tmp_path / "compare"
    assert bstriplet("compare", *tiny_flags(epochs=2), "--seeds", 0, "--out", out).status == 0
    before = snapshot(out)
    outcome = bstriplet("compare", "--out", out, "--resume", *changes)
    assert outcome.status == 2
    assert message in outcome.err
    assert snapshot(out) == before


def test_plans_survive_the_file(tiny: TrainConfig, tmp_path: Path) -> None:
    experiment = Experiment(tiny, SCHEMES, (3, 1))
    (tmp_path / "compare.json").write_text(json.dumps(experiment.to_dict()))
    assert read_experiment(tmp_path) == experiment


@pytest.mark.usefixtures("no_pictures")
def test_the_demo_works_when_typed_again(
    tmp_path: Path, bstriplet: Command, monkeypatch: pytest.MonkeyPatch, make_tree: MakeTree
) -> None:
    def small(data: str) -> Experiment:
        experiment = demo_experiment(data)
        config = replace(
            experiment.config, backbone="test_efficientnet", epochs=1, image_size=32,
            train_per_class=4, batch_size=24, validation_fraction=0.34, warmup_epochs=0,
        )  # fmt: skip
        return replace(experiment, config=config, seeds=(0,))

    monkeypatch.setattr("bstriplet.study.demo.demo_experiment", small)
    out = tmp_path / "demo"
    first = bstriplet("demo", "--out", out)
    assert first.status == 0
    linear, report = first.out.splitlines()[-2:]
    assert linear == linear_model(small("digits"), tmp_path)
    assert (out / "digits/linear.csv").read_text() == (tmp_path / "linear.csv").read_text()
    assert report == f"report: {out / 'digits' / 'report.html'}"
    second = bstriplet("demo", "--out", out)
    assert (second.status, second.out) == (0, first.out)
    tree = bstriplet("demo", "--out", out, "--data", make_tree(train=6, test=3))
    assert tree.status == 0
    assert tree.out.splitlines()[-1] == f"report: {out / 'data' / 'report.html'}"
    assert (out / "data" / "summary.csv").exists()


@pytest.mark.parametrize("data", ["digits", "some/tree"])
def test_the_demo_compares_pairs_in_a_small_sample(data: str) -> None:
    experiment = demo_experiment(data)
    assert len(experiment.seeds) >= 3
    assert experiment.schemes == SCHEMES
    assert 10 <= experiment.config.train_per_class <= 20
    assert experiment.config.backbone == "test_resnet"
    assert experiment.config.augment == "shifts"  # a flip or a rotation makes another digit
    configs = {
        replace(config, loss="ce", batches="random", seed=0) for _, config in experiment.runs()
    }
    assert configs == {experiment.config}


def test_the_demo_names_the_mean_accuracy_of_a_linear_model_over_seeds(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels of 0 and 255 that say the class, in seed 1 but for one of its four test images."""

    def image_set(pixels: list[int], labels: list[int]) -> ImageSet:
        rows = np.arange(len(pixels))[::-1]  # a set's images need not be in the order of pixels
        images = np.array(pixels, dtype=np.uint8).reshape(-1, 1, 1, 1)
        return ImageSet(images, rows, np.array(labels)[::-1], ("",) * len(pixels))

    def task(config: TrainConfig) -> Task:
        train = image_set([0, 255] * 8, [0, 1] * 8)
        swapped = image_set([255, 0], [0, 1])  # of no influence: only training images count
        test = image_set([0, 255, 0, 255], [0, 1, 0, 1 - config.seed])
        return Task(("a", "b"), train, swapped, test, (), "")

    monkeypatch.setattr("bstriplet.study.demo.Tasks.of", lambda _, config: task(config))
    line = linear_model(Experiment(tiny, SCHEMES, (0, 1)), tmp_path)
    assert line.endswith("test accuracy 87.50%")
    assert (tmp_path / "linear.csv").read_text() == "seed,accuracy\n0,1.0\n1,0.75\n"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        (["train"], STRONG),
        (["compare", "--schemes", "ce:random", "--seeds", "0"], STRONG),
        (["sweep", "--metric-weights", "1", "--seeds", "0"], STRONG),
        (["reproduce", "figure6", "--seeds", "1"], PAPER),
    ],
)
def test_a_command_starts_from_its_recipe_or_the_one_that_is_typed(
    tmp_path: Path, bstriplet: Command, command: list[str], recipe: str
) -> None:
    typed, other = tiny_flags(epochs=1), PAPER if recipe == STRONG else STRONG
    for out, words, expected in (("own", [], recipe), ("other", ["--recipe", other], other)):
        assert bstriplet(*command, *typed, *words, "--out", tmp_path / out).status == 0
        (config, *_) = (json.loads(p.read_text()) for p in (tmp_path / out).rglob("config.json"))
        fields = with_recipe(expected, {"epochs": 1})
        assert {name: config[name] for name in fields} == fields


def test_another_recipe_is_not_mixed_in(tmp_path: Path, bstriplet: Command) -> None:
    out = tmp_path / "run"
    assert bstriplet("train", *tiny_flags(epochs=1), "--out", out).status == 0
    again = bstriplet("train", "--recipe", "paper", "--out", out, "--resume")
    assert again.status == 2
    assert "optimiser ('adam' here, 'adamw' there)" in again.err
    assert bstriplet("train", "--out", out, "--resume").status == 0
    same = bstriplet("train", "--recipe", "strong", "--epochs", 1, "--out", out, "--resume")
    assert same.status == 0
    unknown = bstriplet("train", "--recipe", "papers", "--out", tmp_path / "new")
    assert (unknown.status, "did you mean 'paper'" in unknown.err) == (2, True)
    assert not (tmp_path / "new").exists()
