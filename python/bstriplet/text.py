"""Encoding and display of text with file names.

A file name may hold bytes that are not UTF-8. Python keeps each of them as a lone surrogate
("surrogateescape"), and so do the tables of this package: a name read back still opens its file.
"""

import os
import re

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
# Control characters, which a terminal would obey. File names may hold them: a folder's icon on a
# Mac does.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


def utf8(name: str) -> str:
    """Return a name from the file system with its bytes decoded as UTF-8, in any locale."""
    if name.isascii():
        return name
    try:
        return decode(os.fsencode(name))
    except UnicodeEncodeError:  # not a name of the file system: the locale cannot encode it
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
    except UnicodeEncodeError:  # half a surrogate pair, as in some names on Windows
        return text.encode("utf-8", "surrogatepass")


def decode(content: bytes) -> str:
    """Return the text that :func:`encode` encoded; half a pair comes back as three lone bytes."""
    return content.decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    r"""Return text for a page or a picture; characters it cannot hold become escapes, ``\xe9``."""
    valid = encode(text).decode("utf-8", "backslashreplace")
    return _NOT_IN_XML.sub(lambda found: ascii(found.group())[1:-1], valid)


def visible(text: str) -> str:
    """Return text with its control characters as escapes."""
    return _CONTROLS.sub(lambda control: ascii(control.group())[1:-1], text)
