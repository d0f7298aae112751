"""Rotations, flips and translations of training images: section 3.5, or drawn anew in each epoch.

All of them move whole pixels, so each is a gather of pixel positions: exact, uint8 in and out, and
one operation for a batch in which every image is moved in its own way.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SHIFT = 5  # pixels
COPIES = 8  # the original, three rotations, two flips, two translations


def n_copies(augment: str) -> int:
    """Return the number of training images that are made from one original."""
    return COPIES if augment == "copies" else 1


class Augmentation:
    """Moves the pixels of batches of square images, uint8 [B, C, size, size].

    ``"copies"``: copy k of an image is the original (0), rotated by 90, 180 or 270 degrees (1-3),
    flipped left to right or upside down (4, 5), or moved by 5 pixels to the right or down (6, 7).
    ``"online"``: each image is rotated and flipped in one of the 8 possible ways, and moved by -5
    to 5 pixels each way, at random. Pixels that come in from outside repeat those of the edge.
    ``"shifts"``: each is only moved, for images that a flip or a rotation would make another class
    of, as digits. ``"none"`` changes nothing.
    """

    def __init__(self, augment: str, size: int, device: torch.device) -> None:
        self.augment = augment
        self.size = size
        self.device = device
        if augment == "none":
            return
        moved = self._shifts(np.array([0, SHIFT]), np.array([SHIFT, 0]))
        self.symmetries = _symmetries(size).to(device)
        self.copies = torch.cat([self.symmetries[: COPIES - 2], moved])

    def __call__(self, images: Tensor, copies: Sequence[int], numbers: tuple[int, ...]) -> Tensor:
        """Return the images moved.

        Args:
            images: uint8 [B, C, size, size] on the device.
            copies: the number of the copy for each image.
            numbers: seed, epoch and batch, which decide the random moves.
        """
        if self.augment == "none":
            return images
        if self.augment == "copies":
            source = self.copies[torch.tensor(copies).to(self.device)]
        else:
            draw = np.random.default_rng(numbers)
            ways = 1 if self.augment == "shifts" else len(self.symmetries)
            way = torch.from_numpy(draw.integers(ways, size=len(images)))
            down, right = draw.integers(-SHIFT, SHIFT, (2, len(images)), endpoint=True)
            source = self.symmetries[way.to(self.device)].gather(1, self._shifts(down, right))
        source = source[:, None].expand(-1, images.shape[1], -1)
        return images.flatten(2).gather(2, source).view_as(images)

    def _shifts(self, down: np.ndarray, right: np.ndarray) -> Tensor:
        """Return for each pixel the one that takes its place, int64 [B, size * size]."""
        last, places = self.size - 1, torch.arange(self.size, device=self.device)
        rows, columns = (
            (places - torch.from_numpy(shift).to(self.device)[:, None]).clamp(0, last)
            for shift in (down, right)
        )
        return (rows[:, :, None] * self.size + columns[:, None, :]).flatten(1)


def _symmetries(size: int) -> Tensor:
    """Return the 8 symmetries of a square as sources of each pixel, int64 [8, size * size].

    The identity, rotations by 90, 180 and 270 degrees, the flips of columns and of rows, and these
    two rotated by 90 degrees.
    """
    square = torch.arange(size * size).view(size, size)
    flips = [square.flip(1), square.flip(0)]
    rotations = [square.rot90(turns) for turns in range(4)]
    return torch.stack([*rotations, *flips, *(flip.rot90() for flip in flips)]).flatten(1)
