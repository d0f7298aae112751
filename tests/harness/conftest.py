"""Fixtures of the harness tests: image trees, a quick configuration and the command line."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bstriplet import cli
from bstriplet.config import TrainConfig
from bstriplet.report import page
from PIL import Image
from quick import TINY, Command, MakeTree, Outcome


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread, because results depend on their number; restore its modes after."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep decoded images out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BSTRIPLET_CACHE", str(folder))
    return folder


@pytest.fixture
def bstriplet(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing of reports, which takes seconds each, in tests that do not look at them."""
    monkeypatch.setattr(page, "write_report", lambda folder: folder / "report.html")


@pytest.fixture
def tiny() -> TrainConfig:
    """A configuration on digits that trains in a second."""
    return TrainConfig(**TINY)


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Make a tree of learnable images: each class is bright in its own quarter."""

    def make(name: str = "data", classes: int = 2, colour: bool = False, **counts: int) -> Path:
        root = tmp_path / name
        generator = np.random.default_rng(classes)
        for part, count in (counts or {"train": 8, "test": 4}).items():
            for label in range(classes):
                folder = root / part / f"class_{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    shape = (20, 24, 3) if colour else (20, 24)
                    pixels = generator.integers(0, 100, shape, dtype=np.uint8)
                    top, left = 10 * (label // 2), 12 * (label % 2)
                    pixels[top : top + 10, left : left + 12] += 120
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return root

    return make
