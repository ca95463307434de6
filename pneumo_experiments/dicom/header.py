"""The header of a DICOM file: read, checked, and never quoted."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from typing import Any

from pydicom import uid
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue

from pneumo_experiments.dicom.codecs import DECODERS
from pneumo_experiments.errors import Rejected

HEADER_BYTES = 2**24  # room beside the pixels of a file that is packed as a whole
UNCOMPRESSED = {
    uid.ImplicitVRLittleEndian: "uncompressed",
    uid.ExplicitVRLittleEndian: "uncompressed",
    uid.ExplicitVRBigEndian: "uncompressed big endian",
    uid.DeflatedExplicitVRLittleEndian: "deflated",
}
GREYS = ("MONOCHROME1", "MONOCHROME2")
# fmt: off
COLOURS = (  # PS3.3 C.7.6.3.1.2
    "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "XYB", "YBR_FULL", "YBR_FULL_422",
    "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT",
)
# fmt: on

logging.getLogger("pydicom").propagate = False  # what it logs of a damaged file may quote the header


@dataclass(frozen=True)
class Layout:
    """How the header says that the pixels lie."""

    syntax: uid.UID
    photometric: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool

    @property
    def format(self) -> str:
        name = UNCOMPRESSED.get(self.syntax) or DECODERS[self.syntax].name
        return f"{name}, {self.bits_stored} bit, {self.photometric}"


def parse(content: bytes, max_pixels: int) -> tuple[Any, uid.UID]:
    """The data set of a file, and its transfer syntax: where none is named, DICOM's default (PS3.5 10.1).

    ``Rejected`` when that syntax has no decoder, or a packed file would unpack to more than max_pixels needs.
    """
    start = 132 if content[128:132] == b"DICM" else 0
    # Files without the 128 bytes and the word begin with group 2 or 8.
    if not start and content[:2] not in (b"\x02\0", b"\x08\0"):
        raise Rejected("not a DICOM file")
    file = BytesIO(content)
    file.seek(start)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_after_group_2)
    syntax = uid.UID(str(meta.get("TransferSyntaxUID") or uid.ImplicitVRLittleEndian))
    if syntax not in UNCOMPRESSED and syntax not in DECODERS:
        known = not syntax.is_private and syntax.is_transfer_syntax
        raise Rejected(f"transfer syntax {syntax.name if known else '(unknown)'} is not supported")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        # Here, since pydicom unpacks without a limit.
        file = BytesIO(inflate(content[file.tell() :], 2 * max_pixels + HEADER_BYTES))
    return read_dataset(file, syntax.is_implicit_VR, syntax.is_little_endian), syntax


def _after_group_2(tag: int, vr: str | None, length: int) -> bool:
    return tag >> 16 != 2


def read_layout(header: Any, syntax: uid.UID, max_pixels: int) -> Layout:
    """What the header says, checked before anything of that size is made."""
    if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
        raise Rejected("floating-point pixels")
    if "PixelData" not in header:
        raise Rejected("no pixel data: not an image, or cut short")
    photometric = text(header, "PhotometricInterpretation")
    if photometric not in GREYS:
        raise Rejected(f"not a grey image ({photometric if photometric in COLOURS else 'of no known kind'})")
    if (samples := whole(header, "SamplesPerPixel", 1)) != 1:
        raise Rejected(f"not a grey image ({samples} samples per pixel)")
    if (frames := whole(header, "NumberOfFrames", 1)) != 1:
        raise Rejected(f"{frames} frames instead of one")
    rows, columns = whole(header, "Rows"), whole(header, "Columns")
    if rows < 1 or columns < 1:
        raise Rejected(f"{rows} x {columns} pixels are no picture")
    if rows * columns > max_pixels:
        raise Rejected(
            f"{rows} x {columns} pixels are more than max_pixels = {max_pixels}; raise it if they are real"
        )
    allocated, bits = whole(header, "BitsAllocated"), whole(header, "BitsStored")
    if allocated not in (8, 16):
        raise Rejected(f"{allocated} bits allocated per pixel instead of 8 or 16")
    high, signed = whole(header, "HighBit", bits - 1), whole(header, "PixelRepresentation")
    if not 1 <= bits <= allocated or high != bits - 1 or signed not in (0, 1):
        raise Rejected(
            f"contradictory bits: {bits} stored of {allocated}, high bit {high}, representation {signed}"
        )
    return Layout(syntax, photometric, rows, columns, allocated, bits, signed == 1)


def inflate(content: bytes, max_bytes: int) -> bytes:
    """A deflated data set (RFC 1951) unpacked; ``Rejected`` when cut, or longer than ``max_bytes``."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacked = stream.decompress(content, max_bytes + 1)
    if len(unpacked) > max_bytes:
        raise Rejected(
            f"unpacks to more than {max_bytes} bytes, which max_pixels allows; raise it if they are real"
        )
    if not stream.eof:
        raise Rejected("cut short")
    return unpacked


def whole(header: Any, keyword: str, default: int | None = None) -> int:
    """A number of the header; ``Rejected`` when it is several or none, and there is no default."""
    value = header.get(keyword)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise Rejected(f"{keyword} is missing or not one whole number")
    return int(value)


def first(header: Any, keyword: str) -> float | None:
    """The first of one or more numbers; None when it is absent or not finite."""
    value = header.get(keyword)
    if isinstance(value, MultiValue):
        value = value[0]
    return float(value) if value is not None and isfinite(value) else None


def text(header: Any, keyword: str) -> str:
    """Text without what fills it up; empty when it is absent."""
    return str(header.get(keyword) or "").replace("\0", "").strip()


def term(text: str, terms: frozenset[str], other: str) -> str:
    """A defined term, empty where there is none; any other text may be a name, and stays here."""
    text = text.upper()
    return text if not text or text in terms else other
