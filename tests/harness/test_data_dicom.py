"""DICOM: windows, tables, MONOCHROME1, colour, patients, and reasons why files cannot be read."""

import re
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bstriplet.data.cache import decode
from bstriplet.data.dataset import load_dataset
from bstriplet.data.dicom import NO_PATIENT
from bstriplet.data.image_files import NO_IMAGES, list_images
from bstriplet.data.images import read_image
from bstriplet.data.pixels import TooLarge, Unreadable
from bstriplet.errors import UserError

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
    """A lung window on a CT: its ends are black and white, whatever the image's range."""
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


def notes_of(path: Path) -> str:
    return " / ".join(read_image(path, SIDE).notes)


def test_an_intercept_without_a_slope_counts(tmp_path: Path) -> None:
    """Hounsfield units of a CT whose writer left out a slope of 1."""
    window = {"WindowCenter": -872, "WindowWidth": 256}
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleIntercept=-1000, **window)
    assert np.abs(read(path) - RAMP).max() <= 1
    path = write_dicom(tmp_path / "b.dcm", RAMP, RescaleSlope=2, WindowCenter=256, WindowWidth=512)
    assert np.abs(read(path) - RAMP).max() <= 1


def test_an_enhanced_image_says_its_window_elsewhere(tmp_path: Path) -> None:
    def one(**tags: Any) -> Any:
        item = pydicom.Dataset()
        for name, value in tags.items():
            setattr(item, name, value)
        return pydicom.Sequence([item])

    path = write_dicom(
        tmp_path / "a.dcm",
        RAMP // 4,
        NumberOfFrames=1,
        SharedFunctionalGroupsSequence=one(
            PixelValueTransformationSequence=one(RescaleIntercept=64, RescaleSlope=1),
        ),
        PerFrameFunctionalGroupsSequence=one(
            FrameVOILUTSequence=one(WindowCenter=128, WindowWidth=256),
        ),
    )
    assert np.abs(read(path) - (RAMP // 4 + 64)).max() <= 1


def test_a_negative_slope_is_no_second_inversion(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm",
        RAMP,
        RescaleSlope=-1,
        RescaleIntercept=255,
        WindowCenter=128,
        WindowWidth=256,
    )
    assert np.abs(read(path) - (255 - RAMP)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "shape", "inverted"),
    [("MONOCHROME2", "INVERSE", True), ("MONOCHROME1", "INVERSE", True),
     ("MONOCHROME2", "inverse", True), ("MONOCHROME2", "IDENTITY", False),
     (" monochrome1", "IDENTITY", True)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_bright_is_dense_however_it_is_said(
    tmp_path: Path, kind: str, shape: str, inverted: bool
) -> None:
    tags = {"PhotometricInterpretation": kind, "PresentationLUTShape": shape}
    path = write_dicom(tmp_path / "a.dcm", RAMP, **tags)
    np.testing.assert_array_equal(read(path), 255 - RAMP if inverted else RAMP)


BAD_TABLE = pydicom.Dataset()
BAD_TABLE.LUTDescriptor = [256, 0, 12]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"WindowCenter": 100, "WindowWidth": 0}, "WindowWidth is 0"),
        ({"WindowCenter": 100, "WindowWidth": 0.5}, r"WindowWidth is 0\.5"),
        ({"WindowCenter": 100, "WindowWidth": -20}, "WindowWidth is -20"),
        ({"WindowCenter": 9, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "VOILUTFunction CUBIC"),
        ({"VOILUTSequence": pydicom.Sequence([BAD_TABLE])}, "0028,3006|LUTData"),
        ({"WindowCenter": 100, "WindowWidth": b"wide"}, "WindowWidth"),
    ],
)
def test_a_window_that_cannot_be_used_costs_no_image(
    tmp_path: Path, tags: dict[str, Any], reason: str
) -> None:
    text = tags.get("WindowWidth") == b"wide"
    path = write_dicom(tmp_path / "a.dcm", RAMP, **(tags | {"WindowWidth": 1234} if text else tags))
    if text:
        path.write_bytes(path.read_bytes().replace(b"1234", b"wide"))
    picture = read_image(path, SIDE)
    np.testing.assert_array_equal(picture.pixels[0], RAMP)
    (note,) = picture.notes
    assert re.search(f"cannot be used .*({reason})", note)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_window_is_none(tmp_path: Path, empty: str | None) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=empty, WindowWidth=empty)
    np.testing.assert_array_equal(read(path), RAMP)
    assert not notes_of(path)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_windows_of_other_functions_are_followed(tmp_path: Path) -> None:
    window = {"WindowCenter": 128, "WindowWidth": 64}
    exact = write_dicom(tmp_path / "a.dcm", RAMP, VOILUTFunction="linear_exact ", **window)
    assert np.abs(read(exact) - np.clip((RAMP - 96.0) / 64, 0, 1) * 255).max() <= 1
    curved = write_dicom(tmp_path / "b.dcm", RAMP, VOILUTFunction="SIGMOID", **window)
    assert np.abs(read(curved) - 255 / (1 + np.exp(-4 * (RAMP - 128.0) / 64))).max() <= 1
    step = write_dicom(tmp_path / "c.dcm", RAMP, WindowCenter=128, WindowWidth=1)
    np.testing.assert_array_equal(read(step), np.where(RAMP > 127, 255, 0))


def test_padding_is_black_and_does_not_decide_the_range(tmp_path: Path) -> None:
    signed = RAMP.astype(np.int16) + 100
    signed[0, :4] = -2000
    expected = RAMP.astype(float) - RAMP[0, 4]
    expected = np.rint(np.clip(expected / expected.max(), 0, 1) * 255)
    expected[0, :4] = 0
    for value in (-2000, 63536):  # 63536 is -2000 in the same bits
        path = write_dicom(tmp_path / "a.dcm", signed)
        element = pydicom.DataElement("PixelPaddingValue", "US" if value > 0 else "SS", value)
        header = pydicom.dcmread(path)
        header.add(element)
        header.save_as(path)
        np.testing.assert_array_equal(read(path), expected)
    inverse = RAMP.copy()
    inverse[:2] = 60000
    path = write_dicom(
        tmp_path / "b.dcm",
        inverse,
        PhotometricInterpretation="MONOCHROME1",
        PixelPaddingValue=50000,
        PixelPaddingRangeLimit=65535,
    )
    pixels = read(path)
    assert (pixels[:2] == 0).all()
    assert (pixels[2, 0], pixels[-1, -1]) == (255, 0)


@pytest.mark.parametrize(("kind", "value"), [("US", [1, 2]), ("LO", "none"), ("FD", float("inf"))])
def test_a_padding_value_that_cannot_be_read_costs_no_image(
    tmp_path: Path, kind: str, value: Any
) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    header = pydicom.dcmread(path)
    header.add(pydicom.DataElement("PixelPaddingValue", kind, value))
    header.save_as(path)
    np.testing.assert_array_equal(read(path), RAMP)
    assert "PixelPaddingValue that cannot be read" in notes_of(path)


def test_an_image_of_nothing_but_padding_has_no_other_values_to_tell_it_from(
    tmp_path: Path,
) -> None:
    flat = np.full_like(RAMP, 5)
    tags = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 5}
    assert (read(write_dicom(tmp_path / "a.dcm", flat, **tags)) == 255).all()


def without_preamble(path: Path) -> bytes:
    return path.read_bytes()[132:]


def without_group_2(path: Path) -> bytes:
    """Return the data set alone, as very old files and network captures hold it."""
    content = path.read_bytes()
    length = int.from_bytes(content[140:144], "little")
    return content[144 + length :]


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("cut", [without_preamble, without_group_2])
def test_a_file_without_preamble_or_transfer_syntax_is_read(
    tmp_path: Path, implicit: bool, cut: Callable[[Path], bytes]
) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP * 16, 12, PhotometricInterpretation="MONOCHROME1")
    if implicit:
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        header.save_as(path, implicit_vr=True, little_endian=True)
    path.write_bytes(cut(path))
    np.testing.assert_array_equal(read(path), 255 - RAMP)
    assert ("no preamble" in notes_of(path)) == (cut is without_group_2)


def test_a_header_without_transfer_syntax_is_read(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    header = pydicom.dcmread(path)
    del header.file_meta.TransferSyntaxUID
    header.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
    np.testing.assert_array_equal(read(path), RAMP)


@pytest.mark.parametrize("claim", [None, pydicom.uid.ExplicitVRLittleEndian])
def test_compressed_pixels_are_not_read_as_they_lie(tmp_path: Path, claim: str | None) -> None:
    """Compressed noise is longer than the pixels, so that there are enough bytes for an image."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    path = write_dicom(tmp_path / "a.dcm", noise, 8)
    header = pydicom.dcmread(path)
    header.compress(pydicom.uid.RLELossless)
    header.save_as(path)
    content = without_group_2(path)
    if claim:
        header.file_meta.TransferSyntaxUID = claim
        group_2 = BytesIO()
        pydicom.filewriter.write_file_meta_info(group_2, header.file_meta)
        content = bytes(128) + b"DICM" + group_2.getvalue() + content
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="compressed pixels whose header does not say how"):
        read_image(path, SIDE)


def test_the_kind_of_pixels_is_assumed_where_it_is_not_said_and_else_must_be_known(
    tmp_path: Path,
) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    header = pydicom.dcmread(path)
    del header.PhotometricInterpretation
    header.save_as(path)
    np.testing.assert_array_equal(read(path), RAMP)
    assert "taken for MONOCHROME2" in notes_of(path)
    for kind in ("HSV", "GREY"):
        header.PhotometricInterpretation = kind
        header.save_as(path)
        with pytest.raises(Unreadable, match=kind):
            read_image(path, SIDE)
    colour = np.stack([RAMP] * 3, axis=-1).astype(np.uint8)
    header = pydicom.dcmread(write_dicom(path, colour, 8))
    del header.PhotometricInterpretation
    header.save_as(path)
    np.testing.assert_array_equal(read(path), RAMP)
    assert "taken for RGB" in notes_of(path)
    with pytest.raises(Unreadable, match="colours HSV; export it as RGB"):
        read_image(write_dicom(path, colour, 8, PhotometricInterpretation="HSV"), SIDE)


def test_bits_that_do_not_lie_lowest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="12 bits below bit 15"):
        read_image(write_dicom(tmp_path / "a.dcm", RAMP * 16, 12, HighBit=15), SIDE)


@pytest.mark.parametrize("slope", [0, float("inf")])
def test_a_slope_that_says_nothing_is_named(tmp_path: Path, slope: float) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    header = pydicom.dcmread(path)
    header.add(pydicom.DataElement("RescaleSlope", "FD", slope))
    header.save_as(path)
    with pytest.raises(Unreadable, match=f"RescaleSlope is {slope}"):
        read_image(path, SIDE)


def test_a_slope_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope=1234)
    path.write_bytes(path.read_bytes().replace(b"1234", b"slow"))
    with pytest.raises(Unreadable, match=r"^RescaleSlope: .*slow"):
        read_image(path, SIDE)


def test_a_modality_table_is_followed(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.LUTData = [255 - value for value in range(256)]
    table["LUTData"].VR = "US"
    path = write_dicom(tmp_path / "a.dcm", RAMP, ModalityLUTSequence=pydicom.Sequence([table]))
    np.testing.assert_array_equal(read(path), 255 - RAMP)


def test_colours_of_twelve_bits_use_all_of_their_range(tmp_path: Path) -> None:
    colour = np.stack([RAMP, RAMP, RAMP], axis=-1) * 16
    assert np.abs(read(write_dicom(tmp_path / "a.dcm", colour, 12)) - RAMP).max() <= 1


def test_a_dicom_file_without_an_image_and_one_of_too_many_pixels_are_named(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    with pytest.raises(TooLarge, match="16 x 16 pixels"):
        read_image(path, SIDE, max_pixels=255)
    assert read_image(path, SIDE, max_pixels=256).area == 256
    header = pydicom.dcmread(path)
    del header.Rows
    header.save_as(path)
    with pytest.raises(Unreadable, match="DICOM without an image"):
        read_image(path, SIDE)


def test_a_palette_that_says_16_bits_and_uses_8_is_not_black(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).tobytes()
    tables = {
        f"{colour}PaletteColorLookupTable{what}": value
        for colour in ("Red", "Green", "Blue")
        for what, value in (("Descriptor", [256, 0, 16]), ("Data", ramp))
    }
    path = write_dicom(
        tmp_path / "a.dcm",
        RAMP.astype(np.uint8),
        8,
        PhotometricInterpretation="PALETTE COLOR",
        **tables,
    )
    np.testing.assert_array_equal(read(path), RAMP)


def test_dicom_is_known_by_its_content_and_a_directory_of_files_is_none(tmp_path: Path) -> None:
    write_dicom(tmp_path / "IM000001", RAMP)
    write_dicom(tmp_path / "1.2.840.113619.2", RAMP)
    (tmp_path / "old").write_bytes(without_group_2(write_dicom(tmp_path / "old", RAMP)))
    directory = write_dicom(tmp_path / "DICOMDIR", RAMP)
    header = pydicom.dcmread(directory)
    header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    header.save_as(directory)
    found = list_images(tmp_path)
    assert [path.name for path in found.images] == ["1.2.840.113619.2", "IM000001", "old"]
    assert found.left_out == {NO_IMAGES: [str(directory)]}


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


def test_patients_of_the_headers_stay_with_their_images_and_a_manifest_says_more(
    tmp_path: Path,
) -> None:
    for label in "ab":
        for number in range(4):
            path = tmp_path / "train" / label / f"{number}.dcm"
            write_dicom(path, RAMP + number + 10 * ord(label), PatientID=f"{label}{number // 2}")
    (tmp_path / "train/a/0.dcm").write_text("no image")
    (tmp_path / "manifest.csv").write_text("file,patient\ntrain/a/3.dcm,x\ntrain/b/0.dcm,X\n")
    dataset = load_dataset(str(tmp_path), SIDE, skip_broken=True)
    assert dataset.patients is not None
    np.testing.assert_array_equal(dataset.patients, [0, 1, 2, 2, 3, 4, 4])


def test_a_patient_id_that_cannot_be_read_costs_no_image_and_is_told_nowhere(
    tmp_path: Path, cache: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_dicom(tmp_path / "odd.dcm", RAMP, PatientID="MILLER")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"LO\x06\0MILLER", b"QQ\x06\0MILLER"))
    long = write_dicom(tmp_path / "long.dcm", RAMP, PatientID="M" * 70)  # pydicom warns of it
    recwarn.clear()
    decoded = decode([path, long], SIDE)
    assert not decoded.broken
    assert decoded.notes == {NO_PATIENT: [0]}
    assert list(decoded.patients) == [1]
    assert not recwarn.list
    assert "MILLER" not in next(cache.rglob("about.json")).read_text()


def test_without_pydicom_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in "ab":
        write_dicom(tmp_path / "train" / label / "1.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pydicom, which is not installed.*\[medical\]"):
        load_dataset(str(tmp_path), SIDE)
