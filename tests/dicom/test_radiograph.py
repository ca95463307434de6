from __future__ import annotations

import csv
import io
import logging
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import (
    GREYS,
    RAMP,
    dicom_bytes,
    jpeg,
    jpeg_2000,
    jpeg_file,
    jpeg_lossless,
    jpeg_ls_frame,
    pixels_of,
    rejection,
    rle,
    stretched,
)
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_windowing

from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected

NO_CONTRAST = "no contrast: at least 99% of its pixels have the same grey"


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


def test_windows_of_all_three_shapes_follow_their_formulas() -> None:
    values = RAMP.astype(float)
    window = {"WindowCenter": 1500, "WindowWidth": 800}
    sigmoid = pixels_of(dicom_bytes(RAMP, 12, VOILUTFunction="SIGMOID", **window))
    assert np.abs(sigmoid - 255 / (1 + np.exp(-4 * (values - 1500) / 800))).max() <= 0.5
    exact = pixels_of(dicom_bytes(RAMP, 12, VOILUTFunction="LINEAR_EXACT", **window))
    assert np.abs(exact - np.clip((values - 1100) / 800, 0, 1) * 255).max() <= 0.5
    step = pixels_of(dicom_bytes(RAMP, 12, WindowCenter=1500.5, WindowWidth=1))
    assert np.array_equal(step, np.where(RAMP > 1500, 255, 0))
    first_of_two = dicom_bytes(RAMP, 12, WindowCenter=[1500, 9], WindowWidth=[800, 2])
    assert np.array_equal(pixels_of(first_of_two), pixels_of(dicom_bytes(RAMP, 12, **window)))
    unknown = read_radiograph(dicom_bytes(RAMP, 12, VOILUTFunction="DOE^JANE", **window), "x")
    assert np.array_equal(unknown.pixels, pixels_of(dicom_bytes(RAMP, 12, **window)))
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
    assert rejection(only_padding) == NO_CONTRAST


def test_bits_beyond_the_stored_ones_are_left_out() -> None:
    overlaid = RAMP | (np.arange(4096, dtype=np.uint16).reshape(64, 64) % 3 << 12)
    assert np.array_equal(pixels_of(dicom_bytes(overlaid, 12)), stretched(RAMP))
    wide = dicom_bytes(GREYS.astype(np.uint16) + 256 * 7, 8, WindowCenter=9, WindowWidth=9)
    assert np.array_equal(pixels_of(wide), GREYS)  # 8 bits stored are 8 bits, wherever


def test_signed_8_bit_values_are_shifted() -> None:
    assert np.array_equal(pixels_of(dicom_bytes(RAMP.astype(np.int8), 8)), (RAMP + 128) % 256)


def notes_of(content: bytes) -> tuple[str, ...]:
    return read_radiograph(content, "x").notes


WINDOW = {"WindowCenter": 1500, "WindowWidth": 800}
BAD_RESCALE = "RescaleSlope or RescaleIntercept empty or damaged: not used"
BAD_WINDOW = "WindowCenter or WindowWidth empty or damaged: not used"


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(None, None), ("2", None), (None, "7"), ("0", "7"), ("9e999", "0"), ("1e308", "1e308"), ("2,5", "0")],
)
def test_a_rescale_that_is_empty_zero_or_damaged_is_none(slope: str | None, intercept: str | None) -> None:
    plain = dicom_bytes(RAMP, 12, **WINDOW)
    content = dicom_bytes(RAMP, 12, **WINDOW, RescaleSlope="7.12345", RescaleIntercept="3.12345")
    for placeholder, value in (("7.12345", slope), ("3.12345", intercept)):
        written = (value or "").ljust(7).encode()
        assert content.count(placeholder.encode()) == 1
        content = content.replace(placeholder.encode(), written)
    assert np.array_equal(pixels_of(content), pixels_of(plain))
    assert BAD_RESCALE in notes_of(content)
    assert notes_of(plain) == ()


@pytest.mark.parametrize(
    ("centre", "width", "used"),
    [
        ("2047,5", "4095", None),
        ("", "4095", None),
        ("1500", "", None),
        *(("40", width, None) for width in ("0", "-5", "0.5")),
        ("JANE", "4095", None),
        ("2047,5\\1500", "4095\\800", (1500, 800)),
        ("9e999\\1500", "4095\\800", (1500, 800)),
        ("2047.5\\1500", "-1\\800", (1500, 800)),
        ("1500", "800\\9", (1500, 800)),
    ],
)
def test_a_damaged_window_leaves_the_next_one_or_the_range(
    centre: str, width: str, used: tuple[int, int] | None
) -> None:
    content = dicom_bytes(RAMP, 12, WindowCenter="7" * 16, WindowWidth="8" * 16)
    content = content.replace(b"7" * 16, centre.ljust(16).encode()).replace(
        b"8" * 16, width.ljust(16).encode()
    )
    expected = stretched(RAMP)
    if used is not None:
        expected = pixels_of(dicom_bytes(RAMP, 12, WindowCenter=used[0], WindowWidth=used[1]))
    assert np.array_equal(pixels_of(content), expected)
    assert (width == "800\\9") is (notes_of(content) == ())


def voi_table(entries: int = 256, first: int = 100, data: int | None = None) -> Dataset:
    table = Dataset()
    table.LUTDescriptor = [entries, first, 16]
    table.LUTData = (np.arange(entries if data is None else data) ** 2 % 65536).astype(np.uint16).tolist()
    table["LUTData"].VR = "US"
    return table


def test_a_damaged_voi_table_leaves_the_next_table_the_window_or_the_range() -> None:
    window, whole = pixels_of(dicom_bytes(RAMP, 12, **WINDOW)), voi_table()
    no_data, short = voi_table(), voi_table(data=3)
    del no_data.LUTData
    note = "VOILUTSequence empty or damaged: not used"
    for damaged in (Dataset(), no_data, short):
        with_window = dicom_bytes(RAMP, 12, VOILUTSequence=[damaged], **WINDOW)
        assert np.array_equal(pixels_of(with_window), window)
        assert note in notes_of(with_window)
        alone = dicom_bytes(RAMP, 12, VOILUTSequence=[damaged])
        assert np.array_equal(pixels_of(alone), stretched(RAMP))
        second = dicom_bytes(RAMP, 12, VOILUTSequence=[damaged, whole], **WINDOW)
        assert np.array_equal(pixels_of(second), pixels_of(dicom_bytes(RAMP, 12, VOILUTSequence=[whole])))


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
        assert rejection(dicom_bytes(picture, 8 * picture.itemsize)) == NO_CONTRAST
    labelled[10, 0] = 255
    assert np.array_equal(pixels_of(dicom_bytes(labelled)), labelled)


def test_a_shape_that_contradicts_the_photometric_interpretation_is_noted() -> None:
    for photometric, shape, other in (
        ("MONOCHROME2", "INVERSE", "IDENTITY"),
        ("MONOCHROME1", "IDENTITY", "INVERSE"),
    ):
        plain = dicom_bytes(GREYS, PhotometricInterpretation=photometric)
        contradicted = dicom_bytes(GREYS, PhotometricInterpretation=photometric, PresentationLUTShape=shape)
        assert np.array_equal(pixels_of(contradicted), pixels_of(plain))
        assert notes_of(contradicted) == (f"PresentationLUTShape contradicts {photometric}: not used",)
        agreed = dicom_bytes(GREYS, PhotometricInterpretation=photometric, PresentationLUTShape=other)
        assert notes_of(agreed) == ()


def test_large_deep_pictures_take_little_memory_and_give_the_same_greys() -> None:
    picture = np.resize(RAMP.reshape(-1), (3000, 4000))
    content = dicom_bytes(picture, 12)
    tracemalloc.start()
    pixels = pixels_of(content)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(pixels.reshape(-1)[: RAMP.size], stretched(RAMP).reshape(-1))
    assert np.array_equal(pixels[-1], stretched(RAMP).astype(np.uint8)[RAMP[0, 0] :].reshape(-1)[picture[-1]])
    assert peak_bytes < 4.5 * picture.size


def test_a_voi_table_is_looked_up() -> None:
    content = dicom_bytes(RAMP, 12, VOILUTSequence=[voi_table()])
    expected = np.clip(RAMP.astype(float) - 100, 0, 255) ** 2 / 255
    assert np.abs(pixels_of(content) - expected).max() <= 0.5


@pytest.mark.parametrize(
    ("age", "years"),
    [("62", 62), ("062Y", 62), ("018M", 1), ("051W", 0), ("400D", 1), ("", -1), ("old", -1), (None, -1)],
)
def test_age_is_in_whole_years_or_unknown(age: str | None, years: int) -> None:
    header = {} if age is None else {"PatientAge": age}
    assert read_radiograph(dicom_bytes(GREYS, **header), "x").age == years


def test_the_header_gives_patient_view_and_sex_or_nothing() -> None:
    full = read_radiograph(
        dicom_bytes(GREYS, PatientID=" 17 ", ViewPosition="PA", PatientSex="F", PatientName="Doe^Jane"), "x"
    )
    assert (full.patient, full.view, full.sex) == ("17", "PA", "F")
    assert "17" not in repr(full)
    bare = read_radiograph(dicom_bytes(GREYS), "x")
    assert (bare.patient, bare.view, bare.sex, bare.age) == ("", "", "", -1)


def test_only_defined_terms_leave_the_header() -> None:
    def terms(view: str, sex: str) -> tuple[str, str]:
        radiograph = read_radiograph(dicom_bytes(GREYS, ViewPosition=view, PatientSex=sex), "x")
        return radiograph.view, radiograph.sex

    for view in ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO"):
        assert terms(view, "M") == (view, "M")
    assert terms("pa", "o") == ("PA", "O")
    assert terms("LATERAL", "FEMALE") == ("other", "")
    assert terms("DOE^JANE", "DOE") == ("other", "")
    assert terms("PA\\AP", "F\\M") == ("other", "")


def test_the_format_is_reported_in_known_words() -> None:
    assert read_radiograph(jpeg_file(GREYS), "x").format == "JPEG Baseline, 8 bit, MONOCHROME2"
    inverted = dicom_bytes(RAMP, 12, PhotometricInterpretation="MONOCHROME1")
    assert read_radiograph(inverted, "x").format == "uncompressed, 12 bit, MONOCHROME1"


def test_no_message_and_no_output_quotes_the_header(capfd: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)  # as an application that keeps a log file
    said = [
        rejection(dicom_bytes(GREYS, PhotometricInterpretation="DOE^JANE")),
        rejection(dicom_bytes(GREYS, NumberOfFrames="2", PatientName="DOE^JANE")),
        rejection(jpeg_file(GREYS).replace(b"1.2.840.10008.1.2.4.50", b"9.DOE^JANE.10008.1.2.4")),
        rejection(jpeg_file(GREYS).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.44")),
        rejection(dicom_bytes(GREYS, WindowCenter=1, RescaleSlope=1).replace(b"Rows", b"")[:-700]),
        rejection(jpeg_file(GREYS, SpecificCharacterSet="DOE^JANE", Rows=33)),
    ]
    damaged = dicom_bytes(RAMP, 12, RescaleSlope="7.12345", RescaleIntercept=0, VOILUTFunction="DOE^JANE")
    said += notes_of(damaged.replace(b"7.12345", b"DOEJANE"))
    assert len(said) == 8
    assert not [message for message in said if "DOE" in message or "JANE" in message]
    assert said[2:4] == ["transfer syntax (unknown) is not supported"] * 2
    logging.getLogger().removeHandler(handler)
    assert log.getvalue() == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            dicom_bytes(np.zeros((4, 4, 3), np.uint8), PhotometricInterpretation="RGB"),
            "not a grayscale image (RGB)",
        ),
        (
            dicom_bytes(GREYS, PhotometricInterpretation="PALETTE COLOR"),
            "not a grayscale image (PALETTE COLOR)",
        ),
        (
            dicom_bytes(GREYS, PhotometricInterpretation="PINK"),
            "not a grayscale image (unknown photometric interpretation)",
        ),
        (dicom_bytes(GREYS, SamplesPerPixel=3), "not a grayscale image (3 samples per pixel)"),
        (dicom_bytes(GREYS, NumberOfFrames=3), "3 frames instead of one"),
        (dicom_bytes(GREYS, Rows=0), "image size is 0 x 48 pixels"),
        (dicom_bytes(GREYS, Columns=[3, 4]), "Columns is missing or not a single integer"),
        (dicom_bytes(GREYS, BitsStored=None), "BitsStored is missing or not a single integer"),
        (dicom_bytes(GREYS.astype(np.uint32), 32), "32 bits allocated per pixel instead of 8 or 16"),
        (dicom_bytes(GREYS, BitsAllocated=1), "1 bits allocated per pixel instead of 8 or 16"),
        (dicom_bytes(GREYS, 9), "contradictory bits: 9 stored of 8, high bit 8, representation 0"),
        (dicom_bytes(GREYS, BitsStored=0), "contradictory bits: 0 stored of 8, high bit 7, representation 0"),
        (
            dicom_bytes(GREYS, PixelRepresentation=2),
            "contradictory bits: 8 stored of 8, high bit 7, representation 2",
        ),
        (dicom_bytes(GREYS, FloatPixelData=bytes(8)), "floating-point pixels"),
        (dicom_bytes(GREYS, Rows=33), "its pixel data is truncated"),
        (dicom_bytes(GREYS)[:-1560], "no pixel data: not an image, or truncated"),
        (
            jpeg_file(GREYS).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.66"),
            "transfer syntax JPEG Lossless, Hierarchical (Process 29) is not supported",
        ),
        (b"", "not a DICOM file"),
        (b"ImageId,EncodedPixels", "not a DICOM file"),
        (bytes(128) + b"DICM", "no pixel data: not an image, or truncated"),
    ],
)
def test_what_is_no_single_grayscale_image_is_rejected_with_the_reason(content: bytes, reason: str) -> None:
    assert rejection(content) == reason


def test_what_the_standard_or_every_reader_allows_is_read_as_pydicom_reads_it() -> None:
    longer = np.vstack([GREYS, np.zeros((1, 48), np.uint8), GREYS[:5]])
    for content in (
        dicom_bytes(longer, Rows=32),  # bytes after the pixels: PS3.5 8.1.1
        dicom_bytes(GREYS, Rows=31, Columns=47),
        dicom_bytes(GREYS, NumberOfFrames=0),
        dicom_bytes(GREYS, NumberOfFrames=None),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = pydicom.dcmread(io.BytesIO(content)).pixel_array
        assert np.array_equal(pixels_of(content), expected)
    assert notes_of(dicom_bytes(longer, Rows=32)) == ("bytes after the pixels: not read",)
    assert notes_of(dicom_bytes(GREYS, NumberOfFrames=0)) == ("NumberOfFrames 0: read as 1",)
    assert notes_of(dicom_bytes(GREYS[:31, :47])) == ()  # an odd number, padded to an even one


def peak_bytes(source: bytes, **options: Any) -> tuple[str, int]:
    """Why a file is rejected, and the memory that it took."""
    tracemalloc.start()
    reason = rejection(source, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return reason, peak


def test_absurd_sizes_are_refused_before_memory_is_taken() -> None:
    huge = {"Rows": 60000, "Columns": 60000}
    for content in (dicom_bytes(GREYS, **huge), jpeg_file(GREYS, **huge)):
        reason, peak = peak_bytes(content)
        assert reason == ("60000 x 60000 pixels exceed max_pixels=100000000; raise it if the size is right")
        assert peak < 1e6
    assert "max_pixels=1535;" in rejection(dicom_bytes(GREYS), max_pixels=1535)
    assert np.array_equal(read_radiograph(dicom_bytes(GREYS), "x", max_pixels=1536).pixels, GREYS)


@pytest.mark.parametrize(
    ("syntax", "frame", "place"),
    [
        (uid.JPEGBaseline8Bit, jpeg(GREYS), 5 + jpeg(GREYS).index(b"\xff\xc0")),
        (uid.JPEGLSLossless, jpeg_ls_frame(GREYS, 8), 5 + jpeg_ls_frame(GREYS, 8).index(b"\xff\xf7")),
        (uid.JPEGLossless, jpeg_lossless(GREYS, 8), 5 + jpeg_lossless(GREYS, 8).index(b"\xff\xc3")),
        (uid.JPEG2000Lossless, jpeg_2000(GREYS, 8), None),
    ],
)
def test_a_compressed_image_that_claims_an_absurd_size_is_refused(
    syntax: uid.UID, frame: bytes, place: int | None
) -> None:
    if place is None:  # 4 bytes for each side, columns first
        lying = frame[:8] + (60000).to_bytes(4, "big") * 2 + frame[16:]
    else:
        lying = frame[:place] + (60000).to_bytes(2, "big") * 2 + frame[place + 4 :]
    reason, peak = peak_bytes(dicom_bytes(GREYS, syntax=syntax, frame=lying))
    assert reason == "its compressed image has 60000 x 60000 pixels, its DICOM header says 32 x 48"
    assert peak < 1e6


def test_a_deflated_file_is_not_unpacked_beyond_what_its_pixels_can_need() -> None:
    plain = dicom_bytes(GREYS, syntax=uid.DeflatedExplicitVRLittleEndian)
    start = plain.index(b"1.2.840.10008.1.2.1.99\0\0"[:22])
    packer = zlib.compressobj(9, wbits=-15)
    zeros = bytes(2**20)
    bomb = b"".join(packer.compress(zeros) for _ in range(400)) + packer.flush()
    meta_end = start + len(plain[start:].split(b"\x02\x00\x12\x00")[0])
    reason, peak = peak_bytes(plain[:meta_end] + bomb, max_pixels=10**6)
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


@pytest.mark.parametrize(
    "name", ["uncompressed", "deflated", "JPEG", "RLE", "JPEG 2000", "JPEG-LS", "JPEG Lossless"]
)
def test_a_file_cut_anywhere_is_rejected(name: str) -> None:
    pixels = np.tile(GREYS, (4, 4))
    content = {
        "uncompressed": lambda: dicom_bytes(pixels),
        "deflated": lambda: dicom_bytes(pixels, syntax=uid.DeflatedExplicitVRLittleEndian),
        "JPEG": lambda: jpeg_file(pixels),
        "RLE": lambda: dicom_bytes(pixels, syntax=uid.RLELossless, frame=rle(pixels, 8)),
        "JPEG 2000": lambda: dicom_bytes(pixels, syntax=uid.JPEG2000Lossless, frame=jpeg_2000(pixels, 8)),
        "JPEG Lossless": lambda: dicom_bytes(
            pixels, syntax=uid.JPEGLosslessSV1, frame=jpeg_lossless(pixels, 8)
        ),
        "JPEG-LS": lambda: dicom_bytes(pixels, syntax=uid.JPEGLSLossless, frame=jpeg_ls_frame(pixels, 8)),
    }[name]()
    # The last 8 bytes of a compressed picture only close the sequence, one before them may fill it up.
    end = len(content) - {"uncompressed": 0, "deflated": 1}.get(name, 9)
    for cut in [*range(0, end, max(1, end // 150)), end - 2, end - 1]:
        rejection(content[:cut])


def test_a_jpeg_picture_that_ends_early_in_a_whole_file_is_rejected() -> None:
    content = jpeg_file(np.tile(GREYS, (8, 8)))
    start = content.index(b"\xff\xd8")
    half = start + (len(content) - start) // 2
    filled = content[:half] + bytes(len(content) - 8 - half) + content[-8:]
    assert rejection(filled) == "its pixel data is truncated"


TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
USED = [
    "693_J2KI",
    "CT_small",
    "J2K_pixelrep_mismatch",
    "JPEG2000",
    "JPEG-lossy",
    "JPEGLSNearLossless_08",
    "JPEGLSNearLossless_16",
    "JPGExtended",
    "MR_small",
    "MR_small_RLE",
    "MR_small_bigendian",
    "MR_small_expb",
    "MR_small_implicit",
    "MR_small_jp2klossless",
    "MR_small_jpeg_ls_lossless",
    "MR_small_padded",
    "examples_overlay",
    "image_dfl",
]
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
    assert {reason for reason in reasons if reason.startswith("cannot be decoded")} == set()
    assert {"not a DICOM file", "its pixel data is truncated", "15 frames instead of one"} < reasons
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(USED) - TWELVE_BIT_JPEG))
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
