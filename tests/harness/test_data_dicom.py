"""DICOM: windows, tables, MONOCHROME1, colour, patients; what cannot be read says why."""

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bstriplet.data import load_dataset
from bstriplet.errors import UserError
from bstriplet.images import read_image
from bstriplet.pixels import Unreadable

pydicom = pytest.importorskip("pydicom")

SIDE = 16
RAMP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)


def write_dicom(path: Path, pixels: np.ndarray, bits: int = 16, **tags: Any) -> Path:
    """Write uncompressed pixels [H, W] or [H, W, 3] with other tags of the header."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    header = pydicom.dataset.FileDataset(BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    header.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    header.BitsStored, header.HighBit = bits, bits - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def read(path: Path) -> np.ndarray:
    pixels = read_image(path, SIDE).pixels
    assert pixels.shape == (1, SIDE, SIDE)
    return pixels[0].astype(int)


def test_twelve_bits_without_a_window_are_scaled_by_their_range(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP * 16, bits=12)
    np.testing.assert_array_equal(read(path), RAMP)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP * 16, 12, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read(path), 255 - RAMP)


def test_the_window_is_that_of_the_header_after_rescaling(tmp_path: Path) -> None:
    """A lung window on a CT: the ends are black and white, whatever else the image holds."""
    stored = RAMP.astype(np.int16) * 8
    path = write_dicom(
        tmp_path / "a.dcm",
        stored,
        RescaleSlope=2,
        RescaleIntercept=-2000,
        WindowCenter=[-600, 40],
        WindowWidth=[1500, 400],
    )
    hounsfield = stored * 2.0 - 2000
    # Part 3 of the standard, C.11.2.1.2: width and centre are those of 1499 steps about -600.5
    expected = np.clip((hounsfield + 600.5) / 1499 + 0.5, 0, 1) * 255
    assert np.abs(read(path) - expected).max() <= 1
    assert read(path)[0, 0] == 0
    assert read(path)[-1, -1] == 255


def test_an_image_within_its_window_is_not_stretched(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP // 4 + 64, 8, WindowCenter=128, WindowWidth=256)
    pixels = read(path)
    assert abs(pixels.min() - 64) <= 1
    assert abs(pixels.max() - 127) <= 1


def test_a_voi_table_is_followed(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 12]
    table.LUTData = [4095 - 16 * value for value in range(256)]
    table["LUTData"].VR = "US"
    path = write_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=pydicom.Sequence([table]))
    assert np.abs(read(path) - (255 - RAMP)).max() <= 1


def test_colour_is_rgb(tmp_path: Path) -> None:
    colour = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    colour[:8, :, 2] = 200
    path = write_dicom(tmp_path / "a.dcm", colour, 8)
    np.testing.assert_array_equal(read_image(path, SIDE).pixels, colour.transpose(2, 0, 1))


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    frames = np.zeros((2 * SIDE, SIDE), dtype=np.uint8)
    several = write_dicom(tmp_path / "several.dcm", frames, 8, NumberOfFrames=2, Rows=SIDE)
    with pytest.raises(Unreadable, match="2 frames; export one image a file"):
        read_image(several, SIDE)
    whole = write_dicom(tmp_path / "cut.dcm", RAMP).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) - 100])
    with pytest.raises(Unreadable):
        read_image(tmp_path / "cut.dcm", SIDE)
    (tmp_path / "text.dcm").write_text("no image")
    with pytest.raises(Unreadable, match="not an image"):
        read_image(tmp_path / "text.dcm", SIDE)


def test_patients_of_the_headers_are_known_and_their_ids_are_not_kept(
    tmp_path: Path, cache: Path
) -> None:
    for label in "ab":
        for number in range(4):
            path = tmp_path / "train" / label / f"{number}.dcm"
            identity = f"Miller^{label}{number // 2}" if number else ""
            write_dicom(path, RAMP + number + 10 * ord(label), PatientID=identity)
    for _ in range(2):  # the second time from the cache
        dataset = load_dataset(str(tmp_path), SIDE)
        assert dataset.patients is not None
        np.testing.assert_array_equal(dataset.patients, [0, 1, 2, 2, 3, 4, 5, 5])
    about = [path.read_text() for path in cache.rglob("about.json")]
    assert len(about) == 1
    assert "Miller" not in about[0]


def test_without_pydicom_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in "ab":
        write_dicom(tmp_path / "train" / label / "1.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pydicom, which is not installed.*\[medical\]"):
        load_dataset(str(tmp_path), SIDE)
