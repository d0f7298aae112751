"""DICOM images as a radiologist's screen shows them; reading them needs pydicom."""

import hashlib
import math
from collections.abc import MutableSequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bstriplet.data.notes import Note
from bstriplet.data.pixels import Pixels, Unreadable, check_area, stretch, stretch_own_range
from bstriplet.errors import UserError, one_line

NO_KIND = "have no PhotometricInterpretation and were taken for {}"
NO_PREAMBLE = "have no preamble or transfer syntax and were read as their first elements suggest"
NO_PADDING = "have a PixelPaddingValue that cannot be read ({})"
NO_PATIENT = "have a patient ID that cannot be read and count as patients of their own"
NO_WINDOW = "have a VOI table or window that cannot be used ({}) and are shown without it"

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom gives RGB for all


def read_dicom(content: bytes, max_pixels: int, note: Note) -> tuple[Image.Image, int]:
    """Return a DICOM image of one frame as 8-bit grey ("L") or RGB, and its number of pixels.

    Greys are mapped by rescale slope and intercept (or the modality table), then by the first VOI
    table or window of the header; the ends of the window become 0 and 255. Without a usable window,
    the smallest and largest value of the image become 0 and 255; padding does not count. Padding is
    black. MONOCHROME1 and inverse presentations are inverted: bright is always dense.

    Raises:
        UserError: pydicom is not installed.
        Unreadable: the pixels are damaged, of several frames or of an unsupported kind, or their
            compression needs another package.
        TooLarge: there are more than ``max_pixels``.
    """
    pydicom = _pydicom()
    from pydicom.pixels import apply_color_lut

    header = pydicom.dcmread(BytesIO(content), force=True)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise Unreadable(f"DICOM of {frames} frames; export one image a file")
    if "Rows" not in header or "Columns" not in header:
        raise Unreadable("DICOM without an image")
    _take_from_groups(header)
    area = check_area(int(header.Columns), int(header.Rows), max_pixels)
    if "TransferSyntaxUID" not in header.file_meta:
        note(NO_PREAMBLE)
        header.file_meta.TransferSyntaxUID = _syntax_read(header)
    _check_length_of_pixels(header)
    kind = _keyword(header, "PhotometricInterpretation")
    if not kind:
        kind = "RGB" if header.get("SamplesPerPixel") == 3 else "MONOCHROME2"
        note(NO_KIND.format(kind))
    header.PhotometricInterpretation = kind
    bits, highest = header.get("BitsStored"), header.get("HighBit")
    if None not in (bits, highest) and highest != bits - 1:  # pydicom would take the lowest bits
        raise Unreadable(f"DICOM of {bits} bits below bit {highest}; one of these is wrong")
    stored = header.pixel_array
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(stored, header)
        # Some palettes declare 16 bits and use 8.
        top = np.iinfo(colours.dtype).max if colours.max() > 255 else 255
        return Image.fromarray(stretch(colours, 0, top)), area
    if stored.ndim == 3:
        if kind not in _COLOURS:
            raise Unreadable(f"DICOM of colours {kind}; export it as RGB")
        return Image.fromarray(stretch(stored, 0, 2 ** int(header.BitsStored) - 1)), area
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unreadable(f"DICOM of {kind} with one channel; export it as MONOCHROME2")
    padding = _padding(stored, header, note)
    grey = _windowed(_rescaled(stored, header), header, ~padding, note)
    if kind == "MONOCHROME1" or _keyword(header, "PresentationLUTShape") == "INVERSE":
        grey = 255 - grey
    if not padding.all():
        grey[padding] = 0
    return Image.fromarray(grey), area


def read_patient(content: bytes, note: Note) -> str:
    """Return a pseudonym of the header's patient ID; empty if there is no readable ID.

    The ID itself is personal data and is written nowhere.
    """
    header = _pydicom().dcmread(BytesIO(content), stop_before_pixels=True, force=True)
    try:
        identity = str(header.get("PatientID") or "").strip()
    except Exception:  # damaged elements fail in many ways; the message may quote the ID
        note(NO_PATIENT)
        return ""
    return "dicom-" + hashlib.sha256(identity.encode()).hexdigest()[:12] if identity else ""


def _keyword(header: Any, name: str) -> str:
    """Return the defined term of an element in capitals; empty if the element is absent."""
    return str(header.get(name) or "").strip().upper()


def _check_length_of_pixels(header: Any) -> None:
    """Raise if the pixels are compressed although the header says that they are not.

    Only compressed pixels have an undefined length. pydicom would show them as noise.
    """
    from pydicom import uid

    uncompressed = header.file_meta.TransferSyntaxUID in uid.UncompressedTransferSyntaxes
    if uncompressed and "PixelData" in header and header["PixelData"].is_undefined_length:
        raise Unreadable(
            "DICOM of compressed pixels whose header does not say how; export it uncompressed"
        )


def _syntax_read(header: Any) -> Any:
    """Return the transfer syntax in which pydicom read a header that names none."""
    from pydicom import uid

    implicit, little = header.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _take_from_groups(header: Any) -> None:
    """Copy the elements that an enhanced image gives for its frame to the top of the header."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in header.get(groups) or ():
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in group.get(name) or ():
                    header.update(item)


def _padding(stored: npt.NDArray[Any], header: Any, note: Note) -> npt.NDArray[np.bool_]:
    """Return a mask of the padding: pixels of one value or of a range (part 3, C.7.5.1.1.2)."""
    try:
        values = [header.get(f"PixelPadding{name}") for name in ("Value", "RangeLimit")]
        # A writer may have stored a signed value as an unsigned one; the bits are the same.
        ends = [np.int64(int(value)).astype(stored.dtype) for value in values if value is not None]
    except Exception as error:  # damaged elements fail in many ways; the image is still usable
        note(NO_PADDING.format(one_line(error)))
        ends = []
    if not ends:
        return np.zeros(stored.shape, dtype=bool)
    return (min(ends) <= stored) & (stored <= max(ends))


def _rescaled(stored: npt.NDArray[Any], header: Any) -> npt.NDArray[Any]:
    """Return stored values in the units of the modality, such as Hounsfield's."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, header)
    slope, intercept = (
        _number(header, name, default)
        for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if slope == 0:
        raise Unreadable("RescaleSlope is 0; mend the header")
    return stored * slope + intercept


def _number(header: Any, name: str, default: float = math.nan) -> float:
    """Return the first value of an element; ``default`` where it is absent or empty."""
    try:
        value = header.get(name)
        if isinstance(value, MutableSequence):
            value = value[0]
        number = default if value in (None, "") else float(value)
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise Unreadable(f"{name}: {one_line(error)}") from error
    if not math.isfinite(number):
        raise Unreadable(f"{name} is {number}")
    return number


def _windowed(
    values: npt.NDArray[Any], header: Any, counted: npt.NDArray[np.bool_], note: Note
) -> Pixels:
    """Return rescaled greys as uint8 [H, W] by the table or window, else by their own range."""
    for shown_by in (_by_table, _by_window):
        try:
            shown = shown_by(values, header)
        except Exception as error:  # damaged elements fail in many ways; the next way is tried
            note(NO_WINDOW.format(one_line(error)))
        else:
            if shown is not None:
                return shown
    return stretch_own_range(values, counted)


def _by_table(values: npt.NDArray[Any], header: Any) -> Pixels | None:
    """Return greys by the first VOI table of the header; None where there is none."""
    from pydicom.pixels import apply_voi

    if not header.get("VOILUTSequence"):
        return None
    bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
    return stretch(apply_voi(np.rint(values).astype(np.int64), header), 0, 2**bits - 1)


def _by_window(values: npt.NDArray[Any], header: Any) -> Pixels | None:
    """Return greys by the first window of the header; None where there is none.

    Part 3, C.11.2.1.2 and C.11.2.1.3.
    """
    if any(header.get(name) in (None, "") for name in ("WindowCenter", "WindowWidth")):
        return None
    centre, width = _number(header, "WindowCenter"), _number(header, "WindowWidth")
    function = _keyword(header, "VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise Unreadable(f"VOILUTFunction {function} is not known")
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise Unreadable(f"WindowWidth is {width:g}")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):  # far below the window: 1 / (1 + inf)
            return stretch(1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1)
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    low = centre - width / 2
    return stretch(values, low, low + max(width, 1e-6))  # a width of 1 is a step


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "DICOM images are read by pydicom, which is not installed; install it with: "
            "pip install 'bstriplet-kernels[medical]'"
        ) from None
    return pydicom
