"""The image files below a folder, found by suffix or content, and the names of left-out files."""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from bstriplet.errors import UserError, one_line

# A file with such a suffix is an image; without an image in it, it is a broken one.
SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".gif", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".pbm", ".pgm",
    ".ppm", ".pnm", ".pfm", ".dcm", ".dicom",
})  # fmt: skip

# The first bytes of these kinds of image, for files without such a suffix.
_BEGINNINGS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP|"
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51|.{4}ftypavi[fs]|P[1-6]\s+(#|\d+\s+\d)|P[Ff]\n",
    re.DOTALL,
)
# The first element of a DICOM file without preamble, in either byte order: a tag of group 2 or 8,
# then two letters or a short length.
_DICOM_ELEMENT = re.compile(
    rb"[\x02\x08]\0.\0([A-Z]{2}|.{2}\0\0)|\0[\x02\x08]\0.[A-Z]{2}", re.DOTALL
)
_DICOM_DIRECTORY = b"1.2.840.10008.1.3.10"  # the class of a DICOMDIR, which lists other files
_HEAD = 512  # bytes that are read to recognise a file

# Folders of thumbnails, deleted files and snapshots on a NAS, Windows, Linux or macOS, in lower
# case.
_SYSTEM_FOLDERS = frozenset({
    "@eadir", "@tmp", "#recycle", "#snapshot", "~snapshot", "@recycle", "@recently-snapshot",
    "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "__macosx",
    "network trash folder", "temporary items",
})  # fmt: skip

HIDDEN = "hidden files or folders were left out"
SYSTEM = "folders of thumbnails, deleted or system files were left out"
NO_IMAGES = "files of kinds that are not read were left out"
NOWHERE = "links that lead nowhere were left out"
REPEATED = "links to enclosing or already read folders were left out"


class Found(NamedTuple):
    """Image files, sorted, and the names of left-out files and folders by reason."""

    images: list[Path]
    left_out: dict[str, list[str]]


def list_images(folder: Path) -> Found:
    """Return the image files below ``folder``; links to files and folders are followed.

    Each folder is read once. Folders that contain ``folder`` are not read: links cannot form a
    loop.

    Raises:
        UserError: a folder or a file of unknown kind cannot be opened.
    """
    found: list[str] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    seen = {_identity(above) for above in folder.resolve().parents}
    # Links are followed last: a folder that can also be reached without a link keeps that name.
    starts = [str(folder)]
    for start in starts:
        for parent, folders, files in os.walk(start, onerror=_stop, followlinks=True):
            identity = _identity(parent)
            if identity in seen:
                left_out[REPEATED].append(parent)
                folders.clear()
                continue
            seen.add(identity)
            kept = []
            for name in sorted(folders):
                path = os.path.join(parent, name)
                if reason := why_left_out(name):
                    left_out[reason].append(counted_folder(path))
                elif os.path.islink(path):
                    starts.append(path)
                else:
                    kept.append(name)
            folders[:] = kept
            for name in files:
                path = os.path.join(parent, name)
                if reason := why_no_image(path):
                    left_out[reason].append(path)
                else:
                    found.append(path)
    images = [Path(file) for file in sorted(found, key=lambda file: file.split(os.sep))]
    return Found(images, {reason: sorted(names) for reason, names in left_out.items()})


def entries_of(folder: Path) -> list[Path]:
    """Return the files and folders in ``folder``, sorted.

    Raises:
        UserError: the folder cannot be opened.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise _cannot_open(folder, error) from error


def why_left_out(name: str) -> str:
    """Return why a folder of this name is left out; empty if it is not."""
    if name.lower() in _SYSTEM_FOLDERS:
        return SYSTEM
    return HIDDEN if name.startswith(".") else ""


def why_no_image(path: str) -> str:
    """Return why a file is left out; empty if it is an image, by suffix or by content."""
    name = os.path.basename(path)
    if name.startswith("."):
        return HIDDEN
    if os.path.splitext(name)[1].lower() in SUFFIXES:
        return ""
    if os.path.isfile(path):
        return "" if _begins_as_image(path) else NO_IMAGES
    return NO_IMAGES if os.path.exists(path) else NOWHERE


def counted_folder(folder: str) -> str:
    """Return the path of a left-out folder, with the number of images in it if there are any."""
    count = sum(
        not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        for _, _, files in os.walk(folder)
        for name in files
    )
    return f"{folder} ({count} images)" if count else folder


def is_dicom(content: bytes) -> bool:
    """Whether ``content`` begins like a DICOM file, with or without preamble."""
    return content[128:132] == b"DICM" or _DICOM_ELEMENT.match(content) is not None


def begins_as_image(content: bytes) -> bool:
    """Whether ``content`` begins like an image of a known kind other than DICOM."""
    return _BEGINNINGS.match(content) is not None


def _begins_as_image(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise _cannot_open(path, error) from error
    if is_dicom(head):
        return _DICOM_DIRECTORY not in head
    return begins_as_image(head)


def _identity(folder: str | Path) -> tuple[int, int] | str:
    """Return a value that is the same for all paths of one folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _cannot_open(folder, error) from error
    # Some file systems of Windows have no inode numbers.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _stop(error: OSError) -> None:
    raise _cannot_open(error.filename, error) from error


def _cannot_open(path: str | Path, error: OSError) -> UserError:
    return UserError(
        f"cannot open {path}: {error.strerror or one_line(error)}; make it readable or remove it"
    )
