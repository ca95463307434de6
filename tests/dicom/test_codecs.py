from __future__ import annotations

import io
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_files import (
    GREYS,
    RAMP,
    dicom_bytes,
    items,
    jpeg,
    jpeg_12_bit,
    jpeg_2000,
    jpeg_lossless,
    jpeg_lossless_by_hand,
    jpeg_ls_frame,
    pixels_of,
    progressive_jpeg_by_hand,
    rejection,
    rle,
    stretched,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_files

from pneumo_experiments.dicom.codecs import CUT_SHORT, DECODERS, read_frame_header
from pneumo_experiments.dicom.header import Attributes, parse, read_layout
from pneumo_experiments.dicom.radiograph import _stored_pixels, read_radiograph
from pneumo_experiments.errors import Rejected

SMOOTH = np.add.outer(np.arange(40) * 3, np.arange(50) * 2).astype(np.uint8)
# The start of a JPEG whose first segment holds another one, as a camera's does.
THUMBNAIL = b"\xff\xd8\xff\xe1" + (2 + len(jpeg(GREYS))).to_bytes(2, "big") + jpeg(GREYS)
ENCODERS: dict[uid.UID, Callable[[np.ndarray, int], bytes] | None] = {
    uid.ImplicitVRLittleEndian: None,
    uid.ExplicitVRLittleEndian: None,
    uid.ExplicitVRBigEndian: None,
    uid.DeflatedExplicitVRLittleEndian: None,
    uid.RLELossless: rle,
    uid.JPEG2000Lossless: jpeg_2000,
    uid.JPEGLSLossless: jpeg_ls_frame,
    uid.JPEGLossless: lambda pixels, bits: jpeg_lossless(pixels, bits, predictor=6),
    uid.JPEGLosslessSV1: jpeg_lossless,
}
# 12 x 20 pixels of 12 bits. HTJ2K by OpenJPH, which claims 16 bits, JPEG Lossless by liblj92.
FORMULA = np.fromfunction(lambda y, x: (x * x * 7 + y * 191) % 4096, (12, 20), dtype=int).astype(np.uint16)
HTJ2K = bytes(imagecodecs.htj2k_encode(FORMULA, reversible=True))
LOSSLESS = bytes(imagecodecs.ljpeg_encode(FORMULA, bitspersample=12))
EXTENDED = jpeg_12_bit(FORMULA)


def file_of(pixels: np.ndarray, bits: int, syntax: uid.UID) -> bytes:
    encode = ENCODERS[syntax]
    return dicom_bytes(pixels, bits, syntax, encode(pixels, bits) if encode else b"")


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda syntax: syntax.name)
def test_what_a_lossless_syntax_stores_comes_back(syntax: uid.UID) -> None:
    assert np.array_equal(pixels_of(file_of(GREYS, 8, syntax)), GREYS)
    assert np.array_equal(pixels_of(file_of(RAMP, 12, syntax)), stretched(RAMP))
    wide = (RAMP * 15 + 3).astype(np.uint16)
    assert np.array_equal(pixels_of(file_of(wide, 16, syntax)), stretched(wide))
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    assert np.array_equal(pixels_of(file_of(signed, 12, syntax)), stretched(RAMP))


@pytest.mark.parametrize(
    ("syntax", "bits", "form"),
    [
        (uid.ImplicitVRLittleEndian, 12, "uncompressed, 12 bit, MONOCHROME2"),
        (uid.ExplicitVRBigEndian, 8, "uncompressed big endian, 8 bit, MONOCHROME2"),
        (uid.DeflatedExplicitVRLittleEndian, 8, "deflated, 8 bit, MONOCHROME2"),
        (uid.RLELossless, 12, "RLE, 12 bit, MONOCHROME2"),
        (uid.JPEG2000Lossless, 12, "JPEG 2000, 12 bit, MONOCHROME2"),
        (uid.JPEGLSLossless, 8, "JPEG-LS, 8 bit, MONOCHROME2"),
        (uid.JPEGLosslessSV1, 12, "JPEG Lossless, 12 bit, MONOCHROME2"),
    ],
)
def test_the_format_names_syntax_and_bits(syntax: uid.UID, bits: int, form: str) -> None:
    assert read_radiograph(file_of(GREYS if bits == 8 else RAMP, bits, syntax), "x").format == form


def test_every_syntax_has_a_short_name_without_text_from_the_file() -> None:
    assert {codec.name for codec in DECODERS.values()} == {
        "JPEG Baseline", "JPEG Extended", "JPEG Lossless", "JPEG-LS", "JPEG-LS near-lossless", "JPEG 2000",
        "JPEG 2000 lossy", "HTJ2K", "HTJ2K lossy", "RLE",
    }  # fmt: skip


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


def test_lossy_syntaxes_come_close() -> None:
    near = dicom_bytes(GREYS, 8, uid.JPEGLSNearLossless, jpeg_ls_frame(GREYS, 8, lossy_error=3))
    assert 0 < np.abs(pixels_of(near).astype(int) - GREYS).max() <= 3
    lossy = dicom_bytes(SMOOTH, 8, uid.JPEG2000, jpeg_2000(SMOOTH, 8, compression_ratios=[4]))
    assert 0 < np.abs(pixels_of(lossy).astype(int) - SMOOTH).mean() < 10


@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2K, uid.HTJ2KLosslessRPCL])
def test_high_throughput_jpeg_2000_is_read(syntax: uid.UID) -> None:
    assert np.array_equal(pixels_of(dicom_bytes(FORMULA, 12, syntax, HTJ2K)), stretched(FORMULA))


@pytest.mark.parametrize("bits", range(2, 17))
def test_lossless_jpeg_of_any_depth_and_predictor_comes_back(bits: int) -> None:
    pixels = (RAMP.astype(int) * 40503 % 2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    expected = pixels if bits == 8 else stretched(pixels)
    for predictor in range(1, 8):
        frame = jpeg_lossless(pixels, bits, predictor)
        assert np.array_equal(pixels_of(dicom_bytes(pixels, bits, uid.JPEGLossless, frame)), expected)


def test_lossless_jpeg_may_start_anew_and_leave_out_the_lowest_bits() -> None:
    for point_transform in (0, 1, 3):
        kept = FORMULA >> point_transform << point_transform
        for restart_rows in (1, 2, 5, 12):
            frame = jpeg_lossless_by_hand(FORMULA, 12, point_transform, restart_rows)
            content = dicom_bytes(FORMULA, 12, uid.JPEGLosslessSV1, frame)
            assert np.array_equal(pixels_of(content), stretched(kept))
    assert np.array_equal(
        pixels_of(dicom_bytes(FORMULA, 12, uid.JPEGLosslessSV1, LOSSLESS)), stretched(FORMULA)
    )


def test_12_bit_jpeg_comes_close_sequential_or_progressive() -> None:
    greys = pixels_of(dicom_bytes(FORMULA, 12, uid.JPEGExtended12Bit, EXTENDED))
    assert 0 < np.abs(greys - stretched(FORMULA)).max() <= 1
    squares = np.kron(FORMULA, np.ones((8, 8), np.uint16))
    content = dicom_bytes(squares, 12, uid.JPEGExtended12Bit, progressive_jpeg_by_hand(FORMULA))
    assert np.array_equal(pixels_of(content), stretched(squares))


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
    ("syntax", "value", "reason"),
    [
        (uid.JPEGBaseline8Bit, items(b"", jpeg(GREYS), jpeg(GREYS)), "2 images instead of one"),
        (uid.RLELossless, items(b"", rle(GREYS, 8), rle(GREYS, 8)), "2 images instead of one"),
        (uid.JPEGBaseline8Bit, items(jpeg(GREYS)), CUT_SHORT),
        (uid.JPEGBaseline8Bit, items(b"", jpeg(GREYS)[:-200]), CUT_SHORT),
        (uid.JPEG2000Lossless, items(b"", jpeg_2000(GREYS, 8)[:-20]), CUT_SHORT),
        (uid.RLELossless, items(b"", rle(GREYS, 8)[:-20]), CUT_SHORT),
        (uid.JPEGLosslessSV1, items(b"", jpeg_lossless(GREYS, 8)[:-20]), CUT_SHORT),
        (uid.JPEGExtended12Bit, items(b"", jpeg_12_bit(GREYS, 8)[:-20]), CUT_SHORT),
        (uid.RLELossless, items(b"", rle(RAMP, 12)), "2 RLE segments instead of 1"),
        (
            uid.JPEG2000Lossless,
            items(b"", b"\xff\x4f\xff\x51\0\0\xff\xd9"),
            "its pixel data is not valid JPEG 2000: damaged, or a wrong transfer syntax",
        ),
        (
            uid.JPEGLSLossless,
            items(b"", jpeg_ls_frame(RAMP, 12)),
            "its compressed image has 64 x 64 pixels, its DICOM header says 32 x 48",
        ),
        (
            uid.JPEG2000Lossless,
            items(b"", jpeg_2000(GREYS.astype(np.uint16) * 2, 12)),
            "its compressed image uses more than the 8 bits of its DICOM header",
        ),
        (
            uid.JPEGBaseline8Bit,
            items(b"", jpeg(np.dstack([GREYS] * 3))),
            "its compressed image has 3 components, its DICOM header says 1",
        ),
        (
            uid.ExplicitVRLittleEndian,
            items(b"", jpeg(GREYS)),
            "its pixel data is compressed, although the transfer syntax says uncompressed",
        ),
    ],
)
def test_a_compressed_image_that_does_not_fit_is_rejected(syntax: uid.UID, value: bytes, reason: str) -> None:
    content = dicom_bytes(GREYS, 8, uid.JPEGBaseline8Bit, value)
    old, new = (name.encode().ljust(22, b"\0") for name in (uid.JPEGBaseline8Bit, syntax))
    assert rejection(content.replace(old, new)) == reason


def test_pixels_that_the_file_calls_compressed_and_are_not_are_rejected() -> None:
    content = dicom_bytes(GREYS)
    # Both names are as long with their padding.
    renamed = content.replace(uid.ExplicitVRLittleEndian.encode() + b"\0", uid.RLELossless.encode()[:20])
    assert rejection(renamed).startswith("transfer syntax (unknown)")
    raw = dicom_bytes(GREYS, 8, uid.RLELossless, b"\1")
    start = raw.index(b"\xfe\xff\0\xe0")
    plain = raw[: start - 4] + GREYS.size.to_bytes(4, "little") + GREYS.tobytes()
    assert rejection(plain) == "its pixel data is not compressed, although the transfer syntax says so"


def test_a_jpeg_2000_picture_in_its_file_wrapper_is_unpacked() -> None:
    wrapped = jpeg_2000(GREYS, 8, codec_format=1)
    assert wrapped.startswith(b"\0\0\0\x0cjP")
    assert np.array_equal(pixels_of(dicom_bytes(GREYS, 8, uid.JPEG2000Lossless, wrapped)), GREYS)


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


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (uid.JPEGBaseline8Bit, lambda greys: jpeg(greys)),
        (uid.JPEG2000Lossless, lambda greys: jpeg_2000(greys, 8)),
        (uid.JPEGLSLossless, lambda greys: jpeg_ls_frame(greys, 8)),
    ],
)
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_8_bit_greys_below_a_header_of_more_bits_are_used_as_they_are(
    syntax: uid.UID, encode: Callable[[np.ndarray], bytes], bits: int
) -> None:
    header = {"BitsAllocated": 16, "BitsStored": bits, "HighBit": bits - 1}
    content = dicom_bytes(GREYS, 8, syntax, encode(GREYS), WindowCenter=2048, WindowWidth=4096, **header)
    expected = np.asarray(Image.open(io.BytesIO(jpeg(GREYS)))) if syntax == uid.JPEGBaseline8Bit else GREYS
    assert np.array_equal(pixels_of(content), expected)
    if syntax != uid.JPEGBaseline8Bit:  # which pydicom's Pillow decoder refuses
        assert np.array_equal(pydicom.dcmread(io.BytesIO(content)).pixel_array, expected)


@pytest.mark.parametrize("padding", [bytes(1), bytes(2), bytes(17), bytes(5000), b"\xff" * 40, b"end\0" * 9])
def test_bytes_after_the_end_of_a_compressed_image_are_no_matter(padding: bytes) -> None:
    for syntax, frame in {
        uid.JPEGBaseline8Bit: jpeg(GREYS),
        uid.JPEG2000Lossless: jpeg_2000(GREYS, 8),
        uid.JPEGLSLossless: jpeg_ls_frame(GREYS, 8),
        uid.JPEGLossless: jpeg_lossless(GREYS, 8),
    }.items():
        whole = pixels_of(dicom_bytes(GREYS, 8, syntax, frame))
        padded = frame + padding + bytes((len(frame) + len(padding)) % 2)
        assert np.array_equal(pixels_of(dicom_bytes(GREYS, 8, syntax, padded)), whole)
        in_two = dicom_bytes(GREYS, 8, syntax, items(b"", frame, padding + bytes(len(padding) % 2)))
        assert np.array_equal(pixels_of(in_two), whole)
        cut = frame[:-60] + padding
        assert rejection(dicom_bytes(GREYS, 8, syntax, cut + bytes(len(cut) % 2))) == CUT_SHORT


@given(
    npst.arrays(
        np.uint8,
        npst.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=99),
        elements=st.sampled_from([0, 1, 255]),
    )
)
def test_run_lengths_of_any_picture_unpack(pixels: np.ndarray) -> None:
    assume(np.bincount(pixels.reshape(-1)).max() < 0.99 * pixels.size)  # else it has no contrast
    assert np.array_equal(pixels_of(dicom_bytes(pixels, 8, uid.RLELossless, rle(pixels, 8))), pixels)


def test_run_lengths_never_unpack_beyond_the_picture() -> None:
    bomb = (
        (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56) + b"\x81\x07\x81\x08" * (5 * 10**5)
    )
    content = dicom_bytes(GREYS, 8, uid.RLELossless, bomb)
    tracemalloc.start()
    pixels = pixels_of(content)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(pixels.reshape(-1), np.resize([7] * 128 + [8] * 128, pixels.size))
    assert peak_bytes < 10**7  # unlimited it is 128 million


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
        (LOSSLESS, (12, 20, 1, 12)),
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


def test_a_jpeg_2000_picture_may_be_a_part_of_its_grid_and_sampled() -> None:
    frame = bytearray(jpeg_2000(SMOOTH, 8))
    frame[8:24] = b"".join(n.to_bytes(4, "big") for n in (101, 81, 7, 4))  # right, bottom, left, top
    frame[43:45] = bytes((2, 3))  # every second column, every third row
    rows = len([y for y in range(4, 81) if y % 3 == 0])
    columns = len([x for x in range(7, 101) if x % 2 == 0])
    assert read_frame_header(bytes(frame)) == (rows, columns, 1, 8, 0)
    frame[43] = 0
    assert read_frame_header(bytes(frame)) is None


@pytest.mark.parametrize(
    "junk", [b"", b"\xff", b"\xff\xd8\xff", bytes(99), b"\xff\xd8\xff\xda\0\2", b"\xff\x4f\xff\x51"]
)
def test_what_is_no_picture_states_no_size(junk: bytes) -> None:
    assert read_frame_header(junk) is None


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
