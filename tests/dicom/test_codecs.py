from __future__ import annotations

import io
import warnings
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_files import (
    GREYS,
    ITEM,
    LOSSLESS,
    RAMP,
    dicom_bytes,
    items,
    jpeg,
    jpeg_12_bit,
    jpeg_2000,
    jpeg_lossless,
    jpeg_lossless_by_hand,
    jpeg_ls_frame,
    lossless_file,
    pixels_of,
    progressive_jpeg_by_hand,
    rejection,
    rle,
    stretched,
    with_peak,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_files

from pneumo_experiments.dicom.codecs import CUT_SHORT, read_frame_header
from pneumo_experiments.dicom.header import Attributes, parse, read_layout
from pneumo_experiments.dicom.radiograph import _stored_pixels, read_radiograph
from pneumo_experiments.errors import Rejected

SMOOTH = np.add.outer(np.arange(40) * 3, np.arange(50) * 2).astype(np.uint8)
# The start of a JPEG whose first segment holds another one, as a camera's does.
THUMBNAIL = b"\xff\xd8\xff\xe1" + (2 + len(jpeg(GREYS))).to_bytes(2, "big") + jpeg(GREYS)
# 12 x 20 pixels of 12 bits. HTJ2K by OpenJPH, which claims 16 bits, JPEG Lossless by liblj92.
FORMULA = np.fromfunction(lambda y, x: (x * x * 7 + y * 191) % 4096, (12, 20), dtype=int).astype(np.uint16)
HTJ2K = bytes(imagecodecs.htj2k_encode(FORMULA, reversible=True))
LIBLJ92 = bytes(imagecodecs.ljpeg_encode(FORMULA, bitspersample=12))
EXTENDED = jpeg_12_bit(FORMULA)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
def test_what_a_lossless_syntax_stores_comes_back(syntax: uid.UID) -> None:
    wide = (RAMP * 15 + 3).astype(np.uint16)
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    assert np.array_equal(pixels_of(lossless_file(GREYS, 8, syntax)), GREYS)
    for stored, bits, expected in ((RAMP, 12, RAMP), (wide, 16, wide), (signed, 12, RAMP)):
        radiograph = read_radiograph(lossless_file(stored, bits, syntax), "x")
        assert np.array_equal(radiograph.pixels, stretched(expected))
        assert radiograph.format == f"{LOSSLESS[syntax][0]}, {bits} bit, MONOCHROME2"


def test_big_endian_8_bit_pixels_may_lie_as_swapped_words() -> None:
    swapped = GREYS.reshape(-1, 2)[:, ::-1].reshape(GREYS.shape)
    content = dicom_bytes(swapped, 8, uid.ExplicitVRBigEndian)
    words = content.replace(b"\x7f\xe0\0\x10OB", b"\x7f\xe0\0\x10OW")
    assert words != content
    assert np.array_equal(pixels_of(words), GREYS)
    assert np.array_equal(pixels_of(content), swapped)


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit])
@pytest.mark.parametrize("shape", [(40, 50), (1, 50), (7, 1023), (5000, 3600)])  # the last is beyond 16 MB
def test_an_8_bit_jpeg_is_decoded_bit_by_bit_as_pillow_does(syntax: uid.UID, shape: tuple[int, int]) -> None:
    pixels = np.resize(SMOOTH, shape)
    frame = jpeg(pixels)
    if syntax == uid.JPEGExtended12Bit:
        frame = frame.replace(b"\xff\xc0", b"\xff\xc1", 1)
    expected = np.asarray(Image.open(io.BytesIO(frame)))
    assert np.array_equal(pixels_of(dicom_bytes(pixels, 8, syntax, frame)), expected)
    progressive = dicom_bytes(SMOOTH, 8, syntax, jpeg(SMOOTH, progressive=True))
    assert np.abs(pixels_of(progressive).astype(int) - SMOOTH).max() < 40


SQUARES = np.kron(FORMULA, np.ones((8, 8), np.uint16))


@pytest.mark.parametrize(
    ("pixels", "bits", "syntax", "frame", "off"),
    [
        (GREYS, 8, uid.JPEGLSNearLossless, jpeg_ls_frame(GREYS, 8, lossy_error=3), 3),
        (SMOOTH, 8, uid.JPEG2000, jpeg_2000(SMOOTH, 8, compression_ratios=[4]), 40),
        (FORMULA, 12, uid.JPEGExtended12Bit, EXTENDED, 1),
        (SQUARES, 12, uid.JPEGExtended12Bit, progressive_jpeg_by_hand(FORMULA), 0),
        (FORMULA, 12, uid.HTJ2KLossless, HTJ2K, 0),
        (FORMULA, 12, uid.HTJ2K, HTJ2K, 0),
        (FORMULA, 12, uid.HTJ2KLosslessRPCL, HTJ2K, 0),
        (FORMULA, 12, uid.JPEGLosslessSV1, LIBLJ92, 0),
        (GREYS, 8, uid.JPEG2000Lossless, jpeg_2000(GREYS, 8, codec_format=1), 0),  # in its file wrapper
    ],
)
def test_other_encoders_pictures_come_back_or_close(
    pixels: np.ndarray, bits: int, syntax: uid.UID, frame: bytes, off: int
) -> None:
    error = np.abs(
        pixels_of(dicom_bytes(pixels, bits, syntax, frame))
        - (pixels if bits == 8 else stretched(pixels)).astype(int)
    )
    assert min(off, 1) <= error.max() <= off
    assert error.mean() < 10


@pytest.mark.parametrize("bits", range(2, 17))
def test_lossless_jpeg_of_any_depth_and_predictor_comes_back(bits: int) -> None:
    pixels = (RAMP.astype(int) * 40503 % 2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    expected = pixels if bits == 8 else stretched(pixels)
    for predictor in range(1, 8):
        frame = jpeg_lossless(pixels, bits, predictor)
        assert np.array_equal(pixels_of(dicom_bytes(pixels, bits, uid.JPEGLossless, frame)), expected)


@pytest.mark.parametrize("point_transform", [0, 1, 3])
@pytest.mark.parametrize("restart_rows", [1, 2, 5, 12])
def test_lossless_jpeg_may_start_anew_and_leave_out_the_lowest_bits(
    point_transform: int, restart_rows: int
) -> None:
    frame = jpeg_lossless_by_hand(FORMULA, 12, point_transform, restart_rows)
    kept = FORMULA >> point_transform << point_transform
    assert np.array_equal(pixels_of(dicom_bytes(FORMULA, 12, uid.JPEGLosslessSV1, frame)), stretched(kept))


@pytest.mark.parametrize("name", ["JPEG-lossy", "JPGExtended"])
def test_12_bit_jpeg_of_pydicom_has_the_values_that_gdcm_gives(name: str) -> None:
    content = Path(get_testdata_files(f"{name}.dcm")[0]).read_bytes()
    header, syntax = parse(content, 10**8)
    stored, bits = _stored_pixels(Attributes(header), read_layout(Attributes(header), syntax, 10**8))
    assert (stored.shape, bits, int(stored.max()), int(stored.sum())) == ((1024, 256), 12, 264, 3767007)
    assert zlib.crc32(stored.tobytes()) == 1369335493


@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (uid.JPEGLosslessSV1, jpeg_lossless(RAMP, 12)),
        (uid.JPEGExtended12Bit, jpeg_12_bit(RAMP)),
        (uid.HTJ2KLossless, bytes(imagecodecs.htj2k_encode(RAMP, reversible=True))),
        (uid.JPEG2000Lossless, jpeg_2000(RAMP, 12)),
        (uid.JPEGLSLossless, jpeg_ls_frame(RAMP, 12)),
    ],
)
def test_a_damaged_stream_is_rejected_or_gives_a_picture_of_its_size(
    syntax: uid.UID, frame: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    content = dicom_bytes(RAMP, 12, syntax, frame)
    start, rng = content.index(frame[:4]), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(start, len(content) - 10, 3):
            damaged[place] = rng.integers(256)
        try:
            assert pixels_of(bytes(damaged)).shape == RAMP.shape
        except Rejected:
            rejection(bytes(damaged))
    assert capfd.readouterr() == ("", "")


def test_a_picture_may_come_in_pieces_and_with_a_wrong_table_of_offsets() -> None:
    frame = jpeg(GREYS)
    pieces = frame[:2], frame[2:100], frame[100:102], frame[102:]
    for table in (b"", bytes(4), b"\x99\0\0\0", bytes(8), b"\1\2\3\4" * 9, b"\0\0"):
        content = dicom_bytes(GREYS, 8, uid.JPEGBaseline8Bit, items(table, *pieces))
        assert np.array_equal(pixels_of(content), np.asarray(Image.open(io.BytesIO(frame))))
    rle_frame = rle(GREYS, 8)
    assert np.array_equal(pixels_of(dicom_bytes(GREYS, 8, uid.RLELossless, items(b"", rle_frame))), GREYS)


@pytest.mark.parametrize(
    ("syntax", "frames", "reason"),
    [
        (uid.JPEGBaseline8Bit, [jpeg(GREYS)] * 2, "2 images instead of one"),
        (uid.RLELossless, [rle(GREYS, 8)] * 2, "2 images instead of one"),
        (uid.JPEGBaseline8Bit, [], CUT_SHORT),
        (uid.JPEGBaseline8Bit, [jpeg(GREYS)[:-200]], CUT_SHORT),
        (uid.JPEG2000Lossless, [jpeg_2000(GREYS, 8)[:-20]], CUT_SHORT),
        (uid.RLELossless, [rle(GREYS, 8)[:-20]], CUT_SHORT),
        (uid.JPEGLosslessSV1, [jpeg_lossless(GREYS, 8)[:-20]], CUT_SHORT),
        (uid.JPEGExtended12Bit, [jpeg_12_bit(GREYS, 8)[:-20]], CUT_SHORT),
        (uid.RLELossless, [rle(RAMP, 12)], "2 RLE segments instead of 1"),
        (uid.JPEG2000Lossless, [b"\xff\x4f\xff\x51\0\0\xff\xd9"], "its pixel data is not valid JPEG 2000"),
        (uid.JPEGLSLossless, [jpeg_ls_frame(RAMP, 12)], "its compressed image has 64 x 64 pixels"),
        (
            uid.JPEG2000Lossless,
            [jpeg_2000(GREYS.astype(np.uint16) * 2, 12)],
            "its compressed image uses more",
        ),
        (uid.JPEGBaseline8Bit, [jpeg(np.dstack([GREYS] * 3))], "its compressed image has 3 components"),
        (uid.ExplicitVRLittleEndian, [jpeg(GREYS)], "its pixel data is compressed, although the"),
    ],
)
def test_a_compressed_image_that_does_not_fit_is_rejected(
    syntax: uid.UID, frames: list[bytes], reason: str
) -> None:
    content = dicom_bytes(GREYS, 8, uid.JPEGBaseline8Bit, items(b"", *frames))
    old, new = (name.encode().ljust(22, b"\0") for name in (uid.JPEGBaseline8Bit, syntax))
    assert rejection(content.replace(old, new)).startswith(reason)


def test_pixels_that_the_file_calls_compressed_and_are_not_are_rejected() -> None:
    raw = dicom_bytes(GREYS, 8, uid.RLELossless, b"\1")
    plain = raw[: raw.index(ITEM) - 4] + GREYS.size.to_bytes(4, "little") + GREYS.tobytes()
    assert rejection(plain).startswith("its pixel data is not compressed")


def test_deep_pictures_may_state_more_bits_than_the_header_unless_they_use_them() -> None:
    for syntax, encode in ((uid.JPEG2000Lossless, jpeg_2000), (uid.JPEGLSLossless, jpeg_ls_frame)):
        assert np.array_equal(pixels_of(dicom_bytes(RAMP, 12, syntax, encode(RAMP, 16))), stretched(RAMP))
        brighter = (RAMP + 1).astype(np.uint16)
        assert rejection(dicom_bytes(brighter, 12, syntax, encode(brighter, 16))) == (
            "its compressed image uses more than the 12 bits of its DICOM header"
        )
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    content = dicom_bytes(signed, 12, uid.JPEG2000Lossless, jpeg_2000(signed, 16))
    assert np.array_equal(pixels_of(content), stretched(RAMP))
    fewer = dicom_bytes(RAMP, 16, uid.JPEG2000Lossless, jpeg_2000(RAMP, 12))
    assert np.array_equal(pixels_of(fewer), stretched(RAMP))


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.JPEGLSLossless])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_8_bit_greys_below_a_header_of_more_bits_are_used_as_they_are(syntax: uid.UID, bits: int) -> None:
    header = {"BitsAllocated": 16, "BitsStored": bits, "HighBit": bits - 1}
    header |= {"WindowCenter": 2048, "WindowWidth": 4096}
    if syntax == uid.JPEGBaseline8Bit:  # which pydicom's Pillow decoder refuses
        content = dicom_bytes(GREYS, 8, syntax, jpeg(GREYS), **header)
        expected = np.asarray(Image.open(io.BytesIO(jpeg(GREYS))))
    else:
        content, expected = lossless_file(GREYS, 8, syntax, **header), GREYS
        assert np.array_equal(pydicom.dcmread(io.BytesIO(content)).pixel_array, expected)
    assert np.array_equal(pixels_of(content), expected)


@pytest.mark.parametrize("padding", [bytes(1), bytes(2), bytes(5000), b"\xff" * 40, b"end\0" * 9])
@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (uid.JPEGBaseline8Bit, jpeg(GREYS)),
        (uid.JPEG2000Lossless, jpeg_2000(GREYS, 8)),
        (uid.JPEGLSLossless, jpeg_ls_frame(GREYS, 8)),
        (uid.JPEGLossless, jpeg_lossless(GREYS, 8)),
    ],
)
def test_bytes_after_the_end_of_a_compressed_image_are_no_matter(
    syntax: uid.UID, frame: bytes, padding: bytes
) -> None:
    whole = pixels_of(dicom_bytes(GREYS, 8, syntax, frame))
    odd = bytes((len(frame) + len(padding)) % 2)
    assert np.array_equal(pixels_of(dicom_bytes(GREYS, 8, syntax, frame + padding + odd)), whole)
    in_two = items(b"", frame, padding + bytes(len(padding) % 2))
    assert np.array_equal(pixels_of(dicom_bytes(GREYS, 8, syntax, in_two)), whole)
    assert rejection(dicom_bytes(GREYS, 8, syntax, frame[:-60] + padding + odd)) == CUT_SHORT


@given(
    npst.arrays(
        np.uint8,
        npst.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=99),
        elements=st.sampled_from([0, 1, 255]),
    )
)
def test_run_lengths_of_any_picture_unpack(pixels: np.ndarray) -> None:
    assume(np.bincount(pixels.reshape(-1)).max() < 0.99 * pixels.size)  # else it has no contrast
    assert np.array_equal(pixels_of(lossless_file(pixels, 8, uid.RLELossless)), pixels)


def test_run_lengths_never_unpack_beyond_the_picture() -> None:
    bomb = np.array([1, 64, *[0] * 14], "<u4").tobytes() + b"\x81\x07\x81\x08" * (5 * 10**5)
    pixels, peak = with_peak(pixels_of, dicom_bytes(GREYS, 8, uid.RLELossless, bomb))
    assert np.array_equal(pixels.reshape(-1), np.resize([7] * 128 + [8] * 128, pixels.size))
    assert peak < 10**7  # unlimited it is 128 million


@pytest.mark.parametrize(
    ("frame", "stated"),
    [
        (jpeg(SMOOTH), (40, 50, 1, 8)),
        (jpeg(SMOOTH, progressive=True), (40, 50, 1, 8)),
        (jpeg(np.dstack([SMOOTH] * 3)), (40, 50, 3, 8)),
        (THUMBNAIL + jpeg(SMOOTH)[2:], (40, 50, 1, 8)),
        (b"\xff\xd8\xff\xff\xff" + jpeg(SMOOTH)[3:], (40, 50, 1, 8)),
        (jpeg_ls_frame(RAMP, 12), (64, 64, 1, 12)),
        (jpeg_2000(SMOOTH, 8), (40, 50, 1, 8)),
        (LIBLJ92, (12, 20, 1, 12)),
        (HTJ2K, (12, 20, 1, 16)),
        (EXTENDED, (12, 20, 1, 12)),
    ],
)
def test_a_compressed_picture_states_its_size(frame: bytes, stated: tuple[int, int, int, int]) -> None:
    header = read_frame_header(frame)
    assert header is not None
    assert header[:4] == stated
    headers = {read_frame_header(frame[:k]) for k in range(0, len(frame), 3)}
    assert headers <= {None, header}  # cut, it states the same or nothing
    for junk in (b"\xff", b"\xff\xd8\xff", bytes(99), b"\xff\xd8\xff\xda\0\2", b"\xff\x4f\xff\x51"):
        assert read_frame_header(junk) is None


def test_a_jpeg_2000_picture_may_be_a_part_of_its_grid_and_sampled() -> None:
    frame = bytearray(jpeg_2000(SMOOTH, 8))
    frame[8:24] = b"".join(n.to_bytes(4, "big") for n in (101, 81, 7, 4))  # right, bottom, left, top
    frame[43:45] = bytes((2, 3))  # every second column, every third row
    rows, columns = sum(y % 3 == 0 for y in range(4, 81)), sum(x % 2 == 0 for x in range(7, 101))
    assert read_frame_header(bytes(frame)) == (rows, columns, 1, 8, 0)
    frame[43] = 0
    assert read_frame_header(bytes(frame)) is None


def test_what_pydicom_decodes_of_its_own_files_is_decoded_to_the_same_values() -> None:
    compared = 0
    for path in filter(Path.is_file, map(Path, get_testdata_files("**/*"))):
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = pydicom.dcmread(io.BytesIO(content))
                expected = dataset.pixel_array
            except Exception:  # pictures of many kinds, damaged on purpose
                continue
            is_grey = dataset.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2")
            if not is_grey or expected.ndim != 2 or dataset.BitsAllocated not in (8, 16):
                continue
            header, syntax = parse(content, 10**8)
            layout = read_layout(Attributes(header), syntax, 10**8)
            stored, bits = _stored_pixels(Attributes(header), layout)
        values = stored.astype(np.int64) & 2**bits - 1
        if layout.signed:
            values -= (values >> bits - 1) << bits
        assert np.array_equal(values, expected), path.name
        assert read_radiograph(content, "x").pixels.shape == expected.shape
        compared += 1
    assert compared >= 40
