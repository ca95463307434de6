"""One DICOM file to one 8-bit picture, or the reason why not."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from pneumo_experiments.dicom.codecs import CUT_SHORT, DECODERS, Pixels, decode
from pneumo_experiments.dicom.header import Layout, first, parse, read_layout, term, text, whole
from pneumo_experiments.errors import Rejected

MAX_PIXELS = 100_000_000  # the largest detectors have 20 million
BLOCK_PIXELS = 2**20  # looked up at once: an index takes 8 bytes per pixel
VIEWS = frozenset(("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO"))  # defined terms, PS3.3 C.8.1.1
SEXES = frozenset("FMO")
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1, "": 1}  # units of an age string, PS3.5 6.2


@dataclass(frozen=True)
class Radiograph:
    """A picture with what its header tells; the raw PatientID stays in memory and out of messages."""

    image_id: str
    pixels: NDArray[np.uint8] = field(repr=False)  # (H, W), bright is dense
    patient: str = field(repr=False)
    view: str  # a defined term, "other", or empty
    sex: str  # F, M, O or empty
    age: int  # years as the header has them, up to 999; -1 unknown
    format: str  # such as "JPEG Baseline, 8 bit, MONOCHROME2"


def read_radiograph(content: bytes, image_id: str, max_pixels: int = MAX_PIXELS) -> Radiograph:
    """A single grey picture as 8-bit greys (H, W); anything else is ``Rejected`` with the reason.

    Memory beside the file: a copy of its pixel data and 1 byte per pixel; up to 8 where it is compressed.
    What a hostile file takes has no limit here: ``decoders`` and ``batches`` read in processes that have one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of an age '62', a bad date …: no matter here
            header, syntax = parse(content, max_pixels)
            layout = read_layout(header, syntax, max_pixels)
            stored, bits = _stored(header, layout)
            return Radiograph(
                image_id=image_id,
                pixels=_greys(stored, bits, header, layout),
                patient=text(header, "PatientID"),
                view=term(text(header, "ViewPosition"), VIEWS, other="other"),
                sex=term(text(header, "PatientSex"), SEXES, other=""),
                age=_age_years(text(header, "PatientAge")),
                format=layout.format,
            )
    except Rejected as error:
        reason = str(error)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make pydicom and the decoders raise nearly anything
        # Only the kind of error: its text may quote the header.
        reason = f"cannot be decoded: damaged, cut short or not supported ({type(error).__name__})"
    raise Rejected(f"{image_id}: {reason}")


def _stored(header: Any, layout: Layout) -> tuple[Pixels, int]:
    """The bits of each pixel (H, W) as they lie, of which so many low ones count."""
    element = header["PixelData"]
    value = element.value
    if not isinstance(value, bytes):
        raise Rejected("no pixel data: empty, or of the wrong kind")
    if layout.syntax in DECODERS:
        size = layout.rows, layout.columns
        return decode(layout.syntax, value, size, layout.bits_allocated, layout.bits_stored, layout.signed)
    if element.is_undefined_length:
        raise Rejected("its picture is compressed, the file says that it is not")
    rows, columns, item_bytes = layout.rows, layout.columns, layout.bits_allocated // 8
    expected = rows * columns * item_bytes
    if len(value) < expected:
        raise Rejected(CUT_SHORT)
    # Up to a row of zeros is padding; with more, or other than zeros, the size is wrong.
    if len(value) > expected + columns * item_bytes or any(value[expected + 1 :]):
        raise Rejected(f"{len(value)} bytes of pixels are too many for {rows} x {columns}")
    kind = np.dtype(f"u{item_bytes}").newbyteorder("<" if layout.syntax.is_little_endian else ">")
    if not layout.syntax.is_little_endian and item_bytes == 1 and element.VR == "OW":
        value = np.frombuffer(value[: len(value) // 2 * 2], ">u2").astype("<u2")  # bytes go in swapped pairs
    return np.frombuffer(value, kind, rows * columns).reshape(rows, columns), layout.bits_stored


def _greys(stored: Pixels, bits: int, header: Any, layout: Layout) -> NDArray[np.uint8]:
    # 8 bits are taken as they are, whatever window the header suggests.
    if bits == 8 and not layout.signed:
        greys = stored.astype(np.uint8, copy=False)
    else:
        greys = _to_8_bits(stored, bits, layout.signed, header)
    return 255 - greys if layout.photometric == "MONOCHROME1" else greys


def _to_8_bits(stored: Pixels, bits: int, signed: bool, header: Any) -> NDArray[np.uint8]:
    """Stored values (H, W) through modality LUT and VOI LUT or window, scaled to 0-255.

    The ends of the scale are those of the window or LUT; without either, those of the picture without its
    padding. Works on the table of all values that the bits can hold (DICOM PS3.3 C.11.1 and C.11.2).
    """
    pixels = stored.reshape(-1)
    blocks = [slice(k, k + BLOCK_PIXELS) for k in range(0, pixels.size, BLOCK_PIXELS)]
    mask = stored.dtype.type(2**bits - 1)
    levels = np.arange(2**bits)
    if signed:
        levels[2 ** (bits - 1) :] -= 2**bits  # two's complement
    values: NDArray[Any] = apply_modality_lut(levels, header).astype(np.float64)
    if not np.isfinite(values).all():
        raise Rejected("its modality LUT is not finite")
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
    greys = np.zeros(pixels.size, np.uint8)
    if low < high:
        scaled = np.rint(((values - low) / (high - low) * 255).clip(0, 255)).astype(np.uint8)
        for block in blocks:
            greys[block] = scaled[pixels[block] & mask]
    return greys.reshape(stored.shape)


def _window(values: NDArray[np.float64], header: Any) -> NDArray[np.float64] | None:
    """Values through the header's first window, 0 to 1 (PS3.3 C.11.2.1); None without a valid one."""
    centre, width = first(header, "WindowCenter"), first(header, "WindowWidth")
    function = text(header, "VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "SIGMOID":
        return (1 + np.tanh(2 * (values - centre) / width)) / 2  # 1 / (1 + exp(-4 …)) that cannot overflow
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if function != "LINEAR":
        raise Rejected("its VOI LUT function is none that the standard has")
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    # Half a unit off the other two, so that a window of 256 around 128 leaves 0 to 255 as they are.
    return ((values - centre + 0.5) / (width - 1) + 0.5).clip(0, 1)


def _padding(levels: NDArray[Any], header: Any) -> NDArray[np.bool]:
    """Which stored values only fill up the picture (PS3.3 C.7.5.1.1.2)."""
    if header.get("PixelPaddingValue") is None:
        return np.zeros(levels.shape, bool)
    ends = [whole(header, "PixelPaddingValue")]
    ends.append(whole(header, "PixelPaddingRangeLimit", ends[0]))
    if levels.min() < 0:  # some write -2000 as 63536
        ends = [(end + 2**15) % 2**16 - 2**15 for end in ends]
    return (levels >= min(ends)) & (levels <= max(ends))


def _age_years(text: str) -> int:
    """Whole years of a DICOM age string ('062Y', '018M') or plain number ('62'); -1 for anything else."""
    age = re.fullmatch(r"(\d{1,3})([DWMY]?)", text.upper())
    return int(int(age[1]) * YEARS[age[2]]) if age else -1
