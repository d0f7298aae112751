"""Reading runs from disk: one run folder, or the runs of a compare folder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bstriplet import paper
from bstriplet.config import Scheme, TrainConfig
from bstriplet.data.names import one_form
from bstriplet.errors import NO_ARRAYS, UserError, one_line
from bstriplet.loss_registry import BUILT_IN
from bstriplet.storage import read_json
from bstriplet.text import decode, printable
from bstriplet.training.run_folder import (
    COMPARE_FILE,
    CONFIG_FILE,
    EMBEDDINGS_FILE,
    ENVIRONMENT_FILE,
    LOG_FILE,
    METRICS_FILE,
    MISTAKES_FILE,
    PREDICTIONS_FILE,
)

BATCH_NAMES = {"random": "RS", "mined": "DM"}
SETTING_NAMES = {"metric_weight": "λ", "margin": "m", "backbone": "", "batch_size": "N_b"}
PROBABILITY = "prob_"


def scheme_label(scheme: Scheme) -> str:
    """The scheme as Table 3 writes it: "CE+BST (DM)" for ce+bst on mined batches."""
    built_in = BUILT_IN.get(scheme.loss)
    loss = built_in.label if built_in else scheme.loss.replace("ce+", "CE+", 1)
    settings = [
        f"{SETTING_NAMES.get(name, name.replace('_', ' '))} {_value_name(name, value)}".strip()
        for name, value in scheme.others.items()
    ]
    name = ", ".join([f"{loss} ({BATCH_NAMES.get(scheme.batches, scheme.batches)})", *settings])
    return printable(name)


def _value_name(name: str, value: Any) -> Any:
    return paper.BACKBONES.get(value, value) if name == "backbone" else value


@dataclass(frozen=True)
class Predictions:
    """Predictions for N test images: `labels` [N] int64, `probabilities` [N, C] float64."""

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    classes: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The predicted classes, int64 [N]."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N training images: `vectors` [N, D] float32, `labels` [N] int64."""

    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run folder. `metrics` is empty until the run has finished; `log` has a dict per epoch."""

    folder: Path
    scheme: Scheme
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    metrics: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return bool(self.metrics)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a finished run, in the form of `one_form`."""
        return tuple(one_form(row["class"]) for row in self.metrics["per_class"])

    @cached_property
    def predictions(self) -> Predictions:
        """The test predictions of a finished run."""
        path = self.folder / PREDICTIONS_FILE
        try:
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                reader = csv.DictReader(file)
                columns = [name for name in reader.fieldnames or () if name.startswith(PROBABILITY)]
                classes = tuple(name.removeprefix(PROBABILITY) for name in columns)
                rows = [
                    (
                        row["file"],
                        classes.index(row["label"]),
                        [float(row[name]) for name in columns],
                    )
                    for row in reader
                ]
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise _damaged(path, error) from error
        if len(rows) != (tested := sum(row["support"] for row in self.metrics["per_class"])):
            raise _damaged(path, f"it lists {len(rows)} images, {tested} were tested")
        files, labels, probabilities = zip(*rows, strict=True)
        return Predictions(np.array(labels, np.int64), np.array(probabilities), classes, files)

    @cached_property
    def mistakes(self) -> dict[str, NDArray[np.uint8]]:
        """Pixels [C, H, W] of the most confidently wrong test images, by file name.

        Empty if mistakes.npz was removed, to save space or for privacy.
        """
        path = self.folder / MISTAKES_FILE
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(zip(stored["files"].tolist(), stored["pixels"], strict=True))
        except NO_ARRAYS as error:
            raise _damaged(path, error) from error

    @cached_property
    def embeddings(self) -> Embeddings:
        """The embeddings of a finished run."""
        path = self.folder / EMBEDDINGS_FILE
        try:
            with np.load(path, allow_pickle=False) as stored:
                vectors, labels = stored["embeddings"], stored["labels"]
                classes = tuple(str(name) for name in stored["classes"])
        except NO_ARRAYS as error:
            raise _damaged(path, error) from error
        if not np.isfinite(vectors).all():
            raise _damaged(path, "it holds NaN or infinity")
        return Embeddings(vectors, labels, classes)


@dataclass(frozen=True)
class Comparison:
    """The runs of some schemes and seeds; a single run is a comparison of one.

    `runs` holds the runs that have a folder, ordered by scheme, then by seed. `shared` is the
    configuration of the runs, as far as no scheme sets a field. `reference` is the scheme that all
    others are compared with; None for plain cross entropy.
    """

    folder: Path
    schemes: tuple[Scheme, ...]
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    shared: Mapping[str, Any] = field(default_factory=dict)
    reference: Scheme | None = None

    @property
    def finished(self) -> list[Run]:
        """The runs that reached their end."""
        return [run for run in self.runs if run.finished]

    def finished_of(self, scheme: Scheme) -> list[Run]:
        """The finished runs of one scheme, by seed."""
        return [run for run in self.finished if run.scheme == scheme]

    def baseline_of(self, scheme: Scheme) -> Scheme | None:
        """The scheme to compare `scheme` with: the reference, else the nearest cross entropy.

        That is plain cross entropy of the same network on the same data. Of several, the one that
        differs in the fewest other settings (loss and batches aside) is taken, the first if they
        are equal; None if there is none.
        """
        if self.reference:
            return self.reference

        def differing(other: Scheme) -> list[str]:
            names = {*scheme.others, *other.others}
            return [n for n in names if self._field(scheme, n) != self._field(other, n)]

        candidates = [
            other
            for other in self.schemes
            if other.loss == "ce" and not {"backbone", "data"}.intersection(differing(other))
        ]
        return min(candidates, key=lambda other: len(differing(other)), default=None)

    def network_of(self, scheme: Scheme) -> str:
        """The network that a scheme trains, as the paper writes it; "" if it is not known."""
        name = self._field(scheme, "backbone") or ""
        return paper.BACKBONES.get(name, name)

    def _field(self, scheme: Scheme, name: str) -> Any:
        return scheme.get(name, self.shared.get(name))

    def gaps(self) -> list[str]:
        """One sentence for each run that was asked for and has not finished."""
        found = {(run.scheme, run.seed): run for run in self.runs}
        sentences = []
        for scheme in self.schemes:
            for seed in self.seeds:
                run = found.get((scheme, seed))
                name = f"{scheme_label(scheme)}, seed {seed}"
                if run is None:
                    sentences.append(f"{name}: not started")
                elif not run.finished:
                    sentences.append(f"{name}: not finished, {len(run.log)} epochs so far")
        return sentences


def read_comparison(directory: Path | str) -> Comparison:
    """Read a compare folder (it holds compare.json) or one run folder (it holds config.json).

    Raises:
        UserError: the folder is neither, or one of its files is damaged; the message names it.
    """
    folder = Path(directory)
    if os.path.isfile(folder / COMPARE_FILE):
        return _read_comparison(folder)
    if os.path.isfile(folder / CONFIG_FILE):
        run = _read_run(folder)
        return Comparison(folder, (run.scheme,), (run.seed,), (run,))
    raise UserError(
        f"{folder} is neither a run folder (config.json) nor a compare folder (compare.json)"
    )


def _read_run(folder: Path) -> Run:
    config = TrainConfig.from_dict(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    return Run(
        folder=folder,
        scheme=Scheme(config.loss, config.batches),
        seed=config.seed,
        config=config.to_dict(),
        environment=_environment(folder / ENVIRONMENT_FILE),
        log=_read_log(folder / LOG_FILE),
        metrics=_metrics(folder / METRICS_FILE),
    )


def _environment(path: Path) -> dict[str, Any]:
    """Return the content of environment.json; empty without the file."""
    environment = _object_if_there(path)
    data = environment.get("data", {})
    images = data.get("images", {}) if isinstance(data, dict) else None
    if not isinstance(images, dict) or not all(isinstance(part, dict) for part in images.values()):
        raise _damaged(path, "its data or images are not JSON objects")
    return environment


def _metrics(path: Path) -> dict[str, Any]:
    """Return the content of metrics.json; empty without the file."""
    metrics = _object_if_there(path)
    try:
        if metrics:
            sum(row["support"] for row in metrics["per_class"] if row["class"])
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"per_class: {one_line(error)}") from error
    return metrics


def _read_comparison(folder: Path) -> Comparison:
    path = folder / COMPARE_FILE
    asked = _object(path)
    try:
        schemes = tuple(Scheme.parse(text) for text in asked["schemes"])
        seeds = tuple(int(seed) for seed in asked["seeds"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    # Runs are recognised by their own config.json; the names of the folders do not matter.
    found = read_runs(folder)
    names = sorted({name for scheme in schemes for name in scheme})
    shared = asked.get("config", {})
    scheme_of = {
        tuple({**shared, **scheme}.get(name) for name in names): scheme for scheme in schemes
    }
    named = [
        replace(run, scheme=scheme)
        for run in found
        if (scheme := scheme_of.get(tuple(run.config[name] for name in names)))
    ]
    wanted = [run for run in named if run.seed in seeds]
    wanted.sort(key=lambda run: (schemes.index(run.scheme), seeds.index(run.seed)))
    refuse_doubles(wanted)
    return Comparison(folder, schemes, seeds, tuple(wanted), shared)


def read_runs(folder: Path) -> list[Run]:
    """Read every run in ``folder``/runs, in the order of their folders' names.

    Raises:
        UserError: one of the files is damaged; the message names it.
    """
    if not os.path.isdir(folder):
        return []
    return [_read_run(config.parent) for config in sorted(folder.glob(f"runs/*/*/{CONFIG_FILE}"))]


def refuse_doubles(runs: Sequence[Run]) -> None:
    """Raise if two neighbours of sorted runs have the same scheme and seed."""
    for one, other in pairwise(runs):
        if (one.scheme, one.seed) == (other.scheme, other.seed):
            raise UserError(
                f"{one.folder} and {other.folder} hold the same scheme and seed; move one away"
            )


def _read_log(path: Path) -> tuple[dict[str, Any], ...]:
    """The epochs logged so far; an incomplete last line, cut off by a kill, is left out."""
    if not path.is_file():
        return ()
    try:
        lines = decode(path.read_bytes()).splitlines()
    except OSError as error:
        raise _damaged(path, error) from error
    epochs = []
    for number, line in enumerate(lines, start=1):
        try:
            epochs.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise _damaged(path, f"line {number}: {error}") from error
    return tuple(epochs)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    return value


def _object_if_there(path: Path) -> dict[str, Any]:
    return _object(path) if path.is_file() else {}


def _damaged(path: Path, reason: object) -> UserError:
    # The folder of compare.json holds all runs, which are not to be deleted.
    advice = "restore it" if path.name == COMPARE_FILE else "delete its folder and run it again"
    return UserError(f"{path} cannot be used ({reason}); {advice}")
