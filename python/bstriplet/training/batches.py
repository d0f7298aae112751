"""Training batches: drawn at random or from the groups of section 2.3, augmented, on the device."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from bstriplet.config import TrainConfig
from bstriplet.data.dataset import ImageSet
from bstriplet.errors import UserError, one_line
from bstriplet.mining import mine_groups
from bstriplet.sampler import GroupBatchSampler
from bstriplet.training.augmentation import Augmentation, n_copies


class RandomBatchSampler(Sampler[list[int]]):
    """Batches of ``batch_size`` positions in a random order; every position at least once an epoch.

    The last batch is filled with positions of other batches, drawn at random, as the group sampler
    fills its own. Left short, it would be a step as long as the others on a few images: 4 of 256 in
    batches of 36. A set of fewer than ``batch_size`` positions is one batch of them all. The order
    depends on the seed and the epoch alone.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int) -> None:
        self.n_images = n_images
        self.batch_size = min(batch_size, n_images)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n_images // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_images).tolist()
        filled = order + order[: len(self) * self.batch_size - self.n_images]
        for start in range(0, len(filled), self.batch_size):
            yield filled[start : start + self.batch_size]


def make_validation_batches(config: TrainConfig, n_images: int) -> list[list[int]]:
    """Return batches of all validation images, each once, the same in every epoch.

    They have the size of the training batches and are drawn at random, because some metric losses
    grow with the batch: only then can training and validation losses be compared. A single
    left-over image joins the last batch: losses over pairs need two.
    """
    order = np.random.default_rng([config.seed, 0]).permutation(n_images).tolist()
    full, rest = divmod(n_images, config.batch_size)
    starts = [number * config.batch_size for number in range(full + (rest > 1 or full == 0))]
    return [order[a:b] for a, b in zip(starts, [*starts[1:], n_images], strict=True)]


def make_sampler(config: TrainConfig, images: ImageSet) -> RandomBatchSampler | GroupBatchSampler:
    """Return the sampler of batches that ``config`` names; groups are mined from pixels.

    Position p of the sampler is copy p % copies of image p // copies. All copies of an image are in
    the group of the image.
    """
    copies = n_copies(config.augment)
    if config.batches == "random":
        return RandomBatchSampler(copies * len(images), config.batch_size, config.seed)
    try:
        groups = mine_groups(
            images.pixels,
            images.labels,
            config.groups_per_class,
            rows=images.rows,
            seed=config.seed,
        )
        return GroupBatchSampler(
            groups.repeat(copies), config.batch_size, mode=config.group_share, seed=config.seed
        )
    except ValueError as error:
        raise UserError(
            f"mined batches of --batch-size {config.batch_size} with --groups-per-class "
            f"{config.groups_per_class}: {one_line(error)}"
        ) from error


class Batch(NamedTuple):
    """images uint8 [B, C, H, W] and labels int64 [B] on the device; positions in the image set."""

    positions: list[int]
    images: Tensor
    labels: Tensor


class Feed:
    """The batches of each epoch; a batch is a function of the seed, the epoch and its number."""

    def __init__(self, config: TrainConfig, images: ImageSet, device: torch.device) -> None:
        self.seed = config.seed
        self.device = device
        self.sampler = make_sampler(config, images)
        self.copies = n_copies(config.augment)
        self.augment = Augmentation(config.augment, images.pixels.shape[-1], device)
        self.images = ResidentImages(images, device) if fits(images, device) else images

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        self.sampler.set_epoch(epoch)
        for number, drawn in enumerate(self.sampler):
            positions = [position // self.copies for position in drawn]
            images, labels = self.images.batch(positions)
            images, labels = images.to(self.device), labels.to(self.device)
            copies = [position % self.copies for position in drawn]
            images = self.augment(images, copies, (self.seed, epoch, number))
            yield Batch(positions, images, labels)


class ResidentImages:
    """A set of images in GPU memory, where batches are gathered."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        parts = [
            [part.to(device) for part in images.batch(range(start, min(start + 1024, len(images))))]
            for start in range(0, len(images), 1024)
        ]
        self.pixels, self.labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def batch(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return pixels uint8 [B, C, H, W] and labels int64 [B] at ``positions``."""
        index = torch.tensor(positions).to(self.pixels.device, non_blocking=True)
        return self.pixels[index], self.labels[index]


def fits(images: ImageSet, device: torch.device) -> bool:
    """Whether ``device`` is a GPU and the images take at most half of its free memory."""
    if device.type != "cuda":
        return False
    size = len(images) * images.pixels[0].nbytes
    return size <= torch.cuda.mem_get_info(device)[0] // 2
