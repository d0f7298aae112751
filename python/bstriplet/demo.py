"""The comparison of ``make demo``: few images a class, the setting that the paper is about."""

from bstriplet.compare import Plan
from bstriplet.config import DIGITS, Scheme, TrainConfig

SCHEMES = (Scheme("ce", "random"), Scheme("ce+bst", "mined"))
SEEDS = (0, 1, 2, 3, 4)


def demo_plan(data: str) -> Plan:
    """Return a comparison on ``data`` ("digits" or a folder) that takes minutes on two cores.

    20 images a class train and validate. Digits test on half of the set, ten classes on 900
    images, so that a point of accuracy is nine images; a folder tests on its own test images.
    """
    config = TrainConfig(
        data=data,
        image_size=32 if data == DIGITS else 64,
        train_per_class=20,
        test_fraction=0.5,
        epochs=60,
    )
    return Plan(config, SCHEMES, SEEDS)
