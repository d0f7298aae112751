"""The error for mistakes that the user can correct."""

import difflib
import tokenize
import zipfile
import zlib
from collections.abc import Iterable

# Errors of zipfile and numpy for an .npz file that was cut or overwritten.
NO_ARRAYS = (
    OSError,
    KeyError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


class UserError(Exception):
    """A mistake that the user can correct; the message says what is wrong, where, and what to do.

    The ``bstriplet`` command prints it as one line without a traceback; its exit status is 2.
    """


def one_line(error: BaseException) -> str:
    """Return an exception's message on a single line, or its class name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def unknown_name(what: str, name: str, known: Iterable[str], *, advice: str = "") -> UserError:
    """Return the error for a ``name`` that is not ``known``; it suggests the nearest known name.

    ``advice`` says where to find the allowed names; without it they are listed.
    """
    allowed = list(known)
    nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.3)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return UserError(
        f"{what}: unknown name {name!r}{suggestion} {advice or 'Allowed: ' + ', '.join(allowed)}"
    )
