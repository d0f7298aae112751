"""Image files of any kind, read as 8-bit pixels: one file, or many in parallel."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from bstriplet.config import MAX_PIXELS
from bstriplet.data.image_files import is_dicom
from bstriplet.data.pixels import Pixels, Unreadable, resize
from bstriplet.data.raster import libraries_at_work, read_raster
from bstriplet.errors import UserError, one_line

IN_FLIGHT = 512  # files that are read ahead; bounds the memory

Item = TypeVar("Item")
Result = TypeVar("Result")


class Picture(NamedTuple):
    """An image that was read.

    pixels: uint8 [C, size, size]. notes: remarks on how it was read. area: pixels in the file.
    """

    pixels: Pixels
    notes: tuple[str, ...]
    area: int


def read_image(
    path: Path, size: int, channels: int | None = None, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Return one image file, decoded by :func:`decode_image`, or raise :class:`Unreadable`."""
    return decode_image(read_content(path), size, channels, max_pixels)


def read_content(path: Path) -> bytes:
    """Return the bytes of a file, or raise :class:`Unreadable`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Unreadable("not found") from None
    except OSError as error:
        raise Unreadable(error.strerror or one_line(error)) from error


def decode_image(
    content: bytes, size: int, channels: int | None = None, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Return an image squeezed to a square of ``size`` pixels a side (bilinear, antialiased).

    ``channels`` is 1 (grey) or 3 (RGB); None gives 1 where all pixels are grey, else 3. A file of
    more than ``max_pixels`` is refused; 0 allows any.

    DICOM images are windowed as their header says (:func:`bstriplet.data.dicom.read_dicom`); all
    others are read by :func:`bstriplet.data.raster.read_raster`. The first image of an animation or
    a stack is taken. An image is unreadable only if its pixels are; other faults are named in
    ``notes``.
    """
    notes: list[str] = []
    try:
        with libraries_at_work(notes.append):
            if is_dicom(content):
                from bstriplet.data.dicom import read_dicom  # pydicom is an optional package

                image, area = read_dicom(content, max_pixels, notes.append)
            else:
                image, area = read_raster(content, max_pixels, notes.append)
    except (Unreadable, UserError):
        raise
    except Exception as error:  # pydicom too fails in many ways on damaged bytes
        raise Unreadable(one_line(error)) from error
    return Picture(resize(image, size, channels), tuple(dict.fromkeys(notes)), area)


def read_all(
    paths: Sequence[Path], size: int, channels: int, max_pixels: int
) -> Iterator[Picture | Unreadable]:
    """Yield each image, or the :class:`Unreadable` of its file, in order; read in parallel."""
    read = partial(_read_or_reason, size=size, channels=channels, max_pixels=max_pixels)
    yield from in_parallel(read, paths, len(paths), "reading images")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], total: int, what: str
) -> Iterator[Result]:
    """Yield ``function(item)`` in order from a pool of threads, under a progress bar.

    At most ``IN_FLIGHT`` of ``items`` are taken ahead of the last yielded one.
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


def _read_or_reason(
    path: Path, size: int, channels: int | None, max_pixels: int
) -> Picture | Unreadable:
    """Return the image, or the :class:`Unreadable` that reading it raised."""
    try:
        return read_image(path, size, channels, max_pixels)
    except Unreadable as reason:
        return reason
