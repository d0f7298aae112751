"""Text that holds names of files: encoded so that a name still opens its file, and shown.

A file name may hold bytes that are not UTF-8. Python keeps each of them as a lone surrogate
("surrogateescape"), and so do the tables here: what is read back still opens the file.
"""

import os
import re

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
# A file name may hold them (that of a folder's icon on a Mac does); a terminal would obey.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


def utf8(name: str) -> str:
    """Return a name that the file system gave as UTF-8 reads its bytes, whatever the locale."""
    if name.isascii():
        return name
    try:
        return decode(os.fsencode(name))
    except UnicodeEncodeError:  # it is text of another source, which the locale cannot hold
        return name


def on_disk(name: str) -> str:
    """Return the name that opens the file here: the inverse of :func:`utf8`."""
    if name.isascii() or os.name == "nt":
        return name
    return os.fsdecode(encode(name))


def encode(text: str) -> bytes:
    """Return text as UTF-8; bytes of file names that are not UTF-8 stay as they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair: names of Windows may hold one
        return text.encode("utf-8", "surrogatepass")


def decode(content: bytes) -> str:
    """Return the text that :func:`encode` encoded; half a pair comes back as its three bytes."""
    return content.decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    r"""Return text for a page or a picture: what these cannot hold becomes an escape, ``\xe9``."""
    valid = encode(text).decode("utf-8", "backslashreplace")
    return _NOT_IN_XML.sub(lambda found: ascii(found.group())[1:-1], valid)


def visible(text: str) -> str:
    """Return text with its control characters as escapes."""
    return _CONTROLS.sub(lambda control: ascii(control.group())[1:-1], text)
