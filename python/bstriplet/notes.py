"""What was left out or read otherwise than it lies: counted and named."""

import re
from collections.abc import Callable, Mapping, Sequence

Note = Callable[[str], None]  # told, while an image is read, what is odd about it

ON_SCREEN = 600  # characters of a note on the screen; what is written to disk has all of it

# A file name may hold them (that of a folder's icon on a Mac does); a terminal would obey.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


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


def visible(text: str) -> str:
    """Return text with its control characters as escapes."""
    return _CONTROLS.sub(lambda control: ascii(control.group())[1:-1], text)


def on_screen(note: str) -> str:
    """Return a note that names very many files cut short."""
    if len(note) <= ON_SCREEN:
        return note
    return f"{note[:ON_SCREEN].rpartition(', ')[0] or note[:ON_SCREEN]}, ... (all in the report)"
