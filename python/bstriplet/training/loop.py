"""The training loop, from seed to metrics; section 3.1 of the paper by default."""

import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bstriplet.config import TrainConfig
from bstriplet.data.dataset import ImageSet, Task
from bstriplet.errors import UserError
from bstriplet.models.classifier import Output, check_backbone, check_embedding
from bstriplet.storage import read_json, write_json
from bstriplet.training import cuda_graph
from bstriplet.training.batches import Batch, Feed, make_validation_batches
from bstriplet.training.evaluation import TrainedModel, choose_device, embed, write_results
from bstriplet.training.learner import Learner
from bstriplet.training.losses import LossTerms, check_loss
from bstriplet.training.run_folder import (
    BAD_BATCH_FILE,
    BEST_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LAST_FILE,
    METRICS_FILE,
    RunFolder,
    locked_folder,
    save_checkpoint,
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
        if run.started:
            run.check_images(task.fingerprint, "train again into another folder")
        return read_json(run.path / METRICS_FILE) if run.finished else _train(config, task, run)


def check_models(config: TrainConfig) -> None:
    """Raise if timm has no such backbone, it no such embedding, or no library such a loss."""
    check_backbone(config.backbone, config.image_size)
    if config.embedding == "pooled":  # of a classifier's input all have one
        check_embedding(config.backbone, config.embedding, config.image_size)
    check_loss(config.loss)


def _train(config: TrainConfig, task: Task, run: RunFolder) -> Row:
    """Train in a folder that is locked and checked."""
    device = choose_device(config.device)
    with _reproducible(device):
        return _train_on(device, config, task, run)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Let torch compute the same bits each time.

    Its modes and the global random states are left as they were, for a process that goes on.
    """
    modes = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _train_on(device: torch.device, config: TrainConfig, task: Task, run: RunFolder) -> Row:
    seed_everything(config.seed, 0)
    learner = Learner(config, task, device)
    feed = Feed(config, task.train, device)
    training, validation = Tally(config, task, device), Tally(config, task, device)
    step: cuda_graph.Step = Step(learner, training)
    if uses_cuda_graph(config, learner):
        step = cuda_graph.GraphedStep(step, learner.optimiser, config.batch_size)
    validation_batches = make_validation_batches(config, len(task.validation))
    progress = Progress()
    if (run.path / LAST_FILE).exists():
        checkpoint = run.load(LAST_FILE, config)
        progress = Progress(checkpoint["history"], checkpoint["best_weights"])
        learner.load_state_dict(checkpoint["learner"])
    else:
        write_json(run.path / ENVIRONMENT_FILE, describe_environment(device, task))
        write_json(run.path / CONFIG_FILE, config.to_dict())
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
        training.reset()
        learner.model.train()
        for batch in feed.epoch(epoch):
            step(batch.images, batch.labels)
            if device.type == "cpu" and training.first_bad is not None:
                break  # on a GPU, to look would be to wait for it at every step
        if training.first_bad is not None:
            batch = next(islice(feed.epoch(epoch), training.first_bad, None))
            stop_at(batch, "train", training, task.train, epoch, run)
        train_seconds = time.perf_counter() - started

        output, labels = embed(learner.evaluated, task.validation, device)
        validation.reset()
        with torch.no_grad():
            for positions in validation_batches:
                part, answers = Output(*(t[positions] for t in output)), labels[positions]
                validation.add(learner.criterion(part, answers), part.logits, answers)
        if validation.first_bad is not None:
            positions = validation_batches[validation.first_bad]
            batch = Batch(positions, *task.validation.batch(positions))
            stop_at(batch, "validation", validation, task.validation, epoch, run)
        row = {
            "epoch": epoch,
            "train_loss": training.loss,
            "train_ce": training.ce,
            "train_metric": training.metric,
            "train_accuracy": training.accuracy,
            "validation_loss": validation.loss,
            "validation_accuracy": validation.accuracy,
            "lr": learner.optimiser.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            "images_per_second": training.n_images / train_seconds,
        }
        learner.schedule(training.loss)
        progress.history.append(row)
        if progress.best_epoch == epoch:
            progress.best_weights = {
                k: v.clone() for k, v in learner.evaluated.state_dict().items()
            }
        run.append_log(row)

        now = time.perf_counter()
        if progress.finished(config) or now - saved_at > save_seconds / CHECKPOINT_SHARE:
            state = {
                "learner": learner.state_dict(),
                "history": progress.history,
                "best_weights": progress.best_weights,
            }
            save_checkpoint(run.path / LAST_FILE, identity | state)
            saved_at, save_seconds = time.perf_counter(), time.perf_counter() - now
        bar.set_postfix(validation_loss=validation.loss, accuracy=validation.accuracy)
        bar.update()
    bar.close()

    best = {"epoch": progress.best_epoch, "model": progress.best_weights}
    save_checkpoint(run.path / BEST_FILE, identity | best)
    learner.evaluated.load_state_dict(progress.best_weights)
    trained = TrainedModel(learner.evaluated, task.classes, config, device)
    return write_results(run, trained, task, progress.best_epoch, len(progress.history))


class Step:
    """One update of the weights, from images uint8 [B, C, H, W] and labels int64 [B]."""

    def __init__(self, learner: Learner, tally: "Tally") -> None:
        self.learner = learner
        self.tally = tally
        compiled = learner.config.compile
        self.model = torch.compile(learner.model, dynamic=False) if compiled else learner.model

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        learner = self.learner
        with torch.autocast(images.device.type, learner.amp_dtype, enabled=learner.config.amp):
            output = self.model(images)
        output = Output(*(part.float() for part in output))
        loss = learner.criterion(output, labels)
        learner.optimiser.zero_grad()
        learner.scaler.scale(loss.total).backward()
        learner.scaler.step(learner.optimiser)
        learner.scaler.update()
        if learner.ema:
            learner.ema.update(learner.model)
        self.tally.add(loss, output.logits, labels)


class Tally:
    """Means over the images of an epoch, and its first batch whose loss is not finite.

    All is kept on the device and in place: adding neither waits for a GPU nor breaks a CUDA graph,
    reading waits.
    """

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._batches = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad = torch.full_like(self._batches, -1)
        self._has_metric = config.loss != "ce"
        # RandomBatchSampler may add one image to a batch.
        self.bad_logits = torch.zeros(config.batch_size + 1, len(task.classes), device=device)

    def reset(self) -> None:
        """Begin an epoch."""
        self._sums.zero_()
        self._batches.zero_()
        self._first_bad.fill_(-1)

    def add(self, loss: LossTerms, logits: Tensor, labels: Tensor) -> None:
        """Add the mean losses of a batch, weighted by its size, and its right answers."""
        logits, n_images = logits.detach(), len(labels)
        losses = [loss.total, loss.ce, loss.total if loss.metric is None else loss.metric]
        means = torch.stack([value.detach().double() for value in losses])
        self._sums[:3] += means * n_images
        self._sums[3] += (logits.argmax(dim=1) == labels).sum()
        self._sums[4] += n_images
        bad = ~means[0].isfinite() & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._batches, self._first_bad))
        kept = self.bad_logits[:n_images]
        kept.copy_(torch.where(bad, logits, kept))
        self._batches += 1

    @property
    def first_bad(self) -> int | None:
        """The number, from 0, of the first batch whose loss is NaN or infinite."""
        number = int(self._first_bad)
        return None if number < 0 else number

    @property
    def n_images(self) -> int:
        """How many images were added."""
        return int(self._sums[4])

    def _mean(self, position: int) -> float:
        return self._sums[position].item() / self.n_images

    @property
    def loss(self) -> float:
        """The loss that is minimised."""
        return self._mean(0)

    @property
    def ce(self) -> float:
        """Its cross entropy."""
        return self._mean(1)

    @property
    def metric(self) -> float | None:
        """Its metric loss, before lambda; None where there is none."""
        return self._mean(2) if self._has_metric else None

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self._mean(3)


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch by ``numbers``: the seed and the epoch."""
    value = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  (libraries draw from it)
    torch.manual_seed(value)


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


def uses_cuda_graph(config: TrainConfig, learner: Learner) -> bool:
    """Whether the training step is replayed as a CUDA graph."""
    on_gpu, scaled = learner.device.type == "cuda", learner.scaler.is_enabled()
    if config.cuda_graph == "on" and not on_gpu:
        raise UserError("--cuda-graph on: there is no GPU here; use auto or off")
    if config.cuda_graph == "on" and scaled:
        raise UserError("--cuda-graph on: not with --amp on a GPU without bfloat16; use off")
    # What stands in other libraries' losses may wait for the device.
    allowed = config.loss in ("ce", "ce+bst") and not scaled
    return config.cuda_graph == "on" or (config.cuda_graph == "auto" and on_gpu and allowed)


def stop_at(
    batch: Batch, part: str, tally: Tally, images: ImageSet, epoch: int, run: RunFolder
) -> NoReturn:
    """Save a batch whose loss is not finite, and raise: no later epoch could mend it."""
    n_images, files = len(batch.labels), [images.files[position] for position in batch.positions]
    saved = {
        "part": part,
        "epoch": epoch,
        "batch": tally.first_bad,
        "positions": batch.positions,
        "files": files,
        "images": batch.images.cpu(),
        "labels": batch.labels.cpu(),
        "logits": tally.bad_logits[:n_images].cpu(),
    }
    save_checkpoint(run.path / BAD_BATCH_FILE, saved)
    raise UserError(
        f"{part}_loss became {tally.loss} in epoch {epoch} of {run.path}; its batch is in "
        f"{run.path / BAD_BATCH_FILE}: look at it, or train again into another folder with a lower "
        "--lr"
    )
