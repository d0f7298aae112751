"""A run cut at any moment and continued equals one that was not, to the bit."""

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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bstriplet import runs, training
from bstriplet.config import TrainConfig
from bstriplet.data import load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.runs import RunFolder, load_checkpoint, locked_folder
from bstriplet.training import train
from quick import Run, snapshot, tiny_flags

pytestmark = pytest.mark.usefixtures("no_pictures")

MINED = {"loss": "ce+bst", "batches": "mined"}


def contents(folder: Path) -> dict[str, Any]:
    """What a run left, without the times that it took."""

    def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in rows
        ]

    files = snapshot(folder)
    for name in (runs.LOG, runs.LAST, runs.BEST, runs.LOCK):
        files.pop(name, None)
    log = [json.loads(line) for line in (folder / runs.LOG).read_text().splitlines()]
    last, best = (load_checkpoint(folder / name) for name in (runs.LAST, runs.BEST))
    last["history"] = untimed(last["history"])
    return {"files": files, "log": untimed(log), "last": flat(last), "best": flat(best)}


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
    """Stands for a kill: nothing in the package may catch it."""


def test_a_kill_before_any_write_loses_nothing(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the run before its 1st, 2nd, ... file is put in place; continue; compare."""
    config = replace(tiny, **MINED, epochs=2)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", float("inf"))  # a checkpoint an epoch
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


def lines_in(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_kill_9_at_random_moments_loses_nothing(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill processes that are forked from one with the imports behind it; continue; compare."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process
    config = replace(tiny, **MINED, epochs=30)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    train(config, task, whole)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bstriplet.training"])
    moments = random.Random(764)
    for epochs_done in sorted(moments.sample(range(1, 26), 4)):
        process = context.Process(target=train, args=(config, task, cut))
        process.start()
        while process.is_alive() and lines_in(cut.path / runs.LOG) < epochs_done:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not cut.finished
    train(config, task, cut)
    results = [contents(run.path) for run in (whole, cut)]
    for name in [name for name in results[1]["files"] if name.startswith(".")]:
        del results[1]["files"][name]  # half-written by a process that was killed
    assert results[0] == results[1]


def heed_interrupts() -> None:
    """Undo what a shell does to the commands that it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_says_how_to_continue_and_the_run_continues(tmp_path: Path, bstriplet: Run) -> None:
    out = tmp_path / "run"
    command = ["train", *tiny_flags(epochs=400), "--stop-patience", "400", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bstriplet", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(r"bstriplet: interrupted; continue with: bstriplet train .*--resume\n", err)
    assert err.split("bstriplet train ")[1].split() == [*command[1:], "--resume"]
    assert not (out / "metrics.json").exists()
    done = len(load_checkpoint(out / "last.pt")["history"])
    shorter = dict(json.loads((out / "config.json").read_text()), epochs=done + 1)
    for name in ("config.json", "last.pt"):  # as if fewer epochs had been asked for
        if name == "config.json":
            (out / name).write_text(json.dumps(shorter))
        else:
            runs.save_checkpoint(out / name, load_checkpoint(out / name) | {"config": shorter})
    outcome = bstriplet("train", "--resume", "--out", out)
    assert outcome.status == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == done + 1


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, bstriplet: Run) -> None:
    out = tmp_path / "run"
    assert bstriplet("train", *tiny_flags(epochs=1), "--out", out).status == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.*") if path.suffix != ".html"}
    outcome = bstriplet("train", "--out", out, "--resume")
    assert outcome.status == 0
    assert "accuracy" in outcome.out
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.*") if path.suffix != ".html"}
    assert after == before


def test_two_processes_cannot_write_into_one_folder(tiny: TrainConfig, tmp_path: Path) -> None:
    task = split_dataset(load_dataset(tiny.data, tiny.image_size), tiny)
    run = RunFolder(tmp_path / "run")
    with locked_folder(run.path), pytest.raises(UserError, match="another process is writing"):
        train(tiny, task, run)
    train(replace(tiny, epochs=1), task, run)
    assert run.finished


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_a_full_disk_is_one_clear_line_and_the_run_continues(
    tmp_path: Path, bstriplet: Run, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Each file of a run in turn meets a full disk; the run then goes on as if it had not."""
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
                path.name != runs.LOCK]  # fmt: skip
    assert bstriplet("train", *tiny_flags(epochs=1), "--out", out, "--resume").status == 0
