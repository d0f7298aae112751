"""The images of a classification task, found and split: the same seed gives the same split."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits

from bstriplet.config import DIGITS, MAX_PIXELS, MEDMNIST, TrainConfig
from bstriplet.data import splits
from bstriplet.data.cache import Decoded, decode
from bstriplet.data.layouts import (
    TEST,
    TRAIN,
    VALIDATION,
    Count,
    Listing,
    is_csv,
    recognise,
    recognise_test,
)
from bstriplet.data.medmnist import download, read_medmnist
from bstriplet.data.names import one_form, same_person, unknown_class
from bstriplet.data.notes import counted, first
from bstriplet.data.pixels import Pixels
from bstriplet.data.splits import Ints, Mask
from bstriplet.errors import UserError

Strings = npt.NDArray[np.str_]

BROKEN = "images that cannot be read were left out"

# Each random choice has its own stream, so that one of them does not shift the others.
_TEST_STREAM, _SUBSET_STREAM, _VALIDATION_STREAM, _FOLD_STREAM = range(4)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, or a part of them.

    pixels: uint8 [M, C, H, W], C = 1 (grey) or 3 (RGB), shared by all parts, perhaps a memory map.
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
        # np.take always makes a plain C-ordered array. Indexing can keep odd strides of axes of
        # length 1; torch would infer another memory layout from them and sum in another order.
        images = torch.from_numpy(np.take(self.pixels, self.rows[chosen], axis=0))
        return images, torch.from_numpy(self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """All images of a task before they are split.

    parts: [N], "train", "validation" or "test" for each image; all "train" without given parts.
    digests: N hashes of content; copies of an image have the same hash.
    patients: int64 [N], a number for each patient; None where patients are unknown.
    folds: int64 [N], the fold of each image from 0; None where the data give no folds.
    broken: files that were left out, with the reason.
    layout: the layout that was recognised.
    counts: for sets of the paper, the images found and the images in the paper's table.
    notes: remarks on the data for the reader of a report.
    key: hash of the images' content.
    """

    classes: tuple[str, ...]
    images: ImageSet
    parts: Strings
    digests: tuple[str, ...]
    patients: Ints | None
    folds: Ints | None
    broken: tuple[str, ...]
    key: str
    layout: str
    counts: tuple[Count, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Images split into training, validation and test part; ``notes`` are remarks on them."""

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

    @property
    def parts(self) -> dict[str, ImageSet]:
        """The parts by their names."""
        return {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}

    @property
    def fingerprint(self) -> str:
        """A hash that differs where images, labels, classes or parts do."""
        digest = hashlib.sha256(json.dumps([self.key, self.classes]).encode())
        for part in self.parts.values():
            digest.update(part.rows.tobytes())
            digest.update(part.labels.tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the images of each class in each part, the notes and a fingerprint, for JSON."""
        return {
            "images": {
                name: {label: int(np.sum(part.labels == i)) for i, label in enumerate(self.classes)}
                for name, part in self.parts.items()
            },
            "channels": self.channels,
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
        }


def load_dataset(
    data: str, image_size: int, *, skip_broken: bool = False, max_pixels: int = MAX_PIXELS
) -> Dataset:
    """Return the images of ``data``, resized to ``image_size`` x ``image_size``.

    ``data`` is ``"digits"`` (scikit-learn's 1,797 real digits), a folder or a CSV file (see
    :func:`bstriplet.data.layouts.recognise`), a MedMNIST file, or ``medmnist:NAME[:SIZE]`` to
    download one. An image that cannot be read, or whose file has more than ``max_pixels`` (0: any),
    is an error that names it; with ``skip_broken`` it is left out and named in ``Dataset.broken``.
    """
    if data == DIGITS:
        return _load_digits(image_size)
    if _is_medmnist(data):
        return _load_medmnist(data, image_size)
    listing = recognise(data)
    images, broken, decoded = _read(
        listing, listing.classes, image_size, None, skip_broken, max_pixels
    )
    entries = [listing.entries[row] for row in images.rows]
    parts = np.array([entry.part for entry in entries])
    for label, name in enumerate(listing.classes):
        if not np.any(images.labels[parts == TRAIN] == label):
            raise UserError(
                f"no training image of class {name!r} in {listing.root} can be read; put some there"
            )
    patients = _as_first_written(
        entry.patient or decoded.patients.get(int(row), "")
        for row, entry in zip(images.rows, entries, strict=True)
    )
    digests = tuple(decoded.digests[row] for row in images.rows)
    plain = "CSV file" if is_csv(data) else "class tree"
    notes = (
        *_reading_notes(listing, broken, decoded),
        *listing.notes,
        *_unknown_patients_note(patients, images.files),
        *_shared_patients_note(patients, parts),
        *_contradictions_note(digests, images, listing.classes),
    )
    return Dataset(
        classes=listing.classes,
        images=images,
        parts=parts,
        digests=digests,
        patients=_numbered(patients, images.files) if any(patients) else None,
        folds=_given_folds(_as_first_written(entry.fold for entry in entries), images.files),
        broken=broken,
        key=decoded.key,
        layout=listing.known.layout if listing.known else plain,
        counts=listing.counts,
        notes=notes,
    )


def load_for(config: TrainConfig) -> Dataset:
    """Return the images of a configuration before they are split."""
    return load_dataset(
        config.data,
        config.image_size,
        skip_broken=config.skip_broken,
        max_pixels=config.max_pixels,
    )


def load_test_images(
    data: str,
    classes: tuple[str, ...],
    image_size: int,
    channels: int,
    *,
    skip_broken: bool,
    max_pixels: int = MAX_PIXELS,
) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the images of ``data`` to test on (its test part, else all) and notes on them.

    ``data`` is what :func:`load_dataset` takes, or a folder CLASS/*. ``classes`` are the classes of
    the model; an image of another class is an error.
    """
    if _is_medmnist(data):
        decoded, names, labels, parts = read_medmnist(_medmnist_file(data), image_size, channels)
        if list(map(one_form, names)) != list(map(one_form, classes)):
            raise UserError(f"{data} has classes {names}, the model {classes}; give data that fit")
        files = tuple(f"{part}/{number}" for number, part in enumerate(parts))
        images = ImageSet(decoded.pixels, np.arange(len(labels)), labels, files)
        tested = images.take(np.array(parts) == TEST)
        if not len(tested):
            raise UserError(f"{data} has no test images; give data that have some")
        return tested, ()
    listing = recognise_test(data)
    images, broken, decoded = _read(listing, classes, image_size, channels, skip_broken, max_pixels)
    return images, (*_reading_notes(listing, broken, decoded), *listing.notes)


def split_dataset(dataset: Dataset, config: TrainConfig) -> Task:
    """Return training, validation and test images for ``config.seed``.

    Parts that the data define are kept. A missing part is held out of another one, so that every
    class is in both. Where patients are known, all images of a patient stay on one side of such a
    split. It is by image instead if a class has too few patients, which a note says, or with
    ``split_by="image"``. With ``folds``, the data's own parts are ignored: all images are dealt
    into folds, and one fold is the test part. ``validation="test"`` takes validation images from
    the test part and leaves them in it, as the paper does.
    """
    splitter = _Splitter(dataset, config)
    everything = np.arange(len(dataset.images))
    train, validation, test = (
        everything[dataset.parts == part] for part in (TRAIN, VALIDATION, TEST)
    )
    if config.folds:
        train, test = splitter.fold(config)
        validation = everything[:0]
    elif not np.any(dataset.parts == TEST):
        train, test = splitter.split(train, config.test_fraction, "test", _TEST_STREAM)
    if config.train_per_class:
        train = splitter.subset(train, config.train_per_class)
    if config.validation == "test":
        _, validation = splitter.split(
            test, config.validation_fraction, "validation", _VALIDATION_STREAM
        )
    elif len(validation) == 0:
        train, validation = splitter.split(
            train, config.validation_fraction, "validation", _VALIDATION_STREAM
        )
    return Task(
        classes=dataset.classes,
        train=dataset.images.take(train),
        validation=dataset.images.take(validation),
        test=dataset.images.take(test),
        notes=(
            *dataset.notes,
            *splitter.notes,
            *_copies_note(dataset, {TRAIN: train, VALIDATION: validation, TEST: test}),
            *_untested_note(dataset, test),
        ),
        key=dataset.key,
    )


class _Splitter:
    """Seeded splits of one dataset, with notes on splits that could not be made as asked."""

    def __init__(self, dataset: Dataset, config: TrainConfig) -> None:
        self.dataset = dataset
        self.seed = config.seed
        self.patients = dataset.patients if config.split_by == "patient" else None
        self.notes: list[str] = []

    def split(self, source: Ints, fraction: float, what: str, stream: int) -> tuple[Ints, Ints]:
        """Return the kept and the held-out images of ``source``, both sorted.

        ``fraction`` is the share of each class to hold out; ``what`` names the held-out part.
        """
        labels = self.dataset.images.labels[source]
        self._require(labels, 2, f"hold {what} images out of")
        generator = np.random.default_rng([self.seed, stream])
        held_out = None
        if self.patients is not None:
            held_out = splits.hold_out_groups(labels, self.patients[source], fraction, generator)
            if held_out is None:
                self._note_by_image(f"{what} images are held out")
        if held_out is None:
            held_out = splits.hold_out(labels, fraction, generator)
        return source[~held_out], source[held_out]

    def fold(self, config: TrainConfig) -> tuple[Ints, Ints]:
        """Return the images outside and inside the test fold, both sorted."""
        repeat, by_seed = divmod(self.seed, config.folds)
        number = config.fold - 1 if config.fold else by_seed
        labels = self.dataset.images.labels
        folds = self.dataset.folds
        if folds is not None and (n_given := int(folds.max()) + 1) != config.folds:
            raise UserError(f"--folds {config.folds}: the data give {n_given}; leave it at that")
        if folds is None:
            self._require(labels, config.folds, f"make {config.folds} folds of")
            generator = np.random.default_rng([repeat, _FOLD_STREAM])
            if self.patients is not None:
                folds = splits.group_folds(labels, self.patients, config.folds, generator)
                if folds is None:
                    self._note_by_image("folds are made")
            if folds is None:
                folds = splits.folds(labels, config.folds, generator)
        if np.any(self.dataset.parts != TRAIN):
            self.notes.append(
                f"{config.folds} folds are of all images: the data's own parts are not kept"
            )
        return np.flatnonzero(folds != number), np.flatnonzero(folds == number)

    def subset(self, pool: Ints, per_class: int) -> Ints:
        """Return at most ``per_class`` random images of each class of ``pool``, sorted."""
        generator = np.random.default_rng([self.seed, _SUBSET_STREAM])
        chosen = []
        for index in range(len(self.dataset.classes)):
            members = pool[self.dataset.images.labels[pool] == index]
            chosen.append(generator.permutation(members)[:per_class])
        return np.sort(np.concatenate(chosen))

    def _require(self, labels: Ints, minimum: int, purpose: str) -> None:
        """Raise if a class has fewer images than ``minimum``."""
        for index, name in enumerate(self.dataset.classes):
            count = int(np.sum(labels == index))
            if count < minimum:
                raise UserError(
                    f"class {name!r} has {count} image(s) to {purpose}; it needs {minimum} or more"
                )

    def _note_by_image(self, what: str) -> None:
        self.notes.append(f"{what} by image, not by patient: some class has too few patients")


def _is_medmnist(data: str) -> bool:
    return data.startswith(MEDMNIST) or data.lower().endswith(".npz")


def _medmnist_file(data: str) -> Path:
    return download(data) if data.startswith(MEDMNIST) else Path(data)


def _load_medmnist(data: str, image_size: int) -> Dataset:
    """Return the images of a MedMNIST file in the parts that it gives."""
    path = _medmnist_file(data)
    decoded, classes, labels, parts = read_medmnist(path, image_size)
    files = tuple(f"{part}/{number}" for number, part in enumerate(parts))
    images = ImageSet(decoded.pixels, np.arange(len(labels)), labels, files)
    digests = tuple(decoded.digests)
    return Dataset(
        classes=classes,
        images=images,
        parts=np.array(parts),
        digests=digests,
        patients=None,
        folds=None,
        broken=(),
        key=decoded.key,
        layout=f"MedMNIST ({path.name})",
        notes=_contradictions_note(digests, images, classes),
    )


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
    return Dataset(
        classes=tuple(str(name) for name in digits.target_names),
        images=images,
        parts=np.full(len(pixels), TRAIN),
        digests=tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in digits.images),
        patients=None,
        folds=None,
        broken=(),
        key=hashlib.sha256(pixels.tobytes()).hexdigest(),
        layout="digits (scikit-learn)",
    )


def _read(
    listing: Listing,
    classes: tuple[str, ...],
    image_size: int,
    channels: int | None,
    skip_broken: bool,
    max_pixels: int,
) -> tuple[ImageSet, tuple[str, ...], Decoded]:
    """Return the readable images of a listing, its broken files, and all decoded files."""
    index = {one_form(name): number for number, name in enumerate(classes)}
    names = [listing.name(entry.path) for entry in listing.entries]
    for entry in listing.entries:
        if entry.label not in index:
            raise unknown_class(entry.path, entry.label, classes)
    paths = [entry.path for entry in listing.entries]
    decoded = decode(paths, image_size, channels, max_pixels)
    broken = tuple(f"{names[i]} ({reason})" for i, reason in sorted(decoded.broken.items()))
    if broken and not skip_broken:
        raise UserError(
            f"{count_broken(broken, len(names))} in {listing.root}; mend or remove them, or leave "
            "them out with --skip-broken"
        )
    if len(broken) == len(names):
        raise UserError(f"no image in {listing.root} can be read; put some there")
    rows = np.array([i for i in range(len(names)) if i not in decoded.broken], dtype=np.int64)
    labels = np.array([index[entry.label] for entry in listing.entries], dtype=np.int64)
    images = ImageSet(decoded.pixels, rows, labels[rows], tuple(names[i] for i in rows))
    return images, broken, decoded


def _as_first_written(names: Iterable[str]) -> list[str]:
    """Return names of patients or folds, each in the spelling that came first."""
    first: dict[str, str] = {}
    return [first.setdefault(same_person(name), name) for name in names]


def _numbered(patients: Sequence[str], files: Sequence[str]) -> Ints:
    """Return the number of each image's patient; an image without one is its own patient."""
    identities = [
        ("patient", patient) if patient else ("file", file)
        for patient, file in zip(patients, files, strict=True)
    ]
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(identities))}
    return np.array([numbers[identity] for identity in identities], dtype=np.int64)


def _given_folds(folds: Sequence[str], files: Sequence[str]) -> Ints | None:
    """Return the data's own folds, numbered from 0; None where there are none.

    Folds are sorted as numbers, and names after them: fold 2 comes before fold 10.
    """
    if not any(folds):
        return None
    for fold, file in zip(folds, files, strict=True):
        if not fold:
            raise UserError(f"{file} has no fold, others have; fill the column or remove it")
    names = sorted(set(folds), key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[fold] for fold in folds], dtype=np.int64)


def count_broken(broken: Sequence[str], total: int) -> str:
    """Return how many of ``total`` images are broken, naming the first five."""
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    return f"{len(broken)} of {total} images cannot be read: {', '.join(broken[:5])}{more}"


def _reading_notes(listing: Listing, broken: tuple[str, ...], decoded: Decoded) -> tuple[str, ...]:
    """Return notes on left-out files and on images that were read with a remark, all by name."""
    names = [listing.name(entry.path) for entry in listing.entries]
    odd = {
        f"images {note}": [names[i] for i in positions] for note, positions in decoded.notes.items()
    }
    return (*counted({BROKEN: broken}), *listing.left_out_notes, *counted(odd))


def _unknown_patients_note(patients: Sequence[str], files: Sequence[str]) -> tuple[str, ...]:
    """Return a note on images without a patient, if other images have one."""
    unknown = [file for file, patient in zip(files, patients, strict=True) if not patient]
    if not 0 < len(unknown) < len(files):
        return ()
    return (
        f"{len(unknown)} images have no patient, others have: {first(unknown)}; each counts as a "
        "patient of its own",
    )


def _shared_patients_note(patients: Sequence[str], parts: Strings) -> tuple[str, ...]:
    """Return a note on patients with images in the data's test part and in another part."""
    parts_of = defaultdict(set)
    for patient, part in zip(patients, parts, strict=True):
        if patient:
            parts_of[patient].add(part)
    shared = [patient for patient, of in parts_of.items() if TEST in of and len(of) > 1]
    if not shared:
        return ()
    return (
        f"{len(shared)} patients are in the test part and in another: {first(shared)}; --folds "
        "would keep each on one side",
    )


def _contradictions_note(
    digests: Sequence[str], images: ImageSet, classes: Sequence[str]
) -> tuple[str, ...]:
    """Return a note on copies of one image that have different classes."""
    originals: dict[str, int] = {}
    pairs = []
    for position, digest in enumerate(digests):
        other = originals.setdefault(digest, position)
        if images.labels[other] != images.labels[position]:
            pairs.append(
                f"{images.files[position]} ({classes[images.labels[position]]}) = "
                f"{images.files[other]} ({classes[images.labels[other]]})"
            )
    return (f"{len(pairs)} images occur with another class: {first(pairs)}",) if pairs else ()


def _untested_note(dataset: Dataset, test: Ints) -> tuple[str, ...]:
    """Return a note on classes without a test image, for which some metrics are undefined."""
    missing = set(range(len(dataset.classes))) - set(dataset.images.labels[test].tolist())
    names = ", ".join(dataset.classes[label] for label in sorted(missing))
    return (f"no test image of class {names}",) if missing else ()


def _copies_note(dataset: Dataset, rows_of: dict[str, Ints]) -> tuple[str, ...]:
    """Return a note for each pair of parts that hold copies of the same images."""
    notes = []
    for here, there in ((TEST, TRAIN), (VALIDATION, TRAIN), (TEST, VALIDATION)):
        original = {dataset.digests[row]: row for row in rows_of[there]}
        shared = set(rows_of[there].tolist())  # validation images may also be test images
        files = dataset.images.files
        copies = [
            f"{files[row]} = {files[original[digest]]}"
            for row in rows_of[here]
            if row not in shared and (digest := dataset.digests[row]) in original
        ]
        if copies:
            notes.append(
                f"{len(copies)} {here} images are exact copies of {there} images: {first(copies)}"
            )
    return tuple(notes)
