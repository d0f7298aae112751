"""Schemes x seeds: the runs of a comparison, one after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bstriplet.backbones import check_backbone
from bstriplet.config import Scheme, TrainConfig
from bstriplet.data import load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.results import COMPARE, scheme_label
from bstriplet.runs import RunFolder, locked_folder, read_json, write_json
from bstriplet.training import train

# The fields that a scheme and a seed decide, run by run.
VARIED = ("loss", "batches", "seed")


@dataclass(frozen=True)
class Plan:
    """What a comparison runs: each scheme with each seed, all else as in ``config``."""

    config: TrainConfig
    schemes: tuple[Scheme, ...]
    seeds: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dict that JSON can hold."""
        return {
            "schemes": [str(scheme) for scheme in self.schemes],
            "seeds": list(self.seeds),
            "config": {k: v for k, v in self.config.to_dict().items() if k not in VARIED},
        }

    def runs(self) -> list[tuple[Scheme, TrainConfig]]:
        """Return the runs, seed by seed, so that a cut comparison has whole pairs."""
        return [
            (scheme, replace(self.config, loss=scheme.loss, batches=scheme.batches, seed=seed))
            for seed in self.seeds
            for scheme in self.schemes
        ]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan saved by :meth:`to_dict`."""
        return cls(
            config=TrainConfig.from_dict(values["config"]),
            schemes=tuple(Scheme.parse(text) for text in values["schemes"]),
            seeds=tuple(values["seeds"]),
        )


def run_folder(compare_folder: Path, scheme: Scheme, seed: int) -> Path:
    """Return where a comparison keeps one of its runs."""
    return compare_folder / "runs" / scheme.slug / f"seed-{seed}"


def started(folder: Path) -> bool:
    """Whether ``folder`` holds a comparison that can be continued."""
    return (folder / COMPARE).exists()


def read_plan(folder: Path) -> Plan:
    """Return the plan of a started comparison."""
    try:
        return Plan.from_dict(read_json(folder / COMPARE))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / COMPARE} is no plan of a comparison; restore it") from error


def compare(plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
    """Run what ``plan`` lists and ``folder`` does not have yet; ``say`` is told of each run.

    Images are read once for all runs. One seed gives all schemes the same split, the same initial
    weights and, for the same kind of batches, the same batches: schemes are compared in pairs.
    """
    check_backbone(plan.config.backbone)
    config = plan.config
    dataset = load_dataset(config.data, config.image_size, skip_broken=config.skip_broken)
    tasks = {seed: split_dataset(dataset, replace(config, seed=seed)) for seed in plan.seeds}
    for note in dict.fromkeys(note for task in tasks.values() for note in task.notes):
        say(f"note: {note}")
    with locked_folder(folder):
        if not started(folder):
            write_json(folder / COMPARE, plan.to_dict())
        runs = plan.runs()
        for number, (scheme, run_config) in enumerate(runs, start=1):
            seed = run_config.seed
            run = RunFolder(run_folder(folder, scheme, seed))
            metrics = train(run_config, tasks[seed], run)
            say(
                f"[{number}/{len(runs)}] {scheme_label(scheme)}, seed {seed}: test accuracy "
                f"{metrics['accuracy']:.2%} (epoch {metrics['best_epoch']} of {metrics['epochs']})"
            )
