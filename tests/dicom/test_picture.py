"""A grey picture in three colour components is read as grey; one with any colour is rejected."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import imagecodecs
import jpeg_ls
import numpy as np
import pydicom
import pytest
from dicom_files import GREYS, dicom_bytes, jpeg, rejection, rle, with_peak
from PIL import Image
from pydicom import uid

from pneumo_experiments.dicom.radiograph import Radiograph, read_radiograph

NOTE = "grey picture in three colour components: read as grey"
SMOOTH = np.add.outer(np.arange(40) * 3, np.arange(50) * 2).astype(np.uint8)
NATIVE = uid.ExplicitVRLittleEndian


def three(grey: np.ndarray) -> np.ndarray:
    return np.dstack([grey] * 3)


def ybr(grey: np.ndarray, blue: int = 128, red: int = 128) -> np.ndarray:
    return np.dstack([grey, np.full_like(grey, blue), np.full_like(grey, red)])


def colour_file(
    pixels: np.ndarray, photometric: str, syntax: uid.UID = NATIVE, frame: bytes = b"", **header: Any
) -> bytes:
    header = {"PlanarConfiguration": 0, "BitsAllocated": 8, **header}
    return dicom_bytes(
        pixels, 8, syntax, frame, SamplesPerPixel=3, PhotometricInterpretation=photometric, **header
    )


def subsampled(pixels: np.ndarray) -> bytes:
    """YBR_FULL_422: Y Y Cb Cr of two pixels."""
    pairs = pixels.reshape(len(pixels), -1, 2, 3)
    return np.dstack([pairs[..., 0], pairs[:, :, 0, 1:]]).tobytes()


def native_422(pixels: np.ndarray) -> bytes:
    content = colour_file(pixels, "YBR_FULL_422")
    raw = pixels.tobytes()
    assert content.count(raw) == 1
    length = len(raw).to_bytes(4, "little")
    values = subsampled(pixels)
    return content.replace(length + raw, len(values).to_bytes(4, "little") + values)


def read(content: bytes) -> Radiograph:
    radiograph = read_radiograph(content, "x")
    assert radiograph.notes == (NOTE,)
    return radiograph


def red_as_pydicom_reads_it(content: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a JPEG whose header calls it RGB
        return pydicom.dcmread(io.BytesIO(content)).pixel_array[..., 0]


def rle_of_three(pixels: np.ndarray) -> bytes:
    planes = [rle(np.ascontiguousarray(pixels[..., k]), 8)[64:] for k in range(3)]
    starts = np.cumsum([64, *map(len, planes)])[:3]
    return np.array([3, *starts, *[0] * 12], "<u4").tobytes() + b"".join(planes)


def jpeg_2000_of_three(pixels: np.ndarray, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, codecformat="J2K", **options))


def jpeg_ls_of_three(pixels: np.ndarray) -> bytes:
    return bytes(jpeg_ls.encode_buffer(pixels.tobytes(), *pixels.shape, 8, interleave_mode=2))


PLANES = {"PlanarConfiguration": 1, "Rows": 32, "Columns": 48}
RGB, YBR = three(GREYS), ybr(GREYS)
RCT, NO_RCT = (jpeg_2000_of_three(RGB, reversible=True, mct=mct) for mct in (True, False))
LOSSLESS = bytes(imagecodecs.jpeg8_encode(RGB, lossless=True, colorspace="RGB", outcolorspace="RGB"))
EXACT = {
    "RGB": colour_file(RGB, "RGB"),
    "RGB in planes": colour_file(RGB.transpose(2, 0, 1), "RGB", **PLANES),
    "RGB, big endian": colour_file(RGB, "RGB", uid.ExplicitVRBigEndian),
    "RGB, deflated": colour_file(RGB, "RGB", uid.DeflatedExplicitVRLittleEndian),
    "YBR_FULL": colour_file(YBR, "YBR_FULL"),
    "YBR_FULL in planes": colour_file(YBR.transpose(2, 0, 1), "YBR_FULL", **PLANES),
    "YBR_FULL_422": native_422(YBR),
    "RLE, RGB": colour_file(RGB, "RGB", uid.RLELossless, rle_of_three(RGB)),
    "RLE, YBR_FULL": colour_file(YBR, "YBR_FULL", uid.RLELossless, rle_of_three(YBR)),
    "JPEG-LS": colour_file(RGB, "RGB", uid.JPEGLSLossless, jpeg_ls_of_three(RGB)),
    "JPEG 2000, YBR_RCT": colour_file(RGB, "YBR_RCT", uid.JPEG2000Lossless, RCT),
    "JPEG 2000, RGB": colour_file(RGB, "RGB", uid.JPEG2000Lossless, NO_RCT),
    "JPEG Lossless": colour_file(RGB, "RGB", uid.JPEGLosslessSV1, LOSSLESS),
}


@pytest.mark.parametrize("name", EXACT)
def test_three_equal_components_are_the_grey(name: str) -> None:
    radiograph = read(EXACT[name])
    assert np.array_equal(radiograph.pixels, GREYS)
    assert radiograph.pixels.flags.c_contiguous
    if name != "JPEG Lossless":  # which pydicom does not decode
        assert np.array_equal(red_as_pydicom_reads_it(EXACT[name]), GREYS)


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "YBR_FULL", "RGB"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_a_grey_jpeg_in_colour_is_read_whatever_its_colours_are_called(
    photometric: str, options: dict[str, Any]
) -> None:
    frame = jpeg(three(SMOOTH), **options)
    content = colour_file(three(SMOOTH), photometric, uid.JPEGBaseline8Bit, frame)
    expected = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))[..., 0]
    assert np.abs(read(content).pixels.astype(int) - expected).max() <= 1
    assert np.abs(read(content).pixels.astype(int) - red_as_pydicom_reads_it(content)).max() <= 1
    assert read(content).format == f"JPEG Baseline, 8 bit, {photometric}"


def test_lossy_pictures_of_equal_components_are_read() -> None:
    as_rgb = bytes(imagecodecs.jpeg8_encode(three(SMOOTH), 90, colorspace="RGB", outcolorspace="RGB"))
    ict = jpeg_2000_of_three(three(SMOOTH), level=60, reversible=False)
    for photometric, syntax, frame in (
        ("RGB", uid.JPEGBaseline8Bit, as_rgb),
        ("YBR_ICT", uid.JPEG2000, ict),
    ):
        content = colour_file(three(SMOOTH), photometric, syntax, frame)
        pixels = read(content).pixels.astype(int)
        assert np.abs(pixels - SMOOTH).max() <= 8
        assert np.abs(pixels - red_as_pydicom_reads_it(content)).max() <= 1


def test_a_tint_that_nobody_sees_is_grey_and_more_is_colour() -> None:
    half, green = three(GREYS // 2), np.array([0, 1, 0], np.uint8)
    for grey, colour, photometric in (
        (ybr(GREYS, 124, 132), ybr(GREYS, 123), "YBR_FULL"),
        (half + 8 * green, half + 9 * green, "RGB"),
    ):
        assert np.array_equal(read(colour_file(grey, photometric)).pixels, grey[..., 0])
        assert rejection(colour_file(colour, photometric)) == f"not a grayscale image ({photometric})"


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (NATIVE, lambda pixels: b""),
        (uid.RLELossless, rle_of_three),
        (uid.JPEGLSLossless, jpeg_ls_of_three),
        (uid.JPEG2000Lossless, lambda pixels: jpeg_2000_of_three(pixels, reversible=True)),
        (uid.JPEGBaseline8Bit, jpeg),
    ],
)
def test_a_small_mark_in_colour_rejects_a_picture(
    syntax: uid.UID, encode: Callable[[np.ndarray], bytes]
) -> None:
    pixels = three(SMOOTH)
    assert read(colour_file(pixels, "RGB", syntax, encode(pixels))).pixels.shape == SMOOTH.shape
    pixels[7:9, 9:11] = (200, 60, 60)
    assert rejection(colour_file(pixels, "RGB", syntax, encode(pixels))) == "not a grayscale image (RGB)"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (colour_file(RGB, "YBR_FULL"), "not a grayscale image (YBR_FULL)"),
        (native_422(ybr(GREYS, 90)), "not a grayscale image (YBR_FULL_422)"),
        (colour_file(YBR, "RGB"), "not a grayscale image (RGB)"),
        (colour_file(RGB, "YBR_PARTIAL_422"), "not a grayscale image (YBR_PARTIAL_422)"),
        (
            colour_file(RGB.astype(np.uint16), "RGB", BitsAllocated=16),
            "not a grayscale image (RGB in 16",
        ),
        (colour_file(RGB, "RGB", Rows=33), "its pixel data is truncated"),
        (native_422(YBR)[:-2], "its pixel data is truncated"),
        (colour_file(RGB, "RGB", uid.JPEGBaseline8Bit, jpeg(GREYS)), "its compressed image has 1 components"),
        (colour_file(RGB, "RGB", uid.RLELossless, rle(GREYS, 8)), "1 RLE segments instead of 3"),
    ],
)
def test_what_does_not_fit_is_rejected(content: bytes, reason: str) -> None:
    assert rejection(content).startswith(reason)
    small = {"max_pixels": 3 * GREYS.size - 1}
    assert rejection(EXACT["RGB"], **small).startswith("32 x 48 pixels of 3 components exceed max_pixels=")


def test_three_components_take_little_more_memory_than_they_are() -> None:
    large = np.resize(GREYS, (2000, 3000))
    radiograph, peak_bytes = with_peak(read, colour_file(three(large), "RGB"))
    assert np.array_equal(radiograph.pixels, large)
    assert peak_bytes < 3 * 2.5 * large.size
