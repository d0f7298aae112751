"""The progress of a run: its epochs, its best weights, when it stops, and its checkpoints."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bstriplet.config import TrainConfig
from bstriplet.errors import UserError
from bstriplet.training.learner import Learner
from bstriplet.training.run_folder import BEST_FILE, LAST_FILE, RunFolder, save_checkpoint

# Writing checkpoints takes at most about this share of the time. Epochs that a kill loses are
# trained again to the same numbers, so the interval between checkpoints changes no result.
CHECKPOINT_SHARE = 0.1

Row = dict[str, Any]


@dataclass
class Progress:
    """One row per epoch, and the weights of the best epoch so far."""

    history: list[Row] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        """The epoch, counted from 1, with the lowest validation loss (the first of equals)."""
        losses = [row["validation_loss"] for row in self.history]
        return losses.index(min(losses)) + 1

    def add(self, row: Row, model: nn.Module) -> None:
        """Add an epoch, and keep the weights of ``model`` if it is the best one."""
        self.history.append(row)
        if self.best_epoch == len(self.history):
            self.best_weights = {name: value.clone() for name, value in model.state_dict().items()}

    def finished(self, config: TrainConfig) -> bool:
        """Whether all epochs are done or the validation loss has stalled."""
        losses = [row["validation_loss"] for row in self.history]
        stalled = epochs_without_improvement(losses, config.stop_delta) >= config.stop_patience
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
    """Writes and reads the files of a run that hold weights: ``last.pt`` and ``best.pt``."""

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
        return Progress(checkpoint["history"], checkpoint["best_weights"])

    def save(self, progress: Progress) -> None:
        """Write ``last.pt`` if a checkpoint is due or the run is finished."""
        started = time.perf_counter()
        due = started - self._saved_at > self._save_seconds / CHECKPOINT_SHARE
        if due or progress.finished(self._learner.config):
            state = {
                "learner": self._learner.state_dict(),
                "history": progress.history,
                "best_weights": progress.best_weights,
            }
            save_checkpoint(self._run.path / LAST_FILE, self._identity | state)
            self._saved_at = time.perf_counter()
            self._save_seconds = self._saved_at - started

    def save_best(self, progress: Progress) -> None:
        """Write ``best.pt``, the weights of the best epoch; it is an error if one is not finite.

        Losses do not show every such weight: in bfloat16 on a CPU torch leaves the gradient of some
        filters unwritten, where a filter is larger than its map.
        """
        for name, value in progress.best_weights.items():
            if not value.isfinite().all():
                raise UserError(
                    f"the weights {name} are not finite in epoch {progress.best_epoch} of "
                    f"{self._run.path}, though its losses are; train again into another folder, "
                    "without --amp or with a lower --lr"
                )
        best = {"epoch": progress.best_epoch, "model": progress.best_weights}
        save_checkpoint(self._run.path / BEST_FILE, self._identity | best)
