"""The comparison of ``make demo``: few images a class, the setting that the paper is about."""

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from bstriplet.compare import ComparisonPlan, Tasks
from bstriplet.config import DIGITS, Scheme, TrainConfig
from bstriplet.data import ImageSet

SCHEMES = (Scheme("ce", "random"), Scheme("ce+bst", "mined"))
SEEDS = (0, 1, 2, 3, 4)


def demo_plan(data: str) -> ComparisonPlan:
    """Return a comparison on ``data`` ("digits" or a folder) that takes minutes on two cores.

    20 images a class train and validate. Digits test on half of the set, 898 images; a folder on
    its own test images. The network is timm's tiny ResNet, 0.4 M parameters: on so few digits of 32
    pixels, MobileNet-V3-Small stays below a linear model. Images are moved, not flipped or rotated:
    that would make another digit of some. There is no early stop: the learning rate falls until
    the last epoch.

    Two classes make an epoch of one step, hence the more epochs for a folder. Averaged weights
    would lag behind in such epochs; on digits, with five steps, they steady validation.
    """
    special: dict[str, Any] = {"image_size": 64, "epochs": 120}
    if data == DIGITS:
        special = {"image_size": 32, "epochs": 60, "lr": 3e-3, "ema": 0.95}
    config = TrainConfig(
        data=data,
        train_per_class=20,
        test_fraction=0.5,
        backbone="test_resnet",
        augment="shifts",
        optimiser="adamw",
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=5,
        stop_patience=special["epochs"],
        **special,
    )
    return ComparisonPlan(config, SCHEMES, SEEDS)


def linear_model(plan: ComparisonPlan) -> str:
    """Return a line with the test accuracy of logistic regression on the pixels of each seed.

    It is fitted to the training images of the runs, and gives their accuracy something to beat.
    """
    tasks = Tasks()
    accuracies = []
    for seed in plan.seeds:
        task = tasks.of(replace(plan.config, seed=seed))
        model = LogisticRegression(max_iter=1000).fit(_flat(task.train), task.train.labels)
        accuracies.append(model.score(_flat(task.test), task.test.labels))
    return (
        "a linear model (logistic regression) on the same pixels: test accuracy "
        f"{np.mean(accuracies):.2%}"
    )


def _flat(images: ImageSet) -> np.ndarray:
    """Return the pixels of the images, float32 [N, C * H * W] from 0 to 1."""
    return images.pixels[images.rows].reshape(len(images), -1).astype(np.float32) / 255
