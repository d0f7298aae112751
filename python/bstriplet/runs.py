"""Run folders: files that are whole or absent, checkpoints, the log, and one writer at a time."""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bstriplet import names
from bstriplet.config import TrainConfig, describe_difference
from bstriplet.errors import UserError, one_line

LOCK = ".lock"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
LOG = "log.jsonl"
LAST = "last.pt"
BEST = "best.pt"
PREDICTIONS = "predictions.csv"
EMBEDDINGS = "embeddings.npz"
MISTAKES = "mistakes.npz"
METRICS = "metrics.json"
BAD_BATCH = "bad_batch.pt"

# What the holder of a folder writes. A process that was killed may have left half of one of them,
# under another name.
_HELD_FILES = (ENVIRONMENT, CONFIG, LOG, LAST, BEST, PREDICTIONS, MISTAKES, EMBEDDINGS, METRICS)

# What a run that is killed before it has written its configuration may leave behind.
_FIRST_FILES = (LOCK, ENVIRONMENT, f".{ENVIRONMENT}.", f".{CONFIG}.")


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: whoever reads it meets the old file or the new one, whole.

    That holds through a loss of power too, and what this function has returned from stays written.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable, where a folder can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text``, atomically, as :func:`bstriplet.names.encode` does."""
    write_atomic(path, names.encode(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in ASCII, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in ``path``; a missing or damaged file is a :class:`UserError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; restore it") from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a file or folder that cannot be written."""
    return UserError(
        f"cannot write {path}: {error.strerror or one_line(error)}; choose a place that can be "
        "written and has room"
    )


def write_output(path: Path, text: str) -> None:
    """Write ``text`` to the file a user named; a link is followed, a pipe or device written to."""
    if not _is_special(path):
        return write_text(Path(os.path.realpath(path)), text)
    try:
        path.write_bytes(names.encode(text))
    except OSError as error:
        raise cannot_write(path, error) from error


def check_output(path: Path) -> None:
    """Raise, before the work is done, unless :func:`write_output` can write to ``path``."""
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    if not _is_special(path):
        _check_writable(Path(os.path.realpath(path)).parent, path)


def _is_special(path: Path) -> bool:
    """Whether ``path``, which is no folder, is a pipe or a device, such as /dev/stdout."""
    return os.path.exists(path) and not os.path.isfile(path)


def _check_writable(folder: Path, path: Path) -> None:
    """Raise, naming ``path``, unless a file can be made in ``folder``."""
    try:
        # Named as `write_atomic` names it: a name may be too long, or not allowed.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def check_new(path: Path, *, resume: bool = False) -> None:
    """Raise unless ``path`` is absent or a folder in which nothing has been begun.

    resume: whether the command would have gone on with what it had left there itself.
    """
    # os.path: Path.exists raises for a name that is too long, or in a folder that is not readable.
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"output folder {path} is a file; choose another --out")
    _check_writable(next(p for p in (path, *path.absolute().parents) if os.path.exists(p)), path)
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
    """Raise if another process holds the folder: better before the images are read than after."""
    if os.path.exists(path / LOCK):
        with locked_folder(path):
            pass


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make the folder if need be and hold it: a second writer gets an error instead of a mixture.

    The lock goes with the process, however it ends; what a killed one left half-written is removed.
    """
    lock = FileLock(path / LOCK, timeout=0)
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
    """Return a checkpoint on the CPU, reading tensors and plain values only, never code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {path} does not exist; train the run to its end first (--resume)"
        ) from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
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

    ``config.json`` and ``environment.json`` say what was asked for and where it ran; ``log.jsonl``
    has a line an epoch; ``last.pt`` continues the run and ``best.pt`` is the evaluated model;
    ``predictions.csv`` and ``mistakes.npz`` (test set), ``embeddings.npz`` (training set, and
    hashes of all images it has seen) and, last of all, ``metrics.json`` are its results.
    ``bad_batch.pt`` is left by a run that stopped at a loss that is not finite.
    """

    path: Path

    @property
    def started(self) -> bool:
        """Whether there is a configuration to continue from."""
        return os.path.exists(self.path / CONFIG)

    @property
    def finished(self) -> bool:
        """Whether the metrics, the last file of a run, are written."""
        return (self.path / METRICS).exists()

    def config(self) -> TrainConfig:
        """Return the run's configuration."""
        if not os.path.isdir(self.path):
            raise UserError(f"run folder {self.path} does not exist; give the --out of a run")
        if not self.started:
            raise UserError(f"{self.path} is not a run folder (no config.json); give one")
        values = read_json(self.path / CONFIG)
        if not isinstance(values, dict):
            raise UserError(f"{self.path / CONFIG} holds no configuration; restore it")
        return TrainConfig.from_dict(values)

    def check_config(self, config: TrainConfig) -> None:
        """Raise if the run was started with another configuration."""
        if self.started and (difference := describe_difference(config, self.config())):
            raise UserError(
                f"{self.path} was started with another configuration: {difference}; leave those "
                "options as they were, or choose another --out"
            )

    def check_images(self, fingerprint: str, otherwise: str) -> None:
        """Raise if images, labels or parts are not those the run began with.

        fingerprint: that of the task. otherwise: what can be done instead of restoring them.
        """
        environment = self.path / ENVIRONMENT
        try:
            began_with = read_json(environment)["data"]["fingerprint"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{environment} does not say which images the run began with; restore it"
            ) from error
        if fingerprint != began_with:
            raise UserError(
                f"the images have changed since {self.path} began, or their labels, order or parts "
                f"(or an older version began it); restore them, or {otherwise}"
            )

    def load(self, name: str, config: TrainConfig) -> dict[str, Any]:
        """Return checkpoint ``name`` after comparing its configuration with the run's."""
        path = self.path / name
        checkpoint = load_checkpoint(path)
        difference = describe_difference(config, TrainConfig.from_dict(checkpoint["config"]))
        if difference:
            raise UserError(
                f"checkpoint {path} is from another configuration: {difference}; put the run's "
                "own checkpoint back, or train again into another folder"
            )
        return checkpoint

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Write the log anew, without lines of an epoch that a kill cut off."""
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_text(self.path / LOG, lines)

    def append_log(self, row: dict[str, Any]) -> None:
        """Add one epoch's line to the log."""
        try:
            with (self.path / LOG).open("a", encoding="utf-8", newline="\n") as stream:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise cannot_write(self.path / LOG, error) from error
