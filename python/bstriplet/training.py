"""The training loop, from seed to metrics; section 3.1 of the paper by default."""

import math
import platform
import random
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from bstriplet.backbones import Classifier, Output, check_backbone
from bstriplet.batches import make_sampler, make_validation_batches
from bstriplet.config import TrainConfig
from bstriplet.data import ImageSet, Task
from bstriplet.errors import UserError
from bstriplet.evaluation import TrainedModel, choose_device, embed, write_results
from bstriplet.losses import TrainingLoss, check_loss
from bstriplet.runs import (
    BEST,
    CONFIG,
    ENVIRONMENT,
    LAST,
    METRICS,
    RunFolder,
    locked_folder,
    read_json,
    save_checkpoint,
    write_json,
)

# Writing checkpoints takes at most about this share of the time. What a kill loses is trained
# again to the same numbers, so how often they are written changes no result.
CHECKPOINT_SHARE = 0.1

Row = dict[str, Any]


@dataclass
class Progress:
    """How far a run has come: a row an epoch, and the weights of the best epoch so far."""

    history: list[Row] = field(default_factory=list)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        """The epoch, counted from 1, with the lowest validation loss (the first of equals)."""
        losses = [row["validation_loss"] for row in self.history]
        return losses.index(min(losses)) + 1

    def finished(self, config: TrainConfig) -> bool:
        """Whether all epochs are done or the validation loss has stalled."""
        losses = [row["validation_loss"] for row in self.history]
        stalled = epochs_without_improvement(losses, config.stop_delta) >= config.stop_patience
        return len(self.history) >= config.epochs or stalled


def epochs_without_improvement(losses: list[float], delta: float) -> int:
    """Return for how many last epochs the loss has not fallen by more than ``delta``.

    The fall is counted from the last loss that was itself such an improvement, as Keras'
    EarlyStopping does: many small steps that add up are an improvement.
    """
    reference, since = math.inf, 0
    for loss in losses:
        if loss < reference - delta:
            reference, since = loss, 0
        else:
            since += 1
    return since


def train(config: TrainConfig, task: Task, run: RunFolder) -> Row:
    """Train a run to its end, from its last checkpoint where it has one, and return its metrics.

    A finished run is left as it is, and a folder that another process writes to is refused. The
    evaluated model is that of the epoch with the lowest validation loss: the test set has no part
    in the choice. Every random number is a function of ``config.seed`` and the epoch, so that a
    run cut anywhere and continued is, on a CPU with the same number of threads, equal bit for bit
    to one that was not.
    """
    with locked_folder(run.path):
        run.check_config(config)
        check_same_images(run, task)
        return read_json(run.path / METRICS) if run.finished else _train(config, task, run)


def check_names(config: TrainConfig) -> None:
    """Raise if the backbone or the loss, names of other libraries, is not one of theirs."""
    check_backbone(config.backbone)
    check_loss(config.loss)


def _train(config: TrainConfig, task: Task, run: RunFolder) -> Row:
    """Train in a folder that is locked and checked."""
    device = choose_device(config.device)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    seed_everything(config.seed, 0)
    model = Classifier(config.backbone, len(task.classes), task.channels).to(device)
    model.standardise_with(*grey_level_statistics(task.train))
    class_counts = np.bincount(task.train.labels, minlength=len(task.classes)).tolist()
    criterion = TrainingLoss(config, class_counts, model.embedding_size).to(device)
    parameters = [*model.parameters(), *criterion.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=config.lr, fused=True)
    scheduler = ReduceLROnPlateau(
        optimiser,
        factor=config.lr_factor,
        patience=config.lr_patience - 1,  # torch acts one epoch after its patience is used up
        threshold=0,
        min_lr=config.lr_floor,
        eps=0,
    )
    sampler = make_sampler(config, task.train)
    validation_batches = make_validation_batches(config, len(task.validation))
    progress = Progress()
    if (run.path / LAST).exists():
        checkpoint = run.load(LAST, config)
        progress = Progress(checkpoint["history"], checkpoint["best_weights"])
        model.load_state_dict(checkpoint["model"])
        criterion.load_state_dict(checkpoint["criterion"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    else:
        write_json(run.path / ENVIRONMENT, describe_environment(device, task))
        write_json(run.path / CONFIG, config.to_dict())
    run.write_log(progress.history)

    identity = {"config": config.to_dict(), "classes": list(task.classes)}
    saved_at, save_seconds = time.perf_counter(), 0.0
    bar = tqdm(
        desc=f"{config.loss}:{config.batches}, seed {config.seed}",
        initial=len(progress.history),
        total=config.epochs,
        unit="epoch",
        disable=None,
        leave=False,
    )
    while not progress.finished(config):
        epoch = len(progress.history) + 1
        started = time.perf_counter()
        seed_everything(config.seed, epoch)
        sampler.set_epoch(epoch)
        training = Averages()
        model.train()
        for positions in sampler:
            images, labels = task.train.batch(positions)
            images, labels = images.to(device), labels.to(device)
            output = model(images)
            loss = criterion(output, labels)
            optimiser.zero_grad()
            loss.total.backward()
            optimiser.step()
            training.add(loss, output.logits, labels)
        train_seconds = time.perf_counter() - started

        output, labels = embed(model, task.validation, device)
        validation = Averages()
        with torch.no_grad():
            for positions in validation_batches:
                part, answers = Output(*(t[positions] for t in output)), labels[positions]
                validation.add(criterion(part, answers), part.logits, answers)
        row = {
            "epoch": epoch,
            "train_loss": training.loss,
            "train_ce": training.ce,
            "train_metric": training.metric,
            "train_accuracy": training.accuracy,
            "validation_loss": validation.loss,
            "validation_accuracy": validation.accuracy,
            "lr": optimiser.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            "images_per_second": training.n_images / train_seconds,
        }
        refuse_nan(row, run)
        scheduler.step(training.loss)
        progress.history.append(row)
        if progress.best_epoch == epoch:
            progress.best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        run.append_log(row)

        now = time.perf_counter()
        if progress.finished(config) or now - saved_at > save_seconds / CHECKPOINT_SHARE:
            state = {
                "model": model.state_dict(),
                "criterion": criterion.state_dict(),
                "optimiser": optimiser.state_dict(),
                "scheduler": scheduler.state_dict(),
                "history": progress.history,
                "best_weights": progress.best_weights,
            }
            save_checkpoint(run.path / LAST, identity | state)
            saved_at, save_seconds = time.perf_counter(), time.perf_counter() - now
        bar.set_postfix(validation_loss=validation.loss, accuracy=validation.accuracy)
        bar.update()
    bar.close()

    best = {"epoch": progress.best_epoch, "model": progress.best_weights}
    save_checkpoint(run.path / BEST, identity | best)
    model.load_state_dict(progress.best_weights)
    trained = TrainedModel(model, task.classes, config, device)
    return write_results(run, trained, task, progress.best_epoch, len(progress.history))


class Averages:
    """Means over the images of an epoch, summed where the tensors are: no wait for a GPU."""

    def __init__(self) -> None:
        self.n_images = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, loss: Any, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add the mean losses of a batch, weighted by its size, and its right answers."""
        n_images = len(labels)
        self.n_images += n_images
        sums = {"right": (logits.argmax(dim=1) == labels).sum()}
        for name, value in loss._asdict().items():
            if value is not None:
                sums[name] = value.detach().double() * n_images
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _mean(self, name: str) -> float:
        return self._sums[name].item() / self.n_images

    @property
    def loss(self) -> float:
        """The loss that is minimised."""
        return self._mean("total")

    @property
    def ce(self) -> float:
        """Its cross entropy."""
        return self._mean("ce")

    @property
    def metric(self) -> float | None:
        """Its metric loss, before lambda; None where there is none."""
        return self._mean("metric") if "metric" in self._sums else None

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self._mean("right")


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch by ``numbers``: the seed and the epoch."""
    value = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  (libraries draw from it)
    torch.manual_seed(value)


def grey_level_statistics(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel, float32 [C], over all pixels.

    Counts of the 256 levels give them exactly, a few images at a time. A constant channel gets 1.
    """
    channels = images.pixels.shape[1]
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), 1024):
        pixels = images.pixels[images.rows[start : start + 1024]]
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[:, channel].ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256)
    mean = share @ levels
    std = np.sqrt(np.sum(share * (levels - mean[:, None]) ** 2, axis=1))
    std[std == 0] = 1
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


def describe_environment(device: torch.device, task: Task) -> Row:
    """Return versions, hardware and images, for ``environment.json``."""
    packages = ("bstriplet-kernels", "torch", "timm", "numpy", "scikit-learn", "pillow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "data": task.summary(),
    }


def check_same_images(run: RunFolder, task: Task) -> None:
    """Raise if a started run was trained on other images than ``task`` has."""
    if not run.started:
        return
    began_with = read_json(run.path / ENVIRONMENT).get("data", {})
    if began_with.get("fingerprint") != task.summary()["fingerprint"]:
        raise UserError(
            f"the images have changed since {run.path} began; restore them, or train again into "
            "another folder"
        )


def refuse_nan(row: Row, run: RunFolder) -> None:
    """Raise if a loss of this epoch is not a number: no later epoch could mend it."""
    for name in ("train_loss", "validation_loss"):
        if not math.isfinite(row[name]):
            raise UserError(
                f"{name} became {row[name]} in epoch {row['epoch']} of {run.path}; train again "
                "into another folder with a lower --lr"
            )
