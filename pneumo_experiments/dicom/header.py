"""Reads and validates the header of a DICOM file; messages never quote its texts: they may name a patient."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterable
from io import BytesIO
from math import isfinite
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.filereader import read_dataset

from pneumo_experiments.dicom.codecs import DECODERS, UNCOMPRESSED, Layout
from pneumo_experiments.dicom.limits import MAX_HEADER_BYTES, max_file_bytes
from pneumo_experiments.dicom.picture import LUMINANCE_FIRST, RGB, is_picture
from pneumo_experiments.errors import Rejected

GZIP = b"\x1f\x8b"
OTHER_FILES = {  # by their first bytes: what people send instead
    b"GIF8": "a GIF picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"BM": "a BMP picture",
    b"RIFF": "a WebP picture",
    b"%PDF": "a PDF document",
    b"PK\3\4": "a zip file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
}
GREYSCALE = ("MONOCHROME1", "MONOCHROME2")
# fmt: off
COLOURS = (  # PS3.3 C.7.6.3.1.2
    "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "XYB", "YBR_FULL", "YBR_FULL_422",
    "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT",
)
# fmt: on

logging.getLogger("pydicom").propagate = False  # its log messages on damaged files may quote the header
# Patient Orientation (0020,0020), PS3.3 C.7.6.1.1.1: where a row leads to, and where a column does. The first
# letter of each is its main direction.
EDGES = ({"L": "right", "R": "left"}, {"L": "bottom", "R": "top"})
FRONTAL_VIEWS = ("AP", "PA", "")
# The calibrated spacing first. Imager Pixel Spacing is that of the detector, where the chest is enlarged.
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing")
LEAST_FRACTION = 0.1  # of a finding's area, from which a side counts
ATTRIBUTES = (
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality"),
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
    *("PatientOrientation", "LossyImageCompression", "LossyImageCompressionMethod"),
)
MAX_LENGTH = 1024  # characters; the standard allows fewer for each


class Attributes:
    """The attributes of a header; one that is damaged reads as absent, and ``notes`` name it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.notes = set[str]()  # in fixed words: no text of the file

    def __contains__(self, keyword: str) -> bool:
        return keyword in self.dataset

    def get(self, keyword: str) -> Any:
        """The value; None if it is absent, empty or damaged."""
        try:
            return self.dataset.get(keyword)
        except MemoryError:
            raise
        except Exception:  # pydicom raises many types
            self.is_damaged(keyword)
            return None

    def is_damaged(self, keyword: str) -> None:
        """Notes that an attribute cannot be used."""
        self.notes.add(f"{keyword} empty or damaged: not used")

    def values(self, keyword: str) -> list[Any]:
        """The values of an attribute of one or more; none if it is absent."""
        value = self.get(keyword)
        if isinstance(value, str):
            return value.split("\\")  # as pydicom leaves what it cannot convert
        if value is None or not isinstance(value, Iterable):
            return [] if value is None else [value]
        return list(cast("Iterable[Any]", value))

    def numbers(self, keyword: str) -> list[float | None]:
        """The numbers of an attribute, None in place of one that is damaged or not finite."""
        return [_number(value) for value in self.values(keyword)]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None


def parse(content: bytes, max_pixels: int) -> tuple[Any, uid.UID]:
    """The DICOM data set of a file, and its transfer syntax; DICOM's default (PS3.5 10.1) if none is given.

    Raises Rejected if the syntax has no decoder, or a deflated file is larger than max_pixels allows.
    """
    content = unpacked(content, max_pixels)
    start = 132 if content[128:132] == b"DICM" else 0
    # Files without preamble and magic number start with group 2 or 8.
    if not start and content[:2] not in (b"\x02\0", b"\x08\0"):
        other = next((name for magic, name in OTHER_FILES.items() if content.startswith(magic)), "")
        raise Rejected(f"not a DICOM file, but {other}" if other else "not a DICOM file")
    file = BytesIO(content)
    file.seek(start)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_after_group_2)
    syntax = uid.UID(str(meta.get("TransferSyntaxUID") or uid.ImplicitVRLittleEndian))
    if syntax not in UNCOMPRESSED and syntax not in DECODERS:
        is_standard = not syntax.is_private and syntax.is_transfer_syntax
        raise Rejected(f"transfer syntax {syntax.name if is_standard else '(unknown)'} is not supported")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        # pydicom would inflate without a limit.
        file = BytesIO(inflate(content[file.tell() :], 2 * max_pixels + MAX_HEADER_BYTES))
    return read_dataset(file, syntax.is_implicit_VR, syntax.is_little_endian), syntax


def _after_group_2(tag: int, vr: str | None, length: int) -> bool:
    return tag >> 16 != 2


def read_layout(header: Attributes, syntax: uid.UID, max_pixels: int) -> Layout:
    """The pixel layout, validated before memory for the pixels is allocated; Rejected if unsupported."""
    if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
        raise Rejected("floating-point pixels")
    if "PixelData" not in header:
        raise Rejected("no pixel data: not an image, or truncated")
    photometric, components = text(header, "PhotometricInterpretation"), integer(header, "SamplesPerPixel", 1)
    is_colour = components == 3 and photometric in RGB + LUMINANCE_FIRST
    if photometric not in GREYSCALE and not is_colour:
        kind = photometric if photometric in COLOURS else "unknown photometric interpretation"
        raise Rejected(f"not a grayscale image ({kind})")
    if components != 1 and not is_colour:
        raise Rejected(f"not a grayscale image ({components} samples per pixel)")
    frames = integer(header, "NumberOfFrames", 1)
    if frames == 0:  # wrong, and written by some devices for one
        header.notes.add("NumberOfFrames 0: read as 1")
    elif frames != 1:
        raise Rejected(f"{frames} frames instead of one")
    rows, columns = integer(header, "Rows"), integer(header, "Columns")
    if rows < 1 or columns < 1:
        raise Rejected(f"image size is {rows} x {columns} pixels")
    if rows * columns * components > max_pixels:
        pixels = "pixels" if components == 1 else f"pixels of {components} components"
        raise Rejected(
            f"{rows} x {columns} {pixels} exceed max_pixels={max_pixels}; raise it if the size is right"
        )
    allocated, bits = integer(header, "BitsAllocated"), integer(header, "BitsStored")
    if allocated not in (8, 16):
        raise Rejected(f"{allocated} bits allocated per pixel instead of 8 or 16")
    high, signed = integer(header, "HighBit", bits - 1), integer(header, "PixelRepresentation")
    if not 1 <= bits <= allocated or signed not in (0, 1):
        raise Rejected(
            f"contradictory bits: {bits} stored of {allocated}, high bit {high}, representation {signed}"
        )
    if is_colour and (allocated, bits, signed) != (8, 8, 0):
        raise Rejected(f"not a grayscale image ({photometric} in {allocated} bits)")
    if high != bits - 1:  # since 2014 it is always so (PS3.5 8.1.1); before, values could be stored higher
        header.notes.add("HighBit is not BitsStored - 1")
    low = max(0, min(high, allocated - 1) + 1 - bits)
    return Layout(syntax, photometric, rows, columns, allocated, bits, signed == 1, low, components)


def unpacked(content: bytes, max_pixels: int) -> bytes:
    """The file in a gzip file, others unchanged; Rejected if truncated or larger than max_pixels allows."""
    if not content.startswith(GZIP):
        return content
    return inflate(content, max_file_bytes(max_pixels), zlib.MAX_WBITS | 16)


def inflate(content: bytes, max_bytes: int, format_bits: int = -zlib.MAX_WBITS) -> bytes:
    """A deflated data set (RFC 1951) unpacked; Rejected if truncated or longer than ``max_bytes``."""
    stream = zlib.decompressobj(format_bits)
    unpacked = stream.decompress(content, max_bytes + 1)
    if len(unpacked) > max_bytes:
        raise Rejected(
            f"inflates to more than the {max_bytes} bytes of max_pixels; raise it if the size is right"
        )
    if not stream.eof:
        raise Rejected("truncated")
    return unpacked


def integer(header: Attributes, keyword: str, default: int | None = None) -> int:
    """An integer of the header; the default if absent, Rejected without one or if it is not one integer."""
    value = header.get(keyword)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise Rejected(f"{keyword} is missing or not a single integer")
    return int(value)


def text(header: Attributes, keyword: str) -> str:
    """Text without padding; empty if absent."""
    return str(header.get(keyword) or "").replace("\0", "").strip()


def defined_term(text: str, terms: frozenset[str], other: str) -> str:
    """A defined term, or empty; ``other`` instead of any other text, which may contain a name."""
    text = text.upper()
    return text if not text or text in terms else other


class Geometry(NamedTuple):
    """``left_edge`` of the image shows the patient's left: right, left, top, bottom, or empty if unknown.

    ``spacing_mm`` are the distances of rows and of columns, as the attribute ``spacing`` has them.
    """

    left_edge: str = "right"
    spacing: str = ""
    spacing_mm: tuple[float, float] | None = None

    def area_mm2(self, area_px: int) -> float | None:
        """The area of so many pixels; None without a spacing."""
        return None if self.spacing_mm is None else area_px * self.spacing_mm[0] * self.spacing_mm[1]


def read_geometry(header: Attributes) -> Geometry:
    """The geometry in a header; values that are damaged count as absent.

    Without Patient Orientation a frontal view is taken to be displayed as usual: the patient's left on the
    right. Other views have no sides.
    """
    spacing, spacing_mm = next(
        ((name, found) for name in SPACINGS if (found := _spacing_mm(header, name)) is not None), ("", None)
    )
    return Geometry(_left_edge(header), spacing, spacing_mm)


def side_of(mask: NDArray[np.bool_], left_edge: str) -> str:
    """The patient's side of a finding (H, W): right, left, both, or empty without a finding or a known edge.

    The middle of the image divides the sides. A side counts if it holds at least a tenth of the area.
    """
    area_px = int(np.count_nonzero(mask))
    if not area_px or not left_edge:
        return ""
    rows, columns = mask.shape
    first = mask[:, : columns // 2] if left_edge in ("left", "right") else mask[: rows // 2]
    in_first = int(np.count_nonzero(first))
    halves = (in_first, area_px - in_first)
    on_left, on_right = halves if left_edge in ("left", "top") else halves[::-1]
    if min(on_left, on_right) >= LEAST_FRACTION * area_px:
        return "both"
    return "left" if on_left > on_right else "right"


def _left_edge(header: Attributes) -> str:
    directions = header.values("PatientOrientation")
    if not any(directions):
        view = text(header, "ViewPosition").upper()
        return "right" if view in FRONTAL_VIEWS else ""
    for edges, direction in zip(EDGES, directions, strict=False):
        if str(direction)[:1] in edges:
            return edges[str(direction)[:1]]
    return ""


def _spacing_mm(header: Attributes, keyword: str) -> tuple[float, float] | None:
    match header.numbers(keyword):
        case [float(rows), float(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case []:
            return None
        case _:
            header.is_damaged(keyword)
            return None


def read_source(content: bytes, max_pixels: int) -> dict[str, str]:
    """The texts of ``ATTRIBUTES``, with backslashes between values, of a file that has been decoded.

    Absent, damaged and overlong ones are left out; a picture that is not DICOM has none. They name the
    patient: never print or log them.
    """
    content = unpacked(content, max_pixels)
    if is_picture(content):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about values that the standard does not allow
        header, _ = parse(content, max_pixels)
        texts = {keyword: _text(header, keyword) for keyword in ATTRIBUTES}
    return {keyword: text for keyword, text in texts.items() if 0 < len(text) <= MAX_LENGTH}


def _text(header: Any, keyword: str) -> str:
    try:
        value = header.get(keyword)
        values = value if hasattr(value, "append") else [value or ""]  # a name is one, with components
        return "\\".join(str(each).replace("\0", "").strip() for each in values)
    except MemoryError:
        raise
    except Exception:  # pydicom raises many types for damaged bytes
        return ""
