"""CSV files of common delimiters and encodings, and the names in them, in several spellings."""

import csv
import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from bstriplet import text
from bstriplet.data.layouts import Listing, recognise
from bstriplet.data.tables import read_table
from bstriplet.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = "path,label,patient\nä/0.png,café,p1\nä/1.png,b,\n"
EXPECTED = [("ä/0.png", "café", "p1"), ("ä/1.png", "b", "")]


def listed(listing: Listing) -> list[tuple[str, str, str]]:
    return [(listing.name(entry.path), entry.label, entry.patient) for entry in listing.entries]


def read(folder: Path, content: str | bytes, *files: str | bytes) -> Listing:
    """The listing of a CSV file with these files beside it."""
    for name in files:
        if os.name == "nt" and isinstance(name, bytes):
            pytest.skip("names of files are Unicode here")
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name))))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:
            pytest.skip("this file system has no such names")
    (folder / "list.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return recognise(str(folder / "list.csv"))


# --- delimiters, encodings, rows ------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", ",;\t")
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_delimiter_encoding_and_newlines_do_not_matter(
    tmp_path: Path, delimiter: str, encoding: str, newline: str
) -> None:
    content = ROWS.replace(",", delimiter).replace("\n", newline).encode(encoding)
    listing = read(tmp_path, content)
    assert listed(listing) == EXPECTED
    assert listing.notes == ()


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\r\n" + ROWS.replace(",", ";"),
        "\n,,\n" + ROWS + ",,\n , ,\n\n",
        "note;path;label;patient\n1,5;ä/0.png;café;p1\n2,0;ä/1.png;b;\n",
        '"path", "label", "patient"\n"ä/0.png", "café", "p1"\n"ä/1.png", "b", ""\n',
        "path,label,patient,\nä/0.png,café,p1\nä/1.png,b,,,\n",
        "File Name,CLASS,PatientID\nä/0.png, cafe\u0301 ,p1\nä/1.png,b\u00a0,NaN\n".replace(
            "File Name", "file"
        ),
    ],
)
def test_what_spreadsheets_add_does_not_matter(tmp_path: Path, content: str) -> None:
    assert listed(read(tmp_path, content)) == EXPECTED


def test_a_table_that_is_not_unicode_is_read_with_a_note(tmp_path: Path) -> None:
    listing = read(tmp_path, ROWS.encode("cp1252"), "ä/0.png")
    assert listed(listing) == EXPECTED
    assert listing.entries[0].path.exists()
    (note,) = listing.notes
    assert "not UTF-8 and was read as cp1252" in note


def test_bytes_that_cp1252_lacks_are_read_as_latin_1(tmp_path: Path) -> None:
    (note,) = read(tmp_path, b"path,label\n0.png,\x81\n1.png,b\n").notes
    assert "was read as latin-1" in note


@pytest.mark.parametrize("encoding", ["gbk", "cp1252"])
def test_cells_of_another_encoding_than_the_rest_are_noted(tmp_path: Path, encoding: str) -> None:
    """Some words in GBK and cp1252 are also valid UTF-8, which proves little about a table."""
    words = {"gbk": ("联通", "正常"), "cp1252": ("Ã©", "café")}[encoding]
    rows = "".join(f"{row}.png,{word}\n" for row, word in enumerate(words))
    (note,) = read(tmp_path, f"path,label\n{rows}".encode(encoding)).notes
    assert "list.csv is UTF-8 but for" in note
    assert "cells, whose bytes are kept (line" in note
    assert "\\x" in note


def test_last_cells_that_are_left_out_are_empty(tmp_path: Path) -> None:
    listing = read(tmp_path, b"path,label,patient,age\n0.png,a,Ann\n1.png,b\n")
    assert [(e.label, e.patient) for e in listing.entries] == [("a", "Ann"), ("b", "")]


def test_names_of_files_that_are_not_utf_8_are_found(tmp_path: Path) -> None:
    """They may come from a list of files or from a table in an old code page."""
    files = b"\xe9/0.png", "肺\udcff.png".encode("utf-8", "surrogateescape")
    for number, content in enumerate(
        [b"path,label\n%s,a\n%s,b\n" % files, b"path,label\n\xe9/0.png,a\nx.png,b\n"]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        listing = read(folder, content, *files)
        assert os.fsencode(listing.entries[0].path).endswith(b"\xe9/0.png")
        assert listing.entries[0].path.exists()


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]))] * 2),
        max_size=5,
    ),
    st.sampled_from(",;\t"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_cells_are_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    cells: list[tuple[str, str]],
    delimiter: str,
    encoding: str,
) -> None:
    rows = [(f"path{one}", f"label{other}") for one, other in cells]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("path", "label"), *rows])
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(text.getvalue().encode(encoding))
    table = read_table(file, {"path": ("path",), "label": ("label",)})
    assert [tuple(row.values.values()) for row in table.rows] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\n0.png\n", "line 2: 1 cells, but 2 columns; mend or remove it"),
        ("path,label\n0.png,a,b\n", "line 2: 3 cells, but 2 columns; .*needs quotes"),
        ("path,label,split\n0.png,a,nan\n", "line 2: no split; write one of train,"),
        ("path,label,Label\n0.png,a,b\n", "two columns 'label'"),
        ("path,label\n0.png,a\n1\0.png,b\n", "line 3: holds a NUL character"),
        ('path,label\n"0.png,a\n1.png,b\n', "line 3: unexpected end of data"),
        *(
            (f"path,label\n0.png,a\n1.png,{nothing}\n", f"line 3: label '{nothing}' says")
            for nothing in ("nan", "NaN", "NA", "N/A", "<NA>", "#N/A", "null", "NaT")
        ),
        ("path,label\n0.png,a\n1.png,\u00a0\n", "line 3: no label"),
    ],
)
def test_a_row_that_cannot_be_right_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_none_may_be_a_class_but_no_patient(tmp_path: Path) -> None:
    listing = read(tmp_path, "path,label,patient\n0.png,none,none\n1.png,NAT,nan\n")
    assert listed(listing) == [("0.png", "none", ""), ("1.png", "NAT", "")]


def test_a_second_column_that_could_be_the_label_is_noted(tmp_path: Path) -> None:
    listing = read(tmp_path, "path,class,label\n0.png,x,a\n1.png,y,b\n")
    assert listing.classes == ("a", "b")
    assert listing.notes == ("list.csv: the label was read from column label, not from class",)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "lies"),
    [
        ("images\\0.png", "images/0.png"),
        (unicodedata.normalize("NFD", "é/ü.png"), "é/ü.png"),
        ("é/ü.png", unicodedata.normalize("NFD", "é/ü.png")),
        ("a  b.png", "a b.png"),
    ],
)
def test_a_path_is_found_in_another_spelling(tmp_path: Path, written: str, lies: str) -> None:
    listing = read(tmp_path, f"path,label\n{written},a\nx.png,b\n", lies)
    assert listing.entries[0].path.samefile(tmp_path / lies)


def test_half_a_pair_which_windows_allows_in_names_is_written_and_shown() -> None:
    assert text.encode("a\ud83d") == b"a\xed\xa0\xbd"
    assert text.printable("a\ud83d") == r"a\xed\xa0\xbd"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names are Unicode in any locale")
def test_names_are_the_same_in_a_locale_that_cannot_hold_them(tmp_path: Path) -> None:
    here = listed(read(tmp_path, "path,label\né/肺.png,é\nx.png,b\n", "é/肺.png"))
    code = """
import sys
from bstriplet.data.layouts import recognise
assert sys.getfilesystemencoding() == "ascii"
listing = recognise(sys.argv[1])
assert listing.entries[0].path.is_file()
print(ascii([(listing.name(entry.path), entry.label, entry.patient) for entry in listing.entries]))
"""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    there = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "list.csv")],
        env=os.environ | ascii_only,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert there == f"{here!a}\n"


def test_one_file_in_two_spellings_is_one_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 3: .* is also in .*line 2"):
        read(tmp_path, "path,label\ni/0.png,a\ni\\0.png,b\n", "i/0.png")


def test_one_file_in_two_cases_is_one_file(tmp_path: Path) -> None:
    """On a file system that ignores case, both names exist; here, a second link makes them."""
    (tmp_path / "img.png").touch()
    if not (tmp_path / "IMG.png").exists():
        os.link(tmp_path / "img.png", tmp_path / "IMG.png")
    with pytest.raises(UserError, match=r"line 3: IMG\.png is also in .*line 2"):
        read(tmp_path, "path,label\nimg.png,a\nIMG.png,b\n")


@pytest.mark.skipif(os.name == "nt", reason="there, these are paths like any other")
def test_paths_of_windows_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2: C:\\i\\0\.png is a path of Windows; write"):
        read(tmp_path, "path,label\nC:\\i\\0.png,a\n1.png,b\n")


def test_a_path_in_another_case_is_named(tmp_path: Path) -> None:
    (tmp_path / "PROBE").touch()
    if (tmp_path / "probe").exists():
        pytest.skip("this file system does not tell case")
    with pytest.raises(UserError, match=r"line 2: i/img\.png does not exist; there is .*IMG\.png"):
        read(tmp_path, "path,label\ni/img.png,a\n1.png,b\n", "i/IMG.png")


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("Cat", "cat", "'Cat' .*line 2.* 'cat' .*line 3.*"),
        ("c\u0430t", "cat", r"'c\\u0430t' .* 'cat'"),  # a Cyrillic letter
        ("cat", "ca\u200bt", r"'cat' .* 'ca\\u200bt'"),
        ("cat", "\uff43at", r"'cat' .* '\\uff43at'"),
        ("Вид", "вид", ".*"),  # of which only the capital looks Latin
        ("non-tumor", "non\u2013tumor", r"'non-tumor' .* 'non\\u2013tumor'"),
        ("Crohn's", "Crohn\u2019s", r".*Crohn's.* 'Crohn\\u2019s'"),
        ("\u2764", "\u2764\ufe0f", r"'\\u2764' .* '\\u2764\\ufe0f'"),
    ],
)
def test_classes_that_look_alike_are_refused_and_told_apart(
    tmp_path: Path, one: str, other: str, shown: str
) -> None:
    with pytest.raises(UserError, match=f"{shown}.*look alike"):
        read(tmp_path, f"path,label\n0.png,{one}\n1.png,{other}\n2.png,dog\n")
