"""A grey picture in three colour components is read as grey; one with any colour is rejected."""

from __future__ import annotations

import io
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import jpeg_ls
import numpy as np
import pydicom
import pytest
from dicom_files import GREYS, dicom_bytes, jpeg, rejection, rle
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file

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
}


@pytest.mark.parametrize("name", EXACT)
def test_three_equal_components_are_the_grey(name: str) -> None:
    radiograph = read(EXACT[name])
    assert np.array_equal(radiograph.pixels, GREYS)
    assert np.array_equal(red_as_pydicom_reads_it(EXACT[name]), GREYS)
    assert radiograph.pixels.flags.c_contiguous


def test_lossless_jpeg_of_three_components_is_the_grey() -> None:
    content = colour_file(RGB, "RGB", uid.JPEGLosslessSV1, LOSSLESS)  # which pydicom does not decode
    assert np.array_equal(read(content).pixels, GREYS)


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
    half, none = GREYS // 2, np.zeros_like(GREYS)
    for grey, colour, photometric in (
        (ybr(GREYS, 124, 132), ybr(GREYS, 123), "YBR_FULL"),
        (
            three(half) + np.dstack([none, none + 8, none]),
            three(half) + np.dstack([none, none + 9, none]),
            "RGB",
        ),
    ):
        assert np.array_equal(read(colour_file(grey, photometric)).pixels, grey[..., 0])
        assert rejection(colour_file(colour, photometric)) == f"not a grayscale image ({photometric})"


def with_a_mark(pixels: np.ndarray) -> np.ndarray:
    marked = pixels.copy()
    marked[7:9, 9:11] = (200, 60, 60)
    return marked


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels: colour_file(pixels, "RGB"),
        lambda pixels: colour_file(pixels, "RGB", uid.RLELossless, rle_of_three(pixels)),
        lambda pixels: colour_file(pixels, "RGB", uid.JPEGLSLossless, jpeg_ls_of_three(pixels)),
        lambda pixels: colour_file(
            pixels, "RGB", uid.JPEG2000Lossless, jpeg_2000_of_three(pixels, reversible=True)
        ),
        lambda pixels: colour_file(pixels, "RGB", uid.JPEGBaseline8Bit, jpeg(pixels)),
    ],
)
def test_a_small_mark_in_colour_rejects_a_picture(make: Callable[[np.ndarray], bytes]) -> None:
    assert read(make(three(SMOOTH))).pixels.shape == SMOOTH.shape
    assert rejection(make(with_a_mark(three(SMOOTH)))) == "not a grayscale image (RGB)"


def test_equal_values_in_ybr_are_colour() -> None:
    assert rejection(colour_file(three(GREYS), "YBR_FULL")) == "not a grayscale image (YBR_FULL)"
    assert rejection(native_422(ybr(GREYS, 90))) == "not a grayscale image (YBR_FULL_422)"
    assert rejection(colour_file(ybr(GREYS), "RGB")) == "not a grayscale image (RGB)"


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_dcmtk", "SC_ybr_full_422_uncompressed", "examples_rgb_color"])
def test_colour_pictures_of_pydicom_are_rejected(name: str) -> None:
    path = get_testdata_file(f"{name}.dcm")
    assert isinstance(path, str)
    photometric = pydicom.dcmread(path).PhotometricInterpretation
    assert rejection(Path(path).read_bytes()) == f"not a grayscale image ({photometric})"


def test_what_does_not_fit_is_rejected() -> None:
    cut = colour_file(three(GREYS), "RGB", Rows=33)
    assert rejection(cut) == "its pixel data is truncated"
    assert rejection(native_422(YBR)[:-2]) == "its pixel data is truncated"
    deep = colour_file(three(GREYS).astype(np.uint16), "RGB", BitsAllocated=16)
    assert rejection(deep) == "not a grayscale image (RGB in 16 bits)"
    one = colour_file(three(GREYS), "RGB", uid.JPEGBaseline8Bit, jpeg(GREYS))
    assert rejection(one) == "its compressed image has 1 components, its DICOM header says 3"
    two = colour_file(three(GREYS), "RGB", uid.RLELossless, rle(GREYS, 8))
    assert rejection(two) == "1 RLE segments instead of 3"
    partial = colour_file(three(GREYS), "YBR_PARTIAL_422")
    assert rejection(partial) == "not a grayscale image (YBR_PARTIAL_422)"
    assert rejection(colour_file(three(GREYS), "RGB"), max_pixels=3 * GREYS.size - 1).startswith(
        "32 x 48 pixels of 3 components exceed max_pixels="
    )


def test_three_components_take_little_more_memory_than_they_are() -> None:
    large = np.resize(GREYS, (2000, 3000))
    content = colour_file(three(large), "RGB")
    tracemalloc.start()
    assert np.array_equal(read(content).pixels, large)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * 2.5 * large.size
