"""DICOM images as a radiologist's screen shows them, read by pydicom where that is installed."""

import hashlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from bstriplet.errors import UserError
from bstriplet.images import Unreadable, stretch, stretch_own_range


def read_dicom(content: bytes) -> Image.Image:
    """Return a DICOM image of one frame as 8-bit grey ("L") or RGB.

    Greys: rescale slope and intercept (or the modality table), then the window or the VOI table of
    the header, the first where there are several; the ends of the window become 0 and 255. Without
    a window, the image's own range does. MONOCHROME1 is inverted: bright is always dense.

    Raises:
        UserError: pydicom is not installed.
        Unreadable: the file is damaged, has several frames, or its compression needs another
            package.
    """
    pydicom = _pydicom()
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    header = pydicom.dcmread(BytesIO(content))
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise Unreadable(f"DICOM of {frames} frames; export one image a file")
    values = header.pixel_array
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(values, header)
        return Image.fromarray(stretch(colours, 0, np.iinfo(colours.dtype).max))
    if values.ndim == 3:
        return Image.fromarray(stretch(values, 0, 2 ** int(header.BitsStored) - 1))
    grey = _windowed(apply_modality_lut(values, header), header)
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey)


def read_patient(content: bytes) -> str:
    """Return a pseudonym of the header's patient ID; empty where there is none.

    The ID itself, a person's data, is written nowhere.
    """
    header = _pydicom().dcmread(BytesIO(content), stop_before_pixels=True, force=True)
    identity = str(header.get("PatientID") or "").strip()
    return "dicom-" + hashlib.sha256(identity.encode()).hexdigest()[:12] if identity else ""


def _windowed(values: Any, header: Any) -> Any:
    """Return rescaled greys as uint8 [H, W] by the window or table, else by their range."""
    from pydicom.pixels import apply_voi_lut

    if header.get("VOILUTSequence"):
        table = apply_voi_lut(np.rint(values).astype(np.int64), header)
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return stretch(table, 0, 2**bits - 1)
    if header.get("WindowCenter") is None or header.get("WindowWidth") is None:
        return stretch_own_range(values)
    low, high = apply_voi_lut(np.array([-1e12, 1e12]), header)  # the ends of every window
    return stretch(apply_voi_lut(values, header), low, high)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "DICOM images are read by pydicom, which is not installed; install it with: "
            "pip install 'bstriplet-kernels[medical]'"
        ) from None
    return pydicom
