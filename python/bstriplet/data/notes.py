"""What was left out or read otherwise than it lies: counted and named."""

from collections.abc import Callable, Mapping, Sequence

from bstriplet.text import visible

Note = Callable[[str], None]  # told, while an image is read, what is odd about it

ON_SCREEN = 600  # characters of a note on the screen; what is written to disk has all of it


def counted(names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return a note for each kind of thing: ``"2 hidden files were left out: a, b"``."""
    return tuple(
        f"{len(named)} {what}: {visible(', '.join(named))}"
        for what, named in names.items()
        if named
    )


def first(names: Sequence[str]) -> str:
    """Return the first three names, and that there are more."""
    return visible(", ".join(names[:3])) + (", ..." if len(names) > 3 else "")


def on_screen(note: str) -> str:
    """Return a note that names very many files cut short."""
    if len(note) <= ON_SCREEN:
        return note
    return f"{note[:ON_SCREEN].rpartition(', ')[0] or note[:ON_SCREEN]}, ... (all in the report)"
