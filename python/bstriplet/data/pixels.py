"""8-bit pixels for networks, and the errors of images that cannot be read."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


class Unreadable(Exception):
    """An image cannot be read; the message says why in a few words."""


class TooLarge(Unreadable):
    """An image has more pixels than ``--max-pixels`` allows; ``area`` is their number."""

    def __init__(self, width: int, height: int, limit: int) -> None:
        self.area = width * height
        super().__init__(
            f"{width} x {height} pixels, more than --max-pixels {limit}; allow it with "
            f"--max-pixels {self.area}"
        )


def check_area(width: int, height: int, max_pixels: int) -> int:
    """Return ``width * height``, or raise :class:`TooLarge`; ``max_pixels`` 0 allows any size."""
    if 0 < max_pixels < width * height:
        raise TooLarge(width, height, max_pixels)
    return width * height


def stretch(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Return ``values`` as uint8 of the same shape: ``low`` becomes 0, ``high`` 255, linearly."""
    scaled = (np.clip(values, low, high) - low) * (255 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def stretch_own_range(
    values: npt.NDArray[Any], counted: npt.NDArray[np.bool_] | None = None
) -> Pixels:
    """Return ``values`` as uint8: the smallest becomes 0, the largest 255; equal ones become 0.

    ``counted`` marks the pixels that decide the range. If it is None or marks none, all decide.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise Unreadable("holds pixels that are not finite")
    deciding = values if counted is None or not counted.any() else values[counted]
    low, high = deciding.min(), deciding.max()
    return stretch(values, low, high if high > low else low + 1)


def resize(image: Image.Image, size: int, channels: int | None) -> Pixels:
    """Return an "L" or "RGB" image as uint8 [C, size, size], squeezed to a square.

    ``channels`` is 1 (grey) or 3 (RGB); None gives 1 where all pixels are grey, else 3.
    """
    if channels is None:
        channels = 1 if image.mode == "L" or _is_grey(image) else 3
    image = image.convert("L" if channels == 1 else "RGB")
    array = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return array.reshape(size, size, channels).transpose(2, 0, 1)


def _is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue are equal everywhere."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[..., :1]).all())
