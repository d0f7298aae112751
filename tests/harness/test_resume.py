"""A run that is killed at any moment and continued equals an uninterrupted one bit for bit."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import full_disk
import pytest
import torch
from bstriplet import cli
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import Task, load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.models.classifier import Classifier
from bstriplet.training import progress, run_folder
from bstriplet.training.loop import train
from bstriplet.training.run_folder import RunFolder, load_checkpoint
from quick import Command, snapshot, tiny_flags

pytestmark = pytest.mark.usefixtures("no_pictures")

MINED = {"loss": "ce+bst", "batches": "mined"}
# Together, these recipes use every part of a run that has a state of its own.
RECIPES: dict[str, dict[str, Any]] = {
    "section 3.1": MINED,
    "ema, cosine, amp": MINED | {
        "ema": 0.9, "schedule": "cosine", "warmup_epochs": 1, "amp": True, "optimiser": "adamw",
        "weight_decay": 0.01, "augment": "online", "clip_grad": 0.5,
    },
    "loss with parameters, sgd, copies": {
        "loss": "ce+ProxyAnchorLoss", "optimiser": "sgd", "augment": "copies", "train_per_class": 3,
        "label_smoothing": 0.1, "class_weights": "balanced",
    },
}  # fmt: skip


def contents(folder: Path) -> dict[str, Any]:
    """The files of a run, without the times that it took."""

    def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in rows
        ]

    files = snapshot(folder)
    for name in (
        run_folder.LOG_FILE,
        run_folder.LAST_FILE,
        run_folder.MODEL_FILE,
        run_folder.LOCK_FILE,
    ):
        files.pop(name, None)
    log = read_log(RunFolder(folder))
    last, best = (
        load_checkpoint(folder / name) for name in (run_folder.LAST_FILE, run_folder.MODEL_FILE)
    )
    last["history"] = untimed(last["history"])
    return {"files": files, "log": untimed(log), "last": flat(last), "best": flat(best)}


def read_log(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / run_folder.LOG_FILE).read_text().splitlines()]


def flat(value: Any) -> Any:
    """Return a checkpoint with tensors as bytes, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value


class Killed(BaseException):
    """A stand-in for a kill: nothing in the package may catch it."""


def test_a_kill_before_any_write_loses_nothing(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the run before its 1st, 2nd, ... file is put in place; continue; compare."""
    config = replace(tiny, **MINED, epochs=2)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    monkeypatch.setattr(progress, "CHECKPOINT_SHARE", float("inf"))  # a checkpoint an epoch
    replace_file = os.replace
    writes = 0
    kill_at = 0

    def counted(source: str, target: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == kill_at:
            raise Killed
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", counted)
    train(config, task, RunFolder(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    total = writes
    assert total >= 9
    for kill_at in range(1, total + 1):
        writes = 0
        run = RunFolder(tmp_path / f"cut-{kill_at}")
        with pytest.raises(Killed):
            train(config, task, run)
        writes = -1000
        train(config, task, run)
        assert contents(run.path) == expected, f"killed at write {kill_at}"
        shutil.rmtree(run.path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_continues_to_the_same_bits(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    config = replace(tiny, **RECIPES[recipe], epochs=4)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    standardised = Classifier.standardised

    def noisy(model: Classifier, images: torch.Tensor) -> torch.Tensor:
        """Draws from the global random numbers in training, as dropout does."""
        x = standardised(model, images)
        return x + 0.1 * torch.randn_like(x) if model.training else x

    monkeypatch.setattr(Classifier, "standardised", noisy)
    monkeypatch.setattr(progress, "CHECKPOINT_SHARE", float("inf"))  # a checkpoint an epoch
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    train(config, task, whole)
    append_log, stop_at = RunFolder.append_log, 2

    def killed_later(run: RunFolder, row: dict[str, Any]) -> None:
        if row["epoch"] == stop_at:
            raise Killed
        append_log(run, row)

    for stop_at in (2, 4, 0):
        monkeypatch.setattr(RunFolder, "append_log", killed_later)
        if stop_at:
            with pytest.raises(Killed):
                train(config, task, cut)
        else:
            train(config, task, cut)
    assert contents(cut.path) == contents(whole.path)


def lines_in(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def forked(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process for a call, to be forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bstriplet.training.loop"])
    return context.Process(target=function, args=arguments)


@dataclass(frozen=True)
class Background:
    """Trains a run in processes that are forked from one that has imported everything."""

    config: TrainConfig
    task: Task
    run: RunFolder

    @contextmanager
    def process(self) -> Iterator[BaseProcess]:
        """A process that trains the run, killed at the end."""
        process = forked(train, self.config, self.task, self.run)
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def wait_for_epoch(self, epoch: int, process: BaseProcess) -> None:
        """Wait until the log has this epoch, or the process has ended."""
        while process.is_alive() and lines_in(self.run.path / run_folder.LOG_FILE) < epoch:
            time.sleep(0.002)


@pytest.fixture
def background(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Background]:
    """Prepare a run in the folder ``cut`` for training in the background."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process

    def prepare(**changes: object) -> Background:
        config = replace(tiny, **changes)
        task = split_dataset(load_dataset(config.data, config.image_size), config)
        return Background(config, task, RunFolder(tmp_path / "cut"))

    return prepare


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    half = ("last.pt", "metrics.json", "bad_batch.pt", "compare.json", "reproduce.json")
    for name in (*(f".{name}.k3x8" for name in half), ".mine.txt", "last.pt"):
        (tmp_path / name).write_text("half")
    with run_folder.locked_folder(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left - {run_folder.LOCK_FILE} == {".mine.txt", "last.pt"}


@pytest.mark.parametrize("name", ["environment", "config", "compare", "reproduce"])
def test_a_command_that_is_killed_while_it_writes_its_first_file_starts_again(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / f".{name}.json.k3x8").write_text("half")
    (tmp_path / run_folder.LOCK_FILE).touch()
    run_folder.check_new(tmp_path, resume=True)
    (tmp_path / f".{name}.txt").write_text("mine")
    with pytest.raises(UserError, match="another --out"):
        run_folder.check_new(tmp_path, resume=True)


def test_kill_9_at_20_random_moments_loses_nothing(
    tmp_path: Path, background: Callable[..., Background]
) -> None:
    """Kill between the start of a process and its last epochs; continue; compare."""
    epochs = 24
    cut = background(**MINED, epochs=epochs)
    whole = RunFolder(tmp_path / "whole")
    train(cut.config, cut.task, whole)
    epoch_seconds = min(row["seconds"] for row in read_log(whole))
    moments = random.Random(764)
    for epochs_done in sorted(moments.choices(range(epochs - 3), k=20)):
        with cut.process() as process:
            cut.wait_for_epoch(epochs_done, process)
            time.sleep(moments.uniform(0, 2 * epoch_seconds))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert not cut.run.finished
    train(cut.config, cut.task, cut.run)
    assert contents(cut.run.path) == contents(whole.path)


def test_a_second_process_is_refused_and_the_first_unharmed(
    tmp_path: Path, background: Callable[..., Background], bstriplet: Command
) -> None:
    first = background(epochs=25)
    with first.process() as process:
        first.wait_for_epoch(1, process)
        with pytest.raises(UserError, match="another process is writing"):
            train(first.config, first.task, first.run)
        command = ("train", "--out", first.run.path, "--resume")
        outcome = bstriplet(*command, "--data", tmp_path)  # refused before an image is looked for
        process.join()
        assert process.exitcode == 0
    assert outcome.status == 2
    assert "another process is writing" in outcome.err
    assert [row["epoch"] for row in read_log(first.run)] == list(range(1, 26))
    assert first.run.finished


def command_line(arguments: list[str], error: Path) -> None:
    """Run the command line; a shell would make it ignore SIGINT in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with error.open("w") as sys.stderr:
        sys.exit(cli.main(arguments))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_continue_and_continues(
    tmp_path: Path, bstriplet: Command, stop: signal.Signals
) -> None:
    out = tmp_path / "run"
    command = ["train", "--recipe", "paper", *tiny_flags(epochs=400), "--out", str(out)]
    command += ["--stop-patience", "0"]
    process = forked(command_line, command, tmp_path / "error")
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not (out / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.pid
        os.kill(process.pid, stop)
        process.join(timeout=60)
    finally:
        process.kill()
    assert process.exitcode == 128 + stop
    err = (tmp_path / "error").read_text()
    assert re.fullmatch(r"bstriplet: interrupted; continue with: bstriplet train .*--resume\n", err)
    assert err.split("bstriplet train ")[1].split() == [*command[1:], "--resume"]
    assert not (out / "metrics.json").exists()
    done = len(load_checkpoint(out / "last.pt")["history"])
    shorter = dict(json.loads((out / "config.json").read_text()), epochs=done + 1)
    for name in ("config.json", "last.pt"):  # as if fewer epochs had been asked for
        if name == "config.json":
            (out / name).write_text(json.dumps(shorter))
        else:
            run_folder.save_checkpoint(
                out / name, load_checkpoint(out / name) | {"config": shorter}
            )
    outcome = bstriplet("train", "--resume", "--out", out)
    assert outcome.status == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == done + 1


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, bstriplet: Command) -> None:
    out = tmp_path / "run"
    assert bstriplet("train", *tiny_flags(epochs=1), "--out", out).status == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.*") if path.suffix != ".html"}
    outcome = bstriplet("train", "--out", out, "--resume")
    assert outcome.status == 0
    assert "accuracy" in outcome.out
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.*") if path.suffix != ".html"}
    assert after == before


@pytest.mark.parametrize("fails_at", range(1, 16))
def test_a_failed_write_is_one_clear_line_and_the_run_continues(
    tmp_path: Path, bstriplet: Command, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Each write of a run in turn meets a full disk; the run then continues as without it."""
    out = tmp_path / "run"
    sync: Callable[[int], None] = os.fsync
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    outcome = bstriplet("train", *tiny_flags(epochs=1), "--out", out)
    assert outcome.status == 2
    assert re.fullmatch(r"bstriplet: cannot write .*: No space left on device; .*\n", outcome.err)
    assert not [path for path in out.iterdir() if path.name.startswith(".") and
                path.name != run_folder.LOCK_FILE]  # fmt: skip
    assert bstriplet("train", *tiny_flags(epochs=1), "--out", out, "--resume").status == 0


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_continues(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    """The disk has room for one checkpoint, but not for the next one beside it."""
    config = replace(tiny, **MINED, epochs=3)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    whole = RunFolder(tmp_path / "whole")
    train(config, task, whole)
    (tmp_path / "disk").mkdir()
    checkpoint = (whole.path / run_folder.LAST_FILE).stat().st_size
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount", sys.executable),
            *(full_disk.__file__, tmp_path / "disk", tmp_path / "cut"),
            *(str(round(1.5 * checkpoint)), "--recipe", "paper", *tiny_flags(epochs=3)),
            *("--loss", "ce+bst"),
            *("--batches", "mined"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode == full_disk.NO_DISK:
        pytest.skip("a disk of its own needs Linux and the right to mount one")
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 2
    for line in errors:
        assert re.fullmatch(
            r"bstriplet: cannot write .*last\.pt: No space left on device; .*", line
        )
    assert contents(tmp_path / "cut") == contents(whole.path)
