"""The images of a classification task, found and split: the same seed gives the same split."""

import csv
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold

from bstriplet.config import DIGITS, TrainConfig
from bstriplet.errors import UserError, one_line
from bstriplet.images import Pixels, decode, list_images

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Each random choice has its own stream, so that one of them does not shift the others.
_TEST_STREAM, _SUBSET_STREAM, _VALIDATION_STREAM = range(3)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, or a part of them.

    pixels: uint8 [M, C, H, W], C = 1 (grey) or 3 (RGB), perhaps on disk, shared by all parts.
    rows: int64 [N], the rows of ``pixels`` in this part.
    labels: int64 [N], indices of classes.
    files: N names, relative to the data folder.
    """

    pixels: Pixels
    rows: Ints
    labels: Ints
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Ints | Mask) -> "ImageSet":
        """Return the part at ``positions`` (indices or a mask over this set)."""
        chosen = np.arange(len(self))[positions]
        files = tuple(self.files[i] for i in chosen)
        return ImageSet(self.pixels, self.rows[chosen], self.labels[chosen], files)

    def batch(self, positions: Sequence[int] | Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pixels uint8 [B, C, H, W] and labels int64 [B] at ``positions``."""
        chosen = np.asarray(positions, dtype=np.int64)
        # take always makes a plain C-ordered array. Indexing can carry over odd strides of axes of
        # length 1, from which torch infers another memory layout, and sums in another order.
        images = torch.from_numpy(np.take(self.pixels, self.rows[chosen], axis=0))
        return images, torch.from_numpy(self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """All images of a task before they are split.

    is_test: bool [N], or None where the data have no test set of their own.
    patients: int64 [N], equal where two images show one patient; None where nothing says so.
    broken: files that were left out, with the reason.
    key: hash of the images' content.
    """

    classes: tuple[str, ...]
    images: ImageSet
    is_test: Mask | None
    patients: Ints | None
    broken: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Task:
    """What a run trains, validates and tests on; ``notes`` say what a reader should know of it."""

    classes: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    notes: tuple[str, ...]
    key: str

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.train.pixels.shape[1]

    def summary(self) -> dict[str, Any]:
        """Return the images of each class in each part, the notes and a fingerprint, for JSON."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        digest = hashlib.sha256(self.key.encode())
        for part in parts.values():
            digest.update(part.rows.tobytes())
        return {
            "images": {
                name: {label: int(np.sum(part.labels == i)) for i, label in enumerate(self.classes)}
                for name, part in parts.items()
            },
            "channels": self.channels,
            "notes": list(self.notes),
            "fingerprint": digest.hexdigest(),
        }


def load_dataset(data: str, image_size: int, *, skip_broken: bool = False) -> Dataset:
    """Return the images of ``data``, resized to ``image_size`` x ``image_size``.

    ``data`` is ``"digits"`` (scikit-learn's 1,797 real digits) or a folder ``train/CLASS/*`` with
    or without ``test/CLASS/*``. A ``manifest.csv`` in it with columns ``file`` and ``patient``
    names the patient of each image. An image that cannot be read is an error that names it; with
    ``skip_broken`` it is left out and named in ``Dataset.broken``.
    """
    if data == DIGITS:
        return _load_digits(image_size)
    root = _existing_folder(data)
    if not (root / "train").is_dir():
        raise UserError(
            f"data folder {root} has no folder 'train'; lay images out as train/CLASS/*"
        )
    training = _list_classes(root / "train")
    classes = tuple(sorted(training))
    if len(classes) < 2:
        raise UserError(
            f"{root / 'train'} holds one class only, {classes[0]!r}; add a folder for each other"
        )
    test = _list_classes(root / "test") if (root / "test").is_dir() else {}
    images, broken, key = _read(root, [training, test], classes, image_size, None, skip_broken)
    is_test = np.array([file.startswith("test/") for file in images.files])
    for name in classes:
        if not np.any(images.labels[~is_test] == classes.index(name)):
            raise UserError(f"no image in {root / 'train' / name} can be read; put some there")
    patients = _read_patients(root / "manifest.csv", images.files)
    return Dataset(classes, images, is_test if test else None, patients, broken, key)


def load_test_images(
    data: str, classes: tuple[str, ...], image_size: int, channels: int, *, skip_broken: bool
) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the images of ``data/test/CLASS/*``, else of ``data/CLASS/*``, and the broken files.

    ``classes`` are those that the model knows; a folder of another name is an error.
    """
    root = _existing_folder(data)
    listing = _list_classes(root / "test" if (root / "test").is_dir() else root)
    images, broken, _ = _read(root, [listing], classes, image_size, channels, skip_broken)
    return images, broken


def split_dataset(dataset: Dataset, config: TrainConfig) -> Task:
    """Return training, validation and test images for ``config.seed``.

    Every class is in each part. Where patients are known, no patient is on both sides of a split
    that is made here, unless a class has too few of them; then images are split, and a note says
    so. ``validation="test"`` takes validation images from the test set and leaves them in it, as
    the paper does.
    """
    splitter = _Splitter(dataset, config.seed)
    everything = np.arange(len(dataset.images))
    if dataset.is_test is not None:
        pool, test = everything[~dataset.is_test], everything[dataset.is_test]
    else:
        pool, test = splitter.split(everything, config.test_fraction, "test", _TEST_STREAM)
    if config.train_per_class:
        pool = splitter.subset(pool, config.train_per_class)
    source = pool if config.validation == "train" else test
    rest, validation = splitter.split(
        source, config.validation_fraction, "validation", _VALIDATION_STREAM
    )
    if len(test) == 0:
        raise UserError("no test image can be read; put some into the folder 'test'")
    return Task(
        classes=dataset.classes,
        train=dataset.images.take(rest if config.validation == "train" else pool),
        validation=dataset.images.take(validation),
        test=dataset.images.take(test),
        notes=(*_broken_note(dataset.broken), *splitter.notes),
        key=dataset.key,
    )


class _Splitter:
    """Seeded choices over one dataset, with notes on what could not be done as asked."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.notes: list[str] = []

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])

    def split(self, source: Ints, fraction: float, what: str, stream: int) -> tuple[Ints, Ints]:
        """Return ``source`` without, and the held-out ``fraction`` of each class, both sorted."""
        labels = self.dataset.images.labels[source]
        for index, name in enumerate(self.dataset.classes):
            count = int(np.sum(labels == index))
            if count < 2:
                raise UserError(
                    f"class {name!r} has {count} image(s) to hold {what} images out of; "
                    "it needs 2 or more"
                )
        generator = self._generator(stream)
        held_out = None
        if self.dataset.patients is not None:
            patients = self.dataset.patients[source]
            held_out = _hold_out_patients(labels, patients, fraction, generator)
            if held_out is None:
                self.notes.append(
                    f"{what} images are held out by image, not by patient: some class has too few "
                    "patients"
                )
        if held_out is None:
            held_out = _hold_out_images(labels, fraction, generator)
        return source[~held_out], source[held_out]

    def subset(self, pool: Ints, per_class: int) -> Ints:
        """Return at most ``per_class`` random images of each class of ``pool``, sorted."""
        generator = self._generator(_SUBSET_STREAM)
        chosen = []
        for index in range(len(self.dataset.classes)):
            members = pool[self.dataset.images.labels[pool] == index]
            chosen.append(generator.permutation(members)[:per_class])
        return np.sort(np.concatenate(chosen))


def _hold_out_images(labels: Ints, fraction: float, generator: np.random.Generator) -> Mask:
    """Return a mask of ``fraction`` of each class: at least one image, and not all."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[:count]] = True
    return held_out


def _hold_out_patients(
    labels: Ints, patients: Ints, fraction: float, generator: np.random.Generator
) -> Mask | None:
    """Return a mask of whole patients, nearly ``fraction`` of each class.

    None where that leaves some class without images on a side.
    """
    n_folds = round(1 / fraction)
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=int(generator.integers(2**31)))
    n_classes = len(np.unique(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes smaller than n_folds
        try:
            candidates = list(folds.split(labels, labels, patients))
        except ValueError:  # every class has fewer images than there are folds
            return None
    for rest, held_out in candidates:
        if len(np.unique(labels[rest])) == len(np.unique(labels[held_out])) == n_classes:
            mask = np.zeros(len(labels), dtype=bool)
            mask[held_out] = True
            return mask
    return None


def _load_digits(image_size: int) -> Dataset:
    """Return scikit-learn's bundled digits, scaled from 8 x 8 to ``image_size``."""
    digits = load_digits()
    scaled = np.round(digits.images * (255 / 16)).astype(np.uint8)
    side = (image_size, image_size)
    pixels = np.stack(
        [
            np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR))
            for image in scaled
        ]
    ).reshape(-1, 1, *side)
    images = ImageSet(
        pixels=pixels,
        rows=np.arange(len(pixels)),
        labels=digits.target.astype(np.int64),
        files=tuple(f"digits/{number:04d}" for number in range(len(pixels))),
    )
    key = hashlib.sha256(pixels.tobytes()).hexdigest()
    classes = tuple(str(name) for name in digits.target_names)
    return Dataset(classes, images, is_test=None, patients=None, broken=(), key=key)


def _existing_folder(data: str) -> Path:
    """Return ``data`` as a path after checking that it is a folder with something in it."""
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist; give an existing one with --data")
    if not any(root.iterdir()):
        raise UserError(f"data folder {root} is empty; lay images out as train/CLASS/*")
    return root


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder in ``folder``; one without images is an error."""
    names = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; lay images out as {folder.name}/CLASS/*")
    listing = {path.name: list_images(path) for path in names}
    for name, files in listing.items():
        if not files:
            raise UserError(f"class folder {folder / name} has no images; fill it or remove it")
    return listing


def _read(
    root: Path,
    listings: list[dict[str, list[Path]]],
    classes: tuple[str, ...],
    image_size: int,
    channels: int | None,
    skip_broken: bool,
) -> tuple[ImageSet, tuple[str, ...], str]:
    """Return the readable images of ``listings``, the broken files, and the content's key."""
    paths, labels = [], []
    for listing in listings:
        for name, files in listing.items():
            if name not in classes:
                raise UserError(
                    f"class folder {files[0].parent} is not among the training classes "
                    f"({', '.join(classes)}); rename or remove it"
                )
            paths += files
            labels += [classes.index(name)] * len(files)
    names = [path.relative_to(root).as_posix() for path in paths]
    decoded = decode(paths, image_size, channels)
    broken = tuple(f"{names[i]} ({reason})" for i, reason in sorted(decoded.broken.items()))
    if broken and not skip_broken:
        raise UserError(
            f"{count_broken(broken, len(names))} in {root}; mend or remove them, or leave them out "
            "with --skip-broken"
        )
    rows = np.array([i for i in range(len(names)) if i not in decoded.broken], dtype=np.int64)
    images = ImageSet(
        decoded.pixels, rows, np.array(labels, dtype=np.int64)[rows], tuple(names[i] for i in rows)
    )
    return images, broken, decoded.key


def count_broken(broken: Sequence[str], total: int) -> str:
    """Return how many of ``total`` images are broken, naming the first five."""
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    return f"{len(broken)} of {total} images cannot be read: {', '.join(broken[:5])}{more}"


def _broken_note(broken: tuple[str, ...]) -> tuple[str, ...]:
    """Return the note on images left out, all of them by name."""
    if not broken:
        return ()
    return (f"{len(broken)} images that cannot be read were left out: {', '.join(broken)}",)


def _read_patients(manifest: Path, files: Sequence[str]) -> Ints | None:
    """Return a patient number for each file; None where there is no manifest or no such column.

    A file that the manifest does not name counts as a patient of its own.
    """
    if not manifest.exists():
        return None
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if not {"file", "patient"} <= set(rows.fieldnames or ()):
                return None
            patient_of = {row["file"]: row["patient"] for row in rows if row["patient"]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {manifest}: {one_line(error)}; mend or remove it") from error
    identities = [("patient", patient_of[f]) if f in patient_of else ("file", f) for f in files]
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(identities))}
    return np.array([numbers[identity] for identity in identities], dtype=np.int64)
