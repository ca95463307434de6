"""Small DICOM files of every kind, built for the tests."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import imagecodecs
import jpeg_ls
import numpy as np
import openjpeg
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected

T = TypeVar("T")
ITEM = b"\xfe\xff\x00\xe0"
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
GREYS = np.random.default_rng(0).integers(0, 256, (32, 48), np.uint8)


def dicom_bytes(
    pixels: np.ndarray,
    bits: int = 8,
    syntax: UID = ExplicitVRLittleEndian,
    frame: bytes = b"",
    **header: Any,
) -> bytes:
    """A small DICOM file; ``header`` adds elements or replaces those of a plain grey picture.

    ``frame`` is the compressed picture, or the whole value of Pixel Data where it starts with an item.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    content = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    if frame:
        content = frame if frame.startswith(ITEM) else encapsulate([frame])
    dataset.PixelData = content + bytes(len(content) % 2)
    dataset["PixelData"].VR = "OB" if frame or pixels.dtype.itemsize == 1 else "OW"
    dataset["PixelData"].is_undefined_length = bool(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '62' is no DICOM age, which is the point
        for keyword, value in header.items():
            setattr(dataset, keyword, value)
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def with_uids(content: bytes, instance: str = "1.2", sop_class: str = "1.2.840.10008.5.1.4.1.1.1") -> bytes:
    dataset, file = pydicom.dcmread(io.BytesIO(content)), io.BytesIO()
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = instance
    dataset.save_as(file)
    return file.getvalue()


def items(*contents: bytes) -> bytes:
    """Pixel Data of these items; the first is the table of offsets."""
    return b"".join(ITEM + struct.pack("<I", len(content)) + content for content in contents)


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    frame = io.BytesIO()
    Image.fromarray(pixels).save(frame, "JPEG", quality=90, **options)
    return frame.getvalue() + bytes(frame.tell() % 2)


def jpeg_file(pixels: np.ndarray, **header: Any) -> bytes:
    return dicom_bytes(pixels, syntax=JPEGBaseline8Bit, frame=jpeg(pixels), **header)


def jpeg_12_bit(pixels: np.ndarray, bits: int = 12) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(pixels, level=95, bitspersample=bits))


def jpeg_lossless(pixels: np.ndarray, bits: int, predictor: int = 1) -> bytes:
    if pixels.dtype.kind == "i":  # it knows no signs
        pixels = pixels.view(f"u{pixels.itemsize}") & (2**bits - 1)
    return bytes(imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=predictor, bitspersample=bits))


def jpeg_lossless_by_hand(pixels: np.ndarray, bits: int, point_transform: int, restart_rows: int) -> bytes:
    """ITU-T T.81 H.1 with predictor 1: without the lowest bits, and starting anew after some rows."""
    values = pixels.astype(int) >> point_transform
    before = np.zeros_like(values)
    before[:, 1:], before[1:, 0] = values[:, :-1], values[:-1, 0]
    before[::restart_rows, 0] = 2 ** (bits - point_transform - 1)
    frame = segment(0xC3, struct.pack(">BHHB3B", bits, *pixels.shape, 1, 1, 0x11, 0))
    frame += segment(0xDD, struct.pack(">H", restart_rows * pixels.shape[1])) + CATEGORIES
    frame += segment(0xDA, bytes((1, 1, 0, 1, 0, point_transform)))
    for start in range(0, len(pixels), restart_rows):
        rows = slice(start, start + restart_rows)
        frame += bytes((0xFF, 0xD0 + (start // restart_rows - 1) % 8)) if start else b""
        frame += huffman_coded(values[rows] - before[rows])
    return b"\xff\xd8" + frame + b"\xff\xd9"


def progressive_jpeg_by_hand(squares: np.ndarray) -> bytes:
    """Squares of 8 x 8 equal pixels, 240 of them, as a progressive JPEG of 12 bits (ITU-T T.81 G)."""
    rows, columns = squares.shape
    frame = segment(0xDB, b"\0" + b"\x08" * 64)
    frame += segment(0xC2, struct.pack(">BHHB3B", 12, 8 * rows, 8 * columns, 1, 1, 0x11, 0)) + CATEGORIES
    frame += segment(0xDA, bytes((1, 1, 0, 0, 0, 0)))
    frame += huffman_coded(np.diff(squares.astype(int).reshape(-1) - 2048, prepend=0))
    end_of_128 = b"\x10\1" + bytes(15) + b"\x70"  # the one code: 128 squares end, and as many as follow
    frame += segment(0xC4, end_of_128) + segment(0xDA, bytes((1, 1, 0, 1, 63, 0)))
    return b"\xff\xd8" + frame + bytes((squares.size - 128,)) + b"\xff\xd9"


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


# Codes of five bits for 0 to 15.
CATEGORIES = segment(0xC4, bytes(5) + b"\x10" + bytes(11) + bytes(range(16)))


def huffman_coded(differences: np.ndarray) -> bytes:
    """ITU-T T.81 F.1.2.1: the number of bits in a code of five bits, and the bits."""
    bits = ""
    for difference in differences.reshape(-1).tolist():
        count = abs(difference).bit_length()
        low = difference if difference > 0 else difference + 2**count - 1
        bits += f"{count:05b}" + (f"{low:0{count}b}" if count else "")
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def jpeg_2000(pixels: np.ndarray, bits: int, **options: Any) -> bytes:
    rows, columns = pixels.shape
    signed = pixels.dtype.kind == "i"
    return bytes(openjpeg.utils.encode_buffer(pixels.tobytes(), columns, rows, 1, bits, signed, **options))


def jpeg_ls_frame(pixels: np.ndarray, bits: int, **options: Any) -> bytes:
    if pixels.dtype.kind == "i":  # it knows no signs
        pixels = pixels.view(f"u{pixels.itemsize}") & (2**bits - 1)
    return bytes(jpeg_ls.encode_buffer(pixels.tobytes(), *pixels.shape, 1, bits, **options))


def rle(pixels: np.ndarray, bits: int) -> bytes:
    return RLELosslessEncoder.encode(
        pixels.tobytes(),
        encoding_plugin="pydicom",
        rows=pixels.shape[0],
        columns=pixels.shape[1],
        number_of_frames=1,
        samples_per_pixel=1,
        bits_allocated=8 * pixels.itemsize,
        bits_stored=bits,
        pixel_representation=int(pixels.dtype.kind == "i"),
        photometric_interpretation="MONOCHROME2",
    )


def stretched(pixels: np.ndarray) -> np.ndarray:
    """Darkest to brightest as 0 to 255."""
    low, high = int(pixels.min()), int(pixels.max())
    return np.rint((pixels.astype(float) - low) / (high - low) * 255)


def pixels_of(content: bytes) -> np.ndarray:
    pixels = read_radiograph(content, "x").pixels
    assert pixels.dtype == np.uint8
    return pixels


def rejection(content: bytes, **options: Any) -> str:
    with warnings.catch_warnings(), pytest.raises(Rejected) as caught:
        warnings.simplefilter("error")
        read_radiograph(content, "image-7", **options)
    message = str(caught.value)
    assert message.startswith("image-7: ")
    assert "\n" not in message
    return message.removeprefix("image-7: ")


def with_peak(call: Callable[..., T], *args: Any, **options: Any) -> tuple[T, int]:
    """What a call returns, and the bytes of memory that it took."""
    tracemalloc.start()
    result = call(*args, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


# Of each syntax without loss the name that a reader gives it, and its encoder.
LOSSLESS: dict[UID, tuple[str, Callable[[np.ndarray, int], bytes] | None]] = {
    uid.ImplicitVRLittleEndian: ("uncompressed", None),
    uid.ExplicitVRLittleEndian: ("uncompressed", None),
    uid.ExplicitVRBigEndian: ("uncompressed big endian", None),
    uid.DeflatedExplicitVRLittleEndian: ("deflated", None),
    uid.RLELossless: ("RLE", rle),
    uid.JPEG2000Lossless: ("JPEG 2000", jpeg_2000),
    uid.JPEGLSLossless: ("JPEG-LS", jpeg_ls_frame),
    uid.JPEGLossless: ("JPEG Lossless", lambda pixels, bits: jpeg_lossless(pixels, bits, predictor=6)),
    uid.JPEGLosslessSV1: ("JPEG Lossless", jpeg_lossless),
}


def lossless_file(pixels: np.ndarray, bits: int, syntax: UID, **header: Any) -> bytes:
    encode = LOSSLESS[syntax][1]
    return dicom_bytes(pixels, bits, syntax, encode(pixels, bits) if encode else b"", **header)
