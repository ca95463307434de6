"""The compressed image inside a DICOM file: joins its fragments and reads its own header."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pydicom.encaps import generate_fragments

from pneumo_experiments.errors import Rejected

ITEM = b"\xfe\xff\x00\xe0"  # tag of an item, little endian
JPEG_START, J2K_START = b"\xff\xd8\xff", b"\xff\x4f\xff\x51"
JP2_BOX = b"\0\0\0\x0cjP  "  # JP2 container, which DICOM does not allow around a codestream (PS3.5 A.4.4)
END_OF_IMAGE = b"\xff\xd9"  # JPEG, JPEG-LS and JPEG 2000


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
