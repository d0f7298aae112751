"""The training loop, from seed to metrics."""

import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import islice

import torch
from tqdm import tqdm

from bstriplet.config import TrainConfig
from bstriplet.data.dataset import ImageSet, Task
from bstriplet.errors import UserError
from bstriplet.models.classifier import Output, check_backbone, check_embedding
from bstriplet.storage import read_json, write_json
from bstriplet.training.batches import Batch, Feed, make_validation_batches
from bstriplet.training.cuda_graph import Step
from bstriplet.training.evaluation import TrainedModel, choose_device, embed, write_results
from bstriplet.training.learner import Learner
from bstriplet.training.losses import check_loss
from bstriplet.training.progress import Checkpoints, Progress, Row
from bstriplet.training.run_folder import (
    BAD_BATCH_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RunFolder,
    locked_folder,
    save_checkpoint,
)
from bstriplet.training.seeds import reproducible, seed_everything
from bstriplet.training.step import make_step
from bstriplet.training.tally import Tally

Observe = Callable[[Learner, int], Row]


def check_models(config: TrainConfig) -> None:
    """Raise if the backbone, its embedding layer or the loss does not exist."""
    check_backbone(config.backbone, config.image_size)
    if config.embedding == "pooled":  # the input of a classifier exists in every network
        check_embedding(config.backbone, config.embedding, config.image_size)
    check_loss(config.loss)


def train(config: TrainConfig, task: Task, run: RunFolder, observe: Observe | None = None) -> Row:
    """Train a run to its end and return its metrics; a run with a checkpoint continues from it.

    A finished run is not trained again. A folder that another process writes to is an error.
    ``config.select`` names the epoch whose model is tested: the test set has no part in the choice.
    Every random number is a function of ``config.seed`` and the epoch. On a CPU with
    the same number of threads, an interrupted and continued run therefore equals an uninterrupted
    one bit for bit.

    Args:
        config: the configuration.
        task: its images.
        run: the folder of the run.
        observe: called with the learner and the number of the epoch after each epoch, before the
            learning rate changes; what it returns joins the epoch's line of the log. It must leave
            the learner as it is.
    """
    with locked_folder(run.path):
        run.check_config(config)
        if run.started:
            run.check_images(task.fingerprint, "train again into another folder")
        if run.finished:
            return read_json(run.path / METRICS_FILE)
        device = choose_device(config.device)
        # In bfloat16 torch leaves the gradient of some filters unwritten on a CPU: NaN shows it.
        with reproducible(device, fill=config.amp and device.type == "cpu"):
            return _train(config, task, run, device, observe)


def _train(
    config: TrainConfig,
    task: Task,
    run: RunFolder,
    device: torch.device,
    observe: Observe | None,
) -> Row:
    """Train in a folder that is locked and checked."""
    seed_everything(config.seed, 0)
    learner = Learner(config, task, device)
    feed = Feed(config, task.train, device)
    training, validation = Tally(config, task, device), Tally(config, task, device)
    step = make_step(learner, training)
    validation_batches = make_validation_batches(config, len(task.validation))
    checkpoints = Checkpoints(run, learner, task.classes)
    progress = checkpoints.restore()
    if progress is None:
        progress = Progress(config)
        write_json(run.path / ENVIRONMENT_FILE, describe_environment(device, task))
        write_json(run.path / CONFIG_FILE, config.to_dict())
    run.write_log(progress.history)

    with _bar(config, progress) as bar:
        while not progress.finished:
            epoch, started = len(progress.history) + 1, time.perf_counter()
            seed_everything(config.seed, epoch)
            train_epoch(feed.epoch(epoch), step, learner, training)
            _require_finite("train", epoch, training, feed.epoch(epoch), task.train, run)
            train_seconds = time.perf_counter() - started
            validate(validation_batches, learner, task.validation, validation)
            again = (Batch(p, *task.validation.batch(p)) for p in validation_batches)
            _require_finite("validation", epoch, validation, again, task.validation, run)
            row = {
                "epoch": epoch,
                "train_loss": training.loss,
                "train_ce": training.ce,
                "train_metric": training.metric,
                "train_accuracy": training.accuracy,
                "validation_loss": validation.loss,
                "validation_ce": validation.ce,
                "validation_metric": validation.metric,
                "validation_accuracy": validation.accuracy,
                "lr": learner.optimiser.param_groups[0]["lr"],
                "seconds": time.perf_counter() - started,
                "images_per_second": training.n_images / train_seconds,
            }
            if observe:
                row |= observe(learner, epoch)
            learner.schedule(training.loss)
            progress.add(row, learner.evaluated)
            run.append_log(row)
            checkpoints.save(progress)
            bar.set_postfix(validation_loss=validation.loss, accuracy=validation.accuracy)
            bar.update()

    checkpoints.save_model(progress)
    learner.evaluated.load_state_dict(progress.tested_weights)
    trained = TrainedModel(learner.evaluated, task.classes, config, device)
    return write_results(run, trained, task, progress.tested_epoch, len(progress.history))


def train_epoch(batches: Iterable[Batch], step: Step, learner: Learner, tally: Tally) -> None:
    """Take one step per batch; on a CPU, stop after the first loss that is not finite.

    On a GPU the epoch runs to its end: reading each loss would wait for each step.
    """
    tally.reset()
    learner.model.train()
    for batch in batches:
        step(batch.images, batch.labels)
        if learner.device.type == "cpu" and tally.first_bad is not None:
            break


@torch.no_grad()
def validate(
    positions: Iterable[list[int]], learner: Learner, images: ImageSet, tally: Tally
) -> None:
    """Add up losses and accuracy of the evaluated model on the batches at ``positions``."""
    tally.reset()
    output, labels = embed(learner.evaluated, images, learner.device)
    for batch in positions:
        part, answers = Output(*(t[batch] for t in output)), labels[batch]
        tally.add(learner.criterion(part, answers), part.logits, answers)


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


def _bar(config: TrainConfig, progress: Progress) -> tqdm:
    """Return the progress bar of a run; it is drawn only where standard error is a terminal."""
    return tqdm(
        desc=f"{config.loss}:{config.batches}, seed {config.seed}",
        initial=len(progress.history),
        total=config.epochs,
        unit="epoch",
        disable=None,
        leave=False,
    )


def _require_finite(
    part: str, epoch: int, tally: Tally, batches: Iterable[Batch], images: ImageSet, run: RunFolder
) -> None:
    """Raise if a loss was NaN or infinite: later epochs could not recover from it.

    The first batch with such a loss is drawn from ``batches`` again and saved.
    """
    if tally.first_bad is None:
        return
    batch = next(islice(batches, tally.first_bad, None))
    saved = {
        "part": part,
        "epoch": epoch,
        "batch": tally.first_bad,
        "positions": batch.positions,
        "files": [images.files[position] for position in batch.positions],
        "images": batch.images.cpu(),
        "labels": batch.labels.cpu(),
        "logits": tally.bad_logits[: len(batch.labels)].cpu(),
    }
    save_checkpoint(run.path / BAD_BATCH_FILE, saved)
    raise UserError(
        f"{part}_loss became {tally.loss} in epoch {epoch} of {run.path}; its batch is in "
        f"{run.path / BAD_BATCH_FILE}: look at it, or train again into another folder, with a "
        "lower --lr, or without --amp if that is on"
    )
