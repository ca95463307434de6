"""Who decodes which compressed picture.

Each transfer syntax has one decoder, called directly, so that pixels and speed do not depend on what else is
installed. A decoder is imported with the first picture that needs it.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

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

from pneumo_experiments.dicom.frames import END, Frame, frame_header, join_fragments
from pneumo_experiments.errors import Rejected

Pixels = NDArray[np.unsignedinteger[Any]]  # stored bits (H, W), uint8 or uint16, signed ones as they lie

CUT_SHORT = "its picture is cut short"
STDERR_LOCK = Lock()


def decode(
    syntax: uid.UID,
    encapsulated: bytes,
    size: tuple[int, int],
    bits_allocated: int,
    bits_stored: int,
    signed: bool,
) -> tuple[Pixels, int]:
    """One compressed grey picture of ``size`` (rows, columns), and how many low bits of a pixel count.

    ``Rejected`` before any memory is taken when the picture's own header contradicts size or bits.
    """
    codec = DECODERS[syntax]
    frame = join_fragments(encapsulated, syntax == uid.RLELossless)
    if syntax == uid.RLELossless:
        return _rle(frame, Frame(*size, 1, bits_allocated)), bits_stored
    stated = _agreed(frame, codec.name, size, bits_stored)
    try:
        stored = codec.decode(frame, stated)
    except ImportError as error:
        raise Rejected(f"{codec.name}, {stated.bits} bit, needs {codec.needs}") from error
    except MemoryError:
        raise
    except Exception as error:  # of whatever kind the decoder has
        raise Rejected(f"its {codec.name} picture cannot be decoded: damaged, or of a rare kind") from error
    if stored.shape != size:
        raise ValueError("another size than the header of the picture says")
    if stated.bits > bits_stored:  # an encoder's habit: harmless unless the further bits hold something
        rest = stored >> stored.dtype.type(bits_stored)
        sign = 2 ** (8 * stored.itemsize - bits_stored) - 1 if signed else 0
        if ((rest != 0) & (rest != sign)).any():
            raise Rejected(
                f"its compressed picture needs more than the {bits_stored} bits that its header says"
            )
    return stored, min(stated.bits, bits_stored)


def _agreed(frame: bytes, name: str, size: tuple[int, int], bits_stored: int) -> Frame:
    """The header of a compressed picture that is whole, grey and as expected."""
    # A decoder fills up a picture that ends early with grey, and says nothing.
    if END not in frame[-16:]:
        raise Rejected(CUT_SHORT)
    stated = frame_header(frame)
    if stated is None:
        raise Rejected(f"its picture is no {name} that can be read: damaged, or another transfer syntax")
    if stated[:2] != size:
        own, said = (f"{rows} x {columns}" for rows, columns in (stated[:2], size))
        raise Rejected(f"its compressed picture has {own} pixels, its header says {said}")
    if stated.components != 1:
        raise Rejected(f"not a grey image ({stated.components} components)")
    # Of deep pixels either may be the larger; 8 bits are shown as they are, so that they must be 8.
    if stated.bits > 16 or (stated.bits != bits_stored and min(stated.bits, bits_stored) <= 8):
        raise Rejected(f"its compressed picture has {stated.bits} bits, its header says {bits_stored}")
    return stated


def _jpeg(frame: bytes, stated: Frame) -> Pixels:
    """Lossy JPEG: Pillow has 8 bits only."""
    if stated.bits != 8:
        return _gdcm(frame, stated)
    image = JpegImageFile(BytesIO(frame))
    if image.mode != "L" or image.size != (stated.columns, stated.rows):
        raise ValueError("another header further on")
    image.load()
    return np.asarray(image)


def _jpeg_ls(frame: bytes, stated: Frame) -> Pixels:
    return _shaped(import_module("jpeg_ls").decode_pixel_data(frame)[0], stated)


def _jpeg_2000(frame: bytes, stated: Frame) -> Pixels:
    return _shaped(import_module("openjpeg").decode(frame, j2k_format=0, reshape=False), stated)


def _gdcm(frame: bytes, stated: Frame) -> Pixels:
    """JPEG Lossless and lossy JPEG of 12 bits."""
    gdcm: Any = import_module("gdcm")
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(frame)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((stated.columns, stated.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(
        gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2)
    )
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    # Of 16 allocated bits GDCM tries its 16-bit decoder first, and prints that it does not fit 12.
    allocated = 12 if stated.bits == 12 else 8 if stated.bits <= 8 else 16
    image.SetPixelFormat(gdcm.PixelFormat(1, allocated, stated.bits, stated.bits - 1, 0))
    with _silent_stderr():
        pixels = image.GetBuffer()
    return _shaped(pixels.encode("utf-8", "surrogateescape"), stated)


@contextmanager
def _silent_stderr() -> Generator[None]:
    """GDCM prints from C; what other threads print meanwhile is lost, too."""
    with STDERR_LOCK:
        before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            os.close(nowhere)


def _rle(frame: bytes, stated: Frame) -> Pixels:
    """PackBits (PS3.5 G), one segment for each byte of a pixel, the high one first.

    pydicom's own decoder has no limit: a few kilobytes unpack to megabytes beyond the picture.
    """
    count, *offsets = struct.unpack_from("<16I", frame)
    offsets = [*offsets[:count], len(frame)]
    if count != stated.bits // 8:
        raise Rejected(f"{count} RLE segments instead of {stated.bits // 8}")
    size = stated.rows * stated.columns
    planes = np.empty((size, count), np.uint8)
    for k in range(count):
        planes[:, count - 1 - k] = np.frombuffer(
            _unpack_bits(frame[offsets[k] : offsets[k + 1]], size), np.uint8
        )
    return _shaped(planes, stated)


def _unpack_bits(packed: bytes, size: int) -> bytearray:
    unpacked, place = bytearray(), 0
    while len(unpacked) < size:
        if place >= len(packed):
            raise Rejected(CUT_SHORT)
        head = packed[place]
        if head < 128:  # so many bytes and one more, as they are
            unpacked += packed[place + 1 : place + 2 + head]
            place += 2 + head
        elif head > 128:  # one byte, repeated
            unpacked += packed[place + 1 : place + 2] * (257 - head)
            place += 2
        else:
            place += 1
    del unpacked[size:]
    return unpacked


def _shaped(buffer: Any, stated: Frame) -> Pixels:
    return np.frombuffer(buffer, "<u1" if stated.bits <= 8 else "<u2").reshape(stated.rows, stated.columns)


class Codec(NamedTuple):
    """One transfer syntax: its short name, its decoder, and what to install where that is missing."""

    name: str
    decode: Callable[[bytes, Frame], Pixels]
    needs: str = ""


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
