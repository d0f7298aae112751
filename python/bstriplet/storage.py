"""Atomic files: complete or absent, even if the writing process is killed."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bstriplet.errors import UserError, one_line
from bstriplet.text import encode


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically: readers find the complete old or new file.

    This holds through a loss of power too. When the function returns, the new file is on disk.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def _sync_folder(path: Path) -> None:
    """Write the names in a folder to disk; not on Windows, where a folder cannot be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically, encoded by :func:`bstriplet.text.encode`."""
    write_atomic(path, encode(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in ASCII, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in ``path``; a missing or damaged file is a :class:`UserError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; restore it") from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a file or folder that cannot be written."""
    return UserError(
        f"cannot write {path}: {error.strerror or one_line(error)}; choose a place that can be "
        "written and has room"
    )


def write_output(path: Path, text: str) -> None:
    """Write ``text`` to a file that the user named: through a link, or to a pipe or device."""
    if not _is_special(path):
        return write_text(Path(os.path.realpath(path)), text)
    try:
        path.write_bytes(encode(text))
    except OSError as error:
        raise cannot_write(path, error) from error


def check_output(path: Path) -> None:
    """Raise unless :func:`write_output` can write to ``path``; for a check before the work."""
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    if not _is_special(path):
        check_writable(Path(os.path.realpath(path)).parent, path)


def _is_special(path: Path) -> bool:
    """Whether ``path``, not a folder, is a pipe or a device such as /dev/stdout."""
    return os.path.exists(path) and not os.path.isfile(path)


def check_writable(folder: Path, path: Path) -> None:
    """Raise, naming ``path``, unless a file can be made in ``folder``."""
    try:
        # The same prefix as in `write_atomic`: the name may be too long or not allowed.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error
