"""The runs of the study: trained once, continued after a stop, and measured without a trace."""

import copy
import csv
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from bstriplet.config import STRONG, Scheme, TrainConfig, with_recipe
from bstriplet.data.dataset import load_for, split_dataset
from bstriplet.study.compare import Tasks
from bstriplet.training.batches import Feed
from bstriplet.training.learner import Learner
from bstriplet.training.loop import train
from bstriplet.training.run_folder import LAST_FILE, RunFolder, load_checkpoint, locked_folder
from bstriplet.training.seeds import seed_everything
from PIL import Image

from studies import run
from studies.run import BST, CE, GradientShare, Part

QUICK = {
    "image_size": 32, "train_per_class": 6, "epochs": 12, "device": "cpu",
    "backbone": "test_resnet", "augment": "shifts", "validation_fraction": 0.34,
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts on digits; runs in a thread of this process."""
    parts = {"one": Part(run.BLOOD, (CE, BST), 2, QUICK), "two": Part(run.CHEST, (CE,), 1, QUICK)}
    monkeypatch.setattr(run, "PARTS", parts)
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda _, **options: ThreadPoolExecutor(1))
    monkeypatch.setenv("BENCH_COMMIT", "abc")


def rows(folder, name):
    with (folder / "results" / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def study(folder, *words):
    given = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    run.main([*words, *given])


@pytest.fixture
def tree(tmp_path):
    """Images of three classes, each brighter in columns of its own, with a test part."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 8)):
        for label in range(3):
            folder = tmp_path / "data" / part / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 150, (32, 32), dtype=np.uint8)
                pixels[:, 10 * label : 10 * label + 10] += 60
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


def missing(data):
    return ("one", "--missing", "--blood", str(data))


@pytest.mark.usefixtures("quick")
def test_missing_runs_are_trained_once_and_described(tmp_path, tree, capsys):
    study(tmp_path)
    assert "one: 0 of 4 runs are there\ntwo: 0 of 1 runs are there\n" in capsys.readouterr().out
    study(tmp_path, *missing(tree))
    runs, predictions, epochs = (rows(tmp_path, n) for n in ("runs", "predictions", "epochs"))
    (labels,) = rows(tmp_path, "labels")
    keys = [(row["part"], row["scheme"], row["seed"]) for row in runs]
    assert keys == [("one", s, n) for n in "01" for s in ("ce:random", "ce+bst:random")]
    assert [(row["part"], row["scheme"], row["seed"]) for row in predictions] == keys
    assert (labels["images"], labels["classes"]) == ("blood", '["class_0", "class_1", "class_2"]')
    for row, predicted in zip(runs, predictions, strict=True):
        right = np.mean(
            [a == b for a, b in zip(predicted["predicted"], labels["labels"], strict=True)]
        )
        assert float(row["accuracy"]) == pytest.approx(right, rel=1e-6)
        assert (row["train_images"], row["epochs"], row["commit"]) == ("12", "12", "abc")
        assert float(row["train_ce"]) > 0
        assert 0 <= float(row["test_mean_square_between"]) <= 1
        of_run = [e for e in epochs if (e["scheme"], e["seed"]) == (row["scheme"], row["seed"])]
        assert [int(e["epoch"]) for e in of_run] == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
        for e in of_run:
            assert float(e["ce_norm"]) > 0
            assert (e["metric_norm"] == "") == (row["scheme"] == "ce:random")
    capsys.readouterr()
    study(tmp_path, *missing(tree))
    assert capsys.readouterr().out == "one: 4 of 4 runs are there\n"


@pytest.mark.usefixtures("quick")
def test_a_stop_costs_no_finished_run_and_changes_no_result(tmp_path, tree, monkeypatch):
    study(tmp_path / "whole", *missing(tree))
    finish, calls = run.finish, []

    def stopped(job, threads):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finish(job, threads)

    monkeypatch.setattr(run, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "cut", *missing(tree))
    assert len(rows(tmp_path / "cut", "runs")) == 2
    study(tmp_path / "cut", *missing(tree))
    assert all(calls.count(job) == 1 for job in calls[:2])
    for name in ("runs", "predictions", "epochs", "labels"):
        untimed = [
            [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder, name)]
            for folder in (tmp_path / "whole", tmp_path / "cut")
        ]
        assert untimed[0] == untimed[1]


def test_a_worker_ends_with_its_parent(tmp_path):
    """A killed study leaves no process that holds its folders."""
    code = (
        "import multiprocessing, os, time\n"
        "from studies import run\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = run.ProcessPoolExecutor(1, mp_context=context, initializer=run._end_with,\n"
        "                                   initargs=(os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(100)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(run.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


def alive(process):
    """Whether a process runs; one that has ended may still be in the table, as Z."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("quick")
def test_bad_requests_are_named(tmp_path, tree, capsys):
    for words, said in (
        (["none"], "no part 'none'; parts are one, two"),
        (["two", "--missing"], "--chest FOLDER"),
    ):
        with pytest.raises(SystemExit):
            study(tmp_path, *words)
        assert said in capsys.readouterr().err
    for held in ("work", "results"):
        with locked_folder(tmp_path / held), pytest.raises(SystemExit):
            study(tmp_path, *missing(tree))
        assert f"another process is writing to {tmp_path / held}" in capsys.readouterr().err
    with locked_folder(tmp_path / "results"):
        study(tmp_path)  # counting needs no lock


@pytest.mark.usefixtures("quick")
def test_other_test_images_are_refused(tmp_path, tree, capsys):
    study(tmp_path, *missing(tree))
    with (tmp_path / "results" / "runs.csv").open() as stream:
        lines = stream.readlines()
    (tmp_path / "results" / "runs.csv").write_text("".join(lines[:-1]))
    (tree / "test" / "class_0" / "0.png").unlink()
    with pytest.raises(SystemExit):
        run.main([*missing(tree), "--work", str(tmp_path / "new"),
                  "--results", str(tmp_path / "results")])  # fmt: skip
    assert "blood has other test images" in capsys.readouterr().err
    assert len(rows(tmp_path, "runs")) == 3


@pytest.mark.usefixtures("quick")
def test_a_row_of_another_configuration_is_refused(tmp_path, tree, monkeypatch, capsys):
    study(tmp_path, *missing(tree))
    changed = Part(run.BLOOD, (CE, BST), 2, QUICK | {"lr": 0.5})
    monkeypatch.setattr(run, "PARTS", {"one": changed})
    with pytest.raises(SystemExit):
        study(tmp_path, *missing(tree))
    assert "one ce:random 0 in" in (said := capsys.readouterr().err)
    assert "another configuration" in said
    elsewhere = run.jobs_of("one", tmp_path / "copy", tmp_path)[0]
    assert elsewhere.fingerprint == run.jobs_of("one", tree, tmp_path)[0].fingerprint


@pytest.mark.usefixtures("quick")
def test_an_error_ends_the_study_but_loses_no_run(tmp_path, tree, monkeypatch):
    finish = run.finish

    def failing(job, threads):
        if job.key == ("one", "ce+bst:random", "0"):
            raise ValueError("broken")
        return finish(job, threads)

    monkeypatch.setattr(run, "finish", failing)
    with pytest.raises(ValueError, match="broken"):
        study(tmp_path, *missing(tree))
    assert rows(tmp_path, "runs")[0]["scheme"] == "ce:random"
    monkeypatch.setattr(run, "finish", finish)
    study(tmp_path, *missing(tree))
    assert len(rows(tmp_path, "runs")) == 4


def test_the_schemes_of_a_repetition_share_images_weights_and_batches(tree):
    part = Part(run.BLOOD, (CE, BST), 2, QUICK)
    first = {}
    for scheme, config in part.experiment(tree).runs():
        task = Tasks().of(config)
        seed_everything(config.seed, 0)
        learner = Learner(config, task, torch.device("cpu"))
        batch = next(iter(Feed(config, task.train, torch.device("cpu")).epoch(1)))
        weights = [value.tolist() for value in learner.model.state_dict().values()]
        shared = (task.fingerprint, batch.positions, batch.images.tolist(), weights)
        if scheme == CE:
            first[config.seed] = shared
            continue
        assert shared == first[config.seed]
    assert first[0][0] != first[1][0]


def test_each_part_is_an_experiment_under_the_strong_recipe(tmp_path):
    sizes = {"curve-10": 64, "curve-20": 128, "curve-80": 512, "curve-all": 896}
    for name, part in run.PARTS.items():
        experiment = part.experiment(tmp_path)
        config = experiment.config
        assert (config.metric_weight, config.margin, config.batch_size) == (1.0, 0.9, 36)
        assert config.image_size == (128 if name == "primary-128" else 64)
        assert experiment.seeds == tuple(range(15 if name.startswith("primary") else 5))
        steps = math.ceil(sizes.get(name, 256) / 36) * config.epochs
        assert steps == {"curve-80": 795, "curve-all": 1000}.get(name, 800)
        assert len(run.jobs_of(name, tmp_path, tmp_path)) == len(experiment.runs())
        fields = with_recipe(STRONG, {"data": str(tmp_path), **part.settings})
        assert fields.items() <= experiment.config.to_dict().items()
    assert {str(scheme) for scheme in run.PARTS["primary"].schemes} == {
        "ce:random", "ce+bst:random", "ce+bst:mined", "ce:mined",
    }  # fmt: skip


@pytest.mark.parametrize("loss", ["ce", "ce+bst"])
def test_observing_gradients_leaves_no_trace(tmp_path, tree, loss):
    config = TrainConfig(
        data=str(tree), **QUICK | {"epochs": 3, "loss": loss, "metric_weight": 0.7}
    )
    task = split_dataset(load_for(config), config)
    states = []
    for name, observe in (("plain", None), ("seen", GradientShare(task.train, config))):
        folder = RunFolder(tmp_path / name)
        train(config, task, folder, observe)
        states.append(load_checkpoint(folder.path / LAST_FILE)["learner"]["model"])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_share_is_that_of_both_gradients(tree):
    config = TrainConfig(
        data=str(tree), **QUICK | {"loss": "ce+bst", "metric_weight": 0.7, "batch_size": 20}
    )
    task = split_dataset(load_for(config), config)
    torch.manual_seed(0)
    learner = Learner(config, task, torch.device("cpu"))
    observe = GradientShare(task.train, config)
    found = observe(learner, 1)
    assert observe(learner, 4) == {}
    model, sums = copy.deepcopy(learner.model).train(), {}
    for positions in observe.batches:
        pixels, labels = task.train.batch(positions)
        loss = learner.criterion(model(pixels), labels)
        for name, value in (("ce", loss.ce), ("metric", 0.7 * loss.metric)):
            reached = [p for n, p in model.named_parameters() if "fc" not in n]
            gradients = torch.autograd.grad(
                value / len(observe.batches), reached, retain_graph=True
            )
            flat = torch.cat([g.flatten() for g in gradients])
            sums[name] = sums.get(name, 0) + flat
    assert found["ce_norm"] == pytest.approx(sums["ce"].norm().item(), rel=1e-4)
    assert found["metric_norm"] == pytest.approx(sums["metric"].norm().item(), rel=1e-4)
    cosine = torch.cosine_similarity(sums["ce"], sums["metric"], dim=0).item()
    assert found["cosine"] == pytest.approx(cosine, abs=1e-4)


def test_a_scheme_of_the_study_is_what_the_command_line_reads():
    for part in run.PARTS.values():
        for scheme in part.schemes:
            assert Scheme.parse(str(scheme)) == scheme
