"""How training images are drawn into batches: at random, or from the groups of section 2.3."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from bstriplet.config import TrainConfig
from bstriplet.data import ImageSet
from bstriplet.errors import UserError, one_line
from bstriplet.mining import mine_groups
from bstriplet.sampler import GroupBatchSampler


class RandomBatchSampler(Sampler[list[int]]):
    """Batches of ``batch_size`` positions in a random order; every position once an epoch.

    A rest of one joins the batch before it: neither batch normalisation nor a loss over pairs is
    defined for a single image. The order depends on the seed and the epoch alone.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int) -> None:
        self.n_images = n_images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.n_images, self.batch_size)
        return full + (rest > 1 or full == 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_images).tolist()
        starts = [number * self.batch_size for number in range(len(self))]
        for start, end in zip(starts, [*starts[1:], self.n_images], strict=True):
            yield order[start:end]


def make_validation_batches(config: TrainConfig, n_images: int) -> list[list[int]]:
    """Return batches of all validation images, the same in every epoch.

    A metric loss depends on the batch, and some grow with it: training and validation losses can
    be compared only where both are of batches of the same size, drawn at random.
    """
    return list(RandomBatchSampler(n_images, config.batch_size, config.seed))


def make_sampler(config: TrainConfig, images: ImageSet) -> RandomBatchSampler | GroupBatchSampler:
    """Return the batches of ``images`` that ``config`` names; mined groups come from pixels."""
    if config.batches == "random":
        return RandomBatchSampler(len(images), config.batch_size, config.seed)
    pixels = images.pixels[images.rows]
    try:
        groups = mine_groups(pixels, images.labels, config.groups_per_class, seed=config.seed)
        return GroupBatchSampler(
            groups, config.batch_size, mode=config.group_share, seed=config.seed
        )
    except ValueError as error:
        raise UserError(
            f"mined batches of --batch-size {config.batch_size} with --groups-per-class "
            f"{config.groups_per_class}: {one_line(error)}"
        ) from error
