"""Converts one DICOM file, or a PNG or JPEG copy of one, to an 8-bit image, or rejects it with a reason."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from pneumo_experiments.dicom import colour
from pneumo_experiments.dicom.codecs import CUT_SHORT, DECODERS, StoredPixels, decode
from pneumo_experiments.dicom.display import displayed, with_contrast
from pneumo_experiments.dicom.geometry import Geometry, read_geometry
from pneumo_experiments.dicom.header import (
    Attributes,
    Layout,
    defined_term,
    integer,
    parse,
    read_layout,
    text,
    unpacked,
)
from pneumo_experiments.dicom.picture import is_picture, read_picture
from pneumo_experiments.errors import Rejected

MAX_PIXELS = 100_000_000  # the largest detectors have 20 million
VIEWS = frozenset(("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO"))  # defined terms, PS3.3 C.8.1.1
SEXES = frozenset("FMO")
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1, "": 1}  # units of an age string, PS3.5 6.2


@dataclass(frozen=True)
class Radiograph:
    """An image and its metadata; the raw PatientID is never printed or logged."""

    image_id: str
    pixels: NDArray[np.uint8] = field(repr=False)  # (H, W), MONOCHROME2: dense tissue is bright
    patient: str = field(repr=False)
    view: str  # a defined term, "other", or empty
    sex: str  # F, M, O or empty
    age: int  # years, not checked, up to 999; -1 unknown
    geometry: Geometry
    format: str  # such as "JPEG Baseline, 8 bit, MONOCHROME2"
    notes: tuple[str, ...] = ()  # what its header says and was not used, in fixed words

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_radiograph(content: bytes, image_id: str, max_pixels: int = MAX_PIXELS) -> Radiograph:
    """A single-frame grayscale image as 8-bit pixels (H, W); raises Rejected for anything else.

    A PNG or JPEG picture has no metadata; it is taken to show dense tissue bright, as a display does.

    Memory beside the file: a copy of its pixel data and 1 byte per pixel; up to 8 if it is compressed.
    Memory and time are not limited here: ``decoder_pool`` calls this in limited processes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about an age '62', a bad date …
            content = unpacked(content, max_pixels)
            if is_picture(content):
                pixels, name, notes = read_picture(content, max_pixels)
                return Radiograph(image_id, with_contrast(pixels), "", "", "", -1, Geometry(), name, notes)
            dataset, syntax = parse(content, max_pixels)
            header = Attributes(dataset)
            layout = read_layout(header, syntax, max_pixels)
            stored, bits = _stored_pixels(header, layout)
            return Radiograph(
                image_id=image_id,
                pixels=displayed(stored, bits, layout, header),
                patient=text(header, "PatientID"),
                view=defined_term(text(header, "ViewPosition"), VIEWS, other="other"),
                sex=defined_term(text(header, "PatientSex"), SEXES, other=""),
                age=_age_years(text(header, "PatientAge")),
                geometry=read_geometry(header),
                format=layout.format,
                notes=tuple(sorted(header.notes)),  # last: all that is above adds to them
            )
    except Rejected as error:
        reason = str(error)
    except MemoryError:
        raise
    except Exception as error:  # pydicom and the decoders raise many types for damaged bytes
        # Only the type: the error's text may quote the header.
        reason = f"cannot be decoded: damaged, truncated or not supported ({type(error).__name__})"
    raise Rejected(f"{image_id}: {reason}")


def _stored_pixels(header: Attributes, layout: Layout) -> tuple[StoredPixels, int]:
    """Stored pixel values (H, W), not yet sign-extended, and the number of low bits that are used."""
    value = header.dataset["PixelData"].value
    if not isinstance(value, bytes):
        raise Rejected("no pixel data: empty, or of the wrong type")
    if layout.syntax in DECODERS:
        stored, bits = decode(
            layout.syntax, value, layout.shape, layout.bits_allocated, layout.bits_stored, layout.signed
        )
        if layout.components == 1:
            return stored, bits
        components = list(np.moveaxis(stored, 2, 0))
    else:
        stored, bits = _uncompressed(header, layout, value), layout.bits_stored
        if layout.components == 1:
            return stored.reshape(layout.shape), bits
        planar = integer(header, "PlanarConfiguration", 0) == 1
        components = colour.split(stored, layout.shape, layout.photometric, planar)
    header.notes.add(colour.NOTE)
    return colour.grey(components, layout.photometric, layout.syntax in uid.JPEGTransferSyntaxes), bits


def _uncompressed(header: Attributes, layout: Layout, value: bytes) -> StoredPixels:
    """The values of an uncompressed image, one after the other as they are stored."""
    element = header.dataset["PixelData"]
    if element.is_undefined_length:
        raise Rejected("its pixel data is compressed, although the transfer syntax says uncompressed")
    samples = (
        2 if layout.photometric == "YBR_FULL_422" else layout.components
    )  # two pixels share their chroma
    count, item_bytes = layout.rows * layout.columns * samples, layout.bits_allocated // 8
    expected = count * item_bytes
    if len(value) < expected:
        raise Rejected(CUT_SHORT)
    if len(value) > expected + expected % 2:  # allowed, and to be ignored: PS3.5 8.1.1
        header.notes.add("bytes after the pixels: not read")
    dtype = np.dtype(f"u{item_bytes}").newbyteorder("<" if layout.syntax.is_little_endian else ">")
    if not layout.syntax.is_little_endian and item_bytes == 1 and element.VR == "OW":
        pairs = np.frombuffer(value[: len(value) // 2 * 2], ">u2")  # of swapped bytes
        return np.frombuffer(pairs.astype("<u2"), dtype, count)
    stored = np.frombuffer(value, dtype, count)
    if layout.unused_low_bits and not (stored & (2**layout.unused_low_bits - 1)).any():
        stored = stored >> stored.dtype.type(layout.unused_low_bits)
    return stored


def _age_years(text: str) -> int:
    """Whole years of a DICOM age string ('062Y', '018M') or plain number ('62'); -1 for anything else."""
    age = re.fullmatch(r"(\d{1,3})([DWMY]?)", text.upper())
    return int(int(age[1]) * YEARS[age[2]]) if age else -1
