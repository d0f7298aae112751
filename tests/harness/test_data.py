"""Finding and splitting images: every class on every side, no patient on two of them."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import (
    Dataset,
    ImageSet,
    Task,
    count_broken,
    load_dataset,
    load_test_images,
    split_dataset,
)
from bstriplet.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from quick import MakeTree
from sklearn.datasets import load_digits

# A folder of real image sets; beside the repository unless the variable names another.
REAL_IMAGES = Path(
    os.environ.get("BSTRIPLET_REAL_IMAGES", Path(__file__).parents[3] / "shared/data")
)


def synthetic(counts: list[int], patients: np.ndarray | None, n_test: int = 0) -> Dataset:
    """A dataset of ``counts`` images of each class; the pixels of an image are its number."""
    labels = np.repeat(np.arange(len(counts)), counts)
    n = len(labels)
    images = ImageSet(
        pixels=np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1),
        rows=np.arange(n),
        labels=labels,
        files=tuple(f"{i}.png" for i in range(n)),
    )
    classes = tuple(f"c{i}" for i in range(len(counts)))
    parts = np.full(n, "train", dtype="<U10")
    for label in range(len(counts)):
        parts[np.flatnonzero(labels == label)[:n_test]] = "test"
    return Dataset(
        classes=classes,
        images=images,
        parts=parts,
        digests=images.files,
        patients=patients,
        folds=None,
        broken=(),
        key="key",
        layout="synthetic",
    )


def parts(task: Task) -> dict[str, set[int]]:
    return {name: set(getattr(task, name).rows) for name in ("train", "validation", "test")}


def check_parts(dataset: Dataset, task: Task) -> None:
    """Check that parts are disjoint, consistent with the dataset, and hold every class."""
    rows = parts(task)
    assert not rows["train"] & rows["validation"]
    assert not rows["train"] & rows["test"]
    assert not rows["validation"] & rows["test"]
    for name in rows:
        part = getattr(task, name)
        assert set(part.labels) == set(range(len(dataset.classes))), name
        assert (np.diff(part.rows) > 0).all()
        np.testing.assert_array_equal(part.labels, dataset.images.labels[part.rows])
        assert part.files == tuple(dataset.images.files[row] for row in part.rows)


@given(
    counts=st.lists(st.integers(4, 40), min_size=2, max_size=6),
    test_fraction=st.floats(0.05, 0.5),
    validation_fraction=st.floats(0.05, 0.5),
    own_test=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(derandomize=True, deadline=None)
def test_images_are_split_by_class(
    counts: list[int],
    test_fraction: float,
    validation_fraction: float,
    own_test: bool,
    seed: int,
) -> None:
    dataset = synthetic(counts, None, n_test=2 if own_test else 0)
    config = TrainConfig(
        test_fraction=test_fraction, validation_fraction=validation_fraction, seed=seed
    )
    task = split_dataset(dataset, config)
    check_parts(dataset, task)
    assert len(task.train) + len(task.validation) + len(task.test) == sum(counts)
    for label, count in enumerate(counts):
        tested = np.sum(task.test.labels == label)
        assert tested == 2 if own_test else abs(tested - test_fraction * count) <= 1
        held_out = np.sum(task.validation.labels == label)
        assert abs(held_out - validation_fraction * (count - tested)) <= 1
    for loss, batches in (("ce+bst", "mined"), ("ce", "mined")):
        assert parts(split_dataset(dataset, replace(config, loss=loss, batches=batches))) == parts(
            task
        )


@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=60),
    fraction=st.floats(0.1, 0.4),
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_no_patient_is_on_two_sides(seed: int, sizes: list[int], fraction: float) -> None:
    generator = np.random.default_rng(seed)
    patients = np.repeat(np.arange(len(sizes)), sizes)
    patient_class = generator.permutation(np.arange(len(sizes)) % 2)
    order = np.argsort(patient_class[patients], kind="stable")
    counts = np.bincount(patient_class[patients]).tolist()
    dataset = synthetic(counts, patients[order])
    task = split_dataset(
        dataset, TrainConfig(test_fraction=fraction, validation_fraction=fraction, seed=seed)
    )
    check_parts(dataset, task)
    assert dataset.patients is not None
    of = {name: {dataset.patients[row] for row in rows} for name, rows in parts(task).items()}
    assert not of["train"] & of["validation"]
    assert not of["train"] & of["test"]
    assert not of["validation"] & of["test"]
    assert task.notes == ()


def test_a_class_without_test_images_is_noted() -> None:
    dataset = synthetic([9, 9, 9], None, n_test=3)
    kept = ~((dataset.parts == "test") & (dataset.images.labels != 1))
    dataset = replace(dataset, images=dataset.images.take(kept), parts=dataset.parts[kept])
    assert split_dataset(dataset, TrainConfig()).notes == ("no test image of class c0, c2",)


def test_too_few_patients_are_split_by_image_and_a_note_says_so() -> None:
    dataset = synthetic([10, 10], np.array([0] * 10 + list(range(1, 11))))
    task = split_dataset(dataset, TrainConfig())
    check_parts(dataset, task)
    by_image = "images are held out by image, not by patient: some class has too few patients"
    assert task.notes == (f"test {by_image}", f"validation {by_image}")


@given(per_class=st.integers(2, 20), seed=st.integers(0, 100))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_train_per_class_keeps_at_most_so_many_and_leaves_the_test_set(
    per_class: int, seed: int
) -> None:
    dataset = synthetic([20, 31, 15], None)
    config = TrainConfig(seed=seed)
    few = split_dataset(dataset, replace(config, train_per_class=per_class))
    check_parts(dataset, few)
    kept = np.concatenate([few.train.labels, few.validation.labels])
    expected = [min(per_class, count) for count in (16, 25, 12)]  # of four fifths of each class
    np.testing.assert_array_equal(np.bincount(kept), expected)
    assert parts(few)["test"] == parts(split_dataset(dataset, config))["test"]


def test_seeds_give_different_images_of_each_class_to_train_on() -> None:
    dataset = synthetic([40, 40], None, n_test=10)
    pools = set()
    for seed in range(10):
        rows = parts(split_dataset(dataset, TrainConfig(seed=seed, train_per_class=10)))
        pools.add(tuple(sorted(rows["train"] | rows["validation"])))
    assert len(pools) == 10


def test_seeds_give_different_splits() -> None:
    dataset = synthetic([50, 50], None)
    splits = {tuple(sorted(parts(split_dataset(dataset, TrainConfig(seed=s)))["test"])) for s in
              range(10)}  # fmt: skip
    assert len(splits) == 10


def test_validation_from_test_repeats_the_paper() -> None:
    dataset = synthetic([20, 20], None, n_test=8)
    task = split_dataset(dataset, TrainConfig(validation="test", validation_fraction=0.5))
    rows = parts(task)
    assert rows["validation"] < rows["test"]
    assert (len(task.validation), len(task.test), len(task.train)) == (8, 16, 24)


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ([5, 1], {}, "class 'c1' has 1 image"),
        ([5, 2], {}, "class 'c1' has 1 image"),
        ([9, 4], {"train_per_class": 1}, "class 'c0' has 1 image"),
    ],
)
def test_too_few_images_name_the_class(
    counts: list[int], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        split_dataset(synthetic(counts, None), TrainConfig(**changes))  # type: ignore[arg-type]


@given(
    n_folds=st.integers(2, 5),
    repeat=st.integers(0, 3),
    with_patients=st.booleans(),
    n_test=st.sampled_from([0, 3]),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_seeds_are_the_folds_of_a_cross_validation(
    n_folds: int, repeat: int, with_patients: bool, n_test: int
) -> None:
    patients = np.arange(60) // 2 if with_patients else None
    dataset = synthetic([30, 30], patients, n_test)
    tested = []
    for number in range(n_folds):
        seed = repeat * n_folds + number
        task = split_dataset(dataset, TrainConfig(folds=n_folds, seed=seed))
        check_parts(dataset, task)
        assert sum(map(len, (task.train, task.validation, task.test))) == 60
        same = split_dataset(dataset, TrainConfig(folds=n_folds, fold=number + 1, seed=seed))
        assert parts(same) == parts(task)
        by_number = split_dataset(
            dataset, TrainConfig(folds=n_folds, fold=number + 1, seed=repeat * n_folds)
        )
        assert parts(by_number)["test"] == parts(task)["test"]
        if patients is not None:
            of = {name: {patients[row] for row in rows} for name, rows in parts(task).items()}
            assert not of["test"] & (of["train"] | of["validation"])
            assert not of["train"] & of["validation"]
        assert any("folds are of all images" in note for note in task.notes) == bool(n_test)
        tested += task.test.rows.tolist()
    assert sorted(tested) == list(range(60))


def test_folds_take_in_a_validation_part_of_the_data() -> None:
    dataset = synthetic([12, 12], None, n_test=3)
    dataset.parts[dataset.parts == "test"] = "validation"
    task = split_dataset(dataset, TrainConfig(folds=3))
    check_parts(dataset, task)
    assert sum(map(len, (task.train, task.validation, task.test))) == 24
    assert task.notes == ("3 folds are of all images: the data's own parts are not kept",)


def test_as_many_folds_as_the_data_give_are_made() -> None:
    dataset = replace(synthetic([12, 12], None), folds=np.arange(24) % 3)
    for folds in (2, 4):
        with pytest.raises(UserError, match=f"--folds {folds}: the data give 3; leave it at that"):
            split_dataset(dataset, TrainConfig(folds=folds))
    tested = split_dataset(dataset, TrainConfig(folds=3, seed=7)).test
    np.testing.assert_array_equal(tested.rows, np.arange(1, 24, 3))


def test_repeated_cross_validations_differ() -> None:
    dataset = synthetic([30, 30], None)
    first = {
        tuple(split_dataset(dataset, TrainConfig(folds=5, seed=5 * repeat)).test.rows)
        for repeat in range(6)
    }
    assert len(first) == 6


@pytest.mark.parametrize(
    ("folds", "message"), [(6, "class 'c1' has 5 image.* to make 6 folds of; it needs 6 or more")]
)
def test_too_few_images_for_folds_name_the_class(folds: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_dataset(synthetic([9, 5], None), TrainConfig(folds=folds))


@pytest.mark.parametrize(
    ("counts", "sizes", "n_folds"),
    [
        ([10, 10], [5, 5, 5, 5], 5),  # fewer patients than folds
        ([12, 6], [1] * 12 + [3, 3], 3),  # enough of them, but not of the second class
    ],
)
def test_too_few_patients_for_folds_are_split_by_image_and_a_note_says_so(
    counts: list[int], sizes: list[int], n_folds: int
) -> None:
    dataset = synthetic(counts, np.repeat(np.arange(len(sizes)), sizes))
    task = split_dataset(dataset, TrainConfig(folds=n_folds, validation_fraction=0.5))
    check_parts(dataset, task)
    assert "folds are made by image, not by patient" in task.notes[0]


def test_images_are_split_singly_by_choice() -> None:
    patients = np.repeat(np.arange(20), 5)
    dataset = synthetic([50, 50], patients)
    task = split_dataset(dataset, TrainConfig(split_by="image"))
    of = {name: {patients[row] for row in rows} for name, rows in parts(task).items()}
    assert of["train"] & of["test"]
    assert parts(task) == parts(split_dataset(replace(dataset, patients=None), TrainConfig()))


def test_copies_across_parts_are_reported(make_tree: MakeTree) -> None:
    root = make_tree(train=10, test=4, val=4)
    for copy, original in (
        ("test/class_0/0.png", "train/class_0/7.png"),
        ("test/class_1/3.png", "val/class_1/2.png"),
        ("val/class_0/3.png", "train/class_0/8.png"),
        ("train/class_0/1.png", "train/class_0/2.png"),  # within a part: no matter
    ):
        (root / copy).write_bytes((root / original).read_bytes())
    assert split_dataset(load_dataset(str(root), 32), TrainConfig()).notes == (
        "1 test images are exact copies of train images: test/class_0/0.png = train/class_0/7.png",
        "1 validation images are exact copies of train images: val/class_0/3.png = "
        "train/class_0/8.png",
        "1 test images are exact copies of validation images: test/class_1/3.png = "
        "val/class_1/2.png",
    )


@pytest.mark.parametrize(("n_copies", "more"), [(3, ""), (4, ", ...")])
def test_three_copies_are_named_and_that_there_are_more(n_copies: int, more: str) -> None:
    dataset = synthetic([20, 20], None, n_test=5)
    digests = (*["39.png"] * n_copies, *dataset.digests[n_copies:])
    (note,) = split_dataset(replace(dataset, digests=digests), TrainConfig()).notes
    assert note.startswith(f"{n_copies} test images are exact copies of ")
    assert note.endswith(f" images: 0.png = 39.png, 1.png = 39.png, 2.png = 39.png{more}")


def test_a_validation_set_from_the_test_set_is_no_copy_of_it() -> None:
    dataset = synthetic([20, 20], None, n_test=8)
    assert split_dataset(dataset, TrainConfig(validation="test")).notes == ()


def test_one_image_under_two_classes_is_reported(make_tree: MakeTree) -> None:
    root = make_tree(train=10)
    content = (root / "train/class_0/7.png").read_bytes()
    for number in (4, 6):
        (root / f"train/class_1/{number}.png").write_bytes(content)
    (note,) = load_dataset(str(root), 32).notes
    assert note == (
        "2 images occur with another class: train/class_1/4.png (class_1) = train/class_0/7.png "
        "(class_0), train/class_1/6.png (class_1) = train/class_0/7.png (class_0)"
    )


def test_digits_are_scikit_learns() -> None:
    dataset = load_dataset("digits", 32)
    assert dataset.images.pixels.shape == (1797, 1, 32, 32)
    assert dataset.images.pixels.dtype == np.uint8
    digits = load_digits()
    small = load_dataset("digits", 8)
    assert small.key != dataset.key
    as_they_are = small.images.pixels
    np.testing.assert_array_equal(as_they_are[:, 0], np.rint(digits.images * 255 / 16))
    assert set(np.unique(dataset.images.pixels)) > set(np.unique(as_they_are))  # interpolated
    np.testing.assert_array_equal(dataset.images.labels, digits.target)
    assert dataset.images.labels.dtype == np.int64
    assert dataset.classes == tuple("0123456789")


@pytest.mark.parametrize("name", ["digits2", "Digits"])
def test_a_folder_that_is_nearly_called_digits_is_read(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(make_tree(name).parent)
    assert len(load_dataset(name, 32).images) == 24


@pytest.mark.parametrize("colour", [False, True])
def test_a_tree_is_read_as_it_lies(make_tree: MakeTree, colour: bool) -> None:
    root = make_tree(classes=3, colour=colour)
    dataset = load_dataset(str(root), 32)
    assert dataset.classes == ("class_0", "class_1", "class_2")
    assert dataset.images.pixels.shape == (3 * 12, 3 if colour else 1, 32, 32)
    for file, label, part in zip(
        dataset.images.files, dataset.images.labels, dataset.parts, strict=True
    ):
        assert file.startswith(f"{part}/class_{label}/")
    task = split_dataset(dataset, TrainConfig())
    assert task.channels == task.summary()["channels"] == (3 if colour else 1)
    assert set(task.test.files) == {file for file in dataset.images.files if file[:4] == "test"}


def test_a_batch_holds_the_images_asked_for(make_tree: MakeTree) -> None:
    images = load_dataset(str(make_tree(classes=3)), 32).images.take(np.array([30, 2, 17]))
    pixels, labels = images.batch([2, 0])
    np.testing.assert_array_equal(pixels.numpy(), images.pixels[[17, 30]])
    assert pixels.stride() == (32 * 32, 32 * 32, 32, 1)
    odd = replace(images, pixels=np.moveaxis(images.pixels.reshape(-1, 32, 32, 1), 3, 1))
    assert odd.batch([2, 0])[0].stride() == pixels.stride()  # else torch may sum in another order
    np.testing.assert_array_equal(labels.numpy(), images.labels[[2, 0]])


def test_without_a_test_folder_a_part_of_each_class_tests(make_tree: MakeTree) -> None:
    dataset = load_dataset(str(make_tree(train=10)), 32)
    assert set(dataset.parts) == {"train"}
    assert split_dataset(dataset, TrainConfig()).summary()["images"] == {
        "train": {"class_0": 6, "class_1": 6},
        "validation": {"class_0": 2, "class_1": 2},
        "test": {"class_0": 2, "class_1": 2},
    }


def test_a_manifest_names_patients(make_tree: MakeTree) -> None:
    root = make_tree(train=12)
    with (root / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["patient", "file"])
        for label in range(2):
            for number in range(10):  # the last two of each class are not listed
                writer.writerow([f"p{number // 2}", f"train/class_{label}/{number}.png"])
    dataset = load_dataset(str(root), 32)
    assert dataset.patients is not None
    patient_of = dict(zip(dataset.images.files, dataset.patients, strict=True))
    assert patient_of["train/class_0/0.png"] == patient_of["train/class_1/1.png"]
    assert patient_of["train/class_0/0.png"] != patient_of["train/class_0/2.png"]
    assert len(set(dataset.patients)) == 5 + 4


def test_broken_images_are_all_named_and_left_out_by_choice(make_tree: MakeTree) -> None:
    root = make_tree(train=6)
    (root / "train/class_1/2.png").write_text("no image")
    (root / "train/class_0/5.png").write_bytes((root / "train/class_0/4.png").read_bytes()[:60])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match="2 of 12 images cannot be read") as raised:
            load_dataset(str(root), 32)
        assert "train/class_0/5.png" in str(raised.value)
        assert "train/class_1/2.png (not an image)" in str(raised.value)
        assert "--skip-broken" in str(raised.value)
    dataset = load_dataset(str(root), 32, skip_broken=True)
    assert len(dataset.images) == 10
    assert len(dataset.broken) == 2
    assert not {"train/class_1/2.png", "train/class_0/5.png"} & set(dataset.images.files)
    assert "2 images that cannot be read" in split_dataset(dataset, TrainConfig()).notes[0]
    np.testing.assert_array_equal(
        dataset.images.labels, [int(file[12]) for file in dataset.images.files[:]]
    )


@pytest.mark.parametrize(
    ("n_broken", "named"),
    [(1, "0.png"), (5, "0.png, 1.png, 2.png, 3.png, 4.png"),
     (7, "0.png, 1.png, 2.png, 3.png, 4.png and 2 more")],
)  # fmt: skip
def test_the_first_five_broken_images_are_named(n_broken: int, named: str) -> None:
    broken = [f"{number}.png" for number in range(n_broken)]
    assert count_broken(broken, 9) == f"{n_broken} of 9 images cannot be read: {named}"


def test_test_images_are_an_error_only_where_none_can_be_read(make_tree: MakeTree) -> None:
    root = make_tree(classes=1, train=1, test=2)
    classes = ("class_0", "class_1")
    (root / "test/class_0/0.png").write_text("no image")
    images, _ = load_test_images(str(root), classes, 32, 1, skip_broken=True)
    assert images.files == ("test/class_0/1.png",)
    (root / "test/class_0/1.png").write_text("no image")
    with pytest.raises(UserError, match=r"no image in .* can be read; put some there"):
        load_test_images(str(root), classes, 32, 1, skip_broken=True)


def test_a_class_whose_training_images_are_all_broken_is_named(make_tree: MakeTree) -> None:
    root = make_tree(train=2, test=2)
    for number in range(2):
        (root / f"train/class_1/{number}.png").write_text("no image")
    with pytest.raises(UserError, match=r"no training image of class 'class_1' in .* can be read"):
        load_dataset(str(root), 32, skip_broken=True)


def test_what_is_odd_about_images_is_noted_by_name(make_tree: MakeTree) -> None:
    root = make_tree(train=6)
    for number in (1, 4):
        path = root / f"train/class_0/{number}.png"
        Image.open(path).convert("LA").save(path)
        image = Image.open(path)
        image.putpixel((0, 0), (9, 0))
        image.save(path)
    (root / "train/class_1/0.png").write_text("no image")
    for _ in range(2):  # the second time from the cache
        notes = load_dataset(str(root), 32, skip_broken=True).notes
        assert notes == (
            "1 images that cannot be read were left out: train/class_1/0.png (not an image)",
            "2 images are transparent in part and were laid on white: train/class_0/1.png, "
            "train/class_0/4.png",
        )
    _, notes = load_test_images(str(root / "train"), ("class_0", "class_1"), 32, 1,
                                skip_broken=True)  # fmt: skip
    assert [note.split(":")[0] for note in notes] == [
        "1 images that cannot be read were left out",
        "2 images are transparent in part and were laid on white",
    ]


def test_images_of_too_many_pixels_are_named_and_read_when_allowed(make_tree: MakeTree) -> None:
    root = make_tree(train=6)  # of 20 x 24 pixels
    Image.new("L", (60, 50)).save(root / "train/class_0/1.png")
    for _ in range(2):
        with pytest.raises(UserError, match=r"class_0/1\.png \(60 x 50 .*--max-pixels 3000\)"):
            load_dataset(str(root), 32, max_pixels=2999)
        assert len(load_dataset(str(root), 32, max_pixels=2999, skip_broken=True).images) == 11
        assert len(load_dataset(str(root), 32, max_pixels=3000).images) == 12
        assert len(load_dataset(str(root), 32).images) == 12


def test_fingerprint_tells_images_and_splits_apart(make_tree: MakeTree) -> None:
    root = make_tree()
    config = TrainConfig()

    def fingerprint(config: TrainConfig) -> str:
        return split_dataset(load_dataset(str(root), 32), config).summary()["fingerprint"]

    first = fingerprint(config)
    assert fingerprint(config) == first
    assert fingerprint(replace(config, seed=1)) != first
    (root / "train/class_1/2.png").write_bytes((root / "train/class_1/3.png").read_bytes())
    assert fingerprint(config) != first


def test_fingerprint_tells_labels_and_classes_apart(make_tree: MakeTree) -> None:
    root = make_tree(train=4, val=4, test=4)
    table = root / "labels.csv"

    def fingerprint(*labels: str) -> str:
        rows = ["file,label,split"]
        for part in ("train", "val", "test"):
            for number, label in enumerate(labels):
                rows += [f"{part}/class_{number}/{image}.png,{label},{part}" for image in range(4)]
        table.write_text("\n".join(rows))
        return split_dataset(load_dataset(str(table), 32), TrainConfig()).summary()["fingerprint"]

    labelled = [("a", "b"), ("b", "a"), ("a", "c")]
    assert len({fingerprint(*labels) for labels in labelled}) == len(labelled)


def test_test_images_take_the_models_classes_and_channels(make_tree: MakeTree) -> None:
    root = make_tree(classes=2, colour=True)
    classes = ("class_0", "class_1", "class_2")
    for data in (root, root / "test"):
        images, notes = load_test_images(str(data), classes, 32, 1, skip_broken=False)
        assert images.pixels.shape == (8, 1, 32, 32)
        assert not notes
        assert sorted(images.labels) == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match=r"0\.png: class class_1 is not among"):
        load_test_images(str(root), ("class_0", "other"), 32, 1, skip_broken=False)


def test_real_chest_xrays_are_split_by_patient() -> None:
    root = REAL_IMAGES / "chest2_kermany"
    if not root.is_dir():
        pytest.skip("BSTRIPLET_REAL_IMAGES names no folder with chest2_kermany")
    dataset = load_dataset(str(root), 32)
    assert dataset.images.pixels.shape == (4109, 1, 32, 32)
    task = split_dataset(dataset, TrainConfig())
    assert task.summary()["images"]["test"] == {"NORMAL": 231, "PNEUMONIA": 387}
    check_parts(dataset, task)
    assert dataset.patients is not None
    train, validation = (set(dataset.patients[rows]) for rows in
                         (task.train.rows, task.validation.rows))  # fmt: skip
    assert not train & validation
    assert abs(len(task.validation) / 3491 - 0.2) < 0.02
    (note,) = task.notes  # it is a part of Chest-2
    assert "Table 5 (in brackets): train Normal 900 (1341), test Normal 231 (234)" in note
