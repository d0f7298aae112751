"""The mistakes that a finished run keeps, and predictions in several batches."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from bstriplet.data.dataset import ImageSet
from bstriplet.training import evaluation
from bstriplet.training.evaluation import MISTAKES_KEPT, mistakes_npz, predict_files
from bstriplet.training.run_folder import RunFolder
from PIL import Image
from quick import Command, MakeTree, tiny_flags


def grey(count: int, side: int) -> ImageSet:
    """Images of class 0; all pixels of an image are its number."""
    values = np.arange(count, dtype=np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(values, (count, 1, side, side))
    files = tuple(f"{number}.png" for number in range(count))
    return ImageSet(pixels, np.arange(count), np.zeros(count, dtype=np.int64), files)


def test_the_most_confident_mistakes_are_kept_the_most_confident_first() -> None:
    sure = np.random.default_rng(0).permutation(np.linspace(0.05, 0.95, 3 * MISTAKES_KEPT))
    kept = np.load(io.BytesIO(mistakes_npz(grey(len(sure), 8), np.stack([1 - sure, sure], axis=1))))
    expected = [number for number in np.argsort(-sure) if sure[number] > 0.5][:MISTAKES_KEPT]
    assert list(kept["files"]) == [f"{number}.png" for number in expected]
    assert list(kept["pixels"][:, 0, 3, 5]) == expected


@pytest.mark.parametrize(("side", "shown"), [(8, 8), (128, 128), (129, 64), (300, 100)])
def test_mistakes_are_shown_small(side: int, shown: int) -> None:
    kept = np.load(io.BytesIO(mistakes_npz(grey(3, side), np.array([[0.0, 1.0]] * 3))))
    assert kept["pixels"].shape == (3, 1, shown, shown)
    assert kept["pixels"].dtype == np.uint8
    assert (kept["pixels"] == np.arange(3)[:, None, None, None]).all()


def test_no_image_is_lost_between_batches(
    make_tree: MakeTree, tmp_path: Path, bstriplet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = make_tree(), tmp_path / "run"
    flags = tiny_flags(train_per_class=0, epochs=1)
    assert bstriplet("train", *flags, "--data", root, "--out", run).status == 0
    for name in ("test", "train"):
        (root / name / "class_0/notes.txt").write_text("read by two")
    (root / "train/class_0/3.png").write_bytes(b"cut")
    folders = [root / "test", root / "train"]
    whole, notes = predict_files(RunFolder(run), folders, skip_broken=True)
    assert any(note.startswith("2 ") and "notes.txt" in note for note in notes)
    rows = list(csv.DictReader(io.StringIO(whole)))
    assert len(rows) == 8 + 15
    for batch in (1, 5, 23):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        again, _ = predict_files(RunFolder(run), folders, skip_broken=True)
        for row, other in zip(rows, csv.DictReader(io.StringIO(again)), strict=True):
            assert row["file"] == other["file"]
            for name in ("prob_class_0", "prob_class_1"):
                assert float(row[name]) == pytest.approx(float(other[name]), abs=1e-5)


def test_images_that_the_run_has_seen_are_counted(
    make_tree: MakeTree, tmp_path: Path, bstriplet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = make_tree(train=10), tmp_path / "run"
    flags = tiny_flags(train_per_class=0, epochs=1)
    assert bstriplet("train", *flags, "--data", root, "--out", run).status == 0
    monkeypatch.setattr(evaluation, "BATCH", 7)
    whole = bstriplet("evaluate", "--run", run, "--data", root)
    assert whole.err.startswith("note: the run trained or validated on 18 of these 20 images: ")
    assert whole.err.endswith(".png, ...\n")
    with (run / "predictions.csv").open(newline="") as stream:
        tested = {row["file"] for row in csv.DictReader(stream)}
    named = whole.err.split(": ")[2].removesuffix(", ...\n").split(", ")
    assert len(named) == 3
    assert tested.isdisjoint(named)
    others = tmp_path / "others"
    for file in sorted(tested):
        target = others / Path(file).relative_to("train")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / file).read_bytes())
    assert bstriplet("evaluate", "--run", run, "--data", others).err == ""
    with Image.open(root / named[0]) as image:  # the same pixels in another format
        image.save(others / "class_0/again.bmp")
    again = bstriplet("evaluate", "--run", run, "--data", others)
    assert again.status == 0
    assert again.err.startswith("note: the run trained or validated on 1 of these 3 images: ")
    assert again.err.endswith("again.bmp\n")
    for spoil in (lambda path: path.write_bytes(b"cut"), Path.unlink):
        spoil(run / "embeddings.npz")
        unknown = bstriplet("evaluate", "--run", run, "--data", others)
        assert unknown.out == again.out
        assert f"{run / 'embeddings.npz'} does not say which images the run has seen" in unknown.err
