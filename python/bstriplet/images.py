"""Reading image files: decoded once, in parallel, into a cache that is keyed by their content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from bstriplet.errors import UserError, one_line

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
CACHE_VARIABLE = "BSTRIPLET_CACHE"
CACHE_VERSION = 1  # part of the key: raise it when the same file would decode to other pixels
CHUNK = 512  # images in flight at once, which bounds memory

Pixels = npt.NDArray[np.uint8]
Result = TypeVar("Result")


class Unreadable(Exception):
    """Why one image cannot be read, in a few words."""


@dataclass(frozen=True)
class Decoded:
    """The pixels of a list of image files.

    pixels: uint8 [N, C, size, size], a read-only map of the cache; rows of broken files are 0.
    broken: reason by position in the list.
    key: hash of all contents and of how they were decoded.
    """

    pixels: Pixels
    broken: dict[int, str]
    key: str


def list_images(folder: Path) -> list[Path]:
    """Return the image files below ``folder`` (by suffix, hidden files left out), sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def read_image(path: Path, size: int, channels: int | None = None) -> Pixels:
    """Return one image as uint8 [C, size, size], squeezed to a square (bilinear, antialiased).

    ``channels`` is 1 (grey) or 3 (RGB); None gives 1 where all pixels are grey, else 3. 16-bit
    greys keep their upper 8 bits. Raises :class:`Unreadable` with the reason.
    """
    try:
        with Image.open(path) as opened:
            image = _to_8_bit(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except FileNotFoundError:
        raise Unreadable("not found") from None
    except Exception as error:  # each codec of Pillow fails in its own way on damaged bytes
        raise Unreadable(one_line(error)) from error
    if channels is None:
        channels = 1 if image.mode == "L" or _is_grey(image) else 3
    image = image.convert("L" if channels == 1 else "RGB")
    array = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return array.reshape(size, size, channels).transpose(2, 0, 1)


def read_all(paths: Sequence[Path], size: int, channels: int) -> Iterator[Pixels | Unreadable]:
    """Yield each image as :func:`read_image` returns it, or why not; in order, in parallel."""
    read = partial(_read_or_reason, size=size, channels=channels)
    yield from _in_parallel(read, paths, "reading images")


def decode(paths: Sequence[Path], size: int, channels: int | None = None) -> Decoded:
    """Return all images at ``size`` x ``size``, from the cache where they have been decoded before.

    ``channels``: 1, 3, or None for 1 where every image is grey, else 3. The cache lies in
    ``$BSTRIPLET_CACHE``, else below ``$XDG_CACHE_HOME`` or ``~/.cache``; it may be deleted.
    """
    contents = list(_in_parallel(_hash_file, paths, "looking for changes"))
    key = hashlib.sha256(json.dumps([CACHE_VERSION, size, channels, contents]).encode()).hexdigest()
    folder = cache_folder() / key
    try:
        if not folder.exists():
            _fill_cache(folder, paths, size, channels)
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        broken = json.loads((folder / "broken.json").read_text())
    except OSError as error:
        raise UserError(
            f"image cache {folder.parent}: {error.strerror or one_line(error)}; set "
            f"{CACHE_VARIABLE} to a folder that can be written and has room"
        ) from error
    except ValueError as error:
        raise UserError(f"image cache {folder} is damaged; delete that folder") from error
    return Decoded(pixels, {int(position): reason for position, reason in broken.items()}, key)


def cache_folder() -> Path:
    """Return the folder of decoded images."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bstriplet"


def _in_parallel(
    function: Callable[[Path], Result], paths: Sequence[Path], what: str
) -> Iterator[Result]:
    """Yield ``function(path)`` in order from a pool of threads, under a progress bar."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc=what, unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(paths), CHUNK):
            for result in pool.map(function, paths[start : start + CHUNK]):
                bar.update()
                yield result


def _hash_file(path: Path) -> str:
    """Return the hash of a file's content; empty where it cannot be opened."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return ""


def _fill_cache(folder: Path, paths: Sequence[Path], size: int, channels: int | None) -> None:
    """Decode into a new folder beside ``folder`` and move it there when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        # Grey until a colour image turns up, which in a set of colour images is the first.
        broken = _decode_into(building / "pixels.npy", paths, size, channels or 1, channels is None)
        if broken is None:
            broken = _decode_into(building / "pixels.npy", paths, size, 3, False)
        (building / "broken.json").write_text(json.dumps(broken))
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has just written the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _decode_into(
    file: Path, paths: Sequence[Path], size: int, channels: int, stop_at_colour: bool
) -> dict[int, str] | None:
    """Write all pixels to ``file``; return the broken ones, or None at the first colour image."""
    shape = (len(paths), channels, size, size)
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    broken: dict[int, str] = {}
    read = partial(_read_or_reason, size=size, channels=None if stop_at_colour else channels)
    for position, image in enumerate(_in_parallel(read, paths, "decoding images")):
        if isinstance(image, Unreadable):
            broken[position] = str(image)
        elif len(image) != channels:
            return None
        else:
            pixels[position] = image
    pixels.flush()
    return broken


def _read_or_reason(path: Path, size: int, channels: int | None) -> Pixels | Unreadable:
    """Return the image, or why it cannot be read."""
    try:
        return read_image(path, size, channels)
    except Unreadable as reason:
        return reason


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit grey ("L") or RGB."""
    if image.mode.startswith("I"):  # 16-bit grey; "I" is how older versions of Pillow open it
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype("u1"))
    if image.mode == "F":
        raise Unreadable("floating-point pixels are not supported")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue are equal everywhere."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[..., :1]).all())
