"""The one error that a person at the keyboard can put right."""

import difflib
import tokenize
import zipfile
import zlib
from collections.abc import Iterable

# What zipfile and numpy raise for an .npz file that was cut or overwritten.
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
    """What is wrong, where, and what to do: printed as one line, exit status 2, no traceback."""


def one_line(error: BaseException) -> str:
    """Return an exception's message on a single line, or its class name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def unknown_name(what: str, name: str, known: Iterable[str], *, advice: str = "") -> UserError:
    """Return the error for a ``name`` that is not ``known``, with the nearest known one suggested.

    ``advice`` says where the allowed names are; without it they are listed.
    """
    allowed = list(known)
    nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.3)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return UserError(
        f"{what}: unknown name {name!r}{suggestion} {advice or 'Allowed: ' + ', '.join(allowed)}"
    )
