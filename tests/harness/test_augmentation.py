"""Augmented training images: against NumPy, seeded, and in the groups of their originals."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import load_dataset, split_dataset
from bstriplet.sampler import GroupBatchSampler
from bstriplet.training import batches
from bstriplet.training.augmentation import N_COPIES, Augmentation
from bstriplet.training.batches import Feed, make_sampler

CPU = torch.device("cpu")


def some_images(count: int, channels: int = 2, size: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image [C, H, W], moved, with its edge repeated."""
    padded = np.pad(image, ((0, 0), (5, 5), (5, 5)), mode="edge")
    height, width = image.shape[1:]
    return padded[:, 5 - down : 5 - down + height, 5 - right : 5 - right + width]


def test_the_seven_copies_of_section_3_5() -> None:
    image = some_images(1)
    copies = Augmentation("copies", 9, CPU)(
        image.expand(N_COPIES, -1, -1, -1), range(N_COPIES), (0,)
    )
    one = image[0].numpy()
    expected = [
        one,
        *(np.rot90(one, turns, axes=(1, 2)) for turns in (1, 2, 3)),
        one[:, :, ::-1],
        one[:, ::-1],
        moved(one, 0, 5),
        moved(one, 5, 0),
    ]
    assert copies.dtype == torch.uint8
    np.testing.assert_array_equal(copies, np.stack(expected))


def test_online_moves_are_seeded_and_are_a_symmetry_and_a_translation() -> None:
    images = some_images(24, channels=1)
    augment = Augmentation("online", 9, CPU)
    first = augment(images, [0] * 24, (0, 1, 2))
    assert torch.equal(first, augment(images, [0] * 24, (0, 1, 2)))
    assert not torch.equal(first, augment(images, [0] * 24, (0, 1, 3)))
    seen = set()
    for before, after in zip(images.numpy(), first.numpy(), strict=True):
        ways = set()
        for flip, turns in product((1, -1), range(4)):
            padded = np.pad(np.rot90(before[0, :, ::flip], turns), 5, mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9))
            for top, left in np.argwhere((windows == after[0]).all(axis=(2, 3))).tolist():
                ways.add((flip, turns, 5 - top, 5 - left))
        assert len(ways) == 1
        seen |= ways
    assert len({way[:2] for way in seen}) == 8
    assert {-5, 5} < {way[2] for way in seen} | {way[3] for way in seen}


def test_shifts_are_seeded_and_neither_flip_nor_rotate() -> None:
    images = some_images(200, size=12)
    augment = Augmentation("shifts", 12, CPU)
    first = augment(images, [0] * 200, (0, 1, 2))
    assert torch.equal(first, augment(images, [0] * 200, (0, 1, 2)))
    assert not torch.equal(first, augment(images, [0] * 200, (0, 1, 3)))
    seen = set()
    for before, after in zip(images.numpy(), first.numpy(), strict=True):
        shifts = product(range(-5, 6), repeat=2)
        ways = [shift for shift in shifts if np.array_equal(moved(before, *shift), after)]
        assert len(ways) == 1
        seen |= set(ways)
    assert {down for down, _ in seen} == {right for _, right in seen} == set(range(-5, 6))


@pytest.mark.parametrize("size", [8, 33, 256, 2048])
def test_whole_pixels_are_moved_exactly_at_any_size(size: int) -> None:
    image = some_images(1, channels=1, size=size)
    copies = Augmentation("copies", size, CPU)(image.expand(3, -1, -1, -1), (1, 4, 6), (0,))
    one = image[0].numpy()
    expected = [np.rot90(one, axes=(1, 2)), one[:, :, ::-1], moved(one, 0, 5)]
    np.testing.assert_array_equal(copies, np.stack(expected))


def test_flips_are_left_to_right_in_half_of_the_images() -> None:
    images = some_images(200)
    flipped = Augmentation("flips", 9, CPU)(images, [0] * 200, (0, 1, 2))
    ways = [
        (torch.equal(after, before), torch.equal(after, before.flip(2)))
        for before, after in zip(images, flipped, strict=True)
    ]
    assert set(ways) == {(True, False), (False, True)}
    assert 70 < sum(same for same, _ in ways) < 130


def blobs(count: int, at: tuple[float, float], size: int = 65) -> torch.Tensor:
    """Images with one bright spot, its centre at `at` (x, y) in pixels from their centre."""
    places = torch.arange(size) - size // 2
    distance = (places - at[0]) ** 2 + (places[:, None] - at[1]) ** 2
    return (200 * torch.exp(-distance / 8)).round().byte().expand(count, 1, -1, -1)


def centres(images: torch.Tensor) -> np.ndarray:
    """The centre (x, y) of the light of each image, in pixels from its centre."""
    light = images[:, 0].double()
    places = torch.arange(light.shape[-1]) - light.shape[-1] // 2
    total = light.sum(dim=(1, 2))
    x, y = ((light.sum(dim=axis) * places).sum(dim=1) / total for axis in (1, 2))
    return torch.stack([x, y], dim=1).numpy()


def test_rotations_turn_about_the_centre_by_up_to_ten_degrees() -> None:
    turned = Augmentation("rotations", 65, CPU)(blobs(300, (20, 0)), [0] * 300, (0, 1, 2))
    found = centres(turned)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 20, atol=0.1)
    angles = np.degrees(np.arctan2(found[:, 1], found[:, 0]))
    assert -10.2 < angles.min() < -9
    assert 9 < angles.max() < 10.2
    assert abs(angles.mean()) < 1


def test_scales_grow_and_shrink_about_the_centre_by_up_to_a_tenth() -> None:
    scaled = Augmentation("scales", 65, CPU)(blobs(300, (20, -10)), [0] * 300, (0, 1, 2))
    found = centres(scaled) / (20, -10)
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=0.01)
    assert 1 / 1.1 - 0.01 < found.min() < 0.93
    assert 1.08 < found.max() < 1.11


def test_brightness_scales_grey_levels_and_ends_at_white() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(300, -1, -1, -1)
    lit = Augmentation("brightness", 16, CPU)(levels, [0] * 300, (0, 1, 2)).flatten(1).double()
    factors = lit[:, 200] / 200
    assert 1 / 1.2 - 0.01 < factors.min() < 0.86
    assert 1.17 < factors.max() < 1.21
    expected = (factors[:, None] * torch.arange(256)).clamp(max=255)
    torch.testing.assert_close(lit, expected, rtol=0, atol=1.2)


def test_kinds_are_drawn_for_each_image_and_together() -> None:
    images = blobs(50, (20, 5))
    kinds = "symmetries+flips+shifts+rotations+scales+brightness"
    augment = Augmentation(kinds, 65, CPU)
    first = augment(images, [0] * 50, (3, 1, 4))
    assert torch.equal(first, augment(images, [0] * 50, (3, 1, 4)))
    assert first.dtype == torch.uint8
    assert len(np.unique(first.flatten(1).numpy(), axis=0)) == 50
    away = np.linalg.norm(centres(first), axis=1)
    assert 10 < away.min() < away.max() < 32


def test_a_shift_moves_the_turned_image_not_its_axes() -> None:
    """A spot at the centre stays there under rotations and scales: only the shift moves it."""
    images = blobs(200, (0, 0))
    found = centres(Augmentation("shifts+rotations+scales", 65, CPU)(images, [0] * 200, (1, 2, 3)))
    np.testing.assert_allclose(found, found.round(), atol=0.02)
    assert np.abs(found).max() <= 5.02


def test_an_epoch_of_whole_batches_has_each_copy_once(tiny: TrainConfig) -> None:
    config = replace(tiny, augment="copies", image_size=8, batch_size=20)
    images = split_dataset(load_dataset("digits", 8), config).train
    assert N_COPIES * len(images) % config.batch_size == 0
    drawn = Counter(position for batch in make_sampler(config, images) for position in batch)
    assert drawn == Counter(range(N_COPIES * len(images)))


def test_mined_copies_are_in_the_group_of_their_original(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def spy(groups: np.ndarray, *arguments: object, **options: object) -> GroupBatchSampler:
        given.append(groups)
        return GroupBatchSampler(groups, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batches, "GroupBatchSampler", spy)
    images = split_dataset(load_dataset("digits", 8), tiny).train
    for augment in ("none", "copies"):
        make_sampler(replace(tiny, augment=augment, batches="mined", image_size=8), images)
    np.testing.assert_array_equal(
        given[1].reshape(-1, N_COPIES), given[0][:, None].repeat(N_COPIES, 1)
    )


def test_a_feed_gives_the_images_moved_and_the_labels_of_their_originals(tiny: TrainConfig) -> None:
    config = replace(tiny, augment="copies", batch_size=7)
    images = split_dataset(load_dataset("digits", 32), config).train
    feed = Feed(config, images, CPU)
    for number, batch in enumerate(feed.epoch(3)):
        assert batch.labels.tolist() == images.labels[batch.positions].tolist()
        assert batch.images.dtype == torch.uint8
        if number == 0:
            assert not torch.equal(batch.images, images.batch(batch.positions)[0])
    again = list(feed.epoch(3))
    assert torch.equal(again[-1].images, batch.images)
    assert len(again) == math.ceil(N_COPIES * len(images) / 7)
    assert {len(batch.labels) for batch in again} == {7}


def test_without_augmentation_images_are_as_they_are(tiny: TrainConfig) -> None:
    images = split_dataset(load_dataset("digits", 32), tiny).train
    for batch in Feed(tiny, images, CPU).epoch(1):
        assert torch.equal(batch.images, images.batch(batch.positions)[0])
