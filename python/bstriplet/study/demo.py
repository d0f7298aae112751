"""The experiment of ``make demo``: few images per class, the setting of the paper."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from bstriplet.config import DIGITS, STRONG, Scheme, TrainConfig, with_recipe
from bstriplet.data.dataset import ImageSet
from bstriplet.storage import write_text
from bstriplet.study.compare import Experiment, Tasks
from bstriplet.study.statistics import to_csv

SCHEMES = (Scheme("ce", "random"), Scheme("ce+bst", "mined"))
SEEDS = (0, 1, 2, 3, 4)
PART = 1024


def demo_experiment(data: str) -> Experiment:
    """Return an experiment on ``data`` ("digits" or a folder) that takes minutes on two cores.

    20 images per class train and validate. Half of the digits test, 898 images; a folder tests on
    its own test images. The network is timm's tiny ResNet, 0.4 M parameters: MobileNet-V3-Small
    stays below a linear model on so few digits of 32 pixels. Images are shifted, not flipped or
    rotated, which would turn some digits into others. There is no early stop: the learning rate
    falls until the last epoch.

    A folder gets more epochs, because an epoch of two classes is one step. It gets no averaged
    weights, which would lag behind in such epochs; on digits, with five steps, they average
    the noise of single ones.
    """
    special: dict[str, Any] = {"image_size": 64, "epochs": 120}
    if data == DIGITS:
        special = {"image_size": 32, "epochs": 60, "lr": 3e-3, "ema": 0.95}
    settings = {
        "data": data,
        "train_per_class": 20,
        "test_fraction": 0.5,
        "backbone": "test_resnet",
        "augment": "shifts",
    }
    config = TrainConfig(**with_recipe(STRONG, settings | special))
    return Experiment(config, SCHEMES, SEEDS)


def linear_model(experiment: Experiment, folder: Path) -> str:
    """Return a line with the mean test accuracy of logistic regression on pixels, over the seeds.

    It is fitted to the training images of each seed: what a trained network should beat. The
    accuracies, one per seed, go into ``linear.csv`` in ``folder``.
    """
    tasks = Tasks()
    accuracies = []
    for seed in experiment.seeds:
        task = tasks.of(replace(experiment.config, seed=seed))
        everything = range(len(task.train))
        model = LogisticRegression(max_iter=1000).fit(
            _flat(task.train, everything), task.train.labels
        )
        parts = [  # a part at a time: the test images of a folder may exceed the memory
            range(start, min(start + PART, len(task.test)))
            for start in range(0, len(task.test), PART)
        ]
        right = [
            model.predict(_flat(task.test, part)) == task.test.labels[part.start : part.stop]
            for part in parts
        ]
        accuracies.append(float(np.concatenate(right).mean()))
    rows = zip(experiment.seeds, accuracies, strict=True)
    write_text(folder / "linear.csv", to_csv(("seed", "accuracy"), list(rows)))
    return (
        "a linear model (logistic regression) on the same pixels: test accuracy "
        f"{np.mean(accuracies):.2%}"
    )


def _flat(images: ImageSet, positions: range) -> np.ndarray:
    """Return the pixels at ``positions``, float32 [N, C * H * W] from 0 to 1."""
    pixels, _ = images.batch(positions)
    return pixels.flatten(1).numpy().astype(np.float32) / 255
