"""Experiments: the runs of schemes x seeds, one after the other.

A scheme may set any field of the configuration, so that the grid of a sweep and the networks of
Table 6 are experiments too. :class:`Experiment` lists the runs; :func:`compare` trains those that
are missing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bstriplet.config import Scheme, TrainConfig, fields_of
from bstriplet.data.dataset import Dataset, Task, load_for, split_dataset
from bstriplet.data.notes import on_screen
from bstriplet.errors import UserError
from bstriplet.storage import read_json, write_json
from bstriplet.study.read_runs import scheme_label
from bstriplet.training.loop import check_models, train
from bstriplet.training.run_folder import COMPARE_FILE, RunFolder, locked_folder

# Fields that the scheme and the seed of each run set.
VARIED = ("loss", "batches", "seed")


@dataclass(frozen=True)
class Experiment:
    """The runs to train: each scheme with each seed, all other fields as in ``config``."""

    config: TrainConfig
    schemes: tuple[Scheme, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for number, seed in enumerate(self.seeds):
            if seed in self.seeds[:number]:
                raise UserError(f"--seeds: {seed} is given twice; give each once")
        scheme_of: dict[TrainConfig, Scheme] = {}
        for scheme in self.schemes:
            config = replace(self.config, **scheme)
            if config in scheme_of:
                raise UserError(
                    f"--schemes: {scheme_of[config]} and {scheme} are the same run, given twice; "
                    "give each once"
                )
            scheme_of[config] = scheme

    def to_dict(self) -> dict[str, Any]:
        """Return the experiment as a dict that JSON can hold."""
        return {
            "schemes": [str(scheme) for scheme in self.schemes],
            "seeds": list(self.seeds),
            "config": {k: v for k, v in self.config.to_dict().items() if k not in VARIED},
        }

    def runs(self) -> list[tuple[Scheme, TrainConfig]]:
        """Return the runs, seed by seed: an interrupted experiment then has complete pairs."""
        return [
            (scheme, replace(self.config, **scheme, seed=seed))
            for seed in self.seeds
            for scheme in self.schemes
        ]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: Path) -> "Experiment":
        """Return the experiment saved by :meth:`to_dict`; an error names the file ``source``."""
        varied = {name: getattr(TrainConfig, name) for name in VARIED}
        return cls(
            config=TrainConfig.from_dict(varied | values["config"], source),
            schemes=tuple(Scheme.parse(text) for text in values["schemes"]),
            seeds=tuple(values["seeds"]),
        )


class PreparedRun(NamedTuple):
    """A run that can start: its scheme, its configuration and its images."""

    scheme: Scheme
    config: TrainConfig
    task: Task


def run_folder(compare_folder: Path, scheme: Scheme, seed: int) -> Path:
    """Return the run folder of a scheme and a seed in a compare folder."""
    return compare_folder / "runs" / scheme.slug / f"seed-{seed}"


def started(folder: Path) -> bool:
    """Whether ``folder`` holds an experiment that can be continued."""
    return os.path.exists(folder / COMPARE_FILE)


def read_experiment(folder: Path) -> Experiment:
    """Return the experiment that was started in ``folder``."""
    try:
        return Experiment.from_dict(read_json(folder / COMPARE_FILE), folder / COMPARE_FILE)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / COMPARE_FILE} holds no schemes, seeds and configuration; restore it"
        ) from error


def compare(experiment: Experiment, folder: Path, say: Callable[[str], None]) -> None:
    """Train the runs of ``experiment`` that ``folder`` lacks; ``say`` gets a line on each."""
    runs = prepare(experiment, say)
    with locked_folder(folder):
        if not started(folder):
            write_json(folder / COMPARE_FILE, experiment.to_dict())
        train_missing(runs, folder, say)


def prepare(experiment: Experiment, say: Callable[[str], None]) -> list[PreparedRun]:
    """Return the runs of ``experiment`` with their images; raise if one of them cannot start.

    Images are read once for all runs. One seed gives all schemes the same split, the same initial
    weights and, for the same kind of batches, the same batches: runs of one seed are pairs.
    """
    runs = experiment.runs()
    for scheme in experiment.schemes:
        check_models(replace(experiment.config, **scheme))
    tasks = Tasks()
    prepared = [PreparedRun(scheme, config, tasks.of(config)) for scheme, config in runs]
    for note in dict.fromkeys(note for run in prepared for note in run.task.notes):
        say(f"note: {on_screen(note)}")
    return prepared


def train_missing(runs: Sequence[PreparedRun], folder: Path, say: Callable[[str], None]) -> None:
    """Train the runs that ``folder`` does not have yet; the caller holds its lock."""
    for number, (scheme, config, task) in enumerate(runs, start=1):
        metrics = train(config, task, RunFolder(run_folder(folder, scheme, config.seed)))
        say(
            f"[{number}/{len(runs)}] {scheme_label(scheme)}, seed {config.seed}: test accuracy "
            f"{metrics['accuracy']:.2%} (epoch {metrics['tested_epoch']} of {metrics['epochs']})"
        )


class Tasks:
    """The task of each run: data are read once, and split once for all runs that share a split."""

    def __init__(self) -> None:
        self._datasets: dict[tuple[Any, ...], Dataset] = {}
        self._tasks: dict[tuple[Any, ...], Task] = {}

    def of(self, config: TrainConfig) -> Task:
        """Return training, validation and test images of a run."""
        read = (config.data, config.image_size, config.skip_broken, config.max_pixels)
        if read not in self._datasets:
            self._datasets[read] = load_for(config)
        split = tuple(getattr(config, name) for name in (*fields_of("data"), "seed"))
        if split not in self._tasks:
            self._tasks[split] = split_dataset(self._datasets[read], config)
        return self._tasks[split]
