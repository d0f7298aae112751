"""CSV files of any common delimiter and encoding, and the image files that they name."""

import codecs
import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bstriplet.data.names import Spellings, letters, says_nothing
from bstriplet.errors import UserError, one_line
from bstriplet.text import decode, on_disk, printable

DELIMITERS = (",", ";", "\t")
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_EXCEL_DELIMITER = re.compile('"?sep=([^\\w\\s"]|\t)"?[ \t]*(?=[\r\n]|$)', re.IGNORECASE)
_BYTES = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, see `bstriplet.text`
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")


class Row(NamedTuple):
    """A row: its file and line, and its values by key; an absent column has no value."""

    where: str
    values: dict[str, str]


@dataclass(frozen=True)
class Table:
    """The rows of a file; ``notes`` are remarks on how it was read."""

    file: Path
    encoding: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def read_table(
    file: Path, columns: Mapping[str, tuple[str, ...]], optional: frozenset[str] = frozenset()
) -> Table:
    """Return the rows of a CSV file, without empty rows; values by the keys of ``columns``.

    ``columns`` gives the spellings of each column, the preferred one first; case and signs do not
    matter. The delimiter is the one of ``, ; tab`` that yields most of these columns. A column that
    is not ``optional`` must be there and have a value in every row. A cell such as NaN counts as
    empty.

    Raises:
        UserError: the file cannot be read, a column is missing or occurs twice, or a row has too
            few cells, more cells than the header, or no value. The message names the line.
    """
    try:
        text, encoding = _decoded(file.read_bytes())
        if "\0" in text:
            line = text[: text.index("\0")].count("\n") + 1
            raise UserError(f"{file}, line {line}: holds a NUL character; save it as UTF-8 text")
        text, delimiter = _with_delimiter(text, columns)
        records = _records(text, delimiter)
        _, names = next(records, (0, []))
        places, notes = _places(file, names, columns, optional)
        rows = tuple(_rows(file, records, names, places, optional)) if places else ()
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}; mend or remove it") from error
    notes += _note_on_bytes(file, rows) if _BYTES.search(text) else ()
    if encoding in ("cp1252", "latin-1"):
        notes.append(
            f"{file.name} is not UTF-8 and was read as {encoding}; save it as UTF-8 if names in it "
            "are not what they should be"
        )
    return Table(file, encoding, rows, tuple(notes))


def _decoded(content: bytes) -> tuple[str, str]:
    """Return text and encoding: the encoding of the byte order mark, else the first that fits."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding), encoding
    # Names of columns begin with ASCII letters; in UTF-16, every other byte of them is zero.
    if content[1:4:2] == b"\0\0":
        return content.decode("utf-16-le"), "utf-16-le"
    if content[:3:2] == b"\0\0":
        return content.decode("utf-16-be"), "utf-16-be"
    text = decode(content)
    beyond_ascii = re.search("[^\0-\x7f\udc80-\udcff]", text)
    if beyond_ascii or not _BYTES.search(text):
        return text, "utf-8"  # bytes that do not fit are kept: they may belong to file names
    try:
        return content.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        return content.decode("latin-1"), "latin-1"


def _with_delimiter(text: str, columns: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """Return text and delimiter: that of Excel's line sep=, else the one that fits best."""
    if given := _EXCEL_DELIMITER.match(text):
        return text[given.end() :], given.group(1)
    spellings = {letters(name) for names in columns.values() for name in names}

    def known(delimiter: str) -> int:
        try:
            _, names = next(_records(text, delimiter), (0, []))
        except csv.Error:  # quoted cells with another delimiter between them
            return -1
        return sum(letters(name) in spellings for name in names)

    return text, max(DELIMITERS, key=known)


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of every row that has a value.

    The reader is strict, because an unclosed quote would otherwise swallow the rows below it.
    """
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error


def _places(
    file: Path,
    names: list[str],
    columns: Mapping[str, tuple[str, ...]],
    optional: frozenset[str],
) -> tuple[dict[str, int], list[str]]:
    """Return the position of each column that is present, and notes."""
    found = [letters(name) for name in names]
    places, notes = {}, []
    for key, spellings in columns.items():
        there = [name for name in map(letters, spellings) if name in found]
        if there:
            places[key] = found.index(there[0])
            if found.count(there[0]) > 1:
                raise UserError(f"{file} has two columns {spellings[0]!r}; remove one of them")
        elif key not in optional:
            listed = ", ".join(name.strip() for name in names if name.strip())
            raise UserError(
                f"{file} has no column {spellings[0]!r}; it has {listed or 'none'} (columns are "
                "separated by commas, semicolons or tabs)"
            )
        if len(set(there)) > 1:
            used, *ignored = (names[found.index(name)].strip() for name in dict.fromkeys(there))
            notes.append(
                f"{file.name}: the {key} was read from column {used}, not from {', '.join(ignored)}"
            )
    return places, notes


def _note_on_bytes(file: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a note on cells that are not UTF-8, for a table that is UTF-8 otherwise."""
    odd = [
        f"{where.removeprefix(f'{file}, ')}: {printable(value)}"
        for where, values in rows
        for value in values.values()
        if _BYTES.search(value)
    ]
    if odd:
        yield (
            f"{file.name} is UTF-8 but for {len(odd)} cells, whose bytes are kept ({odd[0]}); save "
            "it as UTF-8 if names in it are not what they should be"
        )


def _rows(
    file: Path,
    records: Iterator[tuple[int, list[str]]],
    names: list[str],
    places: Mapping[str, int],
    optional: frozenset[str],
) -> Iterator[Row]:
    width = max((place + 1 for place, name in enumerate(names) if name.strip()), default=0)
    # Spreadsheets leave out the last empty cells. Where all columns are optional, a row must have
    # all cells: nothing else distinguishes it from a stray line.
    needed = max((place + 1 for key, place in places.items() if key not in optional), default=width)
    for line, cells in records:
        where = f"{file}, line {line}"
        if len(cells) < needed or any(cell.strip() for cell in cells[width:]):
            hint = "" if len(cells) < needed else " (a cell that holds the delimiter needs quotes)"
            raise UserError(
                f"{where}: {len(cells)} cells, but {width} columns; mend or remove it{hint}"
            )
        cells += [""] * (width - len(cells))
        values = {key: cells[place].strip() for key, place in places.items()}
        for key, value in values.items():
            if not (says_nothing(value) or (key in optional and value.casefold() == "none")):
                continue
            if key not in optional:
                raise UserError(
                    f"{where}: {key} {value!r} says that there is none; fill it or remove the line"
                    if value
                    else f"{where}: no {key}; fill it or remove the line"
                )
            values[key] = ""
        yield Row(where, values)


class Finder:
    """Finds the files that a table names, in any spelling."""

    def __init__(self, table: Table) -> None:
        self._root = table.file.parent
        self._encoding = table.encoding
        self._folders: dict[Path, Spellings] = {}

    def find(self, where: str, written: str) -> Path:
        """Return the file that a cell names; relative paths start in the table's folder.

        If no file has the name as written, backslashes separate folders and the Unicode form does
        not matter. If there is still no file, the path is returned with slashes for backslashes.

        Raises:
            UserError: the path has a Windows drive on another system, or only its case is wrong.
        """
        path = self._root / on_disk(written)
        if os.path.exists(path):
            return path
        if os.name != "nt" and _WINDOWS_DRIVE.match(written):
            raise UserError(
                f"{where}: {written} is a path of Windows; write paths relative to the folder of "
                "the table"
            )
        path = self._root / on_disk(written.replace("\\", "/"))
        found = self._search(path, Spellings.find) or self._by_bytes(written)
        if found:
            return found
        if there := self._search(path, Spellings.in_other_case):
            raise UserError(f"{where}: {written} does not exist; there is {there}: write it so")
        return path

    def _by_bytes(self, written: str) -> Path | None:
        """Return the file whose name has the bytes of the cell, for a table that is not Unicode."""
        if self._encoding not in ("cp1252", "latin-1") or os.name == "nt":
            return None
        path = self._root / os.fsdecode(written.replace("\\", "/").encode(self._encoding))
        return path if os.path.exists(path) else None

    def _search(self, path: Path, find: Callable[[Spellings, str], str | None]) -> Path | None:
        """Return an existing path for ``path``; ``find`` replaces the parts that do not exist."""
        if os.path.exists(path):
            return path
        parent = self._search(path.parent, find) if path.parent != path else None
        name = find(self._spellings(parent), path.name) if parent else None
        return parent / name if parent and name else None

    def _spellings(self, folder: Path) -> Spellings:
        if folder not in self._folders:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            self._folders[folder] = Spellings(names)
        return self._folders[folder]
