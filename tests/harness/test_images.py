"""Reading images: every common mode, more than 8 bits, broken files."""

from pathlib import Path

import numpy as np
import pytest
from bstriplet.config import MAX_PIXELS
from bstriplet.files import list_images
from bstriplet.images import Picture, read_all, read_image
from bstriplet.pixels import Unreadable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_a_grey_image_is_the_same_in_every_mode(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "grey.png"
    if mode == "I;16":
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(GREY).convert(mode).save(path)
    pixels = read_image(path, 16).pixels
    assert pixels.shape == (1, 16, 16)
    np.testing.assert_array_equal(pixels[0], GREY)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_image_is_rgb(tmp_path: Path, mode: str) -> None:
    colour = np.zeros((16, 16, 3), dtype=np.uint8)
    colour[:8, :, 0] = 255
    Image.fromarray(colour).convert(mode).save(tmp_path / "colour.png")
    pixels = read_image(tmp_path / "colour.png", 16).pixels
    np.testing.assert_array_equal(pixels, colour.transpose(2, 0, 1))
    assert read_image(tmp_path / "colour.png", 16, channels=1).pixels.shape == (1, 16, 16)


def test_the_orientation_tag_is_followed(tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=tag)
    pixels = read_image(tmp_path / "turned.png", 16).pixels
    np.testing.assert_array_equal(pixels[0], np.rot90(GREY, k=-1))


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
        image = read_image(tmp_path / "flat.png", size, channels).pixels
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
    read = list(read_all(paths, 16, 1, MAX_PIXELS))
    assert isinstance(read[0], Picture)
    assert [str(reason) for reason in read[2:]] == ["not an image", "not an image", "not found"]
    assert isinstance(read[1], Unreadable)
    assert "truncated" in str(read[1]).lower()


def test_list_images_goes_by_suffix_and_leaves_hidden_files_out(tmp_path: Path) -> None:
    for name in (
        "b.PNG",
        "a.jpg",
        "sub/c.tiff",
        "._b.png",
        "notes.txt",
        ".hidden.png",
        "__MACOSX/d.png",
        ".git/e.png",
        "f.dcm",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path).images]
    assert names == ["a.jpg", "b.PNG", "f.dcm", "sub/c.tiff"]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_deep_greys_keep_their_contrast(tmp_path: Path, suffix: str, top: int) -> None:
    """Ten or twelve bits in sixteen: neither clipped at 255 nor nearly black."""
    ramp = np.linspace(0, top, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    pixels = read_image(tmp_path / f"deep.{suffix}", 16).pixels
    assert np.abs(pixels[0].astype(int) - GREY).max() <= 1


def test_floating_point_greys_are_scaled_and_a_flat_image_is_black(tmp_path: Path) -> None:
    Image.fromarray((GREY / 300 - 0.4).astype(np.float32)).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "float.tif", 16).pixels[0], GREY)
    Image.fromarray(np.full((16, 16), 700, dtype=np.uint16)).save(tmp_path / "flat.png")
    assert (read_image(tmp_path / "flat.png", 16).pixels == 0).all()
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(Unreadable, match="not finite"):
        read_image(tmp_path / "nan.tif", 16)
