"""Run folders: their files, checkpoints and log, and one writer at a time."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bstriplet.config import TrainConfig, describe_difference
from bstriplet.errors import UserError, one_line
from bstriplet.storage import cannot_write, check_writable, read_json, write_atomic, write_text

LOCK_FILE = ".lock"
CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
LOG_FILE = "log.jsonl"
LAST_FILE = "last.pt"
MODEL_FILE = "model.pt"
PREDICTIONS_FILE = "predictions.csv"
EMBEDDINGS_FILE = "embeddings.npz"
MISTAKES_FILE = "mistakes.npz"
METRICS_FILE = "metrics.json"
BAD_BATCH_FILE = "bad_batch.pt"
# The first files of other folders with runs in them: those of an experiment and of a reproduction.
COMPARE_FILE = "compare.json"
REPRODUCE_FILE = "reproduce.json"

# Files that only the holder of the lock writes. A killed process may leave a half-written one under
# its temporary name.
_HELD_FILES = (
    ENVIRONMENT_FILE,
    CONFIG_FILE,
    LOG_FILE,
    LAST_FILE,
    MODEL_FILE,
    PREDICTIONS_FILE,
    MISTAKES_FILE,
    EMBEDDINGS_FILE,
    METRICS_FILE,
    BAD_BATCH_FILE,
    COMPARE_FILE,
    REPRODUCE_FILE,
)

# Files that a command may leave if it is killed before it has written its configuration.
_FIRST_FILES = (
    LOCK_FILE,
    ENVIRONMENT_FILE,
    *(f".{name}." for name in (ENVIRONMENT_FILE, CONFIG_FILE, COMPARE_FILE, REPRODUCE_FILE)),
)


def check_new(path: Path, *, resume: bool = False) -> None:
    """Raise unless ``path`` is absent or a folder in which nothing was started.

    resume: whether the command was asked to continue; the message depends on it.
    """
    # os.path: Path.exists raises for a name that is too long, or in a folder that is not readable.
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"output folder {path} is a file; choose another --out")
    check_writable(next(p for p in (path, *path.absolute().parents) if os.path.exists(p)), path)
    if os.path.isdir(path) and not all(
        entry.name.startswith(_FIRST_FILES) for entry in path.iterdir()
    ):
        if resume:
            raise UserError(
                f"{path} has files, but none that this command can go on from; choose another --out"
            )
        raise UserError(
            f"output folder {path} already exists; continue it with --resume, or choose another "
            "--out"
        )


def check_free(path: Path) -> None:
    """Raise if another process holds the folder; for a check before the images are read."""
    if os.path.exists(path / LOCK_FILE):
        with locked_folder(path):
            pass


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Create the folder if needed and lock it: a second writer gets an error.

    The lock ends with the process, even if that is killed. Files that a killed process left
    half-written are removed.
    """
    lock = FileLock(path / LOCK_FILE, timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"another process is writing to {path}; wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        for name in _HELD_FILES:
            for left_over in path.glob(f".{name}.*"):
                left_over.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint (tensors and plain values in dicts and lists) atomically."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint on the CPU; only tensors and plain values are read, never code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {path} does not exist; train the run to its end first (--resume)"
        ) from error
    except Exception as error:  # torch.load raises many kinds of error on damaged bytes
        raise UserError(
            f"checkpoint {path} is damaged ({one_line(error)[:120]}); restore it, or train the "
            "run again into another folder"
        ) from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint:
        raise UserError(f"checkpoint {path} was not written by bstriplet; use one of its runs")
    return checkpoint


@dataclass(frozen=True)
class RunFolder:
    """The files of one training run.

    - ``config.json``: the configuration.
    - ``environment.json``: versions, hardware and images.
    - ``log.jsonl``: one line per epoch.
    - ``last.pt``: the checkpoint from which the run continues.
    - ``model.pt``: the tested model.
    - ``predictions.csv``, ``mistakes.npz``: results on the test images.
    - ``embeddings.npz``: embeddings of the training images; hashes of training and validation
      images.
    - ``metrics.json``: metrics on the test images, written last.
    - ``bad_batch.pt``: only if a loss was not finite, the batch at which the run stopped.
    """

    path: Path

    @property
    def started(self) -> bool:
        """Whether there is a configuration to continue from."""
        return os.path.exists(self.path / CONFIG_FILE)

    @property
    def finished(self) -> bool:
        """Whether the metrics, the last file of a run, are written."""
        return (self.path / METRICS_FILE).exists()

    def config(self) -> TrainConfig:
        """Return the run's configuration."""
        if not os.path.isdir(self.path):
            raise UserError(f"run folder {self.path} does not exist; give the --out of a run")
        if not self.started:
            raise UserError(f"{self.path} is not a run folder (no config.json); give one")
        path = self.path / CONFIG_FILE
        return TrainConfig.from_dict(read_json(path), path)

    def check_config(self, config: TrainConfig) -> None:
        """Raise if the run was started with another configuration."""
        if self.started and (difference := describe_difference(config, self.config())):
            raise UserError(
                f"{self.path} was started with another configuration: {difference}; leave those "
                "options as they were, or choose another --out"
            )

    def check_images(self, fingerprint: str, otherwise: str) -> None:
        """Raise if images, labels or parts are not those that the run began with.

        fingerprint: ``Task.fingerprint``. otherwise: the advice beside restoring the images.
        """
        environment = self.path / ENVIRONMENT_FILE
        try:
            began_with = read_json(environment)["data"]["fingerprint"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{environment} does not say which images the run began with; restore it"
            ) from error
        if fingerprint != began_with:
            raise UserError(
                f"the images have changed since {self.path} began, or their labels, order or "
                f"parts; restore them, or {otherwise}"
            )

    def load(self, name: str, config: TrainConfig) -> dict[str, Any]:
        """Return checkpoint ``name`` after comparing its configuration with the run's."""
        path = self.path / name
        checkpoint = load_checkpoint(path)
        difference = describe_difference(config, TrainConfig.from_dict(checkpoint["config"], path))
        if difference:
            raise UserError(
                f"checkpoint {path} is from another configuration: {difference}; put the run's "
                "own checkpoint back, or train again into another folder"
            )
        return checkpoint

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Rewrite the log from ``history``: a line that a kill cut off disappears."""
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_text(self.path / LOG_FILE, lines)

    def append_log(self, row: dict[str, Any]) -> None:
        """Add one epoch's line to the log."""
        try:
            with (self.path / LOG_FILE).open("a", encoding="utf-8", newline="\n") as stream:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise cannot_write(self.path / LOG_FILE, error) from error
