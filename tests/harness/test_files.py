"""Listing images: by suffix, else by content; links are followed; left-out files are named."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from bstriplet.data import image_files
from bstriplet.data.image_files import HIDDEN, NO_IMAGES, NOWHERE, REPEATED, SYSTEM, list_images
from bstriplet.errors import UserError
from PIL import Image, features


def names_of(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The images and the left-out files, by names below the folder."""

    def below(path: object) -> str:
        return str(path).removeprefix(f"{folder}{os.sep}").replace(os.sep, "/")

    found = list_images(folder)
    left_out = {reason: [*map(below, paths)] for reason, paths in found.left_out.items()}
    return [*map(below, found.images)], left_out


def make(folder: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def encoded(format: str) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(buffer, format)
    return buffer.getvalue()


def test_a_suffix_of_images_is_enough_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, "b.PNG", "a.jpg", "sub/c.tiff", "f.dcm", "g.jfif", "h.jpe", "i.pgm", "j.jp2")
    make(tmp_path, "._b.png", "notes.txt", ".hidden.png", ".git/e.png", ".git/f")
    assert names_of(tmp_path) == (
        ["a.jpg", "b.PNG", "f.dcm", "g.jfif", "h.jpe", "i.pgm", "j.jp2", "sub/c.tiff"],
        {HIDDEN: ["._b.png", ".git (1 images)", ".hidden.png"], NO_IMAGES: ["notes.txt"]},
    )


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM"]


@pytest.mark.parametrize("format", [*FORMATS, *(["AVIF"] if features.check("avif") else [])])
def test_content_decides_where_the_suffix_says_nothing(tmp_path: Path, format: str) -> None:
    make(tmp_path, "IM0001", "1.2.840.512", content=encoded(format))
    assert names_of(tmp_path) == (["1.2.840.512", "IM0001"], {})


def test_every_suffix_of_images_is_known(tmp_path: Path) -> None:
    suffixes = "apng png jpg jpeg jpe jfif mpo bmp dib tif tiff webp gif avif jp2 j2k j2c jpc jpf"
    suffixes += " jpx pbm pgm ppm pnm pfm dcm dicom"
    make(tmp_path, *(f"broken.{suffix}" for suffix in suffixes.split()))
    images, left_out = names_of(tmp_path)
    assert (len(images), left_out) == (len(suffixes.split()), {})


@pytest.mark.parametrize(
    "content",
    [b"GIF87a", b"II+\0", b"MM\0*", b"MM\0+", b"\xff\x4f\xff\x51", b"\0\0\0\x20ftypavif",
     b"\0\0\0\x20ftypavis", b"P1 # of 1990", b"P6\n2 2\n255\n", b"PF\n", b"Pf\n",
     b"BM\n\0\0\0\0\0\0\0", b"RIFF\n\0\0\0WEBP", b"\x08\0\n\0CS", b"\x02\0\x10\0UI",
     b"\x08\0\x05\0\n\0\0\0", b"\0\x08\0\x05CS", b"\0\x02\0\x10UI"],
)  # fmt: skip
def test_rarer_beginnings_of_images_are_known(tmp_path: Path, content: bytes) -> None:
    make(tmp_path, "file", content=content)
    assert names_of(tmp_path) == (["file"], {})


@pytest.mark.parametrize(
    "content",
    [b"", b"P1,34,years", b"P1 34 years\n", b"II*", b"BMI: 23.4, of 20 patients",
     b"RIFF\x24\0\0\0WAVEfmt ",
     b"path,label\na.png,x\n", b"%!PS-Adobe-3.0 EPSF", b"\x89HDF\r\n\x1a\n", b"PK\3\4", bytes(600)],
)  # fmt: skip
def test_other_files_are_no_images(tmp_path: Path, content: bytes) -> None:
    make(tmp_path, "file", "file.txt", content=content)
    assert names_of(tmp_path) == ([], {NO_IMAGES: ["file", "file.txt"]})


def test_folders_of_thumbnails_and_deleted_files_are_left_out_and_counted(tmp_path: Path) -> None:
    folders = ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"]
    folders += ["@tmp", "#snapshot", "~snapshot", "@Recycle", "@Recently-Snapshot", "RECYCLER"]
    folders += ["Recycled", "lost+found", "Network Trash Folder", "Temporary Items"]
    make(tmp_path, "a.png", *(f"{name}/a.png/thumb.jpg" for name in folders), "@eaDir/b.png/c.JPG")
    make(tmp_path, "@eaDir/._d.jpg")  # hidden, no image
    images, left_out = names_of(tmp_path)
    assert images == ["a.png"]
    counts = {name: 1 + (name == "@eaDir") for name in folders}
    assert left_out == {SYSTEM: sorted(f"{name} ({n} images)" for name, n in counts.items())}


def link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("links cannot be made here")


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/deep/a.png", "elsewhere/b.png", "class/c.png")
    link(tmp_path / "class/more", tmp_path / "elsewhere")
    link(tmp_path / "class/d.png", tmp_path / "elsewhere/b.png")
    link(tmp_path / "class/e.png", tmp_path / "nowhere.png")
    link(tmp_path / "class/unmounted", tmp_path / "nowhere")
    link(tmp_path / "class/itself", tmp_path / "class/itself")
    images, left_out = names_of(tmp_path / "class")
    # a broken link is an image that cannot be read, not a missing one
    assert images == ["c.png", "d.png", "e.png", "more/b.png", "more/deep/a.png"]
    assert left_out == {NOWHERE: ["itself", "unmounted"]}


def test_links_cannot_lead_in_a_circle_nor_twice_to_one_folder(tmp_path: Path) -> None:
    make(tmp_path, "set/class/a.png", "set/other/b.png", "set/class/sub/c.png")
    link(tmp_path / "set/class/itself", tmp_path / "set/class")
    link(tmp_path / "set/class/sub/up", tmp_path / "set")  # else other would be of this class
    link(tmp_path / "set/class/sub2", tmp_path / "set/class/sub")
    images, left_out = names_of(tmp_path / "set/class")
    assert images == ["a.png", "sub/c.png"]
    assert left_out == {REPEATED: ["itself", "sub/up", "sub2"]}


def test_a_link_in_a_linked_folder_cannot_lead_to_what_holds_it(tmp_path: Path) -> None:
    make(tmp_path, "store/class/a.png", "store/other/b.png")
    link(tmp_path / "store/class/up", tmp_path / "store")
    link(tmp_path / "class", tmp_path / "store/class")
    assert names_of(tmp_path / "class") == (["a.png"], {REPEATED: ["up"]})


def test_images_and_links_are_taken_in_the_order_of_names_folder_by_folder(tmp_path: Path) -> None:
    make(tmp_path, "set/a-b/0.png", "set/a/1.png", "elsewhere/2.png")
    for name in "udbwex":
        link(tmp_path / "set" / name, tmp_path / "elsewhere")
    images, left_out = names_of(tmp_path / "set")
    assert images == ["a/1.png", "a-b/0.png", "b/2.png"]
    assert left_out == {REPEATED: ["d", "e", "u", "w", "x"]}


def test_an_image_has_the_name_under_which_it_lies_in_the_folder_not_that_of_a_link(
    tmp_path: Path,
) -> None:
    make(tmp_path, "class/b/sub/a.png", "class/c/d.png")
    link(tmp_path / "class/a", tmp_path / "class/b/sub")  # comes first in the order of names
    images, left_out = names_of(tmp_path / "class")
    assert images == ["b/sub/a.png", "c/d.png"]  # as a manifest says them
    assert left_out == {REPEATED: ["a"]}


def test_a_folder_or_file_that_cannot_be_opened_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.png", "locked/b.png", "unknown")
    scan = os.scandir

    def refuse(path: str | Path) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot open .*locked: Permission denied; make it read"):
        list_images(tmp_path)
    monkeypatch.undo()

    def refuse_file(path: str, mode: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(image_files, "open", refuse_file, raising=False)
    with pytest.raises(UserError, match=r"cannot open .*unknown: Permission denied"):
        list_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_image_and_does_not_block(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe")
    assert names_of(tmp_path) == (["a.png"], {NO_IMAGES: ["pipe"]})
