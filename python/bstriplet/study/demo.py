"""The experiment of ``make demo``: few images per class, the setting of the paper."""

from bstriplet.config import DIGITS, Scheme, TrainConfig
from bstriplet.study.compare import Experiment

SCHEMES = (Scheme("ce", "random"), Scheme("ce+bst", "mined"))
SEEDS = (0, 1, 2, 3, 4)


def demo_experiment(data: str) -> Experiment:
    """Return an experiment on ``data`` ("digits" or a folder) that takes minutes on two cores.

    20 images per class train and validate. There is no early stop: with a few steps per epoch, the
    running statistics of batch normalisation lag so far behind that the first validation losses
    say little. Digits test on half of the set, 900 images; a folder on its own test images. Two
    classes make an epoch of one step, so a folder gets more epochs.
    """
    epochs = 40 if data == DIGITS else 80
    config = TrainConfig(
        data=data,
        image_size=64,
        train_per_class=20,
        test_fraction=0.5,
        epochs=epochs,
        stop_patience=epochs,
    )
    return Experiment(config, SCHEMES, SEEDS)
