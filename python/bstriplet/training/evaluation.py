"""A trained model in use: embeddings, test results, and predictions for new images."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from bstriplet.config import TrainConfig
from bstriplet.data.dataset import (
    BROKEN,
    ImageSet,
    Task,
    count_broken,
    load_for,
    load_test_images,
    split_dataset,
)
from bstriplet.data.image_files import list_images
from bstriplet.data.images import Picture, read_all
from bstriplet.data.notes import counted, first
from bstriplet.data.pixels import Pixels, Unreadable
from bstriplet.errors import NO_ARRAYS, UserError
from bstriplet.models.classifier import Classifier, Output, placed
from bstriplet.storage import write_atomic, write_json, write_text
from bstriplet.text import utf8
from bstriplet.training.metrics import classification_metrics
from bstriplet.training.run_folder import (
    EMBEDDINGS_FILE,
    METRICS_FILE,
    MISTAKES_FILE,
    MODEL_FILE,
    PREDICTIONS_FILE,
    RunFolder,
)

BATCH = 256
MISTAKES_KEPT = 24  # wrongly classified test images in mistakes.npz, the most confident ones
THUMBNAIL = 128  # pixels of their longest side


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with its classes, configuration and device."""

    model: Classifier
    classes: tuple[str, ...]
    config: TrainConfig
    device: torch.device

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return len(self.model.mean)


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda is not available here; use cpu or auto")
    return torch.device(name)


def load_trained(run: RunFolder) -> TrainedModel:
    """Return the tested model of a run."""
    config = run.config()
    checkpoint = run.load(MODEL_FILE, config)
    classes = tuple(checkpoint["classes"])
    channels = len(checkpoint["model"]["mean"])
    # A run trained on a GPU can be used without one.
    device = choose_device("cpu" if config.device == "cpu" else "auto")
    with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
        model = Classifier(
            config.backbone,
            len(classes),
            channels,
            embedding=config.embedding,
            channels_last=config.channels_last,
        )
    model.load_state_dict(checkpoint["model"])
    return TrainedModel(placed(model, device), classes, config, device)


@torch.no_grad()
def embed(model: Classifier, images: ImageSet, device: torch.device) -> tuple[Output, Tensor]:
    """Return logits and embeddings of all images, in evaluation mode, and their labels."""
    model.eval()
    outputs, labels = [], []
    for start in range(0, len(images), BATCH):
        pixels, batch_labels = images.batch(range(start, min(start + BATCH, len(images))))
        outputs.append(model(pixels.to(device)))
        labels.append(batch_labels)
    logits, embeddings = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return Output(logits, embeddings), torch.cat(labels).to(device)


def probabilities(logits: Tensor) -> npt.NDArray[np.float64]:
    """Return the softmax of logits [N, C] in float64."""
    return logits.double().softmax(dim=1).cpu().numpy()


def write_results(
    run: RunFolder, trained: TrainedModel, task: Task, tested_epoch: int, epochs: int
) -> dict[str, Any]:
    """Write predictions, mistakes, training embeddings and, last, metrics; return the metrics."""
    output, _ = embed(trained.model, task.test, trained.device)
    scores = probabilities(output.logits)
    true_names = [task.classes[label] for label in task.test.labels]
    table = predictions_csv(task.test.files, scores, task.classes, true_names)
    write_text(run.path / PREDICTIONS_FILE, table)
    write_atomic(run.path / MISTAKES_FILE, mistakes_npz(task.test, scores))
    training, _ = embed(trained.model, task.train, trained.device)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        embeddings=training.embeddings.float().cpu().numpy(),
        labels=task.train.labels,
        classes=np.array(task.classes),
        seen=np.concatenate([_pixel_hashes(task.train), _pixel_hashes(task.validation)]),
    )
    write_atomic(run.path / EMBEDDINGS_FILE, buffer.getvalue())
    metrics = classification_metrics(task.test.labels, scores, task.classes)
    metrics |= {"tested_epoch": tested_epoch, "epochs": epochs}
    write_json(run.path / METRICS_FILE, metrics)
    return metrics


def mistakes_npz(images: ImageSet, scores: npt.NDArray[np.float64]) -> bytes:
    """Return the most confident wrong predictions as an .npz: ``files`` and ``pixels``.

    ``pixels`` is uint8 [K, C, H, W] with K at most ``MISTAKES_KEPT`` and no side longer than
    ``THUMBNAIL``; the most confident mistake comes first. A report needs only this file to show
    mistakes, not the images themselves; predictions.csv has the classes.
    """
    predicted = scores.argmax(axis=1)
    wrong = np.flatnonzero(predicted != images.labels)
    chosen = wrong[np.argsort(-scores[wrong, predicted[wrong]], kind="stable")][:MISTAKES_KEPT]
    pixels, _ = images.batch(chosen)
    step = -(-max(pixels.shape[2:]) // THUMBNAIL)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        files=np.array([images.files[index] for index in chosen], dtype=str),
        pixels=avg_pool2d(pixels.float(), step).round().byte().numpy(),
    )
    return buffer.getvalue()


def evaluate_run(
    run: RunFolder, data: str | None, *, skip_broken: bool, max_pixels: int | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the metrics of a run's model, and notes on the images, such as those left out.

    Without ``data``, the images are the run's own test set. It must be unchanged: the model may
    have been trained on some images of another split. With ``data``, they are the test images of
    :func:`bstriplet.data.dataset.load_test_images`. ``max_pixels`` limits the pixels of an image
    file; None keeps the run's limit.
    """
    trained = load_trained(run)
    config = _with_limit(trained.config, max_pixels)
    if data is None:
        config = replace(config, skip_broken=config.skip_broken or skip_broken)
        task = split_dataset(load_for(config), config)
        as_given = "" if max_pixels is None else "leave --max-pixels as the run had it, or "
        run.check_images(task.fingerprint, f"{as_given}evaluate on others with --data")
        images, notes = task.test, task.notes
    else:
        images, notes = load_test_images(
            data,
            trained.classes,
            config.image_size,
            trained.channels,
            skip_broken=skip_broken,
            max_pixels=config.max_pixels,
        )
        notes = (*notes, *_seen_note(run, images))
    output, _ = embed(trained.model, images, trained.device)
    scores = probabilities(output.logits)
    return classification_metrics(images.labels, scores, trained.classes), notes


def predict_files(
    run: RunFolder, paths: Sequence[Path], *, skip_broken: bool, max_pixels: int | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return a CSV of class probabilities for image files and folders, and notes on them.

    Columns: ``file``, ``predicted``, and ``prob_CLASS`` for each class. An image that cannot be
    read is an error; with ``skip_broken`` it is left out and named in the notes. Files in the
    folders that are not images are left out and named too. ``max_pixels`` limits the pixels of an
    image file; None keeps the run's limit.
    """
    trained = load_trained(run)
    config = _with_limit(trained.config, max_pixels)
    files, left_out = _expand(paths)
    pictures = read_all(files, config.image_size, trained.channels, config.max_pixels)
    kept: list[str] = []
    broken: list[str] = []
    odd: dict[str, list[str]] = defaultdict(list)
    scores: list[npt.NDArray[np.float64]] = []
    read = zip(files, pictures, strict=True)
    for names, pixels in _in_batches(read, broken, odd):
        with torch.no_grad():
            logits = trained.model.eval()(torch.from_numpy(pixels).to(trained.device)).logits
        scores.append(probabilities(logits))
        kept += names
    if broken and not skip_broken:
        raise UserError(
            f"{count_broken(broken, len(files))}; mend or remove them, or leave them out with "
            "--skip-broken"
        )
    if not kept:
        raise UserError("no image could be read; give image files or folders with images")
    table = predictions_csv([*map(utf8, kept)], np.concatenate(scores), trained.classes)
    return table, counted({BROKEN: broken, **left_out, **odd})


def predictions_csv(
    files: Sequence[str],
    scores: npt.NDArray[np.float64],
    classes: Sequence[str],
    labels: Sequence[str] | None = None,
) -> str:
    """Return the table file, (label,) predicted, prob_CLASS...; probabilities in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    label_column = [] if labels is None else ["label"]
    writer.writerow(["file", *label_column, "predicted", *(f"prob_{name}" for name in classes)])
    for number, (file, row) in enumerate(zip(files, scores, strict=True)):
        label = [] if labels is None else [labels[number]]
        writer.writerow([file, *label, classes[int(row.argmax())], *map(repr, row.tolist())])
    return text.getvalue()


def _pixel_hashes(images: ImageSet) -> npt.NDArray[np.bytes_]:
    """Return a hash of each image as the model sees it, eight bytes as hexadecimal digits.

    Files of two formats that hold the same pixels have the same hash; so have all blank images.
    """
    hashes = []
    for start in range(0, len(images), BATCH):
        pixels, _ = images.batch(range(start, min(start + BATCH, len(images))))
        hashes += [blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels.numpy()]
    return np.array(hashes, dtype="S16")


def _seen_note(run: RunFolder, images: ImageSet) -> tuple[str, ...]:
    """Return a note on the ``images`` that the run trained or validated on, if there are any."""
    path = run.path / EMBEDDINGS_FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            seen = set(stored["seen"].tolist())
    except NO_ARRAYS:  # not there, or damaged
        return (f"{path} does not say which images the run has seen: these may be among them",)
    hashes = _pixel_hashes(images).tolist()
    again = [file for file, found in zip(images.files, hashes, strict=True) if found in seen]
    told = f"the run trained or validated on {len(again)} of these {len(images)} images"
    return (f"{told}: {first(again)}",) if again else ()


def _with_limit(config: TrainConfig, max_pixels: int | None) -> TrainConfig:
    """Return ``config`` with the limit ``max_pixels``, unless that is None."""
    return config if max_pixels is None else replace(config, max_pixels=max_pixels)


def _expand(paths: Sequence[Path]) -> tuple[list[Path], dict[str, list[str]]]:
    """Return the image files at ``paths`` and below their folders, and the names left out."""
    files: list[Path] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if os.path.isdir(path):
            found = list_images(path)
            if not found.images:
                raise UserError(f"folder {path} has no images; give one that has")
            files += found.images
            for reason, names in found.left_out.items():
                left_out[reason] += names
        elif os.path.exists(path):
            files.append(path)
        else:
            raise UserError(f"{path} does not exist; give image files or folders with images")
    return files, left_out


def _in_batches(
    read: Iterator[tuple[Path, Picture | Unreadable]], broken: list[str], odd: dict[str, list[str]]
) -> Iterator[tuple[list[str], Pixels]]:
    """Yield names and pixels [B, C, H, W], at most ``BATCH`` at a time.

    Unreadable files are added to ``broken``; the other pictures' notes to ``odd``, with the names
    of the files.
    """
    names: list[str] = []
    pixels: list[Pixels] = []
    for path, picture in read:
        if isinstance(picture, Unreadable):
            broken.append(f"{path} ({picture})")
            continue
        names.append(str(path))
        pixels.append(picture.pixels)
        for note in picture.notes:
            odd[f"images {note}"].append(str(path))
        if len(names) == BATCH:
            yield names, np.stack(pixels)
            names, pixels = [], []
    if names:
        yield names, np.stack(pixels)
