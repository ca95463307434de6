"""Decodes compressed pixel data: one decoder for each DICOM transfer syntax.

Decoders are called directly, so that pixels and speed do not depend on what else is installed. imagecodecs
loads each when the first image needs it. ``benchmarks/codecs.py`` compares them with others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import generate_fragments

from pneumo_experiments.dicom.limits import is_memory_full
from pneumo_experiments.errors import Rejected

ITEM = b"\xfe\xff\x00\xe0"  # tag of an item, little endian
JPEG_START, J2K_START = b"\xff\xd8\xff", b"\xff\x4f\xff\x51"
JP2_BOX = b"\0\0\0\x0cjP  "  # JP2 container, which DICOM does not allow around a codestream (PS3.5 A.4.4)
END_OF_IMAGE = b"\xff\xd9"  # JPEG, JPEG-LS and JPEG 2000
StoredPixels = NDArray[np.unsignedinteger[Any]]  # uint8 or uint16; signed values as raw bits
CUT_SHORT = "its pixel data is truncated"
UNCOMPRESSED = {
    uid.ImplicitVRLittleEndian: "uncompressed",
    uid.ExplicitVRLittleEndian: "uncompressed",
    uid.ExplicitVRBigEndian: "uncompressed big endian",
    uid.DeflatedExplicitVRLittleEndian: "deflated",
}


@dataclass(frozen=True)
class Layout:
    """How the pixels are stored, according to the header."""

    syntax: uid.UID
    photometric: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    unused_low_bits: int  # according to HighBit, which is often wrong
    components: int = 1  # 3 of a grey picture in colour components

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W), or (H, W, 3)."""
        size = self.rows, self.columns
        return size if self.components == 1 else (*size, self.components)

    @property
    def format(self) -> str:
        name = UNCOMPRESSED.get(self.syntax) or DECODERS[self.syntax].name
        return f"{name}, {self.bits_stored} bit, {self.photometric}"


class FrameHeader(NamedTuple):
    """Image size and bit depth in the header of a compressed image, and where that header starts."""

    rows: int
    columns: int
    components: int
    bits: int
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, and components if there are several."""
        return self[:2] if self.components == 1 else self[:3]


def join_fragments(encapsulated: bytes, rle: bool) -> bytes:
    """The single compressed image in the items of encapsulated Pixel Data (PS3.5 A.4).

    Ignores the first item, the offset table, which is often wrong. Raises Rejected for several images.
    """
    if not encapsulated.startswith(ITEM):
        raise Rejected("its pixel data is not compressed, although the transfer syntax says so")
    fragments = list(generate_fragments(encapsulated))[1:]
    starts = len(fragments) if rle else sum(f.startswith((JPEG_START, J2K_START, JP2_BOX)) for f in fragments)
    if starts > 1:
        raise Rejected(f"{starts} images instead of one")
    frame = fragments[0] if len(fragments) == 1 else b"".join(fragments)
    return frame[max(frame.find(J2K_START), 0) :] if frame.startswith(JP2_BOX) else frame


def read_frame_header(frame: bytes) -> FrameHeader | None:
    """Header of a JPEG, JPEG-LS or JPEG 2000 image; None if it is not valid.

    JPEG: ITU-T T.81 B.1.1.3 and B.2.2; JPEG-LS: T.87 C.2.2, marker F7; JPEG 2000: T.800 A.5.1.
    """
    try:
        if frame.startswith(J2K_START):
            right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
            components, depth, across, down = struct.unpack_from(">H3B", frame, 40)
            rows, columns = -(-bottom // down) + -top // down, -(-right // across) + -left // across
            return FrameHeader(rows, columns, components, (depth & 0x7F) + 1)
        if not frame.startswith(JPEG_START):
            return None
        position = 2
        while frame[position] == 0xFF:
            marker = frame[position + 1]
            if marker == 0xFF:  # fill
                position += 1
            elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                bits, rows, columns, components = struct.unpack_from(">BHHB", frame, position + 4)
                return FrameHeader(rows, columns, components, bits, position)
            elif marker in (0xD8, 0xD9, 0xDA):  # image data or the end before any size
                return None
            else:
                position += 2 + struct.unpack_from(">H", frame, position + 2)[0]
    except (IndexError, ValueError, ZeroDivisionError, struct.error):  # truncated within the header
        pass
    return None


def decode(encapsulated: bytes, layout: Layout) -> tuple[StoredPixels, int]:
    """Pixels (H, W), or (H, W, 3), of one compressed image, and the number of low bits that are used.

    Raises Rejected, before memory is allocated, if the compressed image's own header contradicts ``layout``,
    and if the image cannot be decoded; MemoryError beyond ``limit_memory``.
    """
    codec, bits_stored, is_rle = DECODERS[layout.syntax], layout.bits_stored, layout.syntax == uid.RLELossless
    frame = join_fragments(encapsulated, is_rle)
    if is_rle:
        stated = FrameHeader(layout.rows, layout.columns, layout.components, layout.bits_allocated)
        return _rle(frame, stated), bits_stored
    header = _check_header(frame, codec.name, layout.shape)
    try:
        decoded = codec.decode(frame, header)
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own exceptions
        if is_memory_full():  # OpenJPEG calls that damage and frees nothing: the next file would fail
            raise MemoryError from error
        raise Rejected(f"its {codec.name} data cannot be decoded: damaged, or an unusual variant") from error
    if decoded.shape != layout.shape:
        raise ValueError("decoded size differs from the compressed header")
    stored: StoredPixels = decoded.view(f"u{decoded.itemsize}")
    if header.bits > bits_stored:  # common among encoders, and harmless if the extra bits are unused
        extra_bits = stored >> stored.dtype.type(bits_stored)
        sign_bits = 2 ** (8 * stored.itemsize - bits_stored) - 1 if layout.signed else 0
        if ((extra_bits != 0) & (extra_bits != sign_bits)).any():
            raise Rejected(f"its compressed image uses more than the {bits_stored} bits of its DICOM header")
    return stored, min(header.bits, bits_stored)


def _check_header(frame: bytes, name: str, shape: tuple[int, ...]) -> FrameHeader:
    """The compressed image's header; Rejected unless complete and equal to the DICOM header."""
    header = read_frame_header(frame)
    # Decoders fill the rest of a truncated image with gray, without an error. What follows the end, mostly
    # zeros, is no matter. Before the header a thumbnail may have an end of its own.
    if frame.find(END_OF_IMAGE, header.offset if header else 0) < 0:
        raise Rejected(CUT_SHORT)
    if header is None:
        raise Rejected(f"its pixel data is not valid {name}: damaged, or a wrong transfer syntax")
    if header.shape[:2] != shape[:2]:
        actual, expected = (f"{rows} x {columns}" for rows, columns in (header.shape[:2], shape[:2]))
        raise Rejected(f"its compressed image has {actual} pixels, its DICOM header says {expected}")
    if header.shape != shape:
        expected = (*shape, 1)[2]
        raise Rejected(
            f"its compressed image has {header.components} components, its DICOM header says {expected}"
        )
    if header.bits > 16:
        raise Rejected(f"its compressed image has {header.bits} bits instead of at most 16")
    return header


def _jpeg(frame: bytes, header: FrameHeader) -> NDArray[Any]:
    """Lossy JPEG of 8 or 12 bits, and JPEG Lossless of 2 to 16; colour components as they are stored."""
    as_stored = "RGB" if header.components == 3 else None  # the same space within and without: no conversion
    pixels = np.empty(header.shape, np.uint8 if header.bits <= 8 else np.uint16)
    return imagecodecs.jpeg8_decode(frame, colorspace=as_stored, outcolorspace=as_stored, out=pixels)


def _jpeg_ls(frame: bytes, header: FrameHeader) -> NDArray[Any]:
    return imagecodecs.jpegls_decode(frame)


def _jpeg_2000(frame: bytes, header: FrameHeader) -> NDArray[Any]:
    return imagecodecs.jpeg2k_decode(frame)


def _rle(frame: bytes, header: FrameHeader) -> StoredPixels:
    """PackBits (PS3.5 G): one segment for each byte of a pixel, most significant first, of each component.

    Not pydicom's decoder, which has no limit: a few kilobytes could unpack to megabytes beyond the image. Nor
    that of imagecodecs, which has one, and refuses bytes after the pixels.
    """
    count, *offsets = struct.unpack_from("<16I", frame)
    offsets = [*offsets[:count], len(frame)]
    item_bytes = header.bits // 8
    if count != header.components * item_bytes:
        raise Rejected(f"{count} RLE segments instead of {header.components * item_bytes}")
    planes = np.empty((header.rows * header.columns, header.components, item_bytes), np.uint8)
    for k in range(count):
        plane = planes[:, k // item_bytes, item_bytes - 1 - k % item_bytes]
        plane[:] = np.frombuffer(_unpack_bits(frame[offsets[k] : offsets[k + 1]], len(planes)), np.uint8)
    return planes.view(f"<u{item_bytes}").reshape(header.shape)


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


class Codec(NamedTuple):
    """A transfer syntax: its short name and its decoder."""

    name: str
    decode: Callable[[bytes, FrameHeader], NDArray[Any]]


DECODERS = {
    uid.JPEGBaseline8Bit: Codec("JPEG Baseline", _jpeg),
    uid.JPEGExtended12Bit: Codec("JPEG Extended", _jpeg),
    uid.JPEGLossless: Codec("JPEG Lossless", _jpeg),
    uid.JPEGLosslessSV1: Codec("JPEG Lossless", _jpeg),
    uid.JPEGLSLossless: Codec("JPEG-LS", _jpeg_ls),
    uid.JPEGLSNearLossless: Codec("JPEG-LS near-lossless", _jpeg_ls),
    uid.JPEG2000Lossless: Codec("JPEG 2000", _jpeg_2000),
    uid.JPEG2000: Codec("JPEG 2000 lossy", _jpeg_2000),
    uid.HTJ2KLossless: Codec("HTJ2K", _jpeg_2000),
    uid.HTJ2KLosslessRPCL: Codec("HTJ2K", _jpeg_2000),
    uid.HTJ2K: Codec("HTJ2K lossy", _jpeg_2000),
    uid.RLELossless: Codec("RLE", _rle),
}
