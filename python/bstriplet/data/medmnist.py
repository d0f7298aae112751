"""MedMNIST files: labelled arrays in one .npz, from disk or downloaded by the package medmnist."""

import hashlib
import importlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bstriplet.config import MEDMNIST
from bstriplet.data.cache import Decoded, Item, Read, cached, file_digests
from bstriplet.data.images import in_parallel
from bstriplet.data.layouts import PARTS
from bstriplet.data.pixels import resize
from bstriplet.errors import NO_ARRAYS, UserError, one_line

# The parts of a file, in the order of PARTS.
_NAMES = ("train", "val", "test")

# The files hold class numbers without names. These are the names of the set that the paper uses.
_CLASSES = {"pneumoniamnist": ("normal", "pneumonia")}


def download(data: str) -> Path:
    """Return the file of ``medmnist:NAME[:SIZE]``; the package downloads it if it is absent."""
    name, _, size = data.removeprefix(MEDMNIST).partition(":")
    try:
        package = importlib.import_module("medmnist")
    except ImportError:
        raise UserError(
            f"--data {data}: the package medmnist, which downloads it, is not installed; install "
            "it with: pip install medmnist, or give the path of a downloaded .npz file"
        ) from None
    known = {flag: about for flag, about in package.INFO.items() if not flag.endswith("3d")}
    if name not in known:
        raise UserError(f"--data {data}: no set of that name; there are {', '.join(known)}")
    kind = getattr(package, known[name]["python_class"])
    sizes = [str(side) for side in kind.available_sizes]
    if size and size not in sizes:
        raise UserError(f"--data {data}: no images of size {size!r}; there are {', '.join(sizes)}")
    try:
        images = kind(split="train", download=True, size=int(size or 28), mmap_mode="r")
    except Exception as error:  # the package raises RuntimeError, the network anything
        raise UserError(f"--data {data}: cannot download it: {one_line(error)}") from error
    suffix = f"_{size}" if size and size != "28" else ""
    return Path(images.root) / f"{name}{suffix}.npz"


def read_medmnist(
    path: Path, size: int, channels: int | None = None
) -> tuple[Decoded, tuple[str, ...], npt.NDArray[np.int64], list[str]]:
    """Return the images of a file, through the cache; class names, labels [N] and parts [N].

    Images are streamed one by one: a file may be larger than memory. A file of several labels per
    image (ChestMNIST) or of volumes is an error.
    """
    if not os.path.isfile(path):
        raise UserError(f"data file {path} does not exist; give an existing one with --data")
    labels, parts = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = []
            for name, part in zip(_NAMES, PARTS, strict=True):
                shapes.append(_image_shape(archive, name))
                labels.append(_labels(archive, name, shapes[-1][0]))
                parts += [part] * shapes[-1][0]
    except NO_ARRAYS as error:
        raise UserError(
            f"{path} is no MedMNIST file (arrays train_images, train_labels, val_..., test_...): "
            f"{one_line(error)}"
        ) from error
    if len({shape[1:] for shape in shapes}) > 1:
        raise UserError(f"{path}: images of the parts differ in shape; give a MedMNIST file")
    joined = np.concatenate(labels)
    flag = path.stem.partition("_")[0].lower()
    classes = _CLASSES.get(flag) or tuple(str(label) for label in range(int(joined.max()) + 1))
    decoded = cached(file_digests([path]), len(joined), size, channels, _reader(path, size))
    return decoded, classes, joined, parts


def _open_array(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], tuple[int, ...]]:
    """Return an array of the archive as a stream, positioned at its first value, and its shape."""
    stream = archive.open(f"{name}.npy")
    version = np.lib.format.read_magic(stream)
    read_header: Any = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read_header(stream)
    if dtype != np.uint8 or fortran_order:
        raise ValueError(f"{name} is not uint8 in C order")
    return stream, shape


def _image_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    stream, shape = _open_array(archive, f"{name}_images")
    stream.close()
    if not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise UserError(
            f"{archive.filename}: {name}_images has shape {shape}; images [N, H, W] or "
            "[N, H, W, 3] are needed, not volumes"
        )
    return shape


def _labels(archive: zipfile.ZipFile, name: str, count: int) -> npt.NDArray[np.int64]:
    """Return the labels of a part, int64 [N]."""
    with archive.open(f"{name}_labels.npy") as stream:
        labels = np.lib.format.read_array(stream, allow_pickle=False)
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise UserError(
            f"{archive.filename}: {labels.shape[1]} labels an image; one class an image is needed"
        )
    if labels.size != count or labels.dtype.kind not in "ui" or (count and labels.min() < 0):
        raise ValueError(f"{name}_labels does not give a class number for each image")
    return labels.reshape(-1).astype(np.int64)


def _reader(path: Path, size: int) -> Read:
    """Return a function that yields all images of the file, resized to ``size``."""

    def read(channels: int | None) -> Iterator[Item]:
        def one(source: tuple[bytes, tuple[int, ...]]) -> Item:
            content, shape = source
            pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape)
            digest = hashlib.sha256(content).hexdigest()
            return Item(resize(Image.fromarray(pixels), size, channels), digest)

        try:
            with zipfile.ZipFile(path) as archive:
                for name in _NAMES:
                    stream, (count, *shape) = _open_array(archive, f"{name}_images")
                    rows = _rows(stream, count, tuple(shape))
                    yield from in_parallel(one, rows, count, f"reading {name}")
        except NO_ARRAYS as error:
            raise UserError(f"{path} is damaged: {one_line(error)}; download it again") from error

    return read


def _rows(
    stream: IO[bytes], count: int, shape: tuple[int, ...]
) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Yield the images of an array as bytes, each with its shape."""
    n_bytes = math.prod(shape)
    with stream:
        for _ in range(count):
            yield stream.read(n_bytes), shape
