"""Reading images: every common mode, more than 8 bits, transparency, broken files and metadata."""

import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import pytest
from bstriplet.config import MAX_PIXELS
from bstriplet.data.images import Picture, decode_image, read_all, read_image
from bstriplet.data.pixels import TooLarge, Unreadable
from bstriplet.data.raster import (
    MORE_CHANNELS,
    NO_METADATA,
    NOT_TURNED,
    ON_WHITE,
    OPAQUE,
    SEVERAL,
    UPPER_BITS,
)
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


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_every_orientation_is_followed_once(tmp_path: Path, suffix: str) -> None:
    turned = [GREY, GREY[:, ::-1], GREY[::-1, ::-1], GREY[::-1], GREY.T, np.rot90(GREY, -1),
              GREY[::-1, ::-1].T, np.rot90(GREY)]  # fmt: skip
    for orientation, expected in enumerate(turned, 1):
        tag = Image.Exif()
        tag[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(GREY).save(path, exif=tag, **({"quality": 100} if suffix == "jpg" else {}))
        assert np.abs(read_image(path, 16).pixels[0].astype(int) - expected).max() <= 2


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


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_deep_greys_keep_their_contrast(tmp_path: Path, suffix: str, top: int) -> None:
    """Ten or twelve bits in sixteen are neither clipped at 255 nor nearly black."""
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


# --- TIFF -----------------------------------------------------------------------------------------


def tiff(
    values: np.ndarray,
    photometric: int = 1,
    *,
    sample_format: int = 1,
    extra: tuple[int, ...] = (),
    order: str = "<",
    deflate: bool = False,
    planes: bool = False,
    more: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """Return an image [H, W] or [H, W, C] as a TIFF of one strip, with any tags."""
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    stored = values.astype(values.dtype.newbyteorder(order))
    data = (stored.transpose(2, 0, 1) if planes else stored).tobytes()
    size = len(data) // samples
    pieces = [data[i * size : (i + 1) * size] for i in range(samples)] if planes else [data]
    pieces = [zlib.compress(piece) for piece in pieces] if deflate else pieces
    starts = np.cumsum([8, *map(len, pieces)]).tolist()
    tags = {
        256: (width,),
        257: (height,),
        258: (8 * values.dtype.itemsize,) * samples,
        259: (8 if deflate else 1,),
        262: (photometric,),
        273: tuple(starts[:-1]),
        277: (samples,),
        278: (height,),
        279: tuple(map(len, pieces)),
        284: (2 if planes else 1,),
        339: (sample_format,) * samples,
        **({338: extra} if extra else {}),
        **(more or {}),
    }
    tags = {tag: numbers for tag, numbers in tags.items() if numbers}
    directory = struct.pack(f"{order}H", len(tags))
    beyond, after = b"", starts[-1] + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        value = packed if len(packed) == 4 else struct.pack(f"{order}I", after + len(beyond))
        beyond += packed if len(packed) > 4 else b""
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + value
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(f"{order}HI", 42, starts[-1])
    return head + b"".join(pieces) + directory + bytes(4) + beyond


def decode(content: bytes, size: int = 16) -> Picture:
    return decode_image(content, size)


def readings(*contents: bytes) -> Iterator[Picture | Unreadable]:
    """Yield the image that is read from each file, or why it cannot be read."""
    for content in contents:
        try:
            yield decode(content)
        except Unreadable as reason:
            yield reason


SIGNED, FLOAT = 2, 3
KINDS = [("u1", 1), ("i1", SIGNED), ("u2", 1), ("i2", SIGNED), ("u4", 1), ("i4", SIGNED),
         ("f2", FLOAT), ("f4", FLOAT), ("f8", FLOAT)]  # fmt: skip


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(("kind", "sample_format"), KINDS)
def test_a_tiff_of_any_samples_is_read_right_or_refused_by_name(
    kind: str, sample_format: int, photometric: int, order: str, deflate: bool
) -> None:
    """The samples span at least half of the type's range: a wrong sign or byte order shows."""
    ramp = GREY / 255.0
    if sample_format != FLOAT:
        limits = np.iinfo(kind)
        ramp = limits.min / 2 + ramp * (limits.max - limits.min / 2)
    values = ramp.astype(kind)
    content = tiff(values, photometric, sample_format=sample_format, order=order, deflate=deflate)
    (read,) = readings(content)
    if isinstance(read, Unreadable):
        bits = 8 * values.dtype.itemsize
        assert re.search(rf"a TIFF of unusual kind \(BitsPerSample \(?{bits}.*save it", str(read))
        assert (kind, photometric) not in {("u1", 0), ("u1", 1), ("u2", 1), ("f4", 1)}
    else:
        expected = GREY if photometric else 255 - GREY.astype(int)
        assert np.abs(read.pixels[0].astype(int) - expected).max() <= 1


def test_a_16_bit_tiff_whose_white_is_zero_is_inverted() -> None:
    for values, sample_format in ((GREY.astype(np.uint16) * 16, 1), (GREY.astype("f4"), FLOAT)):
        pixels = decode(tiff(values, 0, sample_format=sample_format)).pixels
        np.testing.assert_array_equal(pixels[0], 255 - GREY)


def test_planes_are_read_where_pillow_reads_them_right() -> None:
    colours = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
    for deflate in (False, True):
        read = decode(tiff(colours, 2, planes=True, deflate=deflate)).pixels
        np.testing.assert_array_equal(read, colours.transpose(2, 0, 1))
        read = decode(tiff(GREY[..., None], planes=True, deflate=deflate)).pixels
        np.testing.assert_array_equal(read[0], GREY)
    deep = GREY[..., None].astype("u2")
    read = decode(tiff(deep, 0, planes=True, deflate=True)).pixels
    np.testing.assert_array_equal(read[0], 255 - GREY)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extra", [(), (0,), (2,)])
def test_colours_of_12_bits_in_16_are_not_black(
    extra: tuple[int, ...], order: str, deflate: bool
) -> None:
    colours = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
    values = colours.astype(np.uint16) * 16
    if extra:
        values = np.dstack([values, np.full((16, 16), 65535, dtype=np.uint16)])
    picture = decode(tiff(values, 2, extra=extra, order=order, deflate=deflate))
    np.testing.assert_array_equal(picture.pixels, colours.transpose(2, 0, 1))
    assert picture.notes == ((MORE_CHANNELS,) if extra == (0,) else ())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.dstack([GREY] * 2), extra=(0,)), "TIFF of 2 channels|unusual"),
        (tiff(np.dstack([GREY] * 4), extra=(0, 0, 0)), "TIFF of unusual kind|TIFF of 4 channels"),
        (
            tiff(np.dstack([GREY] * 3), extra=(0, 0), planes=True, deflate=True),
            "3 channels|unusual",
        ),
        (
            tiff(np.dstack([GREY.astype("u2")] * 3), 2, planes=True),
            "16-bit colours in separate pla",
        ),
        (tiff(np.dstack([GREY.astype("u2")] * 3), 2, planes=True, deflate=True), "separate planes"),
        (tiff(GREY[..., None], 0, planes=True), "without compression in separate planes"),
        (
            tiff(GREY[..., None].astype("i4"), sample_format=SIGNED, order=">", planes=True),
            "without compression in separate planes",
        ),
        (tiff(np.dstack([GREY] * 3), 6), "subsampled colours"),
        (tiff(np.dstack([GREY] * 3), 8), r"L\*a\*b\*"),
        (tiff(GREY, more={262: ()}), "does not say whether 0 is black or white"),
        (tiff(GREY, more={254: (1,)}), "first image is a reduced copy"),
        (tiff(np.dstack([GREY.astype("u2") * 9] * 4), 2, extra=(1,)), "multiplied by their alpha"),
        (
            tiff(np.dstack([GREY] * 2), 3, extra=(0,), more={320: tuple(range(768))}),
            "TIFF of 2 channels|unusual",
        ),
        (tiff(GREY)[:-100], "damaged TIFF|truncated|TIFF of unusual kind"),
    ],
)
def test_a_tiff_that_may_mean_several_things_is_refused_by_name(
    content: bytes, reason: str
) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode(content)


# --- transparency ---------------------------------------------------------------------------------


def png(
    rows: list[bytes], bits: int, kind: int, *chunks: tuple[bytes, bytes], width: int = 8
) -> bytes:
    """Return a PNG of the given rows and additional chunks."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    more = b"".join(chunk(*item) for item in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )  # fmt: skip


def shorts(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


STEPS = [bytes(range(8))] * 8
PALETTE = (b"PLTE", bytes(value for value in range(8) for _ in range(3)))


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (png(STEPS, 8, 0, (b"tRNS", shorts(3))), [0, 1, 2, 255, 4, 5, 6, 7]),
        (png([b"\x1b\x1b"] * 8, 2, 0, (b"tRNS", shorts(1))), [0, 255, 170, 255] * 2),
        (png([b"\x01\x23\x45\x67"] * 8, 4, 0, (b"tRNS", shorts(2))),
         [0, 17, 255, 51, 68, 85, 102, 119]),
        (png([shorts(*range(0, 1785, 255))] * 7 + [shorts(0, 255, 510, 765, 1020, 1275, 1530)], 16,
             0, (b"tRNS", shorts(0)), width=7), [255, 0, 51, 102, 153, 204, 255]),
        (png(STEPS, 8, 3, PALETTE, (b"tRNS", b"\0\x80")), [255, 128, 2, 3, 4, 5, 6, 7]),
        (png([bytes(v for x in range(8) for v in (x, 255 * (x > 0)))] * 8, 8, 4),
         [255, 1, 2, 3, 4, 5, 6, 7]),
        (png([shorts(*(v for x in range(8) for v in (x * 510, 65535 * (x > 1))))] * 8, 16, 4),
         [255, 255, 0, 51, 102, 153, 204, 255]),
        (png([bytes(v for x in range(8) for v in (x, x, x, 255 * (x > 0)))] * 8, 8, 6),
         [255, 1, 2, 3, 4, 5, 6, 7]),
        (png([bytes(x for x in range(8) for _ in range(3))] * 8, 8, 2, (b"tRNS", shorts(2, 2, 2))),
         [0, 1, 255, 3, 4, 5, 6, 7]),
        (png([shorts(*(x * 255 for x in range(8) for _ in range(3)))] * 8, 16, 2,
             (b"tRNS", shorts(0, 0, 0))), [255, 0, 42, 85, 128, 170, 212, 255]),
    ],
)  # fmt: skip
def test_transparency_is_laid_on_white_in_every_mode(content: bytes, row: list[int]) -> None:
    picture = decode_image(content, len(row), 1)
    assert np.abs(picture.pixels[0, 0].astype(int) - row).max() <= 1
    assert picture.notes == (ON_WHITE,)


def test_a_damaged_exif_directory_of_a_tiff_is_not_looked_at() -> None:
    picture = decode(tiff(GREY, more={34665: (1 << 30,)}))
    np.testing.assert_array_equal(picture.pixels[0], GREY)
    assert not picture.notes


def test_opaque_samples_of_16_bits_are_read_however_their_alpha_is_meant() -> None:
    opaque = np.full_like(GREY, 65535, dtype=np.uint16)
    for extra in (1, 2):
        colours = np.dstack([GREY.astype(np.uint16) * 16] * 3 + [opaque])
        picture = decode(tiff(colours, 2, extra=(extra,)))
        np.testing.assert_array_equal(picture.pixels[0], GREY)
        assert not picture.notes


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_multiplied_by_their_alpha_are_not_multiplied_again(samples: int) -> None:
    content = tiff(
        np.dstack([GREY // 2] * samples + [np.full_like(GREY, 128)]),
        1 if samples == 1 else 2,
        extra=(1,),
    )
    picture = decode_image(content, 16, 1)
    on_white = GREY // 2 + 127.0
    assert np.abs(picture.pixels[0] - on_white).max() <= 2
    assert picture.notes == (ON_WHITE,)


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_what_is_transparent_everywhere_is_read_and_what_is_opaque_not_noted(
    tmp_path: Path, suffix: str
) -> None:
    for alpha, notes in ((0, (OPAQUE,)), (255, ())):
        path = tmp_path / f"{alpha}.{suffix}"
        image = Image.fromarray(np.dstack([GREY, GREY, GREY, np.full_like(GREY, alpha)]))
        image.save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        picture = read_image(path, 16, 1)
        assert picture.notes == notes
        np.testing.assert_array_equal(picture.pixels[0], GREY)


# --- metadata and what surrounds the pixels -------------------------------------------------------


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        (b"iCCP", b"profile\0\x07rubbish"),
        (b"zTXt", b"text\0\0" + zlib.compress(bytes(3 << 20))),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"pHYs", b"?"),
        (b"gAMA", b""),
        (b"eXIf", b"rubbish!"),
        (b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1"),
    ],
)
def test_damaged_or_large_metadata_of_a_png_cost_no_pixels(chunk: tuple[bytes, bytes]) -> None:
    picture = decode_image(png(STEPS, 8, 0, chunk), 8)
    np.testing.assert_array_equal(picture.pixels[0, 0], range(8))
    assert len(picture.notes) == 1 or chunk[0] == b"iCCP"  # Pillow 10 ignores it itself


def test_a_wrong_checksum_of_metadata_costs_no_pixels_and_one_of_pixels_does() -> None:
    content = png(STEPS, 8, 0, (b"tEXt", b"author\0someone"))
    assert decode_image(content.replace(b"someone", b"anybody"), 8).notes == (NO_METADATA,)
    at = content.index(b"IDAT") + 8
    damaged = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    with pytest.raises(Unreadable, match="broken data stream"):
        decode_image(damaged, 8)


def test_a_wrong_checksum_of_exif_data_costs_the_turn_not_the_pixels() -> None:
    turned = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x112, 3, 1, 6, 0)
    content = png(STEPS, 8, 0, (b"eXIf", turned))
    np.testing.assert_array_equal(decode_image(content, 8).pixels[0, :, 0], range(8))
    damaged = content.replace(turned, turned[:-1] + b"?")
    picture = decode_image(damaged, 8)
    np.testing.assert_array_equal(picture.pixels[0, 0], range(8))
    assert picture.notes == (NOT_TURNED, NO_METADATA)


@pytest.mark.parametrize(
    "segment",
    [b"\xe0JFIF", b"\xe0JFIF\0\1", b"\xe2ICC_PROFILE\0", b"\xeeAdobe\0"],
)
def test_damaged_application_data_of_a_jpeg_cost_no_pixels(segment: bytes) -> None:
    buffer = BytesIO()
    tag = Image.Exif()
    tag[0x112] = 6
    colours = np.dstack([GREY, GREY.T, 255 - GREY])
    Image.fromarray(colours).save(buffer, "JPEG", quality=100, subsampling=0, exif=tag)
    whole = buffer.getvalue()
    length = struct.pack(">H", len(segment) + 1)
    damaged = whole[:2] + b"\xff" + segment[:1] + length + segment[1:] + whole[2:]
    picture = decode(damaged)
    np.testing.assert_array_equal(picture.pixels, decode(whole).pixels)
    assert picture.notes == (NO_METADATA,)


def test_adobes_segment_decides_the_colours_of_a_jpeg_and_is_no_metadata() -> None:
    buffer = BytesIO()
    Image.new("RGB", (16, 16), (200, 90, 40)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    seen = []
    for transform in (b"\0", b"\1"):  # samples are RGB, YCbCr
        adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + transform
        content = whole[:2] + adobe + whole[whole.index(b"\xff\xdb") :]
        damaged = content[:2] + b"\xff\xe0\0\6JFIF" + content[2:]
        np.testing.assert_array_equal(decode(damaged).pixels, decode(content).pixels)
        seen.append(decode(damaged).pixels[:, 0, 0])
    assert np.abs(seen[0].astype(int) - seen[1]).max() > 50


def test_a_damaged_file_is_not_said_to_be_no_image() -> None:
    content = png(STEPS, 8, 0)
    with pytest.raises(Unreadable, match=rf"^damaged, or .* Pillow {PIL.__version__} does not"):
        decode(content.replace(b"IHDR", b"IHDX"))


def test_a_damaged_exif_tag_costs_no_pixels_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    buffer = BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1")
    picture = decode(buffer.getvalue())
    assert picture.pixels.shape == (1, 16, 16)
    assert re.search("EXIF", " ".join(picture.notes))
    assert capfd.readouterr().err == ""


def test_a_warning_is_noted_for_the_image_that_it_is_about_also_in_parallel(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:02}.jpg" for number in range(40)]
    damaged = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1"
    for number, path in enumerate(paths):
        Image.fromarray(GREY).save(path, **({"exif": damaged} if number % 3 == 0 else {}))
    read = list(read_all(paths, 16, 1, MAX_PIXELS))
    assert all(isinstance(picture, Picture) for picture in read)
    assert [bool(p.notes) for p in read if isinstance(p, Picture)] == [
        number % 3 == 0 for number in range(40)
    ]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_images_is_taken_and_noted(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(pixels) for pixels in (GREY, 255 - GREY)]
    path = tmp_path / f"several.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    picture = read_image(path, 16, 1)
    assert np.abs(picture.pixels[0].astype(int) - GREY).max() <= 1
    assert picture.notes == (SEVERAL,)


def test_the_first_slice_of_a_volume_is_taken_and_noted() -> None:
    picture = decode(tiff(GREY, more={32997: (2,)}))
    np.testing.assert_array_equal(picture.pixels[0], GREY)
    assert picture.notes == (SEVERAL,)


def test_colours_that_pillow_cuts_to_8_bits_are_noted() -> None:
    pixels = np.arange(192, dtype=">u2").reshape(8, 8, 3) * 21
    assert decode(b"P6 8 8 65535\n" + pixels.tobytes()).notes == (UPPER_BITS,)
    assert not decode(b"P6 8 8 255\n" + pixels.astype(np.uint8).tobytes()).notes
    inks = np.dstack([GREY] * 4)
    for deflate in (False, True):
        assert decode(tiff(inks.astype("u2") * 16, 5, deflate=deflate)).notes == (UPPER_BITS,)
        assert not decode(tiff(inks, 5, deflate=deflate)).notes


@pytest.mark.parametrize("mode", ["RGB", "LA"])
def test_colours_of_a_jpeg_2000_of_16_bits_are_noted_and_greys_are_whole(mode: str) -> None:
    buffer = BytesIO()
    Image.fromarray(GREY).convert(mode).save(buffer, "JPEG2000")
    content = bytearray(buffer.getvalue())
    assert not decode(bytes(content)).notes
    start = content.index(b"\xff\x4f\xff\x51")
    for component in range(len(mode)):
        content[start + 42 + 3 * component] = 16 - 1
    assert UPPER_BITS in decode(bytes(content)).notes
    buffer = BytesIO()
    Image.fromarray(GREY.astype(np.uint16) * 16).save(buffer, "JPEG2000")
    picture = decode(buffer.getvalue())
    np.testing.assert_array_equal(picture.pixels[0], GREY)
    assert not picture.notes


def test_a_second_frame_that_is_damaged_costs_no_pixels_of_the_first() -> None:
    buffer = BytesIO()
    frames = [Image.fromarray(pixels) for pixels in (GREY, 255 - GREY)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    content = buffer.getvalue()
    picture = decode(content[: content.rindex(b",\0\0\0\0") + 5])  # in the head of the second
    np.testing.assert_array_equal(picture.pixels[0], GREY)
    assert picture.notes[0] == SEVERAL


def test_a_bmp_of_16_bits_a_pixel_is_read() -> None:
    """Its samples have 5 or 6 bits, whatever Pillow calls them."""
    header = struct.pack("<IiiHHIIiiII3I", 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    grey = np.arange(8, dtype=np.uint16) * 4
    pixels = np.tile(grey << 11 | (2 * grey) << 5 | grey, (8, 1)).astype("<u2").tobytes()
    start = 14 + len(header)
    file = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + pixels
    picture = decode_image(file, 8, 1)
    assert np.abs(picture.pixels[0, 0].astype(int) - grey * 255 / 31).max() <= 3
    assert not picture.notes


# --- the limit of pixels --------------------------------------------------------------------------


def test_a_file_of_too_many_pixels_is_refused_by_name_and_may_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (400, 300)).save(path)
    with pytest.raises(TooLarge, match=r"400 x 300 pixels.*allow it with --max-pixels 120000$"):
        read_image(path, 8, max_pixels=119_999)
    for allowed in (120_000, 0):
        assert read_image(path, 8, max_pixels=allowed).area == 120_000


def test_pillows_own_limit_is_neither_in_the_way_nor_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for number, path in enumerate(paths):
        Image.new("L", (20 + number, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)  # warns from 251 pixels, fails from 501
    before = list(warnings.filters), warnings.showwarning
    read = list(read_all(paths, 8, 1, 1000))
    assert [isinstance(picture, Picture) for picture in read] == [n <= 30 for n in range(40)]
    assert Image.MAX_IMAGE_PIXELS == 250
    assert (list(warnings.filters), warnings.showwarning) == before
    assert capfd.readouterr().err == ""
