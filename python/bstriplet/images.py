"""One image file as 8-bit pixels: any mode of Pillow, 16-bit and floating-point greys, DICOM."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from bstriplet.errors import one_line

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
SUFFIXES = DICOM_SUFFIXES | {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
IN_FLIGHT = 512  # files that are read ahead, which bounds memory

Pixels = npt.NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Unreadable(Exception):
    """Why one image cannot be read, in a few words."""


def list_images(folder: Path) -> list[Path]:
    """Return the image files below ``folder``, by suffix, sorted.

    Hidden files and folders are left out, and ``__MACOSX``, which archives made on a Mac hold.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if is_visible(name)]
        found += [
            os.path.join(parent, name)
            for name in files
            if is_visible(name) and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return [Path(file) for file in sorted(found, key=lambda file: file.split(os.sep))]


def is_visible(name: str) -> bool:
    """Whether a file or folder of that name is data, not hidden nor added by a Mac to archives."""
    return not name.startswith(".") and name != "__MACOSX"


def read_image(path: Path, size: int, channels: int | None = None) -> Pixels:
    """Return one image file as :func:`decode_image` does; :class:`Unreadable` says why not."""
    return decode_image(read_content(path), size, channels)


def read_content(path: Path) -> bytes:
    """Return the bytes of a file, or raise :class:`Unreadable`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Unreadable("not found") from None
    except OSError as error:
        raise Unreadable(error.strerror or one_line(error)) from error


def decode_image(content: bytes, size: int, channels: int | None = None) -> Pixels:
    """Return an image as uint8 [C, size, size], squeezed to a square (bilinear, antialiased).

    ``channels`` is 1 (grey) or 3 (RGB); None gives 1 where all pixels are grey, else 3.

    Greys of more than 8 bits are scaled from their own smallest and largest value to 0 and 255:
    files do not say how many of their bits are used. DICOM images are windowed as their header
    says (:func:`bstriplet.dicom.read_dicom`). Of an animation or a stack, the first image is taken.
    """
    try:
        if is_dicom(content):
            from bstriplet.dicom import read_dicom  # pydicom is an optional package

            image = read_dicom(content)
        else:
            with Image.open(BytesIO(content)) as opened:
                image = _to_8_bit(ImageOps.exif_transpose(opened))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # each codec fails in its own way on damaged bytes
        raise Unreadable(one_line(error)) from error
    return resize(image, size, channels)


def is_dicom(content: bytes) -> bool:
    """Whether ``content`` begins as a DICOM file does."""
    return content[128:132] == b"DICM"


def resize(image: Image.Image, size: int, channels: int | None) -> Pixels:
    """Return an "L" or "RGB" image as uint8 [C, size, size]; ``channels`` as for decode_image."""
    if channels is None:
        channels = 1 if image.mode == "L" or _is_grey(image) else 3
    image = image.convert("L" if channels == 1 else "RGB")
    array = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return array.reshape(size, size, channels).transpose(2, 0, 1)


def read_all(paths: Sequence[Path], size: int, channels: int) -> Iterator[Pixels | Unreadable]:
    """Yield each image as :func:`read_image` returns it, or why not; in order, in parallel."""
    read = partial(_read_or_reason, size=size, channels=channels)
    yield from in_parallel(read, paths, len(paths), "reading images")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], total: int, what: str
) -> Iterator[Result]:
    """Yield ``function(item)`` in order from a pool of threads, under a progress bar.

    At most ``IN_FLIGHT`` of ``items`` are taken ahead of what has been yielded.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with tqdm(total=total, desc=what, unit="image", disable=None, leave=False) as bar:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == IN_FLIGHT:
                    yield pending.popleft().result()
                    bar.update()
            while pending:
                yield pending.popleft().result()
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def stretch(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Return ``values`` as uint8 of the same shape: ``low`` becomes 0, ``high`` 255, linearly."""
    scaled = (np.clip(values, low, high) - low) * (255 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def stretch_own_range(values: npt.NDArray[Any]) -> Pixels:
    """Return ``values`` as uint8, their smallest as 0 and their largest as 255; all equal: 0."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise Unreadable("holds pixels that are not finite")
    low, high = values.min(), values.max()
    return stretch(values, low, high if high > low else low + 1)


def _read_or_reason(path: Path, size: int, channels: int | None) -> Pixels | Unreadable:
    """Return the image, or why it cannot be read."""
    try:
        return read_image(path, size, channels)
    except Unreadable as reason:
        return reason


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit grey ("L") or RGB."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(stretch_own_range(np.asarray(image)))
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue are equal everywhere."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[..., :1]).all())
