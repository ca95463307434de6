from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from pneumo_experiments.data.dicom import find_dicom, read_radiograph
from pneumo_experiments.errors import Rejected, UserError

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
GREYS = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)


def dicom_bytes(pixels: np.ndarray, bits: int = 8, jpeg: bool = False, **header: Any) -> bytes:
    """A small DICOM file; ``header`` adds elements or replaces those of a plain grey picture."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    content = pixels.tobytes()
    if jpeg:
        frame = io.BytesIO()
        Image.fromarray(pixels).save(frame, "JPEG", quality=90)
        content = encapsulate([frame.getvalue()])
    dataset.PixelData = content
    dataset["PixelData"].VR = "OB" if jpeg or pixels.dtype.itemsize == 1 else "OW"
    dataset["PixelData"].is_undefined_length = jpeg
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '62' is no DICOM age, which is the point
        for keyword, value in header.items():
            setattr(dataset, keyword, value)
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    pixels = read_radiograph(content, "x").pixels
    assert pixels.dtype == np.uint8
    return pixels


def rejection(source: bytes | Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Rejected) as caught:
            read_radiograph(source, "image-7")
    message = str(caught.value)
    assert message.startswith("image-7: ")
    assert "\n" not in message
    return message.removeprefix("image-7: ")


def test_8_bit_greys_pass_untouched_whatever_window_the_header_suggests() -> None:
    content = dicom_bytes(GREYS, WindowCenter=40, WindowWidth=10, RescaleSlope=2, RescaleIntercept=7)
    assert np.array_equal(pixels_of(content), GREYS)


def test_monochrome1_is_inverted() -> None:
    content = dicom_bytes(GREYS, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(pixels_of(content), 255 - GREYS)
    deep = dicom_bytes(RAMP, 12, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(pixels_of(deep), 255 - pixels_of(dicom_bytes(RAMP, 12)))


def test_deep_pixels_without_a_window_are_scaled_from_darkest_to_brightest() -> None:
    assert np.array_equal(pixels_of(dicom_bytes(RAMP, 12)), np.rint(RAMP / 4095 * 255))
    narrow = 1000 + RAMP % 511
    assert np.array_equal(pixels_of(dicom_bytes(narrow, 12)), np.rint((narrow - 1000) / 510 * 255))
    assert not pixels_of(dicom_bytes(np.full((4, 4), 9, np.uint16), 12)).any()


def test_a_window_sets_the_ends_of_the_scale_even_where_no_pixel_reaches_them() -> None:
    content = dicom_bytes(RAMP, 12, WindowCenter=1000.5, WindowWidth=201, VOILUTFunction="LINEAR")
    expected = np.clip((RAMP.astype(float) - 900) / 200, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert np.abs(pixels_of(content) - expected).max() <= 0.5
    wide = dicom_bytes(RAMP, 12, WindowCenter=2048, WindowWidth=16384, VOILUTFunction="LINEAR_EXACT")
    assert (pixels_of(wide).min(), pixels_of(wide).max()) == (96, 159)  # 127.5 ± 255 / 8


def test_signed_pixels_and_a_rescale_are_understood() -> None:
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    assert np.array_equal(pixels_of(dicom_bytes(signed, 12)), pixels_of(dicom_bytes(RAMP, 12)))
    windowed = dicom_bytes(
        RAMP, 12, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000.5, WindowWidth=401
    )
    expected = np.clip((RAMP * 2.0 - 1000 - 800) / 400, 0, 1) * 255
    assert np.abs(pixels_of(windowed) - expected).max() <= 0.5
    falling = dicom_bytes(
        RAMP, 12, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096
    )
    assert np.array_equal(pixels_of(falling), 255 - pixels_of(dicom_bytes(RAMP, 12)))


def test_a_voi_table_is_looked_up() -> None:
    table = Dataset()
    table.LUTDescriptor = [256, 100, 16]
    table.LUTData = (np.arange(256) ** 2).astype(np.uint16).tolist()
    table["LUTData"].VR = "US"
    content = dicom_bytes(RAMP, 12, VOILUTSequence=[table])
    expected = np.clip(RAMP.astype(float) - 100, 0, 255) ** 2 / 255
    assert np.abs(pixels_of(content) - expected).max() <= 0.5


def test_a_jpeg_is_decoded_bit_by_bit_as_pydicom_does() -> None:
    content = dicom_bytes(GREYS, jpeg=True)
    assert np.array_equal(pixels_of(content), pydicom.dcmread(io.BytesIO(content)).pixel_array)


@pytest.mark.parametrize(
    ("age", "years"),
    [("62", 62), ("062Y", 62), ("018M", 1), ("051W", 0), ("400D", 1), ("", -1), ("old", -1), (None, -1)],
)
def test_age_is_in_whole_years_or_unknown(age: str | None, years: int) -> None:
    header = {} if age is None else {"PatientAge": age}
    assert read_radiograph(dicom_bytes(GREYS, **header), "x").age == years


def test_the_header_tells_patient_view_and_sex_or_nothing() -> None:
    full = read_radiograph(
        dicom_bytes(GREYS, PatientID=" 17 ", ViewPosition="PA", PatientSex="F", PatientName="Doe^Jane"), "x"
    )
    assert (full.patient, full.view, full.sex) == ("17", "PA", "F")
    assert "17" not in repr(full)
    bare = read_radiograph(dicom_bytes(GREYS), "x")
    assert (bare.patient, bare.view, bare.sex, bare.age) == ("", "", "", -1)


def test_what_is_no_single_grey_picture_is_rejected_with_the_reason(tmp_path: Path) -> None:
    colour = np.zeros((4, 4, 3), np.uint8)
    assert rejection(dicom_bytes(colour, SamplesPerPixel=3, PhotometricInterpretation="RGB")) == (
        "not a grey image (RGB)"
    )
    assert rejection(dicom_bytes(GREYS, PhotometricInterpretation="PALETTE COLOR")).startswith("not a grey")
    assert rejection(dicom_bytes(GREYS, NumberOfFrames=3)) == "3 frames instead of one"
    assert rejection(dicom_bytes(GREYS.astype(np.uint32), 32)) == "32 bits per pixel instead of 16 or fewer"
    unsupported = dicom_bytes(GREYS, jpeg=True).replace(
        JPEGBaseline8Bit.encode().ljust(22, b"\0"), JPEGLSLossless.encode().ljust(22, b"\0")
    )
    assert "JPEG-LS" in rejection(unsupported)
    assert "is not supported" in rejection(unsupported)
    no_pixels = pydicom.dcmread(io.BytesIO(dicom_bytes(GREYS)))
    del no_pixels.PixelData
    no_pixels.save_as(tmp_path / "a.dcm")
    assert rejection(tmp_path / "a.dcm").startswith("no pixel data")
    assert rejection(b"") == "not a DICOM file"
    assert rejection(b"ImageId,EncodedPixels") == "not a DICOM file"
    assert rejection(tmp_path / "none.dcm").endswith("(FileNotFoundError)")


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_file_cut_anywhere_is_rejected(jpeg: bool) -> None:
    content = dicom_bytes(np.tile(GREYS, (4, 4)), jpeg=jpeg)
    end = len(content) - 8 * jpeg  # the last 8 bytes of a JPEG file only close the sequence
    for cut in [*range(0, end, max(1, end // 150)), end - 2, end - 1]:
        rejection(content[:cut])


def test_a_jpeg_picture_that_ends_early_in_a_whole_file_is_rejected() -> None:
    content = dicom_bytes(np.tile(GREYS, (8, 8)), jpeg=True)
    start = content.index(b"\xff\xd8")
    half = start + (len(content) - start) // 2
    filled = content[:half] + bytes(len(content) - 8 - half) + content[-8:]
    assert rejection(filled) == "its picture is cut short"


def test_no_damage_brings_more_than_a_rejection() -> None:
    content = dicom_bytes(GREYS, jpeg=True, PatientID="17", PatientAge="062Y")
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            damaged[place] = rng.integers(256)
        try:
            read_radiograph(bytes(damaged), "x")
        except Rejected:
            rejection(bytes(damaged))


def test_every_odd_file_of_pydicom_is_a_picture_or_rejected_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    read: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in filter(Path.is_file, folder.rglob("*")):
            try:
                pixels = read_radiograph(path, path.name).pixels
            except Rejected:
                continue
            assert pixels.ndim == 2
            assert pixels.max() > pixels.min() or pixels.size == 256  # tiny ones may be one grey
            read.add(path.name)
    assert {"CT_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "JPEG2000.dcm"} <= read
    assert not {"MR_truncated.dcm", "rtdose.dcm", "SC_rgb_jpeg.dcm", "JPGExtended.dcm"} & read
    assert capfd.readouterr() == ("", "")


def test_files_are_found_in_all_subfolders_without_the_junk_of_archives(tmp_path: Path) -> None:
    for name in ("b/2/x.dcm", "a.DCM", "b/1/y.dcm", "__MACOSX/b/z.dcm", "b/2/._x.dcm", "b/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [str(path.relative_to(tmp_path)) for path in find_dicom(tmp_path)]
    assert names == ["a.DCM", "b/1/y.dcm", "b/2/x.dcm"]
    (tmp_path / "b/1/x.dcm").touch()
    with pytest.raises(UserError, match=r"2 files have the same image id, x\.dcm"):
        find_dicom(tmp_path)


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        find_dicom(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.dcm files"):
        find_dicom(tmp_path)


def test_the_real_radiographs_are_read_as_pydicom_decodes_them(real_data: Path) -> None:
    with (real_data / "known_areas.csv").open() as known:
        rows = {row["ImageId"]: row for row in csv.DictReader(known)}
    files = find_dicom(real_data / "dicom-images-train")
    assert {path.stem for path in files} == rows.keys()
    for path in files:
        radiograph = read_radiograph(path, path.stem)
        row = rows[path.stem]
        assert (radiograph.view, radiograph.sex, radiograph.age) == (row["view"], row["sex"], int(row["age"]))
        assert np.array_equal(radiograph.pixels, pydicom.dcmread(path).pixel_array)
    assert len(find_dicom(real_data / "dicom-images-test")) == 10


def test_a_real_radiograph_cut_in_its_picture_is_rejected(real_data: Path) -> None:
    content = find_dicom(real_data / "dicom-images-test")[0].read_bytes()
    for share in (0.02, 0.3, 0.5, 0.99):
        rejection(content[: int(share * len(content))])
