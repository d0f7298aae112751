"""Image files that Pillow opens, as 8-bit grey or RGB: PNG, JPEG, TIFF, WebP, GIF and others."""

import re
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import IFD, Base

from bstriplet.data.image_files import begins_as_image
from bstriplet.data.notes import Note
from bstriplet.data.pixels import Unreadable, check_area, stretch_own_range
from bstriplet.errors import one_line

SEVERAL = "hold several images or frames; the first is taken"
NOT_TURNED = "have EXIF data that cannot be read and were not turned"
NO_METADATA = "have metadata that cannot be read; the pixels can"
ON_WHITE = "are transparent in part and were laid on white"
OPAQUE = "are transparent everywhere and were read as if they were opaque"
UPPER_BITS = "have colours of more than 8 bits; the upper 8 were taken"
MORE_CHANNELS = "have channels beside red, green and blue, which were left out"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE_IS_ZERO, _YCBCR = 0, 6
_ONE_CHANNEL = (0, 1, 3)  # greys and palettes
_SIGNED = 2
_PLANES = 2
_REDUCED_COPY = 1
_IMAGE_DEPTH = 32997  # the tag of a volume; Pillow counts its slices as one image
_KIND = (Base.BitsPerSample, Base.SampleFormat, Base.PhotometricInterpretation, Base.Compression)
_STEPS = {"L;2": 85, "L;4": 17}  # steps between the greys of a PNG of 2 or 4 bits
_DEEP_COLOUR = re.compile("(RGB|RGBA|RGBa|RGBX|LA);16[BLN]")  # Pillow's names of 16-bit samples
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = (b"tRNS", b"eXIf")  # optional chunks that change the picture
_JPEG = b"\xff\xd8\xff"
_SCANS = (b"\xda", b"", b"\xff")  # the marker of pixels, the end of the file, padding
_COMMENT = b"\xfe"
# Application data that change colours or rotation: their first bytes, and the least length at which
# decoders use them.
_JPEG_NEEDED = {
    b"\xe0": (b"JFIF\0", 14),
    b"\xe1": (b"Exif\0\0", 6),
    b"\xee": (b"Adobe", 12),
}

_lock = threading.Lock()
_n_reading = 0
_altered = ExitStack()  # restores the globals of Pillow and warnings
_heard = threading.local()  # .note: the Note of the image that this thread reads


def read_raster(content: bytes, max_pixels: int, note: Note) -> tuple[Image.Image, int]:
    """Return an image as "L" or "RGB", turned as its metadata say, and its number of pixels.

    Samples of more than 8 bits are scaled: the image's smallest value becomes 0 and its largest
    255, because files do not say how many bits they use. Transparent pixels are laid on white.
    Metadata that cannot be read are ignored and noted.

    Raises:
        Unreadable: the pixels are damaged or of a kind whose meaning is not known.
        TooLarge: there are more than ``max_pixels``.
    """
    try:
        return _read(content, max_pixels, note)
    except Unreadable:
        raise
    except Exception as error:  # each codec fails in its own way on damaged bytes
        unknown = isinstance(error, UnidentifiedImageError)
        failure = Unreadable(_why_not_identified(content) if unknown else one_line(error))
    bare = _without_metadata(content, note)
    if bare == content:
        raise failure
    try:
        read = _read(bare, max_pixels, note)
    except Exception:
        raise failure from None
    note(NO_METADATA)
    return read


@contextmanager
def libraries_at_work(note: Note) -> Iterator[None]:
    """Turn warnings of Pillow and pydicom into notes; lift Pillow's own limit of pixels.

    Both settings are global: the first thread to enter changes them, the last to leave restores
    them.
    """
    global _n_reading, _altered
    with _lock:
        if _n_reading == 0:
            _altered = ExitStack()
            _altered.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = None
            _altered.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("always", module=r"(PIL|pydicom)\b")
            warnings.showwarning = _tell(warnings.showwarning)
        _n_reading += 1
    _heard.note = note
    try:
        yield
    finally:
        _heard.note = None
        with _lock:
            _n_reading -= 1
            if _n_reading == 0:
                _altered.close()


def _tell(show: Any) -> Any:
    """Return a ``showwarning`` that notes the warnings of threads that read an image."""

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if note := getattr(_heard, "note", None):
            said = re.sub(r"\d+", "…", one_line(Warning(message)))  # one note for all such files
            note(f"were read with a warning ({said})")
        else:
            show(message, category, *where, **more)

    return tell


def _read(content: bytes, max_pixels: int, note: Note) -> tuple[Image.Image, int]:
    with Image.open(BytesIO(content)) as opened:
        area = check_area(opened.width, opened.height, max_pixels)
        if _has_more_frames(opened):
            note(SEVERAL)
        if _is_cut_to_8_bits(opened, content):
            note(UPPER_BITS)
        raw = _prepare(opened, note)
        if raw.startswith("CMYK;16"):
            note(UPPER_BITS)
        opened.load()
        turn = None if _is_tiff(opened) else _orientation(opened, note)  # load has turned a TIFF
        if opened.mode == "LAB":
            raise Unreadable("has L*a*b* colours; save it as RGB")
        if _DEEP_COLOUR.fullmatch(raw):
            image, alpha = _deep_colour(opened, content, raw, note)
        elif opened.mode.startswith(("I", "F")):
            image, alpha = _deep_grey(opened)
        else:
            image, alpha = _shallow(opened, raw)
    if alpha is not None:
        image = _on_white(image, alpha, note)
    return (image if turn is None else image.transpose(turn)), area


def _has_more_frames(opened: ImageFile.ImageFile) -> bool:
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # a second frame exists but is damaged; the first may be whole
        return True


def _is_cut_to_8_bits(opened: ImageFile.ImageFile, content: bytes) -> bool:
    """Whether Pillow reduces the colours of this file from more than 8 bits to 8.

    It does so in PPM and JPEG 2000. :func:`_deep_colour` reads all bits of PNG and TIFF.
    """
    if not opened.mode.startswith(("RGB", "LA")):
        return False
    if opened.format == "PPM":  # the last argument of its decoder is the largest value
        args = opened.tile[0][3]
        return isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255
    # The first segment of a JPEG 2000 codestream gives the bits of a sample, less one.
    start = content.find(b"\xff\x4f\xff\x51") if opened.format == "JPEG2000" else -1
    return start >= 0 and content[start + 42] & 0x7F > 7


def _orientation(opened: ImageFile.ImageFile, note: Note) -> Image.Transpose | None:
    """Return the turn that the EXIF data ask for; unreadable EXIF data are noted."""
    try:
        return _TURNS.get(opened.getexif().get(Base.Orientation, 1))
    except Exception:  # each tag fails in its own way on damaged bytes
        note(NOT_TURNED)
        return None


def _raw_mode(opened: ImageFile.ImageFile) -> str:
    """Return Pillow's raw mode, the order of samples in the file; empty if it has none."""
    args = opened.tile[0][3] if opened.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _with_raw_mode(opened: ImageFile.ImageFile, raw: str) -> Image.Image:
    """Set the raw mode of an image that is not loaded yet; return the image."""
    tiles: list[Any] = []  # named tuples since Pillow 11, tuples before
    for tile in opened.tile:
        args = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
        tiles.append(getattr(type(tile), "_make", tuple)((*tile[:3], args)))
    opened.tile = tiles
    return opened


# --- samples of 8 bits and of more ----------------------------------------------------------------


def _shallow(opened: ImageFile.ImageFile, raw: str) -> tuple[Image.Image, Image.Image | None]:
    """Return 8-bit grey ("L") or RGB and, where there is transparency, its alpha ("L")."""
    mode = "L" if opened.mode in ("1", "L", "LA", "La") else "RGB"
    if opened.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in opened.info:
        if raw in _STEPS and "transparency" in opened.info:
            opened.info["transparency"] *= _STEPS[raw]  # Pillow scales the pixels alone
        whole = (opened.convert("LA") if opened.mode == "La" else opened).convert("RGBA")
        return whole.convert("RGB").convert(mode), whole.getchannel("A")
    if _tag(opened, Base.SampleFormat) == _SIGNED:
        return Image.fromarray(stretch_own_range(np.asarray(opened).view(np.int8))), None
    return opened.convert(mode), None


def _deep_grey(opened: ImageFile.ImageFile) -> tuple[Image.Image, Image.Image | None]:
    """Return greys of more than 8 bits, and their alpha."""
    values = np.asarray(opened)
    signed = _tag(opened, Base.SampleFormat) == _SIGNED
    if _is_tiff(opened) and opened.mode == "I" and not signed:
        values = values.view(np.uint32)
    seen = None
    if isinstance(clear := opened.info.get("transparency"), int):
        seen = values != clear
    grey = stretch_own_range(values, seen)
    if _tag(opened, Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow inverts only images of 8 bits and fewer
    return Image.fromarray(grey), None if seen is None else _as_alpha(seen)


def _deep_colour(
    opened: ImageFile.ImageFile, content: bytes, raw: str, note: Note
) -> tuple[Image.Image, Image.Image | None]:
    """Return colours, or greys with alpha, of 16 bits, and their alpha.

    Pillow gives the upper bytes. A second reading in the opposite byte order gives the lower bytes.
    """
    with Image.open(BytesIO(content)) as again:
        _prepare(again, note)
        if raw == "LA;16B":  # a PNG of grey and alpha: Pillow has no opposite byte order for it
            quarters = np.asarray(_with_raw_mode(again, "RGBA")).astype(np.uint16)
            values, alpha = np.moveaxis(quarters[..., ::2] * 256 + quarters[..., 1::2], -1, 0)
        else:
            native = "L" if sys.byteorder == "little" else "B"
            order = native if raw[-1] == "N" else raw[-1]
            lower = np.asarray(_with_raw_mode(again, raw[:-1] + ("B" if order == "L" else "L")))
            values = np.asarray(opened).astype(np.uint16) * 256 + lower
            alpha = values[..., 3] if opened.mode == "RGBA" else None
            values = values[..., :3]
    if alpha is not None:
        seen = alpha > 0
        if raw.startswith("RGBa") and (alpha < alpha.max()).any():
            raise Unreadable("16-bit colours multiplied by their alpha; save it without alpha")
        image = Image.fromarray(stretch_own_range(values, seen))
        return image, Image.fromarray((alpha >> 8).astype(np.uint8))
    clear = opened.info.get("transparency")
    if isinstance(clear, tuple):
        seen = (values != clear).any(axis=-1)
        return Image.fromarray(stretch_own_range(values, seen)), _as_alpha(seen)
    return Image.fromarray(stretch_own_range(values)), None


def _as_alpha(seen: npt.NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(np.where(seen, 255, 0).astype(np.uint8))


def _on_white(image: Image.Image, alpha: Image.Image, note: Note) -> Image.Image:
    """Return the image laid on white; unchanged if it is opaque or transparent everywhere."""
    least, most = alpha.getextrema()
    if least == 255:
        return image
    if most == 0:
        note(OPAQUE)
        return image
    note(ON_WHITE)
    return Image.composite(image, Image.new(image.mode, image.size, "white"), alpha)


# --- TIFF -----------------------------------------------------------------------------------------


def _tag(opened: ImageFile.ImageFile, tag: int) -> Any:
    """Return the first value of a TIFF tag; None without the tag, or for other formats."""
    value = opened.tag_v2.get(tag) if _is_tiff(opened) else None
    return value[0] if isinstance(value, tuple) and value else value


def _is_tiff(opened: ImageFile.ImageFile) -> TypeGuard[TiffImagePlugin.TiffImageFile]:
    """Whether Pillow has opened the image as a TIFF."""
    return isinstance(opened, TiffImagePlugin.TiffImageFile)


def _prepare(opened: ImageFile.ImageFile, note: Note) -> str:
    """Make an image ready to be loaded, and return its raw mode.

    Raises:
        Unreadable: a TIFF that Pillow would read wrongly.
    """
    raw = _raw_mode(opened)
    if not _is_tiff(opened):
        return raw
    if (_tag(opened, Base.NewSubfileType) or 0) & _REDUCED_COPY:
        raise Unreadable("TIFF whose first image is a reduced copy; export the image itself")
    if (_tag(opened, _IMAGE_DEPTH) or 1) > 1:
        note(SEVERAL)
    photometric = _tag(opened, Base.PhotometricInterpretation)
    if photometric is None and opened.mode not in ("1", "YCbCr", "RGB"):
        raise Unreadable("TIFF that does not say whether 0 is black or white; save it anew")
    extra = opened.tag_v2.get(Base.ExtraSamples, ())
    if 0 in extra:
        if photometric in _ONE_CHANNEL:
            raise Unreadable(f"TIFF of {1 + len(extra)} channels; export one channel, or RGB")
        note(MORE_CHANNELS)
    in_planes = _tag(opened, Base.PlanarConfiguration) == _PLANES
    bits = _tag(opened, Base.BitsPerSample)
    if in_planes and photometric not in _ONE_CHANNEL and bits > 8:
        raise Unreadable("TIFF of 16-bit colours in separate planes; save it as one plane")
    if not opened.use_load_libtiff:
        # Pillow keeps one letter of each plane's raw mode: "L" of "L;I", "I" of "I;32BS".
        if in_planes and (photometric == _WHITE_IS_ZERO or (bits or 1) != 8):
            raise Unreadable("TIFF without compression in separate planes; save it as one plane")
        steps = opened.tag_v2.get(Base.YCbCrSubSampling, (2, 2))
        if photometric == _YCBCR and tuple(steps) != (1, 1):
            raise Unreadable("TIFF of subsampled colours without compression; save it as RGB")
    elif raw in ("I;16BS", "I;32BS", "F;32BF"):
        _with_raw_mode(opened, raw.replace("B", "N"))  # libtiff gives the bytes of this machine
    with suppress(Exception):  # loading would read these metadata, which are not needed
        exif = opened.getexif()
        for directory in set(IFD) & set(exif):
            del exif[directory]
    return raw


def _why_not_identified(content: bytes) -> str:
    """Return why Pillow does not identify ``content``: not an image, damaged, or which kind."""
    if not begins_as_image(content):
        return "not an image"
    if not content.startswith(tuple(TiffImagePlugin.PREFIXES)):
        return f"damaged, or of a kind that Pillow {PIL.__version__} does not read"
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if 43 in content[2:4] else 8])
        stream = BytesIO(content)
        stream.seek(tags.next)
        tags.load(stream)
        kind = ", ".join(f"{tag.name} {tags.get(tag, 'not given')}" for tag in _KIND)
    except Exception:  # damaged bytes may raise anything
        return "a damaged TIFF"
    return f"a TIFF of unusual kind ({kind}); save it as 8- or 16-bit grey, or 8-bit RGB"


# --- PNG and JPEG without their metadata ----------------------------------------------------------


def _without_metadata(content: bytes, note: Note) -> bytes:
    """Return a PNG or JPEG without metadata that do not change its pixels; others unchanged."""
    if content.startswith(_PNG):
        return _bare_png(content, note)
    return _bare_jpeg(content) if content.startswith(_JPEG) else content


def _bare_png(content: bytes, note: Note) -> bytes:
    """Return a PNG with its first image alone, and with its EXIF data if these are whole."""
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        chunk, name = content[at:end], content[at + 4 : at + 8]
        if name == b"eXIf" and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            note(NOT_TURNED)
        elif name[:1].isupper() or name in _PNG_NEEDED:
            kept.append(chunk)
        at = end
    return b"".join(kept)


def _bare_jpeg(content: bytes) -> bytes:
    """Return a JPEG without application data and comments, but for those in ``_JPEG_NEEDED``."""
    kept, at = [content[:2]], 2
    while content[at : at + 1] == b"\xff" and (marker := content[at + 1 : at + 2]) not in _SCANS:
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at:end]
        begins, length = _JPEG_NEEDED.get(marker, (b"", 0))
        needed = begins and segment[4:].startswith(begins) and len(segment) >= 4 + length
        if needed or not (marker == _COMMENT or b"\xe0" <= marker <= b"\xef"):
            kept.append(segment)
        at = end
    return b"".join(kept) + content[at:]
