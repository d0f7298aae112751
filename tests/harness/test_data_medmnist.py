"""MedMNIST files: any size, grey and RGB, with their own parts; files that do not fit."""

import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bstriplet.config import TrainConfig
from bstriplet.data import medmnist
from bstriplet.data.dataset import load_dataset, load_test_images, split_dataset
from bstriplet.errors import UserError
from quick import snapshot

COUNTS = {"train": 10, "val": 4, "test": 6}


def arrays(side: int, colour: bool = False, n_labels: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(side)
    shape = (side, side, 3) if colour else (side, side)
    return {
        key: value
        for name, count in COUNTS.items()
        for key, value in (
            (f"{name}_images", generator.integers(0, 256, (count, *shape), dtype=np.uint8)),
            (f"{name}_labels", (np.arange(count * n_labels) % 2).reshape(-1, n_labels)),
        )
    }


def write(path: Path, **changes: Any) -> str:
    np.savez(path, **(arrays(28) | changes))
    return str(path)


def test_classes_of_a_model_are_compared_in_one_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(medmnist._CLASSES, "pneumoniamnist", ("caf\u00e9", "normal"))
    data = write(tmp_path / "pneumoniamnist.npz")
    images, _ = load_test_images(data, ("cafe\u0301", "normal "), 28, 1, skip_broken=False)
    assert len(images) == 6


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_read_in_its_own_parts(tmp_path: Path, colour: bool, compressed: bool) -> None:
    content = arrays(28, colour)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "pneumoniamnist.npz", **content)  # type: ignore[arg-type]
    dataset = load_dataset(str(tmp_path / "pneumoniamnist.npz"), 28)
    assert dataset.classes == ("normal", "pneumonia")
    images = np.concatenate([content[f"{name}_images"] for name in COUNTS])
    expected = images.transpose(0, 3, 1, 2) if colour else images[:, None]
    np.testing.assert_array_equal(dataset.images.pixels, expected)
    task = split_dataset(dataset, TrainConfig())
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 4, 6)
    np.testing.assert_array_equal(task.test.labels, [0, 1] * 3)
    assert task.test.files[0] == "test/14"


def test_images_of_another_size_are_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "bloodmnist_64.npz", **arrays(64, colour=True))  # type: ignore[arg-type]
    dataset = load_dataset(str(tmp_path / "bloodmnist_64.npz"), 32)
    assert dataset.images.pixels.shape == (20, 3, 32, 32)
    assert dataset.classes == ("0", "1")


def test_copies_within_a_file_are_reported_and_other_images_are_told_apart(tmp_path: Path) -> None:
    data = write(tmp_path / "pneumoniamnist.npz")
    dataset = load_dataset(data, 28)
    assert split_dataset(dataset, TrainConfig()).notes == ()
    changed = arrays(28)
    changed["test_images"][1] = changed["train_images"][0]
    other = load_dataset(write(tmp_path / "pneumoniamnist.npz", **changed), 28)
    assert split_dataset(other, TrainConfig()).notes == (
        "1 images occur with another class: test/15 (pneumonia) = train/0 (normal)",
        "1 test images are exact copies of train images: test/15 = train/0",
    )
    assert other.key != dataset.key


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99)])  # encrypted, unknown compression
def test_a_file_that_this_python_cannot_unpack_is_told(
    tmp_path: Path, place: int, value: int
) -> None:
    file = Path(write(tmp_path / "pneumoniamnist.npz"))
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\1\2") + place] = value
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no MedMNIST file"):
        load_dataset(str(file), 28)


def test_bytes_that_change_anywhere_in_a_file_are_told(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "pneumoniamnist.npz"))
    whole = load_dataset(str(file), 28).images
    np.savez_compressed(file, **arrays(28))  # type: ignore[arg-type]
    content, generator = file.read_bytes(), np.random.default_rng(0)
    told: list[str] = []
    for _ in range(100):
        damaged = bytearray(content)
        for place in generator.integers(len(content), size=3):
            damaged[place] ^= generator.integers(1, 256)
        file.write_bytes(damaged)
        try:
            read = load_dataset(str(file), 28).images
        except UserError as error:
            told.append(str(error))
        else:  # where nothing is read, as in the time of an entry
            np.testing.assert_array_equal(read.pixels, whole.pixels)
            np.testing.assert_array_equal(read.labels, whole.labels)
    assert len(told) > 50
    assert all(str(file) in message for message in told)


def test_a_file_may_be_called_in_capitals(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "set.npz")).rename(tmp_path / "PNEUMONIAMNIST.NPZ")
    assert load_dataset(str(file), 28).classes == ("normal", "pneumonia")


def test_a_file_without_test_images_is_nothing_to_test_on(tmp_path: Path) -> None:
    empty = {key: value[:0] for key, value in arrays(28).items() if key.startswith("test_")}
    data = write(tmp_path / "pneumoniamnist.npz", **empty)
    with pytest.raises(UserError, match="has no test images"):
        load_test_images(data, ("normal", "pneumonia"), 28, 1, skip_broken=False)


def test_a_model_is_tested_on_the_test_part(tmp_path: Path) -> None:
    data = write(tmp_path / "pneumoniamnist.npz")
    images, _ = load_test_images(data, ("normal", "pneumonia"), 28, 3, skip_broken=False)
    assert images.pixels.shape == (20, 3, 28, 28)
    assert images.files == tuple(f"test/{number}" for number in range(14, 20))
    for classes in (("a", "b"), ("pneumonia", "normal")):
        with pytest.raises(UserError, match="the model"):
            load_test_images(data, classes, 28, 1, skip_broken=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": np.zeros((6, 14), dtype=np.int64)}, "14 labels an image; one class"),
        ({"val_images": np.zeros((4, 28, 28, 28), dtype=np.uint8)}, "not volumes"),
        ({"train_images": np.zeros((10, 28, 28))}, "train_images is not uint8"),
        ({"train_labels": np.zeros((9, 1), dtype=np.int64)}, "does not give a class number"),
        ({"train_images": np.zeros((10, 64, 64), dtype=np.uint8)}, "differ in shape"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(write(tmp_path / "set.npz", **changes), 28)


def test_a_file_of_another_kind_or_none_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"none\.npz does not exist"):
        load_dataset(str(tmp_path / "none.npz"), 28)
    np.savez(tmp_path / "other.npz", x=np.arange(3))
    with pytest.raises(UserError, match="is no MedMNIST file"):
        load_dataset(str(tmp_path / "other.npz"), 28)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="is no MedMNIST file"):
        load_dataset(str(tmp_path / "text.npz"), 28)


def test_a_damaged_file_is_named_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    data = Path(write(tmp_path / "set.npz"))
    with zipfile.ZipFile(data) as archive:
        offset = archive.getinfo("test_images.npy").header_offset
    content = bytearray(data.read_bytes())
    content[offset + 1000 : offset + 1010] = b"0123456789"  # the checksum tells
    data.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_dataset(str(data), 28)
    assert not snapshot(cache)


def fake_package(folder: Path) -> ModuleType:
    """A stand-in for the package medmnist, which writes its file into its folder."""

    class PneumoniaMNIST:
        available_sizes = (28, 64, 128, 224)

        def __init__(self, split: str, download: bool, size: int, mmap_mode: str) -> None:
            assert download
            self.root = str(folder)
            flag = "" if size == 28 else f"_{size}"
            np.savez(folder / f"pneumoniamnist{flag}.npz", **arrays(size))  # type: ignore[arg-type]

    package = ModuleType("medmnist")
    package.INFO = {  # type: ignore[attr-defined]
        "pneumoniamnist": {"python_class": "PneumoniaMNIST"},
        "organmnist3d": {"python_class": "OrganMNIST3D"},
    }
    package.PneumoniaMNIST = PneumoniaMNIST  # type: ignore[attr-defined]
    package.OrganMNIST3D = SimpleNamespace()  # type: ignore[attr-defined]
    return package


@pytest.mark.parametrize("size", [28, 64])
def test_a_set_is_downloaded_by_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", fake_package(tmp_path))
    data = "medmnist:pneumoniamnist" + (f":{size}" if size != 28 else "")
    assert TrainConfig(data=data).data == data
    dataset = load_dataset(data, size)
    assert dataset.images.pixels.shape == (20, 1, size, size)
    assert dataset.layout == f"MedMNIST (pneumoniamnist{'_64' if size == 64 else ''}.npz)"


def test_a_download_that_cannot_be_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", fake_package(tmp_path))
    with pytest.raises(UserError, match=r"no set of that name; there are pneumoniamnist$"):
        load_dataset("medmnist:organmnist3d", 28)
    with pytest.raises(UserError, match="size '100'; there are 28, 64, 128, 224"):
        load_dataset("medmnist:pneumoniamnist:100", 28)
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(UserError, match="pip install medmnist"):
        load_dataset("medmnist:pneumoniamnist", 28)
