"""Notes that count and name files which were left out or read with a remark."""

from collections.abc import Callable, Mapping, Sequence

from bstriplet.text import visible

Note = Callable[[str], None]  # receives remarks on an image while it is read

ON_SCREEN = 600  # characters of a note on the screen; files on disk have the whole note


def counted(names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return one note for each key of ``names``: ``"2 hidden files were left out: a, b"``."""
    return tuple(
        f"{len(named)} {what}: {visible(', '.join(named))}"
        for what, named in names.items()
        if named
    )


def first(names: Sequence[str]) -> str:
    """Return the first three names, with ``", ..."`` if there are more."""
    return visible(", ".join(names[:3])) + (", ..." if len(names) > 3 else "")


def on_screen(note: str) -> str:
    """Return ``note``, cut to about ``ON_SCREEN`` characters."""
    if len(note) <= ON_SCREEN:
        return note
    return f"{note[:ON_SCREEN].rpartition(', ')[0] or note[:ON_SCREEN]}, ... (all in the report)"
