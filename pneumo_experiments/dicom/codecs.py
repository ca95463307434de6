"""Decodes compressed pixel data: one decoder for each DICOM transfer syntax.

Decoders are called directly, so that pixels and speed do not depend on what else is installed. A decoder is
imported when the first image needs it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from pydicom import uid

from pneumo_experiments.dicom.frames import END_OF_IMAGE, FrameHeader, join_fragments, read_frame_header
from pneumo_experiments.errors import Rejected

StoredPixels = NDArray[np.unsignedinteger[Any]]  # (H, W), uint8 or uint16; signed values as raw bits

CUT_SHORT = "its pixel data is truncated"
STDERR_LOCK = Lock()


def decode(
    syntax: uid.UID,
    encapsulated: bytes,
    size: tuple[int, int],
    bits_allocated: int,
    bits_stored: int,
    signed: bool,
) -> tuple[StoredPixels, int]:
    """Pixels (rows, columns) of one compressed grayscale image, and the number of low bits that are used.

    Raises Rejected, before memory is allocated, if the compressed image's own header contradicts ``size`` or
    ``bits_stored``, and if the image cannot be decoded.
    """
    codec = DECODERS[syntax]
    frame = join_fragments(encapsulated, syntax == uid.RLELossless)
    if syntax == uid.RLELossless:
        return _rle(frame, FrameHeader(*size, 1, bits_allocated)), bits_stored
    header = _check_header(frame, codec.name, size, bits_stored)
    try:
        stored = codec.decode(frame, header)
    except ImportError as error:
        raise Rejected(f"{codec.name}, {header.bits} bit, needs {codec.install}") from error
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own exceptions
        raise Rejected(f"its {codec.name} data cannot be decoded: damaged, or an unusual variant") from error
    if stored.shape != size:
        raise ValueError("decoded size differs from the compressed header")
    if header.bits > bits_stored:  # common among encoders, and harmless if the extra bits are unused
        extra_bits = stored >> stored.dtype.type(bits_stored)
        sign_bits = 2 ** (8 * stored.itemsize - bits_stored) - 1 if signed else 0
        if ((extra_bits != 0) & (extra_bits != sign_bits)).any():
            raise Rejected(f"its compressed image uses more than the {bits_stored} bits of its DICOM header")
    return stored, min(header.bits, bits_stored)


def _check_header(frame: bytes, name: str, size: tuple[int, int], bits_stored: int) -> FrameHeader:
    """The compressed image's header; Rejected unless complete, grayscale and equal to the DICOM header."""
    header = read_frame_header(frame)
    # Decoders fill the rest of a truncated image with gray, without an error. What follows the end, mostly
    # zeros, is no matter. Before the header a thumbnail may have an end of its own.
    if frame.find(END_OF_IMAGE, header.offset if header else 0) < 0:
        raise Rejected(CUT_SHORT)
    if header is None:
        raise Rejected(f"its pixel data is not valid {name}: damaged, or a wrong transfer syntax")
    if (header.rows, header.columns) != size:
        actual, expected = (f"{rows} x {columns}" for rows, columns in ((header.rows, header.columns), size))
        raise Rejected(f"its compressed image has {actual} pixels, its DICOM header says {expected}")
    if header.components != 1:
        raise Rejected(f"not a grayscale image ({header.components} components)")
    if header.bits > 16:
        raise Rejected(f"its compressed image has {header.bits} bits instead of at most 16")
    return header


def _jpeg(frame: bytes, header: FrameHeader) -> StoredPixels:
    """Lossy JPEG: 8 bits by Pillow, 12 bits by GDCM."""
    if header.bits != 8:
        return _gdcm(frame, header)
    image = JpegImageFile(BytesIO(frame))
    if image.mode != "L" or image.size != (header.columns, header.rows):
        raise ValueError("a second header contradicts the first")
    image.load()
    return np.asarray(image)


def _jpeg_ls(frame: bytes, header: FrameHeader) -> StoredPixels:
    return _reshape(import_module("jpeg_ls").decode_pixel_data(frame)[0], header)


def _jpeg_2000(frame: bytes, header: FrameHeader) -> StoredPixels:
    return _reshape(import_module("openjpeg").decode(frame, j2k_format=0, reshape=False), header)


def _gdcm(frame: bytes, header: FrameHeader) -> StoredPixels:
    """JPEG Lossless, and 12-bit lossy JPEG."""
    gdcm: Any = import_module("gdcm")
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(frame)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((header.columns, header.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(
        gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2)
    )
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    # With 16 bits allocated GDCM tries its 16-bit decoder first, and prints an error for 12-bit data.
    allocated = 12 if header.bits == 12 else 8 if header.bits <= 8 else 16
    image.SetPixelFormat(gdcm.PixelFormat(1, allocated, header.bits, header.bits - 1, 0))
    with _silent_stderr():
        pixels = image.GetBuffer()
    return _reshape(pixels.encode("utf-8", "surrogateescape"), header)


@contextmanager
def _silent_stderr() -> Generator[None]:
    """Discards what GDCM's C code prints; stderr output of other threads is lost meanwhile."""
    with STDERR_LOCK:
        stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(devnull, 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(devnull)


def _rle(frame: bytes, header: FrameHeader) -> StoredPixels:
    """PackBits (PS3.5 G): one segment for each byte of a pixel, most significant first.

    Not pydicom's decoder, which has no limit: a few kilobytes could unpack to megabytes beyond the image.
    """
    count, *offsets = struct.unpack_from("<16I", frame)
    offsets = [*offsets[:count], len(frame)]
    if count != header.bits // 8:
        raise Rejected(f"{count} RLE segments instead of {header.bits // 8}")
    size = header.rows * header.columns
    planes = np.empty((size, count), np.uint8)
    for k in range(count):
        planes[:, count - 1 - k] = np.frombuffer(
            _unpack_bits(frame[offsets[k] : offsets[k + 1]], size), np.uint8
        )
    return _reshape(planes, header)


def _unpack_bits(packed: bytes, size: int) -> bytearray:
    unpacked, position = bytearray(), 0
    while len(unpacked) < size:
        if position >= len(packed):
            raise Rejected(CUT_SHORT)
        control = packed[position]
        if control < 128:  # control + 1 literal bytes
            unpacked += packed[position + 1 : position + 2 + control]
            position += 2 + control
        elif control > 128:  # one byte, repeated 257 - control times
            unpacked += packed[position + 1 : position + 2] * (257 - control)
            position += 2
        else:
            position += 1
    del unpacked[size:]
    return unpacked


def _reshape(buffer: Any, header: FrameHeader) -> StoredPixels:
    return np.frombuffer(buffer, "<u1" if header.bits <= 8 else "<u2").reshape(header.rows, header.columns)


class Codec(NamedTuple):
    """A transfer syntax: its short name, its decoder, and what to install if the decoder is missing."""

    name: str
    decode: Callable[[bytes, FrameHeader], StoredPixels]
    install: str = ""


_GDCM = "GDCM: pip install 'pneumo-experiments[gdcm]'"
_JPEG_LS, _JPEG_2000 = "pip install pyjpegls", "pip install pylibjpeg-openjpeg"
DECODERS = {
    uid.JPEGBaseline8Bit: Codec("JPEG Baseline", _jpeg, _GDCM),
    uid.JPEGExtended12Bit: Codec("JPEG Extended", _jpeg, _GDCM),
    uid.JPEGLossless: Codec("JPEG Lossless", _gdcm, _GDCM),
    uid.JPEGLosslessSV1: Codec("JPEG Lossless", _gdcm, _GDCM),
    uid.JPEGLSLossless: Codec("JPEG-LS", _jpeg_ls, _JPEG_LS),
    uid.JPEGLSNearLossless: Codec("JPEG-LS near-lossless", _jpeg_ls, _JPEG_LS),
    uid.JPEG2000Lossless: Codec("JPEG 2000", _jpeg_2000, _JPEG_2000),
    uid.JPEG2000: Codec("JPEG 2000 lossy", _jpeg_2000, _JPEG_2000),
    uid.HTJ2KLossless: Codec("HTJ2K", _jpeg_2000, _JPEG_2000),
    uid.HTJ2KLosslessRPCL: Codec("HTJ2K", _jpeg_2000, _JPEG_2000),
    uid.HTJ2K: Codec("HTJ2K lossy", _jpeg_2000, _JPEG_2000),
    uid.RLELossless: Codec("RLE", _rle),
}
