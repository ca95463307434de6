from __future__ import annotations

import csv
import io
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import (
    GREYS,
    LOSSLESS,
    RAMP,
    dicom_bytes,
    jpeg,
    jpeg_2000,
    jpeg_file,
    jpeg_lossless,
    jpeg_ls_frame,
    lossless_file,
    pixels_of,
    rejection,
    stretched,
    with_peak,
)
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_windowing

from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected


def test_8_bit_greys_pass_untouched_whatever_window_the_header_suggests() -> None:
    content = dicom_bytes(GREYS, WindowCenter=40, WindowWidth=10, RescaleSlope=2, RescaleIntercept=7)
    assert np.array_equal(pixels_of(content), GREYS)
    assert np.array_equal(pixels_of(dicom_bytes(RAMP.astype(np.int8), 8)), (RAMP + 128) % 256)  # shifted


def test_monochrome1_is_inverted() -> None:
    content = dicom_bytes(GREYS, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(pixels_of(content), 255 - GREYS)
    deep = read_radiograph(dicom_bytes(RAMP, 12, PhotometricInterpretation="MONOCHROME1"), "x")
    assert np.array_equal(deep.pixels, 255 - pixels_of(dicom_bytes(RAMP, 12)))
    assert deep.format == "uncompressed, 12 bit, MONOCHROME1"


def test_deep_pixels_without_a_window_are_scaled_from_darkest_to_brightest() -> None:
    assert np.array_equal(pixels_of(dicom_bytes(RAMP, 12)), np.rint(RAMP / 4095 * 255))
    narrow = 1000 + RAMP % 511
    assert np.array_equal(pixels_of(dicom_bytes(narrow, 12)), np.rint((narrow - 1000) / 510 * 255))


def test_a_window_sets_the_ends_of_the_scale_even_where_no_pixel_reaches_them() -> None:
    content = dicom_bytes(RAMP, 12, WindowCenter=1000.5, WindowWidth=201, VOILUTFunction="LINEAR")
    expected = np.clip((RAMP.astype(float) - 900) / 200, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert np.abs(pixels_of(content) - expected).max() <= 0.5
    wide = dicom_bytes(RAMP, 12, WindowCenter=2048, WindowWidth=16384, VOILUTFunction="LINEAR_EXACT")
    assert (pixels_of(wide).min(), pixels_of(wide).max()) == (96, 159)  # 127.5 ± 255 / 8


def test_a_rescale_comes_before_the_window() -> None:
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1000}
    windowed = dicom_bytes(RAMP, 12, **rescale, WindowCenter=1000.5, WindowWidth=401)
    expected = np.clip((RAMP * 2.0 - 1000 - 800) / 400, 0, 1) * 255
    assert np.abs(pixels_of(windowed) - expected).max() <= 0.5
    falling = {"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 2048, "WindowWidth": 4096}
    assert np.array_equal(pixels_of(dicom_bytes(RAMP, 12, **falling)), 255 - pixels_of(dicom_bytes(RAMP, 12)))


def test_windows_of_all_three_shapes_follow_their_formulas() -> None:
    values, plain = RAMP.astype(float), pixels_of(dicom_bytes(RAMP, 12, **WINDOW))
    sigmoid = pixels_of(dicom_bytes(RAMP, 12, VOILUTFunction="SIGMOID", **WINDOW))
    assert np.abs(sigmoid - 255 / (1 + np.exp(-4 * (values - 1500) / 800))).max() <= 0.5
    exact = pixels_of(dicom_bytes(RAMP, 12, VOILUTFunction="LINEAR_EXACT", **WINDOW))
    assert np.abs(exact - np.clip((values - 1100) / 800, 0, 1) * 255).max() <= 0.5
    step = pixels_of(dicom_bytes(RAMP, 12, WindowCenter=1500.5, WindowWidth=1))
    assert np.array_equal(step, np.where(RAMP > 1500, 255, 0))
    first_of_two = dicom_bytes(RAMP, 12, WindowCenter=[1500, 9], WindowWidth=[800, 2])
    assert np.array_equal(pixels_of(first_of_two), plain)
    unknown = read_radiograph(dicom_bytes(RAMP, 12, VOILUTFunction="DOE^JANE", **WINDOW), "x")
    assert np.array_equal(unknown.pixels, plain)
    assert unknown.notes == ("VOILUTFunction empty or damaged: not used",)


def test_padding_does_not_set_the_range() -> None:
    picture = (1000 + RAMP % 511).astype(np.uint16)
    picture[:5], picture[-1] = 0, 4095
    inside = np.clip((picture.astype(float) - 1000) / 510, 0, 1) * 255
    one = dicom_bytes(np.where(picture == 4095, 0, picture).astype(np.uint16), 12, PixelPaddingValue=0)
    assert np.abs(pixels_of(one)[:-1] - inside[:-1]).max() <= 0.5
    assert not pixels_of(one)[-1].any()
    both = dicom_bytes(picture, 12, PixelPaddingValue=0, PixelPaddingRangeLimit=999)
    assert pixels_of(both)[10].max() < 80  # 4095 is no padding here
    upper = dicom_bytes(picture[5:], 12, PixelPaddingValue=4095)
    assert np.abs(pixels_of(upper) - inside[5:]).max() <= 0.5
    signed = (picture.astype(np.int16) - 2000).astype(np.int16)[:-1]
    content = dicom_bytes(signed, 16, PixelPaddingValue=-2000)
    assert np.abs(pixels_of(content) - inside[:-1]).max() <= 0.5
    as_unsigned = content.replace(b"\x28\0\x20\x01SS", b"\x28\0\x20\x01US")  # -2000 becomes 63536
    assert content != as_unsigned
    assert np.array_equal(pixels_of(as_unsigned), pixels_of(content))
    only_padding = dicom_bytes(np.full((4, 4), 7, np.uint16), 12, PixelPaddingValue=7)
    assert rejection(only_padding).startswith("no contrast")


def test_bits_beyond_the_stored_ones_are_left_out() -> None:
    assert np.array_equal(pixels_of(dicom_bytes(RAMP | RAMP % 3 << 12, 12)), stretched(RAMP))
    wide = dicom_bytes(GREYS.astype(np.uint16) + 256 * 7, 8, WindowCenter=9, WindowWidth=9)
    assert np.array_equal(pixels_of(wide), GREYS)  # 8 bits stored are 8 bits, wherever


def notes_of(content: bytes) -> tuple[str, ...]:
    return read_radiograph(content, "x").notes


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1
    return content.replace(old, new)


def with_syntax(name: str) -> bytes:
    return replaced(jpeg_file(GREYS), b"1.2.840.10008.1.2.4.50", name.encode())


WINDOW = {"WindowCenter": 1500, "WindowWidth": 800}


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [("", ""), ("2", ""), ("", "7"), ("0", "7"), ("9e999", "0"), ("1e308", "1e308"), ("2,5", "0")],
)
def test_a_rescale_that_is_empty_zero_or_damaged_is_none(slope: str, intercept: str) -> None:
    plain = dicom_bytes(RAMP, 12, **WINDOW)
    content = dicom_bytes(RAMP, 12, **WINDOW, RescaleSlope="7.12345", RescaleIntercept="3.12345")
    content = replaced(content, b"7.12345", slope.ljust(7).encode())
    content = replaced(content, b"3.12345", intercept.ljust(7).encode())
    assert np.array_equal(pixels_of(content), pixels_of(plain))
    assert "RescaleSlope or RescaleIntercept empty or damaged: not used" in notes_of(content)
    assert notes_of(plain) == ()


@pytest.mark.parametrize(
    ("centre", "width", "used"),
    [
        ("2047,5", "4095", None),
        ("", "4095", None),
        ("1500", "", None),
        *(("40", width, None) for width in ("0", "-5", "0.5")),
        ("JANE", "4095", None),
        ("2047,5\\1500", "4095\\800", WINDOW),
        ("9e999\\1500", "4095\\800", WINDOW),
        ("2047.5\\1500", "-1\\800", WINDOW),
        ("1500", "800\\9", WINDOW),
    ],
)
def test_a_damaged_window_leaves_the_next_one_or_the_range(
    centre: str, width: str, used: dict[str, int] | None
) -> None:
    content = dicom_bytes(RAMP, 12, WindowCenter="7" * 16, WindowWidth="8" * 16)
    content = replaced(content, b"7" * 16, centre.ljust(16).encode())
    content = replaced(content, b"8" * 16, width.ljust(16).encode())
    expected = pixels_of(dicom_bytes(RAMP, 12, **used)) if used else stretched(RAMP)
    assert np.array_equal(pixels_of(content), expected)
    assert (width == "800\\9") is (notes_of(content) == ())


def voi_table(entries: int = 256, first: int = 100, data: int | None = None) -> Dataset:
    table = Dataset()
    table.LUTDescriptor = [entries, first, 16]
    table.LUTData = (np.arange(entries if data is None else data) ** 2 % 65536).astype(np.uint16).tolist()
    table["LUTData"].VR = "US"
    return table


def test_a_voi_table_is_looked_up_and_a_damaged_one_leaves_the_next_the_window_or_the_range() -> None:
    window, whole = pixels_of(dicom_bytes(RAMP, 12, **WINDOW)), voi_table()
    looked_up = pixels_of(dicom_bytes(RAMP, 12, VOILUTSequence=[whole]))
    assert np.abs(looked_up - np.clip(RAMP.astype(float) - 100, 0, 255) ** 2 / 255).max() <= 0.5
    no_data, short = voi_table(), voi_table(data=3)
    del no_data.LUTData
    for damaged in (Dataset(), no_data, short):
        with_window = dicom_bytes(RAMP, 12, VOILUTSequence=[damaged], **WINDOW)
        assert np.array_equal(pixels_of(with_window), window)
        assert "VOILUTSequence empty or damaged: not used" in notes_of(with_window)
        alone = dicom_bytes(RAMP, 12, VOILUTSequence=[damaged])
        assert np.array_equal(pixels_of(alone), stretched(RAMP))
        second = dicom_bytes(RAMP, 12, VOILUTSequence=[damaged, whole], **WINDOW)
        assert np.array_equal(pixels_of(second), looked_up)


def test_a_window_that_shows_nothing_leaves_the_next_one_or_the_range() -> None:
    bright = (RAMP + 12_000).astype(np.uint16)
    useless = dicom_bytes(bright, 16, WindowCenter=3174, WindowWidth=2426)
    assert np.array_equal(pixels_of(useless), stretched(RAMP))
    assert notes_of(useless) == ("window outside the image's values: not used",)
    labelled = bright.copy()
    labelled[0, :30] = 3000  # a burned-in label, 0.7% of the pixels, is all that the window shows
    content = dicom_bytes(labelled, 16, WindowCenter=3174, WindowWidth=2426)
    assert np.array_equal(pixels_of(content), stretched(labelled))
    second = dicom_bytes(bright, 16, WindowCenter=[3174, 13_500], WindowWidth=[2426, 800])
    assert np.array_equal(pixels_of(second), pixels_of(dicom_bytes(RAMP, 12, **WINDOW)))
    flat = dicom_bytes(RAMP, 12, WindowCenter=0, WindowWidth=10**6)  # the whole image in one or two greys
    assert np.array_equal(pixels_of(flat), stretched(RAMP))
    table = dicom_bytes(bright, 16, VOILUTSequence=[voi_table(first=0)], WindowCenter=13_500, WindowWidth=800)
    assert np.array_equal(pixels_of(table), pixels_of(dicom_bytes(RAMP, 12, **WINDOW)))


def test_a_picture_without_contrast_is_rejected() -> None:
    black = np.zeros((100, 100), np.uint8)
    labelled = black.copy()
    labelled[:10, :10] = 255  # 1%
    for picture in (black, black + 255, labelled, black.astype(np.uint16)):
        reason = rejection(dicom_bytes(picture, 8 * picture.itemsize))
        assert reason == "no contrast: at least 99% of its pixels have the same grey"
    labelled[10, 0] = 255
    assert np.array_equal(pixels_of(dicom_bytes(labelled)), labelled)


@pytest.mark.parametrize(
    ("photometric", "wrong", "right"),
    [("MONOCHROME2", "INVERSE", "IDENTITY"), ("MONOCHROME1", "IDENTITY", "INVERSE")],
)
def test_a_shape_that_contradicts_the_photometric_interpretation_is_noted(
    photometric: str, wrong: str, right: str
) -> None:
    plain, contradicted, agreed = (
        read_radiograph(dicom_bytes(GREYS, PhotometricInterpretation=photometric, **header), "x")
        for header in ({}, {"PresentationLUTShape": wrong}, {"PresentationLUTShape": right})
    )
    assert np.array_equal(contradicted.pixels, plain.pixels)
    assert contradicted.notes == (f"PresentationLUTShape contradicts {photometric}: not used",)
    assert agreed.notes == ()


def test_large_deep_pictures_take_little_memory_and_give_the_same_greys() -> None:
    picture = np.resize(RAMP.reshape(-1), (3000, 4000))
    content = dicom_bytes(picture, 12)
    pixels, peak_bytes = with_peak(pixels_of, content)
    assert np.array_equal(pixels.reshape(-1)[: RAMP.size], stretched(RAMP).reshape(-1))
    assert np.array_equal(pixels[-1], stretched(RAMP).astype(np.uint8)[RAMP[0, 0] :].reshape(-1)[picture[-1]])
    assert peak_bytes < 4.5 * picture.size


VIEWS = ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({}, {"patient": "", "view": "", "sex": "", "age": -1}),
        ({"PatientID": " 17 ", "PatientName": "Doe^Jane"}, {"patient": "17"}),
        *(({"PatientAge": age}, {"age": 62}) for age in ("62", "062Y")),
        *(({"PatientAge": age}, {"age": 1}) for age in ("018M", "400D")),
        ({"PatientAge": "051W"}, {"age": 0}),
        *(({"PatientAge": age}, {"age": -1}) for age in ("", "old")),
        *(({"ViewPosition": view}, {"view": view}) for view in VIEWS),
        ({"ViewPosition": "pa", "PatientSex": "o"}, {"view": "PA", "sex": "O"}),
        *(({"ViewPosition": view}, {"view": "other"}) for view in ("LATERAL", "DOE^JANE", "PA\\AP")),
        *(({"PatientSex": sex}, {"sex": ""}) for sex in ("FEMALE", "DOE", "F\\M")),
    ],
)
def test_only_defined_terms_and_whole_years_leave_the_header(
    header: dict[str, str], told: dict[str, Any]
) -> None:
    radiograph = read_radiograph(dicom_bytes(GREYS, **header), "x")
    assert {name: getattr(radiograph, name) for name in told} == told
    assert "17" not in repr(radiograph)


def test_no_message_and_no_output_quotes_the_header(capfd: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)  # as an application that keeps a log file
    names = "9.DOE^JANE.10008.1.2.4", "1.2.840.10008.1.2.4.44"
    unknown = [rejection(with_syntax(name)) for name in names]
    damaged = dicom_bytes(RAMP, 12, RescaleSlope="7.12345", RescaleIntercept=0, VOILUTFunction="DOE^JANE")
    said = [
        *unknown,
        rejection(dicom_bytes(GREYS, PhotometricInterpretation="DOE^JANE")),
        rejection(dicom_bytes(GREYS, NumberOfFrames="2", PatientName="DOE^JANE")),
        rejection(dicom_bytes(GREYS, WindowCenter=1, RescaleSlope=1).replace(b"Rows", b"")[:-700]),
        rejection(jpeg_file(GREYS, SpecificCharacterSet="DOE^JANE", Rows=33)),
        *notes_of(replaced(damaged, b"7.12345", b"DOEJANE")),
    ]
    assert len(said) == 8
    assert not [message for message in said if "DOE" in message or "JANE" in message]
    assert unknown == ["transfer syntax (unknown) is not supported"] * 2
    logging.getLogger().removeHandler(handler)
    assert (log.getvalue(), *capfd.readouterr()) == ("", "", "")


BITS, GREY = "contradictory bits: ", "not a grayscale image "
NO_PICTURE, NO_DICOM = "no pixel data: not an image, or truncated", "not a DICOM file"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (dicom_bytes(GREYS, PhotometricInterpretation="PALETTE COLOR"), f"{GREY}(PALETTE COLOR)"),
        (dicom_bytes(GREYS, PhotometricInterpretation="PINK"), f"{GREY}(unknown photometric interpretation)"),
        (dicom_bytes(GREYS, SamplesPerPixel=3), f"{GREY}(3 samples per pixel)"),
        (dicom_bytes(GREYS, NumberOfFrames=3), "3 frames instead of one"),
        (dicom_bytes(GREYS, Rows=0), "image size is 0 x 48 pixels"),
        (dicom_bytes(GREYS, Columns=[3, 4]), "Columns is missing or not a single integer"),
        (dicom_bytes(GREYS, BitsStored=None), "BitsStored is missing or not a single integer"),
        (dicom_bytes(GREYS.astype(np.uint32), 32), "32 bits allocated per pixel instead of 8 or 16"),
        (dicom_bytes(GREYS, BitsAllocated=1), "1 bits allocated per pixel instead of 8 or 16"),
        (dicom_bytes(GREYS, 9), f"{BITS}9 stored of 8, high bit 8, representation 0"),
        (dicom_bytes(GREYS, BitsStored=0), f"{BITS}0 stored of 8, high bit 7, representation 0"),
        (dicom_bytes(GREYS, PixelRepresentation=2), f"{BITS}8 stored of 8, high bit 7, representation 2"),
        (dicom_bytes(GREYS, FloatPixelData=bytes(8)), "floating-point pixels"),
        (dicom_bytes(GREYS, Rows=33), "its pixel data is truncated"),
        (dicom_bytes(GREYS)[:-1560], NO_PICTURE),
        (
            with_syntax("1.2.840.10008.1.2.4.66"),
            "transfer syntax JPEG Lossless, Hierarchical (Process 29) is not supported",
        ),
        (b"", NO_DICOM),
        (b"ImageId,EncodedPixels", NO_DICOM),
        (bytes(128) + b"DICM", NO_PICTURE),
    ],
)
def test_what_is_no_single_grayscale_image_is_rejected_with_the_reason(content: bytes, reason: str) -> None:
    assert rejection(content) == reason


LONGER = dicom_bytes(np.vstack([GREYS, GREYS[:6]]), Rows=32)


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (LONGER, ("bytes after the pixels: not read",)),  # PS3.5 8.1.1
        (dicom_bytes(GREYS, Rows=31, Columns=47), ("bytes after the pixels: not read",)),
        (dicom_bytes(GREYS[:31, :47]), ()),  # an odd number, padded to an even one
        (dicom_bytes(GREYS, NumberOfFrames=0), ("NumberOfFrames 0: read as 1",)),
        (dicom_bytes(GREYS, NumberOfFrames=None), None),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_standard_or_every_reader_allows_is_read_as_pydicom_reads_it(
    content: bytes, notes: tuple[str, ...] | None
) -> None:
    radiograph = read_radiograph(content, "x")
    assert np.array_equal(radiograph.pixels, pydicom.dcmread(io.BytesIO(content)).pixel_array)
    assert notes is None or radiograph.notes == notes


def test_absurd_sizes_are_refused_before_memory_is_taken() -> None:
    huge = {"Rows": 60000, "Columns": 60000}
    for content in (dicom_bytes(GREYS, **huge), jpeg_file(GREYS, **huge)):
        reason, peak = with_peak(rejection, content)
        assert reason == "60000 x 60000 pixels exceed max_pixels=100000000; raise it if the size is right"
        assert peak < 1e6
    assert "max_pixels=1535;" in rejection(dicom_bytes(GREYS), max_pixels=1535)
    assert np.array_equal(read_radiograph(dicom_bytes(GREYS), "x", max_pixels=1536).pixels, GREYS)


@pytest.mark.parametrize(
    ("syntax", "frame", "marker"),
    [
        (uid.JPEGBaseline8Bit, jpeg(GREYS), b"\xff\xc0"),
        (uid.JPEGLSLossless, jpeg_ls_frame(GREYS, 8), b"\xff\xf7"),
        (uid.JPEGLossless, jpeg_lossless(GREYS, 8), b"\xff\xc3"),
        (uid.JPEG2000Lossless, jpeg_2000(GREYS, 8), b""),
    ],
)
def test_a_compressed_image_that_claims_an_absurd_size_is_refused(
    syntax: uid.UID, frame: bytes, marker: bytes
) -> None:
    # JPEG 2000 has 4 bytes for each side, columns first; the others 2.
    place, size = (frame.index(marker) + 5, 2) if marker else (8, 4)
    lying = frame[:place] + (60000).to_bytes(size, "big") * 2 + frame[place + 2 * size :]
    reason, peak = with_peak(rejection, dicom_bytes(GREYS, syntax=syntax, frame=lying))
    assert reason == "its compressed image has 60000 x 60000 pixels, its DICOM header says 32 x 48"
    assert peak < 1e6


def test_a_deflated_file_is_not_unpacked_beyond_what_its_pixels_can_need() -> None:
    plain = dicom_bytes(GREYS, syntax=uid.DeflatedExplicitVRLittleEndian)
    start = plain.index(b"1.2.840.10008.1.2.1.99")
    meta_end = plain.index(b"\x02\x00\x12\x00", start)
    packer, zeros = zlib.compressobj(1, wbits=-15), bytes(2**20)
    bomb = b"".join(packer.compress(zeros) for _ in range(200)) + packer.flush()
    reason, peak = with_peak(rejection, plain[:meta_end] + bomb, max_pixels=10**6)
    assert reason == "inflates to more than the 18777216 bytes of max_pixels; raise it if the size is right"
    assert peak < 60e6


def test_files_without_preamble_or_syntax_are_read_where_that_is_safe() -> None:
    plain = dicom_bytes(RAMP, 12, syntax=uid.ImplicitVRLittleEndian)
    assert np.array_equal(pixels_of(plain[132:]), stretched(RAMP))  # meta, but no preamble
    header = pydicom.dcmread(io.BytesIO(plain))
    file = io.BytesIO()
    pydicom.dcmwrite(file, header, implicit_vr=True, little_endian=True, enforce_file_format=False)
    bare = file.getvalue()
    bare = bare[bare.index(b"\x28\0\x02\0") :]
    assert rejection(bare) == "not a DICOM file"  # it begins with group 28: may be anything
    modality = b"\x08\0\x60\0\x02\0\0\0CR"
    assert np.array_equal(pixels_of(modality + bare), stretched(RAMP))
    assert rejection(bytes(200) + plain[132:]) == "not a DICOM file"


@pytest.mark.parametrize("syntax", [*LOSSLESS, uid.JPEGBaseline8Bit], ids=lambda syntax: syntax.name)
def test_a_file_cut_anywhere_is_rejected(syntax: uid.UID) -> None:
    pixels = np.tile(GREYS, (4, 4))
    content = lossless_file(pixels, 8, syntax) if syntax in LOSSLESS else jpeg_file(pixels)
    # The last 8 bytes of a compressed picture only close the sequence, one before them may fill it up.
    end = len(content) - (9 if syntax.is_encapsulated else syntax.is_deflated)
    for cut in [*range(0, end, max(1, end // 100)), end - 2, end - 1]:
        rejection(content[:cut])


def test_a_jpeg_picture_that_ends_early_in_a_whole_file_is_rejected() -> None:
    content = jpeg_file(np.tile(GREYS, (8, 8)))
    start = content.index(b"\xff\xd8")
    half = start + (len(content) - start) // 2
    filled = content[:half] + bytes(len(content) - 8 - half) + content[-8:]
    assert rejection(filled) == "its pixel data is truncated"


TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
USED = {
    "693_J2KI", "CT_small", "J2K_pixelrep_mismatch", "JPEG2000", "JPEG-lossy", "JPEGLSNearLossless_08",
    "JPEGLSNearLossless_16", "JPGExtended", "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_expb",
    "MR_small_implicit", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_padded",
    "examples_overlay", "image_dfl",
}  # fmt: skip
TWELVE_BIT_JPEG = {"JPEG-lossy", "JPGExtended"}  # which pydicom does not decode


@pytest.mark.parametrize("shift", [0, 2, 4])
def test_a_high_bit_counts_where_the_bits_below_are_empty(shift: int) -> None:
    plain = read_radiograph(dicom_bytes(RAMP, 12), "x")
    read = read_radiograph(dicom_bytes(RAMP << shift, 12, HighBit=11 + shift), "x")
    assert np.array_equal(read.pixels, plain.pixels)
    wrong = read_radiograph(dicom_bytes(RAMP, 12, HighBit=11 + (shift or 900)), "x")
    assert np.array_equal(wrong.pixels, plain.pixels)
    assert wrong.notes == ("HighBit is not BitsStored - 1",)


def test_of_the_files_of_pydicom_exactly_the_single_grey_ones_are_used(
    capfd: pytest.CaptureFixture[str],
) -> None:
    used, reasons = set[str](), set[str]()
    for path in TEST_FILES.glob("*.*"):
        try:
            used.add(path.stem if read_radiograph(path.read_bytes(), "x").pixels.size else "")
        except Rejected:
            reasons.add(rejection(path.read_bytes()))
    assert used == {*USED, "zipMR"}
    assert not [reason for reason in reasons if reason.startswith("cannot be decoded")]
    assert {NO_DICOM, "its pixel data is truncated", "15 frames instead of one"} < reasons
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(USED - TWELVE_BIT_JPEG))
def test_files_of_pydicom_give_the_greys_that_its_own_functions_give(name: str) -> None:
    header = pydicom.dcmread(TEST_FILES / f"{name}.dcm")
    stored = header.pixel_array
    pixels = read_radiograph((TEST_FILES / f"{name}.dcm").read_bytes(), "x").pixels
    if header.BitsStored == 8:
        assert np.array_equal(pixels, stored)
        return
    values = apply_modality_lut(stored, header).astype(float)
    if header.get("WindowWidth"):
        values, ends = apply_windowing(values, header), apply_windowing(np.array([-1e9, 1e9]), header)
    else:
        real = values[stored != header.get("PixelPaddingValue", -(10**9))]
        ends = np.array([real.min(), real.max()])
    expected = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1) * 255
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-6


def test_the_real_radiographs_are_read_as_pydicom_decodes_them(real_data: Path) -> None:
    with (real_data / "known_areas.csv").open() as known:
        rows = {row["ImageId"]: row for row in csv.DictReader(known)}
    files = list((real_data / "dicom-images-train").rglob("*.dcm"))
    assert {path.stem for path in files} == rows.keys()
    for path in files:
        radiograph = read_radiograph(path.read_bytes(), path.stem)
        row = rows[path.stem]
        assert (radiograph.view, radiograph.sex, radiograph.age) == (row["view"], row["sex"], int(row["age"]))
        assert np.array_equal(radiograph.pixels, pydicom.dcmread(path).pixel_array)


def test_the_real_inverted_radiograph_is_bright_where_it_is_dense(real_data: Path) -> None:
    path = real_data.parent / "odd" / "monochrome1.dcm"
    if not path.is_file():
        pytest.skip(f"no real inverted radiograph ({path})")
    radiograph = read_radiograph(path.read_bytes(), "x")
    assert np.array_equal(radiograph.pixels, 255 - pydicom.dcmread(path).pixel_array)
    assert radiograph.format == "JPEG Baseline, 8 bit, MONOCHROME1"
