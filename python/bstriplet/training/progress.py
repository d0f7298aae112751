"""The progress of a run: its epochs, its best weights, when it stops, and its checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bstriplet.config import TrainConfig
from bstriplet.errors import UserError
from bstriplet.training.learner import Learner
from bstriplet.training.run_folder import LAST_FILE, MODEL_FILE, RunFolder, save_checkpoint

# Writing checkpoints takes at most about this share of the time. Epochs that a kill loses are
# trained again to the same numbers, so the interval between checkpoints changes no result.
CHECKPOINT_SHARE = 0.1

Row = dict[str, Any]


# A validated epoch as a number, the lower the better, by the values of `select`.
_CRITERIA: dict[str, Callable[[Row], float]] = {
    "last": lambda row: -row["epoch"],
    "ce": lambda row: row["validation_ce"],
    "accuracy": lambda row: -row["validation_accuracy"],
    "loss": lambda row: row["validation_loss"],
}


@dataclass
class Progress:
    """One row per epoch, and the weights of the epoch that would be tested if it were the last."""

    config: TrainConfig
    history: list[Row] = field(default_factory=list)
    tested_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tested_epoch(self) -> int:
        """The epoch that ``config.select`` chooses, counted from 1 (the first of equals)."""
        judged = [_CRITERIA[self.config.select](row) for row in self.history]
        return judged.index(min(judged)) + 1

    def add(self, row: Row, model: nn.Module) -> None:
        """Add an epoch, and keep the weights of ``model`` if it is the one to test."""
        self.history.append(row)
        if self.tested_epoch == len(self.history):
            self.tested_weights = {
                name: value.clone() for name, value in model.state_dict().items()
            }

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or the validation loss has stalled."""
        config, losses = self.config, [row["validation_loss"] for row in self.history]
        since = epochs_without_improvement(losses, config.stop_delta)
        stalled = 0 < config.stop_patience <= since
        return len(self.history) >= config.epochs or stalled


def epochs_without_improvement(losses: list[float], delta: float) -> int:
    """Return the number of epochs since the loss last improved.

    A loss improves if it is more than ``delta`` below the last improved loss, as in Keras'
    EarlyStopping: small steps add up to an improvement.
    """
    reference, since = math.inf, 0
    for loss in losses:
        if loss < reference - delta:
            reference, since = loss, 0
        else:
            since += 1
    return since


class Checkpoints:
    """Writes and reads the files of a run that hold weights: ``last.pt`` and ``model.pt``."""

    def __init__(self, run: RunFolder, learner: Learner, classes: tuple[str, ...]) -> None:
        self._run = run
        self._learner = learner
        self._identity = {"config": learner.config.to_dict(), "classes": list(classes)}
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0

    def restore(self) -> Progress | None:
        """Load ``last.pt`` into the learner and return the progress; None without a checkpoint."""
        if not (self._run.path / LAST_FILE).exists():
            return None
        checkpoint = self._run.load(LAST_FILE, self._learner.config)
        self._learner.load_state_dict(checkpoint["learner"])
        config = self._learner.config
        return Progress(config, checkpoint["history"], checkpoint["tested_weights"])

    def save(self, progress: Progress) -> None:
        """Write ``last.pt`` if a checkpoint is due or the run is finished."""
        started = time.perf_counter()
        due = started - self._saved_at > self._save_seconds / CHECKPOINT_SHARE
        if due or progress.finished:
            state = {
                "learner": self._learner.state_dict(),
                "history": progress.history,
                "tested_weights": progress.tested_weights,
            }
            save_checkpoint(self._run.path / LAST_FILE, self._identity | state)
            self._saved_at = time.perf_counter()
            self._save_seconds = self._saved_at - started

    def save_model(self, progress: Progress) -> None:
        """Write ``model.pt``, the tested weights; it is an error if one is not finite.

        Losses do not show every such weight: in bfloat16 on a CPU torch leaves the gradient of some
        filters unwritten, where a filter is larger than its map.
        """
        for name, value in progress.tested_weights.items():
            if not value.isfinite().all():
                raise UserError(
                    f"the weights {name} are not finite in epoch {progress.tested_epoch} of "
                    f"{self._run.path}, though its losses are; train again into another folder, "
                    "without --amp or with a lower --lr"
                )
        tested = {"epoch": progress.tested_epoch, "model": progress.tested_weights}
        save_checkpoint(self._run.path / MODEL_FILE, self._identity | tested)
