"""The compressed picture inside a DICOM file: its pieces joined, and the size that it states itself."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pydicom.encaps import generate_fragments

from pneumo_experiments.errors import Rejected

ITEM = b"\xfe\xff\x00\xe0"  # tag of an item, little endian
JPEG_START, J2K_START = b"\xff\xd8\xff", b"\xff\x4f\xff\x51"
JP2_BOX = b"\0\0\0\x0cjP  "  # a file around the JPEG 2000 stream; DICOM wants it bare (PS3.5 A.4.4)
END = b"\xff\xd9"  # of a JPEG, JPEG-LS and JPEG 2000 picture alike


class Frame(NamedTuple):
    """The size that a compressed picture states itself."""

    rows: int
    columns: int
    components: int
    bits: int


def join_fragments(encapsulated: bytes, rle: bool) -> bytes:
    """The one compressed picture in the items of Pixel Data (PS3.5 A.4).

    The first item, a table of offsets, only tells frames apart and is often wrong: it is never looked at.
    """
    if not encapsulated.startswith(ITEM):
        raise Rejected("its picture is not compressed as the file says")
    fragments = list(generate_fragments(encapsulated))[1:]
    starts = len(fragments) if rle else sum(f.startswith((JPEG_START, J2K_START, JP2_BOX)) for f in fragments)
    if starts > 1:
        raise Rejected(f"{starts} pictures instead of one")
    frame = fragments[0] if len(fragments) == 1 else b"".join(fragments)
    return frame[max(frame.find(J2K_START), 0) :] if frame.startswith(JP2_BOX) else frame


def frame_header(frame: bytes) -> Frame | None:
    """Size of a JPEG, JPEG-LS or JPEG 2000 picture as its first bytes tell it; None where they do not.

    JPEG: ITU-T T.81 B.1.1.3 and B.2.2; JPEG-LS: T.87 C.2.2, marker F7; JPEG 2000: T.800 A.5.1.
    """
    try:
        if frame.startswith(J2K_START):
            right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
            components, depth, across, down = struct.unpack_from(">H3B", frame, 40)
            rows, columns = -(-bottom // down) + -top // down, -(-right // across) + -left // across
            return Frame(rows, columns, components, (depth & 0x7F) + 1)
        if not frame.startswith(JPEG_START):
            return None
        place = 2
        while frame[place] == 0xFF:
            marker = frame[place + 1]
            if marker == 0xFF:  # fill
                place += 1
            elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                bits, rows, columns, components = struct.unpack_from(">BHHB", frame, place + 4)
                return Frame(rows, columns, components, bits)
            elif marker in (0xD8, 0xD9, 0xDA):  # pixels, or the end, before any size
                return None
            else:
                place += 2 + struct.unpack_from(">H", frame, place + 2)[0]
    except (IndexError, ValueError, ZeroDivisionError, struct.error):  # cut within its header
        pass
    return None
