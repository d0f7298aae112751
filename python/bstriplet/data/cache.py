"""A cache of decoded images: memory-mapped arrays, keyed by the content of the files."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bstriplet.config import MAX_PIXELS
from bstriplet.data import images
from bstriplet.data.image_files import is_dicom
from bstriplet.data.images import in_parallel
from bstriplet.data.pixels import Pixels, TooLarge, Unreadable
from bstriplet.data.raster import libraries_at_work
from bstriplet.errors import UserError, one_line

CACHE_VARIABLE = "BSTRIPLET_CACHE"
CACHE_VERSION = 2  # part of the key: raise it when the same file would decode to other pixels

# A file's hash is remembered only if the file did not change for this long before it was read. File
# systems count time in steps, and two changes within one step look the same.
SETTLED_NS = 2_000_000_000

_IMAGES = "images"
_INDEX = "index"
_SIGNATURE = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")


class Item(NamedTuple):
    """One image of a source: pixels uint8 [C, size, size], or why it cannot be read.

    digest: hash of its content. patient: pseudonym of the patient that the file names, else empty.
    notes: remarks on how it was read. area: pixels in its file; 0 where they are not limited.
    """

    pixels: Pixels | Unreadable
    digest: str
    patient: str = ""
    notes: tuple[str, ...] = ()
    area: int = 0


# (channels: 1, 3 or None for as many as each image needs) -> all images of a source, in order.
Read = Callable[[int | None], Iterator[Item]]


@dataclass(frozen=True)
class Decoded:
    """The pixels of a list of images.

    pixels: uint8 [N, C, size, size], a read-only map of the cache; rows of broken images are 0.
    broken: reason by position in the list.
    digests: hash of each image's content; empty for a file that cannot be opened.
    patients: pseudonym by position, where the files themselves name patients (DICOM).
    notes: remarks on how images were read, each with the positions of its images.
    key: hash of all contents and of how they were decoded.
    """

    pixels: Pixels
    broken: dict[int, str]
    digests: list[str]
    patients: dict[int, str]
    notes: dict[str, list[int]]
    key: str


@dataclass
class _Limits:
    """The values of ``max_pixels`` for which the cached images are valid.

    read: pixels of the largest file that was read.
    refused: pixels of the smallest file that was too large; 0 if there is none.
    """

    read: int = 0
    refused: int = 0

    def add(self, item: Item) -> None:
        """Take one more image into account."""
        self.read = max(self.read, item.area)
        if isinstance(item.pixels, TooLarge):
            self.refused = min(self.refused or item.pixels.area, item.pixels.area)

    def __contains__(self, max_pixels: int) -> bool:
        if max_pixels == 0:
            return not self.refused
        return self.read <= max_pixels and not 0 < self.refused <= max_pixels


class _Changed(Exception):
    """A file changed after it was hashed."""


def cache_folder() -> Path:
    """Return the folder of decoded images."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bstriplet"


def decode(
    paths: Sequence[Path], size: int, channels: int | None = None, max_pixels: int = MAX_PIXELS
) -> Decoded:
    """Return all images at ``size`` x ``size``, from the cache where they have been decoded before.

    ``channels``: 1, 3, or None for 1 where every image is grey, else 3. A file of more than
    ``max_pixels`` is broken; 0 allows any. The cache lies in ``$BSTRIPLET_CACHE``, else below
    ``$XDG_CACHE_HOME`` or ``~/.cache``; it may be deleted. If a file changes or vanishes between
    hashing and decoding, both are done once more.
    """
    for last_try in (False, True):
        digests = file_digests(paths)
        read = _reader(paths, digests, size, max_pixels)
        try:
            return cached(digests, len(paths), size, channels, read, max_pixels)
        except _Changed as changed:
            if last_try:
                raise UserError(
                    f"{changed} changes while it is read; start again when it is whole"
                ) from None
    raise AssertionError("the second try returns or raises")


def cached(
    content: Sequence[str],
    count: int,
    size: int,
    channels: int | None,
    read: Read,
    max_pixels: int = 0,
) -> Decoded:
    """Return ``count`` images from the cache, filled by ``read`` where it does not have them.

    ``content`` identifies the images that ``read`` yields: equal content means equal pixels.
    ``read`` refuses files of more than ``max_pixels``. Images decoded under another limit are used
    if ``max_pixels`` would refuse the same files; otherwise the limit becomes part of the key.
    """
    identity: list[object] = [CACHE_VERSION, size, channels, list(content)]
    decoded, same_under = _cached(identity, count, size, channels, read)
    if max_pixels not in same_under:
        key = decoded.key  # does not depend on which limit came first on this machine
        decoded, _ = _cached([*identity, max_pixels], count, size, channels, read)
        decoded = replace(decoded, key=key)
    return decoded


def _cached(
    identity: Sequence[object], count: int, size: int, channels: int | None, read: Read
) -> tuple[Decoded, "_Limits"]:
    """Return the images of one entry of the cache, and the limits for which they are valid."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = cache_folder() / _IMAGES / key
    try:
        if not folder.exists():
            _fill(folder, count, size, channels, read)
        return _load(folder, count)
    except OSError as error:
        raise UserError(
            f"image cache {cache_folder()}: {error.strerror or one_line(error)}; set "
            f"{CACHE_VARIABLE} to a folder that can be written and has room"
        ) from error


def _load(folder: Path, count: int) -> tuple[Decoded, "_Limits"]:
    """Return the images and limits in a cache folder; a damaged folder is a :class:`UserError`."""
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        about = json.loads((folder / "about.json").read_text())
        broken, patients = (
            {int(position): text for position, text in about[name].items()}
            for name in ("broken", "patients")
        )
        decoded = Decoded(pixels, broken, about["digests"], patients, about["notes"], folder.name)
        if not len(decoded.pixels) == len(decoded.digests) == count:
            raise ValueError("not as many images as there are")
        return decoded, _Limits(**about["limits"])
    except Exception as error:  # damaged bytes fail in many ways
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"image cache {folder} is damaged; delete that folder") from error


def _fill(folder: Path, count: int, size: int, channels: int | None, read: Read) -> None:
    """Decode into a temporary folder and rename it to ``folder`` when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        # Images are written as grey until one has colours: in a colour set, that is the first.
        about = _write(building / "pixels.npy", (count, channels or 1, size, size), read(channels))
        if about is None:
            about = _write(building / "pixels.npy", (count, 3, size, size), read(3))
        (building / "about.json").write_text(json.dumps(about))
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has just written the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(
    file: Path, shape: tuple[int, int, int, int], items: Iterator[Item]
) -> dict[str, object] | None:
    """Write all pixels to ``file`` and return the other fields; None if an image has more channels.

    Pixels are written, not memory-mapped: a full disk raises an error in a write, but kills a
    process with a memory map.
    """
    broken: dict[int, str] = {}
    patients: dict[int, str] = {}
    notes: dict[str, list[int]] = {}
    digests: list[str] = []
    limits = _Limits()
    nothing = np.zeros(shape[1:], dtype=np.uint8)
    with file.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for position, item in enumerate(items):
            pixels = item.pixels
            if isinstance(pixels, Unreadable):
                broken[position] = str(pixels)
                pixels = nothing
            elif len(pixels) != len(nothing):
                return None
            if item.patient:
                patients[position] = item.patient
            for note in item.notes:
                notes.setdefault(note, []).append(position)
            digests.append(item.digest)
            limits.add(item)
            stream.write(np.ascontiguousarray(pixels).data)
        stream.flush()
        os.fsync(stream.fileno())
    return {
        "broken": broken,
        "patients": patients,
        "notes": notes,
        "digests": digests,
        "limits": asdict(limits),
    }


def _reader(paths: Sequence[Path], digests: Sequence[str], size: int, max_pixels: int) -> Read:
    """Return a function that decodes the files in parallel."""
    sources = list(zip(paths, digests, strict=True))

    def read(channels: int | None) -> Iterator[Item]:
        one = partial(_read_file, size=size, channels=channels, max_pixels=max_pixels)
        return in_parallel(one, sources, len(sources), "decoding images")

    return read


def _read_file(source: tuple[Path, str], size: int, channels: int | None, max_pixels: int) -> Item:
    """Return one file's image; raise if the digest is not that of its content."""
    path, digest = source
    try:
        content = images.read_content(path)
    except Unreadable as reason:
        if digest:
            raise _Changed(path) from None
        return Item(reason, digest)
    if hashlib.sha256(content).hexdigest() != digest:
        raise _Changed(path)
    try:
        picture = images.decode_image(content, size, channels, max_pixels)
    except Unreadable as reason:
        return Item(reason, digest)
    patient, notes = "", [*picture.notes]
    if is_dicom(content):
        from bstriplet.data.dicom import read_patient  # pydicom is an optional package

        with libraries_at_work(lambda _: None):  # a warning may quote the ID
            patient = read_patient(content, notes.append)
    return Item(picture.pixels, digest, patient, tuple(notes), picture.area)


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's content; empty for one that cannot be opened.

    Hashes are remembered with size, inode and times of the file; its ctime cannot be forged. So
    each file is read once; later only its status is checked.
    """
    if not paths:
        return []
    index = _index_file(paths)
    known = _load_index(index)
    now = time.time_ns()
    signatures = [_signature(path) for path in paths]
    digests: list[str | None] = []
    for path, signature in zip(paths, signatures, strict=True):
        remembered, digest = known.get(str(path), (None, None))
        digests.append(digest if remembered == signature else None)
    unknown = [position for position, digest in enumerate(digests) if digest is None]
    if not unknown:
        return [digest or "" for digest in digests]
    hashed = in_parallel(_hash_file, (paths[i] for i in unknown), len(unknown), "reading files")
    for position, digest in zip(unknown, hashed, strict=True):
        digests[position] = digest
    settled = {
        str(path): (signature, digest)
        for path, signature, digest in zip(paths, signatures, digests, strict=True)
        if digest and signature is not None and max(signature[1:3]) < now - SETTLED_NS
    }
    if settled.keys() - known.keys() or any(known[name] != settled[name] for name in settled):
        _save_index(index, settled)
    return [digest or "" for digest in digests]


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


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return status fields that change when the file changes; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return tuple(getattr(status, name) for name in _SIGNATURE)


def _index_file(paths: Sequence[Path]) -> Path:
    """Return the file that remembers hashes of these files: one file for each data folder."""
    folders = {os.path.dirname(path) for path in paths}  # far fewer folders than files
    folders = {*map(os.path.abspath, folders)}
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # Windows: they are on several drives
        common = min(folders)
    return cache_folder() / _INDEX / f"{hashlib.sha256(os.fsencode(common)).hexdigest()}.npz"


def _load_index(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return signature and digest by path; empty if there is no readable index."""
    try:
        with np.load(file) as index:
            names = os.fsdecode(index["names"].tobytes()).split("\0")
            signatures = map(tuple, index["signatures"].tolist())
            digests = index["digests"].tolist()
    except Exception:  # damaged bytes may raise anything; the index is made anew
        return {}
    found = zip(signatures, (digest.decode() for digest in digests), strict=True)
    return dict(zip(names, found, strict=True))


def _save_index(file: Path, known: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Write the index atomically; a failure is ignored, because it only costs time."""
    names: npt.NDArray[np.uint8] = np.frombuffer(os.fsencode("\0".join(known)), dtype=np.uint8)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".building-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                np.savez(
                    stream,
                    names=names,
                    signatures=np.array([signature for signature, _ in known.values()]),
                    digests=np.array([digest.encode() for _, digest in known.values()]),
                )
            os.replace(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)
