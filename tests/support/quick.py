"""A quick configuration and the outcome of commands, for the harness tests and their fixtures."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# timm's own test model: a small EfficientNet, some milliseconds per step.
TINY = {
    "backbone": "test_efficientnet",
    "image_size": 32,
    "train_per_class": 6,
    "batch_size": 24,
    "epochs": 4,
    "test_fraction": 0.05,
    "validation_fraction": 0.34,
    "device": "cpu",
}


def tiny_flags(**changes: object) -> list[str]:
    """Return ``TINY`` with ``changes`` as command-line options."""
    return [
        word
        for name, value in (TINY | changes).items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]


@dataclass(frozen=True)
class Outcome:
    """The exit status of a command and the text that it printed."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]
MakeTree = Callable[..., Path]


def snapshot(folder: Path) -> dict[str, str]:
    """Return a hash of each file below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
