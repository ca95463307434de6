"""Converts one DICOM file to one 8-bit image, or rejects it with a reason."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from pneumo_experiments.dicom.codecs import CUT_SHORT, DECODERS, StoredPixels, decode
from pneumo_experiments.dicom.geometry import Geometry, read_geometry
from pneumo_experiments.dicom.header import (
    Layout,
    defined_term,
    first_number,
    integer,
    parse,
    read_layout,
    text,
)
from pneumo_experiments.errors import Rejected

MAX_PIXELS = 100_000_000  # the largest detectors have 20 million
BLOCK_PIXELS = 2**20  # per look-up step: an index array takes 8 bytes per pixel
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


def read_radiograph(content: bytes, image_id: str, max_pixels: int = MAX_PIXELS) -> Radiograph:
    """A single-frame grayscale image as 8-bit pixels (H, W); raises Rejected for anything else.

    Memory beside the file: a copy of its pixel data and 1 byte per pixel; up to 8 if it is compressed.
    Memory and time are not limited here: ``decoder_process`` and ``shards`` call this in limited processes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about an age '62', a bad date …
            header, syntax = parse(content, max_pixels)
            layout = read_layout(header, syntax, max_pixels)
            stored, bits = _stored_pixels(header, layout)
            return Radiograph(
                image_id=image_id,
                pixels=_displayed_pixels(stored, bits, header, layout),
                patient=text(header, "PatientID"),
                view=defined_term(text(header, "ViewPosition"), VIEWS, other="other"),
                sex=defined_term(text(header, "PatientSex"), SEXES, other=""),
                age=_age_years(text(header, "PatientAge")),
                geometry=read_geometry(header),
                format=layout.format,
            )
    except Rejected as error:
        reason = str(error)
    except MemoryError:
        raise
    except Exception as error:  # pydicom and the decoders raise many types for damaged bytes
        # Only the type: the error's text may quote the header.
        reason = f"cannot be decoded: damaged, truncated or not supported ({type(error).__name__})"
    raise Rejected(f"{image_id}: {reason}")


def _stored_pixels(header: Any, layout: Layout) -> tuple[StoredPixels, int]:
    """Stored pixel values (H, W), not yet sign-extended, and the number of low bits that are used."""
    element = header["PixelData"]
    value = element.value
    if not isinstance(value, bytes):
        raise Rejected("no pixel data: empty, or of the wrong type")
    if layout.syntax in DECODERS:
        size = layout.rows, layout.columns
        return decode(layout.syntax, value, size, layout.bits_allocated, layout.bits_stored, layout.signed)
    if element.is_undefined_length:
        raise Rejected("its pixel data is compressed, although the transfer syntax says uncompressed")
    rows, columns, item_bytes = layout.rows, layout.columns, layout.bits_allocated // 8
    expected = rows * columns * item_bytes
    if len(value) < expected:
        raise Rejected(CUT_SHORT)
    # Up to one row of zeros is accepted as padding; anything else means that the size is wrong.
    if len(value) > expected + columns * item_bytes or any(value[expected + 1 :]):
        raise Rejected(f"{len(value)} bytes of pixel data are too many for {rows} x {columns}")
    dtype = np.dtype(f"u{item_bytes}").newbyteorder("<" if layout.syntax.is_little_endian else ">")
    if not layout.syntax.is_little_endian and item_bytes == 1 and element.VR == "OW":
        value = np.frombuffer(value[: len(value) // 2 * 2], ">u2").astype("<u2")  # byte pairs are swapped
    return np.frombuffer(value, dtype, rows * columns).reshape(rows, columns), layout.bits_stored


def _displayed_pixels(stored: StoredPixels, bits: int, header: Any, layout: Layout) -> NDArray[np.uint8]:
    """8-bit pixels (H, W), with MONOCHROME1 inverted."""
    # Unsigned 8-bit values are used unchanged, whatever window the header suggests.
    if bits == 8 and not layout.signed:
        pixels = stored.astype(np.uint8, copy=False)
    else:
        pixels = _to_8_bits(stored, bits, layout.signed, header)
    return 255 - pixels if layout.photometric == "MONOCHROME1" else pixels


def _to_8_bits(stored: StoredPixels, bits: int, signed: bool, header: Any) -> NDArray[np.uint8]:
    """Stored values (H, W) through modality LUT and VOI LUT or window, scaled to 0-255.

    The scale runs over the range of the window or LUT; without either, over the range of the image without
    its padding. Uses a lookup table of all values that the bits can hold (DICOM PS3.3 C.11.1 and C.11.2).
    """
    pixels = stored.reshape(-1)
    blocks = [slice(k, k + BLOCK_PIXELS) for k in range(0, pixels.size, BLOCK_PIXELS)]
    mask = stored.dtype.type(2**bits - 1)
    levels = np.arange(2**bits, dtype=np.int64)
    if signed:
        levels[2 ** (bits - 1) :] -= 2**bits  # two's complement
    values: NDArray[Any] = apply_modality_lut(levels, header).astype(np.float64)
    if not np.isfinite(values).all():
        raise Rejected("its modality LUT has values that are not finite")
    if header.get("VOILUTSequence"):
        values = apply_voi(np.rint(values).astype(np.int64), header).astype(np.float64)
        low, high = values.min(), values.max()
    elif (windowed := _window(values, header)) is not None:
        values, low, high = windowed, 0, 1
    else:
        present = np.zeros(2**bits, bool)
        for block in blocks:
            present[pixels[block] & mask] = True
        present &= ~_padding(levels, header)
        low, high = (values[present].min(), values[present].max()) if present.any() else (0, 0)
    scaled = np.zeros(pixels.size, np.uint8)
    if low < high:
        lookup = np.rint(((values - low) / (high - low) * 255).clip(0, 255)).astype(np.uint8)
        for block in blocks:
            scaled[block] = lookup[pixels[block] & mask]
    return scaled.reshape(stored.shape)


def _window(values: NDArray[np.float64], header: Any) -> NDArray[np.float64] | None:
    """Values through the header's first window, 0 to 1 (PS3.3 C.11.2.1); None if it has no valid window."""
    centre, width = first_number(header, "WindowCenter"), first_number(header, "WindowWidth")
    function = text(header, "VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return (1 + np.tanh(2 * (values - centre) / width)) / 2  # 1 / (1 + exp(-4 …)) that cannot overflow
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if function != "LINEAR":
        raise Rejected("its VOI LUT function is not in the DICOM standard")
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    # By the standard half a unit off the other two, so that centre 128, width 256 leaves 0 to 255 unchanged.
    return ((values - centre + 0.5) / (width - 1) + 0.5).clip(0, 1)


def _padding(levels: NDArray[Any], header: Any) -> NDArray[np.bool]:
    """Boolean mask of the stored values that are padding (PS3.3 C.7.5.1.1.2)."""
    if header.get("PixelPaddingValue") is None:
        return np.zeros(levels.shape, bool)
    ends = [integer(header, "PixelPaddingValue")]
    ends.append(integer(header, "PixelPaddingRangeLimit", ends[0]))
    if levels.min() < 0:  # some files write -2000 as 63536
        ends = [(end + 2**15) % 2**16 - 2**15 for end in ends]
    return (levels >= min(ends)) & (levels <= max(ends))


def _age_years(text: str) -> int:
    """Whole years of a DICOM age string ('062Y', '018M') or plain number ('62'); -1 for anything else."""
    age = re.fullmatch(r"(\d{1,3})([DWMY]?)", text.upper())
    return int(int(age[1]) * YEARS[age[2]]) if age else -1
