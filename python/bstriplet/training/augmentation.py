"""Training images moved and lightened: the copies of section 3.5, or drawn anew in each epoch.

One affine map an image takes each pixel of the result from a place of the original, all images of a
batch in one operation. Rotations by right angles, flips and shifts by whole pixels are exact: what
bilinear interpolation adds to them is far below a grey level, and rounding removes it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from bstriplet.config import COPIES, ONLINE

SHIFT = 5  # pixels
ANGLE = 10.0  # degrees
SCALE = 1.1
BRIGHTNESS = 1.2
N_COPIES = 8  # the original, three rotations, two flips, two translations

_IDENTITY, _FLIPPED, _UPSIDE_DOWN = np.eye(2), np.diag([-1.0, 1.0]), np.diag([1.0, -1.0])
# Rotations of the image, anticlockwise, as maps of (x, y) with y down: from result to original.
_QUARTER_TURNS = [
    np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), turns) for turns in range(4)
]
_SYMMETRIES = np.stack([*_QUARTER_TURNS, *(_FLIPPED @ turn for turn in _QUARTER_TURNS)])

Floats = NDArray[np.float64]


def n_copies(augment: str) -> int:
    """Return the number of training images that are made from one original."""
    return N_COPIES if augment == COPIES else 1


class Augmentation:
    """Moves and lightens batches of square images, uint8 [B, C, size, size].

    ``"copies"``: copy k of an image is the original (0), rotated by 90, 180 or 270 degrees (1-3),
    flipped left to right or upside down (4, 5), or moved by 5 pixels to the right or down (6, 7).
    ``"none"`` changes nothing. Else ``augment`` is a kind or several, joined by ``+``, each drawn
    for each image anew in each epoch:

    - ``symmetries``: one of the 8 rotations by right angles, flipped or not;
    - ``flips``: left to right, or not;
    - ``shifts``: by -5 to 5 whole pixels each way;
    - ``rotations``: by -10 to 10 degrees about the centre;
    - ``scales``: larger or smaller by a factor of up to 1.1;
    - ``brightness``: grey levels times 1/1.2 to 1.2, white at most.

    ``"online"`` is ``symmetries+shifts``. Factors are uniform in their logarithm, all else is
    uniform. Pixels that come in from outside repeat those of the edge.
    """

    def __init__(self, augment: str, size: int, device: torch.device) -> None:
        self.kinds = frozenset((ONLINE if augment == "online" else augment).split("+"))
        self.size = size
        self.device = device

    def __call__(self, images: Tensor, copies: Sequence[int], numbers: tuple[int, ...]) -> Tensor:
        """Return the images moved and lightened.

        Args:
            images: uint8 [B, C, size, size] on the device.
            copies: the number of the copy for each image.
            numbers: seed, epoch and batch, which decide the random moves.
        """
        if "none" in self.kinds:
            return images
        if COPIES in self.kinds:
            maps, shifts = _copies(np.asarray(copies))
            levels = np.ones(len(images))
        else:
            maps, shifts, levels = self._drawn(len(images), np.random.default_rng(numbers))
        # affine_grid measures from the centre in halves of a side. It is a matrix product, which in
        # float64 is exact enough whatever the precision of float32 products is set to.
        affine = np.concatenate([maps, maps @ (-2 / self.size * shifts[:, :, None])], axis=2)
        places = affine_grid(
            torch.from_numpy(affine).to(self.device), list(images.shape), align_corners=False
        ).float()
        moved = grid_sample(images.float(), places, padding_mode="border", align_corners=False)
        factors = torch.from_numpy(levels).float().to(self.device)[:, None, None, None]
        return (moved * factors).round_().clamp_(0, 255).to(torch.uint8)

    def _drawn(self, count: int, draw: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        """Return maps [B, 2, 2] from result to original, shifts [B, 2] and factors [B]."""
        maps, shifts = np.broadcast_to(_IDENTITY, (count, 2, 2)), np.zeros((count, 2))
        levels = np.ones(count)
        if "symmetries" in self.kinds:
            maps = _SYMMETRIES[draw.integers(len(_SYMMETRIES), size=count)]
        if "flips" in self.kinds:
            maps = np.stack([_IDENTITY, _FLIPPED])[draw.integers(2, size=count)] @ maps
        if "shifts" in self.kinds:
            shifts = draw.integers(-SHIFT, SHIFT, (count, 2), endpoint=True).astype(np.float64)
        if "rotations" in self.kinds:
            angles = np.radians(draw.uniform(-ANGLE, ANGLE, count))
            cosines, sines = np.cos(angles), np.sin(angles)
            maps = maps @ np.stack([cosines, -sines, sines, cosines], axis=1).reshape(-1, 2, 2)
        if "scales" in self.kinds:
            maps = maps / _factors(SCALE, count, draw)[:, None, None]
        if "brightness" in self.kinds:
            levels = _factors(BRIGHTNESS, count, draw)
        return maps, shifts, levels


def _factors(largest: float, count: int, draw: np.random.Generator) -> Floats:
    """Return factors from ``1 / largest`` to ``largest``."""
    return np.exp(draw.uniform(-math.log(largest), math.log(largest), count))


def _copies(numbers: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return maps from result to original [B, 2, 2] and shifts [B, 2] of the numbered copies."""
    maps = np.stack([*_QUARTER_TURNS, _FLIPPED, _UPSIDE_DOWN, _IDENTITY, _IDENTITY])
    shifts = np.zeros((N_COPIES, 2))
    shifts[6], shifts[7] = (SHIFT, 0), (0, SHIFT)
    return maps[numbers], shifts[numbers]
