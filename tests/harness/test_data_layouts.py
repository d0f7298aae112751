"""Each layout as it is downloaded: recognised, counted, patients read from names and tables."""

import csv
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bstriplet import paper
from bstriplet.config import TrainConfig
from bstriplet.data import image_files
from bstriplet.data.dataset import Dataset, load_dataset, load_test_images, split_dataset
from bstriplet.data.image_files import NO_IMAGES, NOWHERE
from bstriplet.data.layouts import NO_PART, NOT_OPENED, recognise, recognise_test
from bstriplet.data.notes import counted, first, on_screen
from bstriplet.errors import UserError
from PIL import Image

GENERATOR = np.random.default_rng(0)


def write_images(folder: Path, *names: str) -> None:
    """Write an image of random greys under each name; the suffix decides the format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = GENERATOR.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def counts(dataset: Dataset) -> dict[tuple[str, str], int]:
    return Counter(
        (str(part), dataset.classes[label])
        for part, label in zip(dataset.parts, dataset.images.labels, strict=True)
    )


def patient_of(dataset: Dataset) -> dict[str, int]:
    """The number of the patient by file name."""
    assert dataset.patients is not None
    return {
        Path(file).name: int(patient)
        for file, patient in zip(dataset.images.files, dataset.patients, strict=True)
    }


# --- class trees ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [("train", "val", "test"), ("Train", "Valid", "Test"), ("TRAINING", "Validation", "Testing")],
)
def test_parts_may_be_spelled_in_any_way(
    tmp_path: Path, train: str, validation: str, test: str
) -> None:
    for part, count in ((train, 5), (validation, 2), (test, 3)):
        for label in "ab":
            write_images(tmp_path / part / label, *(f"{i}.png" for i in range(count)))
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.layout == "class tree"
    task = split_dataset(dataset, TrainConfig())
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 4, 6)
    assert all(file.startswith(f"{validation}/") for file in task.validation.files)
    assert dataset.notes == task.notes == ()


def test_a_delivered_validation_part_is_kept_while_a_test_part_is_made(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("val", 2)):
        for label in "ab":
            write_images(tmp_path / part / label, *(f"{i}.png" for i in range(count)))
    task = split_dataset(load_dataset(str(tmp_path), 16), TrainConfig())
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 4, 4)
    assert all(file.startswith("train/") for file in task.test.files)


def test_all_that_lies_there_and_is_not_taken_is_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in "ab":
            write_images(tmp_path / "set" / part / label, *(f"{i}.png" for i in range(4)))
    write_images(tmp_path / "set/train/@eaDir/0.png", "thumb.png")
    write_images(tmp_path / "set/train", "stray.png")
    write_images(tmp_path / "set/train/a/.ipynb_checkpoints", "0.png")
    write_images(tmp_path / "set/more/c", "1.png", "2.png")
    write_images(tmp_path / "set/masks", "1.png")
    write_images(tmp_path / "set", "cover.png")
    write_images(tmp_path, "outside.png")
    (tmp_path / "set/LICENSE").write_text("free")  # beside the classes, only images matter
    for folder in ("train/b", "test/b"):
        (tmp_path / "set" / folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "set/papers").mkdir()  # no images, no matter
    expected = {
        "3 images beside the class folders were left out: cover.png, {outside}, train/stray.png",
        "2 folders of images beside those of the parts were left out: masks (1 images), "
        "more (2 images)",
        "1 folders of thumbnails, deleted or system files were left out: train/@eaDir (1 images)",
        "1 hidden files or folders were left out: train/a/.ipynb_checkpoints (1 images)",
        "2 files of kinds that are not read were left out: train/b/Thumbs.db, test/b/Thumbs.db",
    }
    dataset = load_dataset(str(tmp_path), 16)
    assert set(dataset.classes) == {"a", "b"}
    assert len(dataset.images) == 16
    outside = (tmp_path / "outside.png").as_posix()
    assert set(dataset.notes) == {note.format(outside=outside) for note in expected}
    _, notes = load_test_images(str(tmp_path), ("a", "b"), 16, 1, skip_broken=False)
    assert notes == ("1 files of kinds that are not read were left out: test/b/Thumbs.db",)
    _, notes = load_test_images(str(tmp_path / "set/test"), ("a", "b"), 16, 1, skip_broken=False)
    assert notes == ("1 files of kinds that are not read were left out: b/Thumbs.db",)


def test_a_hidden_folder_beside_the_classes_is_named_where_it_holds_images(tmp_path: Path) -> None:
    for label in "ab":
        write_images(tmp_path / "test" / label, "0.png", "1.png")
    write_images(tmp_path / "test/.cache", "0.png")
    (tmp_path / "test/.git").mkdir()
    (tmp_path / "test/.git/HEAD").write_text("ref")
    write_images(tmp_path / "test", "stray.png")
    _, notes = load_test_images(str(tmp_path), ("a", "b"), 16, 1, skip_broken=False)
    assert set(notes) == {
        "1 hidden files or folders were left out: test/.cache (1 images)",
        "1 images beside the class folders were left out: test/stray.png",
    }


def test_a_linked_class_and_images_without_suffix_are_trained_on(tmp_path: Path) -> None:
    write_images(tmp_path / "store/deep", *(f"{i}.png" for i in range(3)))
    write_images(tmp_path / "set/train/a", *(f"{i}.png" for i in range(3)))
    write_images(tmp_path / "set/train/b", "0.jpeg")
    (tmp_path / "set/train/b/0.jpeg").rename(tmp_path / "set/train/b/IM0")
    try:
        (tmp_path / "set/train/b/linked").symlink_to(tmp_path / "store", target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    dataset = load_dataset(str(tmp_path / "set"), 16)
    assert counts(dataset) == {("train", "a"): 3, ("train", "b"): 4}
    assert dataset.notes == ()


def test_a_folder_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "train/a", "1.png")
    allowed = Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:
        if folder == locked:
            raise PermissionError(13, "Permission denied")
        return allowed(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    for locked in (tmp_path, tmp_path / "train"):
        with pytest.raises(
            UserError, match=f"cannot open {re.escape(str(locked))}: Permission denied"
        ):
            load_dataset(str(tmp_path), 16)


def test_a_class_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    for label in "ab":
        write_images(tmp_path / "train" / label, *(f"{i}.png" for i in range(5)))
    try:
        (tmp_path / "train" / "c").symlink_to(tmp_path / "unmounted")
    except OSError:
        pytest.skip("links cannot be made here")
    assert load_dataset(str(tmp_path), 16).notes == (f"1 {NOWHERE}: train/c",)


def test_what_cannot_be_opened_beside_the_data_is_named_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a spreadsheet that is open elsewhere, or a folder of another user."""
    for label in "ab":
        write_images(tmp_path / "train" / label, *(f"{i}.png" for i in range(5)))
    write_images(tmp_path / "locked", "a.png")
    (tmp_path / "labels.xlsx").write_bytes(b"PK")
    scan = os.scandir

    def refuse(path: str | Path, *mode: str) -> object:
        if mode or str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(image_files, "open", refuse, raising=False)
    assert recognise(str(tmp_path)).left_out_notes == (f"2 {NOT_OPENED}: labels.xlsx, locked",)


def test_control_characters_of_names_are_escaped_in_notes_and_bytes_kept() -> None:
    """A folder's icon on a Mac has such a name; a terminal would obey other control characters."""
    names = ["Icon\r", "two\nlines", "\x1b[31m", "\x7f\x9b31m", "caf\udce9", "naïve"]
    assert counted({"were left out": names, "": []}) == (
        r"6 were left out: Icon\r, two\nlines, \x1b[31m, \x7f\x9b31m, caf" + "\udce9, naïve",
    )


def test_of_many_names_the_first_three_are_shown() -> None:
    assert first(["a", "\x1b[31m", "b"]) == r"a, \x1b[31m, b"
    assert first(list("abcd")) == "a, b, c, ..."


def test_a_long_note_is_cut_on_the_screen_after_a_whole_name() -> None:
    name, more = "x" * 99, ", ... (all in the report)"
    assert on_screen(", ".join([name] * 9)) == ", ".join([name] * 5) + more
    assert on_screen("x" * 601) == "x" * 600 + more
    assert on_screen("x" * 600) == "x" * 600


def test_a_tree_is_found_in_three_folders_around_it_and_no_deeper(tmp_path: Path) -> None:
    for label in "ab":
        write_images(tmp_path / "1/2/3/4/train" / label, "0.png")
    assert recognise(str(tmp_path / "1")).root == tmp_path / "1/2/3/4"
    with pytest.raises(UserError, match="has no folder 'train'"):
        recognise(str(tmp_path))


def test_which_of_two_trees_is_meant_is_not_guessed(tmp_path: Path) -> None:
    for tree in ("one", "two"):
        for label in "ab":
            write_images(tmp_path / tree / "train" / label, "0.png")
    with pytest.raises(UserError, match="has no folder 'train'"):
        recognise(str(tmp_path))


def test_two_spellings_of_one_part_are_an_error(tmp_path: Path) -> None:
    for part in ("train", "training"):
        write_images(tmp_path / part / "a", "1.png")
    with pytest.raises(UserError, match="two folders for train: train, training"):
        load_dataset(str(tmp_path), 16)


# --- the sets of the paper ------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_chest_1_as_kaggle_delivers_it(tmp_path: Path, inside: bool) -> None:
    for part, count in (("train", 4), ("test", 2)):
        for label in ("COVID19", "NORMAL", "PNEUMONIA"):
            names = (f"{label}({number}).jpg" for number in range(count))
            write_images(tmp_path / "Data" / part / label, *names)
    dataset = load_dataset(str(tmp_path / "Data" if inside else tmp_path), 16)
    assert dataset.layout.startswith("Chest-1")
    assert dataset.classes == ("COVID19", "NORMAL", "PNEUMONIA")
    assert counts(dataset)["test", "COVID19"] == 2
    assert dataset.patients is None
    assert [(c.part, c.label, c.found, c.paper) for c in dataset.counts][-2:] == [
        ("train", "Covid-19", 4, 920),
        ("test", "Covid-19", 2, 116),
    ]
    (note,) = dataset.notes
    assert "Table 2" in note
    assert "train Covid-19 4 (920)" in note


def make_chest_2(root: Path, validation: bool = True) -> None:
    write_images(
        root / "train/NORMAL",
        *("IM-0115-0001.jpeg", "IM-0117-0001.jpeg", "NORMAL2-IM-0115-0001.jpeg"),
        *("NORMAL2-IM-0666-0001-0001.jpeg", "NORMAL2-IM-0666-0001-0002.jpeg"),
    )
    write_images(
        root / "train/PNEUMONIA",
        *("person1_bacteria_1.jpeg", "person1_bacteria_2.jpeg", "person10_bacteria_43.jpeg"),
        *("person1_virus_7.jpeg", "person1005_virus_1688.jpeg"),
    )
    write_images(root / "test/NORMAL", "IM-0001-0001.jpeg", "NORMAL2-IM-0007-0001.jpeg")
    write_images(root / "test/PNEUMONIA", "person100_bacteria_475.jpeg", "person10_virus_35.jpeg")
    if validation:
        write_images(root / "val/NORMAL", "NORMAL2-IM-1427-0001.jpeg")
        write_images(root / "val/PNEUMONIA", "person1946_bacteria_4874.jpeg")


def test_chest_2_as_kaggle_delivers_it(tmp_path: Path) -> None:
    root = tmp_path / "chest_xray"
    make_chest_2(root)
    make_chest_2(root / "chest_xray")  # the archive holds a copy of itself
    write_images(root / "__MACOSX/train/NORMAL", "._IM-0115-0001.png")
    (root / "train/.DS_Store").write_bytes(b"\0")
    (root / "train/NORMAL/.DS_Store").write_bytes(b"\0")
    (root / "train/NORMAL/._IM-0115-0001.jpeg").write_bytes(b"\0")
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.layout.startswith("Chest-2")
    assert counts(dataset) == {
        ("train", "NORMAL"): 5,
        ("train", "PNEUMONIA"): 5,
        ("test", "NORMAL"): 2,
        ("test", "PNEUMONIA"): 2,
    }
    who = patient_of(dataset)
    same = {name for name in who if who[name] == who["person1_bacteria_1.jpeg"]}
    assert same == {"person1_bacteria_1.jpeg", "person1_bacteria_2.jpeg", "person1_virus_7.jpeg"}
    assert who["NORMAL2-IM-0666-0001-0001.jpeg"] == who["NORMAL2-IM-0666-0001-0002.jpeg"]
    assert who["IM-0115-0001.jpeg"] != who["IM-0117-0001.jpeg"]
    assert who["IM-0115-0001.jpeg"] != who["NORMAL2-IM-0115-0001.jpeg"]
    again, hidden, left_out, differing, shared = dataset.notes
    assert hidden == (
        "2 hidden files or folders were left out: train/NORMAL/.DS_Store, "
        "train/NORMAL/._IM-0115-0001.jpeg"
    )
    assert (
        again
        == "1 folders of images beside those of the parts were left out: chest_xray (16 images)"
    )
    assert "the 2 images of the folder val are left out" in left_out
    assert "train Normal 5 (1341)" in differing
    assert "1 patients are in the test part and in another: person10;" in shared


def test_chest_2_as_mendeley_delivers_it(tmp_path: Path) -> None:
    root = tmp_path / "ChestXRay2017/chest_xray"
    write_images(
        root / "train/NORMAL", "NORMAL-1003233-0001.jpeg", "NORMAL-1003233-0002.jpeg",
        "NORMAL-2-0001.jpeg",
    )  # fmt: skip
    write_images(root / "train/PNEUMONIA", "BACTERIA-7422-0001.jpeg", "VIRUS-7423-0001.jpeg")
    write_images(root / "test/NORMAL", "NORMAL-3-0001.jpeg")
    write_images(root / "test/PNEUMONIA", "virus-9-0001.JPEG")
    (tmp_path / "__MACOSX").mkdir()
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.layout.startswith("Chest-2")
    who = patient_of(dataset)
    assert who["NORMAL-1003233-0001.jpeg"] == who["NORMAL-1003233-0002.jpeg"]
    assert len(set(who.values())) == 6
    (differing,) = dataset.notes
    assert "not the counts of Table 5" in differing


@pytest.mark.parametrize(
    ("count", "more", "kept"), [(8, (), 0), (9, (), 17), (4, ("COVID19",), 12)]
)
def test_the_16_images_of_kaggles_folder_val_are_left_out_and_no_others(
    tmp_path: Path, count: int, more: tuple[str, ...], kept: int
) -> None:
    for label in ("NORMAL", "PNEUMONIA", *more):
        write_images(tmp_path / "train" / label, "person1_bacteria_1.jpeg")
        names = (f"person{number}_virus_1.jpeg" for number in range(2, 2 + count))
        write_images(tmp_path / "val" / label, *names)
    if kept == 17:
        (tmp_path / "val/NORMAL/person2_virus_1.jpeg").unlink()
    listing = recognise(str(tmp_path))
    assert sum(entry.part == "validation" for entry in listing.entries) == kept
    assert any("images of the folder val are left out" in note for note in listing.notes) == (
        not kept
    )


@pytest.mark.parametrize(("strangers", "known"), [(1, "chest2"), (2, None)])
def test_chest_2_is_known_where_more_than_nine_tenths_have_its_names(
    tmp_path: Path, strangers: int, known: str | None
) -> None:
    write_images(tmp_path / "train/NORMAL", *(f"IM-{n}-0001.jpeg" for n in range(10)))
    names = (f"{'x-' if n < strangers else ''}person{n}_virus_1.jpeg" for n in range(10))
    write_images(tmp_path / "train/PNEUMONIA", *names)
    listing = recognise(str(tmp_path))
    assert (listing.known.name if listing.known else None) == known


def test_a_manifest_says_more_than_names_do(tmp_path: Path) -> None:
    make_chest_2(tmp_path, validation=False)
    (tmp_path / "manifest.csv").write_text(
        "file,patient\ntrain/PNEUMONIA/person1_virus_7.jpeg,another child\n"
    )
    who = patient_of(load_dataset(str(tmp_path), 16))
    assert who["person1_bacteria_1.jpeg"] == who["person1_bacteria_2.jpeg"]
    assert who["person1_bacteria_1.jpeg"] != who["person1_virus_7.jpeg"]


def make_tree_with_manifest(root: Path, manifest: str) -> Path:
    """Four training and two test images per class, and a manifest."""
    for part, count in (("train", 4), ("test", 2)):
        for label in "ab":
            write_images(root / part / label, *(f"{i}.png" for i in range(count)))
    (root / "manifest.csv").write_text(manifest)
    return root


def test_a_manifest_may_spell_names_in_other_ways(tmp_path: Path) -> None:
    root = make_tree_with_manifest(
        tmp_path,
        "file;patient\ntrain\\a\\0.png;Ann\n./test/a/0.png;ann \ntrain/b/0.png;Bob\n"
        "train/b/0.png;BOB\n",
    )
    dataset = load_dataset(str(root), 16)
    of = dict(zip(dataset.images.files, dataset.patients, strict=True))  # type: ignore[arg-type]
    assert of["train/a/0.png"] == of["test/a/0.png"] != of["train/b/0.png"]
    unknown, shared = dataset.notes
    assert unknown == (
        "9 images have no patient, others have: train/a/1.png, train/a/2.png, train/a/3.png, ...; "
        "each counts as a patient of its own"
    )
    assert "1 patients are in the test part and in another: Ann;" in shared


def test_what_a_manifest_names_in_vain_is_counted(tmp_path: Path) -> None:
    root = make_tree_with_manifest(
        tmp_path,
        f"file,patient\ntrain/a/0.jpg,Ann\ntrain/a/1.png,Bob\nx.png,Eve\n{'x' * 300},Joe\ny.png,\n",
    )
    lost, _ = load_dataset(str(root), 16).notes
    assert "3 patients of manifest.csv are not those of an image: line 2: train/a/0.jpg," in lost
    assert lost.endswith(f"line 4: x.png, line 5: {'x' * 300}")
    (root / "train/a/notes.txt").write_text("of Ann")
    (root / "manifest.csv").write_text("file,patient\ntrain/a/notes.txt,Ann\n")
    assert not [n for n in load_dataset(str(root), 16).notes if "manifest.csv" in n]  # it is there
    (root / "train/a/notes.txt").unlink()
    (root / "manifest.csv").write_text("file,split\ntrain/a/0.png,train\n")
    (note,) = load_dataset(str(root), 16).notes
    assert "manifest.csv has no column patient" in note
    (root / "manifest.csv").write_bytes(b"patient,\xe9\n" + 4 * b"Ann,1\n")
    encoding, note = load_dataset(str(root), 16).notes
    assert "manifest.csv is not UTF-8" in encoding
    assert note.startswith("4 patients of manifest.csv are not those of an image: line 2: ,")
    assert note.endswith("line 4: , ...")


@pytest.mark.skipif(os.name == "nt", reason="there, a backslash is in no name")
def test_a_manifest_may_name_a_file_with_a_backslash_in_its_name(tmp_path: Path) -> None:
    root = make_tree_with_manifest(tmp_path, "file,patient\ntrain/a/x\\y.png,Ann\n")
    write_images(root / "train/a", "x\\y.png")
    assert [e.path.name for e in recognise(str(root)).entries if e.patient] == ["x\\y.png"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("file,patient\nTrain/a/0.png,Ann\n", "line 2: .* there is train/a/0.png"),
        ("file,patient\ntrain/a/0.png,Ann\ntrain/a/0.png,Bob\n", "line 3: .* Ann and Bob"),
        ("file,patient\ntrain/a/0.png\n", "line 2: 1 cells"),
    ],
)
def test_a_wrong_manifest_is_explained(tmp_path: Path, manifest: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(str(make_tree_with_manifest(tmp_path, manifest)), 16)


def test_class_folders_are_compared_in_one_form(tmp_path: Path) -> None:
    for part, form in (("train", "NFD"), ("test", "NFC")):
        write_images(tmp_path / part / unicodedata.normalize(form, "é"), "0.png", "1.png")  # type: ignore[arg-type]
        write_images(tmp_path / part / "z", "0.png", "1.png")
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.classes == ("z", "é")  # the order is that of the one form too
    decomposed = ("z", unicodedata.normalize("NFD", "é"))  # as of a model trained before
    images, _ = load_test_images(str(tmp_path), decomposed, 16, 1, skip_broken=False)
    np.testing.assert_array_equal(images.labels, [0, 0, 1, 1])
    with pytest.raises(UserError, match=r"class z is not .* \('z' is not 'Z'\)"):
        load_test_images(str(tmp_path), ("Z", "é"), 16, 1, skip_broken=False)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("b", "B", r"class B is not among .* \('B' is not 'b'\)"),
        ("b", "\u0392", r"\('\\u0392' is not 'b'\)"),
        ("nan", "nan", "'nan' says that there is no class"),
        ("\u0430", "\u0430", r"classes 'a' .* and '\\u0430' .* look alike"),
    ],
)
def test_a_class_folder_that_cannot_be_right(
    tmp_path: Path, train: str, test: str, message: str
) -> None:
    for part, label in (("train", train), ("test", test)):
        write_images(tmp_path / part / "a", "0.png", "1.png")
        write_images(tmp_path / part / label, "0.png", "1.png")
    with pytest.raises(UserError, match=message):
        load_dataset(str(tmp_path), 16)


@pytest.mark.parametrize("name", ["{}.png", "person{}.png", "IM-{}.png", "normal-{}.png"])
def test_normal_and_pneumonia_under_other_names_are_a_tree_of_classes(
    tmp_path: Path, name: str
) -> None:
    for label in ("Normal", "Pneumonia"):
        write_images(tmp_path / "train" / label, *(name.format(i) for i in range(4)))
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.layout == "class tree"
    assert dataset.notes == ()


@pytest.mark.parametrize("cases", [True, False])
def test_rashes_as_kaggle_delivers_them(tmp_path: Path, cases: bool) -> None:
    for part, count in (("Train", 4), ("Validation", 2)):
        folder = tmp_path / "RashData" / part
        if cases:
            write_images(folder / f"{part}_4_Cases" / "Shingles", "1.jpg")
            folder = folder / f"{part}_2_Cases"
        for label in ("Lyme_Negative", "Lyme_Positive"):
            write_images(folder / label, *(f"EM rash{number}.jpg" for number in range(count)))
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.layout.startswith("rash")
    assert dataset.classes == ("Lyme_Negative", "Lyme_Positive")
    assert counts(dataset)["test", "Lyme_Positive"] == 2
    assert [(c.part, c.label, c.found) for c in dataset.counts] == [
        ("train", "Non-Lyme Disease", 4),
        ("test", "Non-Lyme Disease", 2),
        ("train", "Lyme Disease", 4),
        ("test", "Lyme Disease", 2),
    ]
    beside = [note for note in dataset.notes if NO_PART in note]
    assert ["Train_4_Cases (1 images)" in note for note in beside] == [True] * cases
    images, _ = load_test_images(str(tmp_path), dataset.classes, 16, 1, skip_broken=False)
    assert len(images) == 4


def test_rashes_with_a_test_part_are_validated_on_their_validation_part(tmp_path: Path) -> None:
    for part in ("Train", "Validation", "Test"):
        write_images(tmp_path / part / f"{part}_4_Cases" / "Shingles", "1.jpg")
        for label in ("Lyme_Negative", "Lyme_Positive"):
            write_images(tmp_path / part / f"{part}_2_Cases" / label, f"{part}.jpg")
    assert {(e.part, e.path.stem) for e in recognise(str(tmp_path)).entries} == {
        ("train", "Train"),
        ("validation", "Validation"),
        ("test", "Test"),
    }
    tested = recognise_test(str(tmp_path))
    assert [entry.path.stem for entry in tested.entries] == ["Test", "Test"]
    assert tested.left_out_notes == (f"1 {NO_PART}: Test/Test_4_Cases (1 images)",)


@pytest.mark.parametrize(
    ("labels", "lyme"),
    [
        (("LYME", "OTHER"), "LYME"),
        (("Lyme_diagnosed", "lyme-NEG"), "Lyme_diagnosed"),  # "no" is no word in it
        (("Lyme", "Non Lyme"), "Lyme"),
        (("Lyme", "Not-Lyme"), "Lyme"),
        (("Lyme", "No_Lyme"), "Lyme"),
        (("Lyme", "Other", "Third"), None),
        (("A_2_Cases", "B_2_Cases_Lyme", "C_2_Cases"), None),
    ],
)
def test_of_two_classes_that_say_lyme_the_one_that_denies_it_is_the_other(
    tmp_path: Path, labels: tuple[str, ...], lyme: str | None
) -> None:
    for label in labels:
        write_images(tmp_path / "train" / label, *(f"{n}.jpg" for n in range(1 + (label == lyme))))
    listing = recognise(str(tmp_path))
    assert listing.classes == labels
    found = {count.label: count.found for count in listing.counts if count.part == "train"}
    assert found == ({"Non-Lyme Disease": 1, "Lyme Disease": 2} if lyme else {})


def test_counts_that_are_not_the_papers_are_noted_be_they_more_or_fewer(tmp_path: Path) -> None:
    tested = paper.data_set("rash").counts["test"]
    assert tested == {"Non-Lyme Disease": 51, "Lyme Disease": 36}
    for folder, count in (
        ("train/Lyme", 1), ("train/Other", 1), ("test/Lyme", 37), ("test/Other", 51)
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / folder / f"{number}.png").touch()
    (note,) = recognise(str(tmp_path)).notes
    _, listed = note.split(" (in brackets): ")
    assert listed == (
        "train Non-Lyme Disease 1 (206), train Lyme Disease 1 (151), test Lyme Disease 37 (36)"
    )


TILES = {
    "Case-3-A10-33277-6761": "Non-Tumor",
    "Case-3-A10-33300-6761": "Non-Viable-Tumor",
    "Case-4-A7-35317-1973": "Viable",
    "Case-48-P5-C16-53844-23083": "viable: non-viable",
    "P10-B6-19328-19600": "Non-Tumor",
}


def make_osteosarcoma(root: Path) -> None:
    names = list(TILES)
    write_images(root / "Training-Set-1/set1", *(f"{name}.jpg" for name in names[:3]))
    write_images(root / "Training-Set-2/set8", *(f"{name}.jpg" for name in names[3:]))
    (root / "Training-Set-1/set1/PathologistValidation.csv").write_text("a,Viable\n")
    with (root / "ML_Features_1144.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image.name", "red.count", "classification"])
        for name, label in TILES.items():  # the table spells names with blanks
            spelled = name.replace("Case-", "Case ").replace("-", " - ", 1)
            writer.writerow([spelled, "7", label])


def test_osteosarcoma_as_tcia_delivers_it(tmp_path: Path) -> None:
    make_osteosarcoma(tmp_path / "Osteosarcoma-UT")
    dataset = load_dataset(str(tmp_path), 16)
    assert dataset.layout.startswith("osteosarcoma")
    assert dataset.classes == ("Non-Tumor", "Necrotic Tumor", "Viable Tumor")
    assert counts(dataset) == {
        ("train", "Non-Tumor"): 2,
        ("train", "Necrotic Tumor"): 1,
        ("train", "Viable Tumor"): 2,
    }
    who = patient_of(dataset)
    assert len(set(who.values())) == 4
    assert who["Case-3-A10-33277-6761.jpg"] == who["Case-3-A10-33300-6761.jpg"]
    patients = {entry.patient for entry in recognise(str(tmp_path)).entries}
    assert patients == {"case-3", "case-4", "case-48", "p10"}
    tested = recognise_test(str(tmp_path)).entries
    assert Counter(entry.label for entry in tested) == {
        "Non-Tumor": 2,
        "Necrotic Tumor": 1,
        "Viable Tumor": 2,
    }
    assert [(c.part, c.label, c.found, c.paper) for c in dataset.counts] == [
        ("all", "Non-Tumor", 2, 536),
        ("all", "Necrotic Tumor", 1, 263),
        ("all", "Viable Tumor", 2, 345),
    ]


def test_a_table_of_no_tiles_leaves_nothing_to_test_on(tmp_path: Path) -> None:
    (tmp_path / "Training-Set-1").mkdir()
    (tmp_path / "ML_Features_1144.csv").write_text("image.name,classification\n")
    with pytest.raises(UserError, match=r"no image in .* can be read; put some there"):
        load_test_images(str(tmp_path), ("Viable Tumor",), 16, 1, skip_broken=False)


def test_osteosarcoma_is_known_by_its_table_and_tiles_by_any_spelling(tmp_path: Path) -> None:
    make_osteosarcoma(tmp_path)
    table = tmp_path / "ML_Features_1144.csv"
    table.write_text(table.read_text().replace("P10 - B6-19328-19600", "Slide-P10-B6-1.jpg"))
    table.write_bytes(table.read_bytes().replace(b"red", b"r\xe9d"))
    tile = tmp_path / "more/set8/slide P10_B6 (1).JPG"
    (tmp_path / "Training-Set-2").rename(tmp_path / "more")
    (tmp_path / "more/set8/P10-B6-19328-19600.jpg").rename(tile)
    (tmp_path / "Training-Set-1").rename(tmp_path / "tiles")
    listing = recognise(str(tmp_path))
    *_, last = listing.entries
    assert (last.path, last.patient) == (tile, "")  # a name that does not begin with the patient
    encoding, differing = listing.notes
    assert "ML_Features_1144.csv is not UTF-8" in encoding
    assert "all Non-Tumor 2 (536)" in differing


def test_a_tile_that_is_missing_is_named_and_one_that_is_too_many_is_noted(tmp_path: Path) -> None:
    make_osteosarcoma(tmp_path)
    (tmp_path / "Training-Set-2/set8/P10-B6-19328-19600.jpg").rename(tmp_path / "extra.jpg")
    with pytest.raises(UserError, match=r"p10-b6-19328-19600\.jpg \(not found\)"):
        load_dataset(str(tmp_path), 16)
    dataset = load_dataset(str(tmp_path), 16, skip_broken=True)
    assert len(dataset.images) == 4
    assert "1 images that are not in ML_Features_1144.csv were left out: extra.jpg" in dataset.notes


def test_a_tile_that_lies_there_twice_is_taken_once_and_the_other_is_named(tmp_path: Path) -> None:
    make_osteosarcoma(tmp_path)
    write_images(tmp_path / "Training-Set-2/copies", "P10-B6-19328-19600.jpg")
    (tmp_path / "Training-Set-2/notes.txt").write_text("none")
    dataset = load_dataset(str(tmp_path), 16)
    assert len(dataset.images) == 5
    # the first in the order of names
    (note,) = (note for note in dataset.notes if "named as another tile" in note)
    assert note.endswith("were left out: Training-Set-2/set8/P10-B6-19328-19600.jpg")
    # the tables that come with the set are no images that were missed
    assert not any("PathologistValidation" in note for note in dataset.notes)
    assert f"1 {NO_IMAGES}: Training-Set-2/notes.txt" in dataset.notes


def test_a_class_folder_of_unknown_files_says_what_they_are(tmp_path: Path) -> None:
    write_images(tmp_path / "train/a", "1.png")
    (tmp_path / "train/b").mkdir()
    (tmp_path / "train/b/1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match=r"b has no images; .*; 1 files of kinds that are not read"):
        load_dataset(str(tmp_path), 16)


def test_osteosarcoma_without_its_table_says_what_is_missing(tmp_path: Path) -> None:
    make_osteosarcoma(tmp_path)
    (tmp_path / "Training-Set-1").rename(tmp_path / "TRAINING-SET-1")
    (tmp_path / "others").mkdir()
    (tmp_path / "ML_Features_1144.csv").unlink()
    with pytest.raises(UserError, match=r"has no ML_Features_1144\.csv"):
        load_dataset(str(tmp_path), 16)


def test_an_unknown_tile_class_is_an_error(tmp_path: Path) -> None:
    make_osteosarcoma(tmp_path)
    table = tmp_path / "ML_Features_1144.csv"
    table.write_text(table.read_text().replace("Non-Viable-Tumor", "Necrosis"))
    with pytest.raises(UserError, match="line 3, classification: unknown name 'Necrosis'"):
        load_dataset(str(tmp_path), 16)


def test_the_papers_split_of_osteosarcoma_is_four_fifths_of_each_class_by_image() -> None:
    """``split_by="image"`` gives the counts of Table 9 from the class totals, by default."""
    counts = paper.data_set("osteosarcoma").counts
    for label, tested in counts["test"].items():
        assert tested == round(TrainConfig().test_fraction * (counts["train"][label] + tested))


# --- CSV files ------------------------------------------------------------------------------------


def make_csv(root: Path, header: str, *rows: str) -> str:
    write_images(root / "images", *(f"{number}.png" for number in range(8)))
    file = root / "list.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(file)


ROWS = [f"images/{number}.png,{'ab'[number % 2]}" for number in range(8)]


def test_a_csv_file_lists_paths_beside_it(tmp_path: Path) -> None:
    dataset = load_dataset(make_csv(tmp_path, "path,label", *ROWS), 16)
    assert dataset.layout == "CSV file"
    assert dataset.images.files[3] == "images/3.png"
    assert dataset.classes == ("a", "b")
    np.testing.assert_array_equal(dataset.images.labels, [0, 1] * 4)
    assert dataset.patients is None
    assert dataset.folds is None
    assert set(dataset.parts) == {"train"}


def test_classes_of_a_csv_file_are_in_one_form_and_sorted(tmp_path: Path) -> None:
    forms = ["e\u0301", "z", "\u00e9", "z "]
    rows = [f"images/{number}.png,{label}" for number, label in enumerate(forms)]
    listing = recognise(make_csv(tmp_path, "path,label", *rows))
    assert listing.classes == ("z", "\u00e9")
    assert [entry.label for entry in listing.entries] == ["\u00e9", "z"] * 2


def test_a_csv_file_gives_patients_parts_and_folds(tmp_path: Path) -> None:
    rows = [
        f"{row},p{number // 2},{'train' if number < 6 else 'Test'},{number // 4}"
        for number, row in enumerate(ROWS)
    ]
    data = make_csv(tmp_path, "File, class ,patient_id,split,fold", *rows)
    dataset = load_dataset(data, 16)
    np.testing.assert_array_equal(dataset.patients, np.arange(8) // 2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dataset.parts, ["train"] * 6 + ["test"] * 2)
    np.testing.assert_array_equal(dataset.folds, [0] * 4 + [1] * 4)  # type: ignore[arg-type]
    task = split_dataset(dataset, TrainConfig(folds=2, fold=2, validation_fraction=0.5))
    assert task.test.files == tuple(f"images/{number}.png" for number in range(4, 8))
    with pytest.raises(UserError, match="--folds 3: the data give 2"):
        split_dataset(dataset, TrainConfig(folds=3))
    images, _ = load_test_images(data, ("a", "b"), 16, 1, skip_broken=False)
    assert images.files == ("images/6.png", "images/7.png")


def test_folds_are_sorted_as_numbers(tmp_path: Path) -> None:
    folds = ("10", "9", "b", "2", "a", "10", "1", "2")
    rows = [f"{row},{fold}" for row, fold in zip(ROWS, folds, strict=True)]
    dataset = load_dataset(make_csv(tmp_path, "path,label,fold", *rows), 16)
    expected = [3, 2, 5, 1, 4, 3, 0, 1]
    np.testing.assert_array_equal(dataset.folds, expected)  # type: ignore[arg-type]


def test_what_is_odd_about_a_csv_file_is_noted_to_train_and_to_test(tmp_path: Path) -> None:
    data = make_csv(tmp_path, "path,label,class", *(f"{row},x" for row in ROWS))
    expected = ("list.csv: the label was read from column label, not from class",)
    assert load_dataset(data, 16).notes == expected
    assert load_test_images(data, ("a", "b"), 16, 1, skip_broken=False)[1] == expected


@pytest.mark.parametrize("others", [0, 1, 2, 3])
def test_the_column_of_paths_has_four_names_of_which_the_first_counts(
    tmp_path: Path, others: int
) -> None:
    *ignored, column = ["Image", "filename", "File", "path"][: others + 1]
    header = ",".join([*ignored, column, "label"])
    rows = ["elsewhere.png," * others + row for row in ROWS]
    listing = recognise(make_csv(tmp_path, header, *rows))
    assert [entry.path.name for entry in listing.entries] == [f"{n}.png" for n in range(8)]
    assert [f"from column {column}, not" in note for note in listing.notes] == [True] * bool(others)


def test_validation_images_of_a_csv_file_are_not_tested_on(tmp_path: Path) -> None:
    rows = [f"{row},{('train', 'val', 'test')[number // 3]}" for number, row in enumerate(ROWS)]
    tested = recognise_test(make_csv(tmp_path, "path,label,split", *rows)).entries
    assert [entry.path.name for entry in tested] == ["6.png", "7.png"]


def test_a_table_of_tabs_may_be_called_tsv(tmp_path: Path) -> None:
    file = make_csv(tmp_path, "path\tlabel", *(row.replace(",", "\t") for row in ROWS))
    table = Path(file).rename(tmp_path / "list.TSV")
    dataset = load_dataset(str(table), 16)
    assert (len(dataset.images), dataset.layout) == (8, "CSV file")


def test_patients_are_compared_in_one_form_and_nan_is_none(tmp_path: Path) -> None:
    patients = ["images/7.png", "Images/7.PNG ", "Zo\u00eb", "zoe\u0308", "nan", "NaN", "NA", ""]
    rows = [f"{row},{patient}" for row, patient in zip(ROWS, patients, strict=True)]
    dataset = load_dataset(make_csv(tmp_path, "path,label,patient", *rows), 16)
    np.testing.assert_array_equal(dataset.patients, [0, 0, 1, 1, 2, 3, 4, 5])  # type: ignore[arg-type]
    assert "4 images have no patient, others have: images/4.png" in dataset.notes[0]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,kind", ROWS, "no column 'label'; it has path, kind"),
        ("path,label", ["images/0.png,a", "images/1.png,"], "line 3: no label; fill it"),
        ("path,label", [*ROWS, ROWS[0]], r"line 10: images/0\.png is also in .*line 2"),
        ("path,label,split", [f"{row},fit" for row in ROWS], "line 2: split 'fit' is not one of"),
        ("path,label,split", [f"{row}," for row in ROWS], "line 2: no split; write one of"),
        ("path,label,fold", [*(f"{row},1" for row in ROWS[1:]), f"{ROWS[0]},"], "has no fold"),
        ("path,label", ROWS[::2], "one class only, 'a'"),
        ("path,label", [], "lists no images"),
        ("path,label,split", [f"{row},test" for row in ROWS], "no images for training"),
        (
            "path,label,split",
            [*(f"{row},train" for row in ROWS), "images/x.png,c,test"],
            r"x\.png: class c is not among the training classes",
        ),
    ],
)
def test_a_wrong_csv_file_is_explained(
    tmp_path: Path, header: str, rows: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(make_csv(tmp_path, header, *rows), 16)


def test_a_file_that_a_csv_lists_in_vain_is_named_or_skipped(tmp_path: Path) -> None:
    data = make_csv(tmp_path, "path,label", *ROWS)
    (tmp_path / "images/5.png").unlink()
    with pytest.raises(UserError, match=r"1 of 8 images cannot be read: images/5\.png \(not foun"):
        load_dataset(data, 16)
    assert load_dataset(data, 16, skip_broken=True).broken == ("images/5.png (not found)",)


def test_what_is_known_of_images_stays_theirs_where_others_are_broken(tmp_path: Path) -> None:
    rows = [
        f"{row},{patient},{part},{fold}"
        for row, patient, part, fold in zip(
            ROWS,
            ["Ann", "Bob", "ann", "Eve", "Joe", "Joe", "Bob", "Eve"],
            ["test", "val", "train", "test", "train", "val", "test", "train"],
            ["x", "b", "a", "x", "B", "A", "c", "C"],
            strict=True,
        )
    ]
    data = make_csv(tmp_path, "path,label,patient,split,fold", *rows)
    for number in (0, 3):
        (tmp_path / f"images/{number}.png").write_text("no image")
    dataset = load_dataset(data, 16, skip_broken=True)
    assert dataset.images.files == tuple(f"images/{number}.png" for number in (1, 2, 4, 5, 6, 7))
    np.testing.assert_array_equal(dataset.images.labels, [1, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(
        dataset.parts, ["validation", "train", "train", "validation", "test", "train"]
    )
    np.testing.assert_array_equal(dataset.patients, [0, 1, 2, 2, 0, 3])  # type: ignore[arg-type]
    np.testing.assert_array_equal(dataset.folds, [1, 0, 1, 0, 2, 2])  # type: ignore[arg-type]
    assert dataset.digests == tuple(
        hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in dataset.images.files
    )
    assert dataset.notes[1:] == (
        "1 patients are in the test part and in another: Bob; --folds would keep each on one side",
    )


def test_a_missing_file_that_is_listed_twice_is_one_file(tmp_path: Path) -> None:
    data = make_csv(tmp_path, "path,label", *ROWS, "images/x.png,a", "images/X.png,a")
    assert len(recognise(data).entries) == 10  # neither is there: they may be two
    data = make_csv(tmp_path, "path,label", *ROWS, "images/x.png,a", "images/../images/x.png,a")
    with pytest.raises(UserError, match=r"line 11: .* is also in .*line 10"):
        recognise(data)


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv does not exist"):
        recognise(str(tmp_path / "nowhere.csv"))
    (tmp_path / "data.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"neither a folder nor a \.csv or \.npz file"):
        recognise(str(tmp_path / "data.zip"))
