"""Small DICOM files that take gigabytes or hours to read."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
from dicom_files import GREYS, dicom_bytes, jpeg_2000
from PIL import Image
from pydicom import uid

ITEM, NO_LENGTH, END = b"\xfe\xff\x00\xe0", b"\xff\xff\xff\xff", b"\xfe\xff\xdd\xe0"


@cache
def deflated_header(items: int = 2_000_000) -> bytes:
    """A sequence of empty items; pydicom makes some 600 bytes of each."""
    whole = dicom_bytes(GREYS, syntax=uid.DeflatedExplicitVRLittleEndian)
    length = struct.unpack_from("<I", whole, 140)[0]  # of group 2, which is never deflated
    start = 144 + length
    header = zlib.decompress(whole[start:], -zlib.MAX_WBITS)
    sequence = b"\x08\0\x40\x11SQ\0\0" + NO_LENGTH + (ITEM + bytes(4)) * items + END + bytes(4)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return whole[:start] + packer.compress(sequence + header) + packer.flush()


@cache
def tiny_precincts(side: int = 4000) -> bytes:
    """JPEG 2000 in precincts of one pixel (ITU-T T.800 A.6.1): OpenJPEG makes some 600 bytes of each."""
    frame = bytearray(jpeg_2000(GREYS, 8))
    struct.pack_into(">8I", frame, 8, side, side, 0, 0, side, side, 0, 0)
    style = frame.index(b"\xff\x52")
    length, levels = struct.unpack_from(">H", frame, style + 2)[0], frame[style + 9]
    frame[style + 4] |= 1  # precincts are given
    frame[style + 2 + length : style + 2 + length] = b"\0" + b"\x11" * levels
    struct.pack_into(">H", frame, style + 2, length + 1 + levels)
    return dicom_bytes(np.zeros((side, side), np.uint8), 8, uid.JPEG2000Lossless, bytes(frame))


@cache
def many_scans(side: int = 2048) -> bytes:
    """A progressive JPEG that refines its empty picture 70,000 times."""
    file = io.BytesIO()
    Image.new("L", (side, side), 99).save(file, "JPEG", progressive=True)
    frame = file.getvalue()
    last = frame[frame.rindex(b"\xff\xda") : -2]
    content = frame[:-2] + last * 70_000 + b"\xff\xd9"
    return dicom_bytes(
        np.zeros((side, side), np.uint8), 8, uid.JPEGBaseline8Bit, content + bytes(len(content) % 2)
    )
