"""Reading images: every common mode, broken files, and the cache keyed by content."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from bstriplet import images
from bstriplet.errors import UserError
from bstriplet.images import Unreadable, decode, list_images, read_all, read_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from quick import snapshot

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_a_grey_image_is_the_same_in_every_mode(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "grey.png"
    if mode == "I;16":
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(GREY).convert(mode).save(path)
    pixels = read_image(path, 16)
    assert pixels.shape == (1, 16, 16)
    np.testing.assert_array_equal(pixels[0], GREY)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_image_is_rgb(tmp_path: Path, mode: str) -> None:
    colour = np.zeros((16, 16, 3), dtype=np.uint8)
    colour[:8, :, 0] = 255
    Image.fromarray(colour).convert(mode).save(tmp_path / "colour.png")
    pixels = read_image(tmp_path / "colour.png", 16)
    np.testing.assert_array_equal(pixels, colour.transpose(2, 0, 1))
    assert read_image(tmp_path / "colour.png", 16, channels=1).shape == (1, 16, 16)


def test_the_orientation_tag_is_followed(tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=tag)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", 16)[0], np.rot90(GREY, k=-1))


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(8, 33), grey=st.booleans()
)
@settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape_becomes_the_square_asked_for(
    tmp_path: Path, height: int, width: int, size: int, grey: bool
) -> None:
    generator = np.random.default_rng(height * width)
    value = generator.integers(0, 256, dtype=np.uint8)
    pixels = np.full((height, width) if grey else (height, width, 3), value)
    Image.fromarray(pixels).save(tmp_path / "flat.png")
    for channels in (1, 3):
        image = read_image(tmp_path / "flat.png", size, channels)
        assert image.shape == (channels, size, size)
        assert (image == value).all()  # resizing a constant keeps it


def test_broken_files_say_why(tmp_path: Path) -> None:
    Image.fromarray(GREY).resize((200, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    paths = [
        tmp_path / name for name in ("whole.png", "cut.png", "text.png", "empty.png", "no.png")
    ]
    read = list(read_all(paths, 16, 1))
    assert isinstance(read[0], np.ndarray)
    assert [str(reason) for reason in read[2:]] == ["not an image", "not an image", "not found"]
    assert isinstance(read[1], Unreadable)
    assert "truncated" in str(read[1]).lower()
    decoded = decode(paths, 16)
    assert sorted(decoded.broken) == [1, 2, 3, 4]
    np.testing.assert_array_equal(decoded.pixels[0], read[0])


def test_list_images_goes_by_suffix_and_leaves_hidden_files_out(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/c.tiff", "._b.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.jpg", "b.PNG", "sub/c.tiff"]


def make_images(folder: Path, count: int, colour_at: int | None = None) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        if number != colour_at:
            pixels[:] = pixels[..., :1]
        paths.append(folder / f"{number:03d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.mark.parametrize("colour_at", [None, 0, 6, 12])
def test_one_colour_image_makes_the_set_rgb(tmp_path: Path, colour_at: int | None) -> None:
    paths = make_images(tmp_path / "set", 13, colour_at)
    channels = 1 if colour_at is None else 3
    pixels = decode(paths, 16).pixels
    assert pixels.shape == (13, channels, 16, 16)
    for path, row in zip(paths, pixels, strict=True):
        np.testing.assert_array_equal(row, read_image(path, 16, channels))


def test_images_are_decoded_once_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 5)
    first = decode(paths, 16)
    monkeypatch.setattr(images, "read_image", None)  # decoding again would fail
    os.utime(paths[0])
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    again = decode([tmp_path / "copy" / path.name for path in paths], 16)
    assert again.key == first.key
    np.testing.assert_array_equal(again.pixels, first.pixels)


def test_changed_content_is_decoded_anew_even_at_the_same_time_and_size(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "set", 3)
    before = decode(paths, 16)
    times = (paths[0].stat().st_atime_ns, paths[0].stat().st_mtime_ns)
    paths[0].write_bytes(paths[1].read_bytes())
    os.utime(paths[0], ns=times)
    after = decode(paths, 16)
    assert after.key != before.key
    np.testing.assert_array_equal(after.pixels[0], before.pixels[1])


def test_size_and_channels_have_their_own_cache(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "set", 3)
    assert len({decode(paths, 16).key, decode(paths, 17).key, decode(paths, 16, 3).key}) == 3


def test_decoding_that_is_cut_leaves_nothing_to_be_mistaken(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "set", 4)
    whole = read_image

    def cut(path: Path, size: int, channels: int | None) -> images.Pixels:
        if path == paths[2]:
            raise KeyboardInterrupt
        return whole(path, size, channels)

    monkeypatch.setattr(images, "read_image", cut)
    with pytest.raises(KeyboardInterrupt):
        decode(paths, 16)
    assert not snapshot(cache)
    monkeypatch.setattr(images, "read_image", whole)
    assert not decode(paths, 16).broken


def test_an_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "set", 2)
    monkeypatch.setenv("BSTRIPLET_CACHE", str(paths[0] / "below_a_file"))
    with pytest.raises(UserError, match="BSTRIPLET_CACHE"):
        decode(paths, 16)


def test_a_damaged_cache_is_named(tmp_path: Path, cache: Path) -> None:
    paths = make_images(tmp_path / "set", 2)
    key = decode(paths, 16).key
    (cache / key / "pixels.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{key} is damaged; delete that folder"):
        decode(paths, 16)
