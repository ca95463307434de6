"""Converts one DICOM file, or a PNG or JPEG copy of one, to an 8-bit image, or rejects it with a reason."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from pneumo_experiments.dicom.codecs import CUT_SHORT, DECODERS, Layout, StoredPixels, decode
from pneumo_experiments.dicom.header import (
    Attributes,
    Geometry,
    defined_term,
    integer,
    parse,
    read_geometry,
    read_layout,
    text,
    unpacked,
)
from pneumo_experiments.dicom.picture import NOTE, grey, is_picture, read_picture, split_components
from pneumo_experiments.errors import Rejected

MAX_PIXELS = 100_000_000  # the largest detectors have 20 million
VIEWS = frozenset(("AP", "PA", "LL", "RL", "LLD", "RLD", "LLO", "RLO"))  # defined terms, PS3.3 C.8.1.1
SEXES = frozenset("FMO")
YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1, "": 1}  # units of an age string, PS3.5 6.2
BLOCK_PIXELS = 2**20  # per look-up step: an index array takes 8 bytes per pixel
ONE_GREY = 0.99  # of the pixels, from which a picture has no contrast
MIN_GREYS = 8  # between the darkest and the brightest pixel, below which a window is useless
SAMPLED_PIXELS = 4096
SHAPES = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}  # PresentationLUTShape, PS3.3 C.8.11.3


@dataclass(frozen=True)
class Radiograph:
    """An image and its metadata; the raw PatientID is never printed or logged."""

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
                return Radiograph(with_contrast(pixels), "", "", "", -1, Geometry(), name, notes)
            dataset, syntax = parse(content, max_pixels)
            header = Attributes(dataset)
            layout = read_layout(header, syntax, max_pixels)
            stored, bits = _stored_pixels(header, layout)
            return Radiograph(
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
        reason = error.reason
    except MemoryError:
        raise
    except Exception as error:  # pydicom and the decoders raise many types for damaged bytes
        # Only the type: the error's text may quote the header.
        reason = f"cannot be decoded: damaged, truncated or not supported ({type(error).__name__})"
    raise Rejected(reason, image_id)


def _stored_pixels(header: Attributes, layout: Layout) -> tuple[StoredPixels, int]:
    """Stored pixel values (H, W), not yet sign-extended, and the number of low bits that are used."""
    value = header.dataset["PixelData"].value
    if not isinstance(value, bytes):
        raise Rejected("no pixel data: empty, or of the wrong type")
    if layout.syntax in DECODERS:
        stored, bits = decode(value, layout)
        if layout.components == 1:
            return stored, bits
        components = list(np.moveaxis(stored, 2, 0))
    else:
        stored, bits = _uncompressed(header, layout, value), layout.bits_stored
        if layout.components == 1:
            return stored.reshape(layout.shape), bits
        planar = integer(header, "PlanarConfiguration", 0) == 1
        components = split_components(stored, layout.shape, layout.photometric, planar)
    header.notes.add(NOTE)
    return grey(components, layout.photometric, layout.syntax in uid.JPEGTransferSyntaxes), bits


def _uncompressed(header: Attributes, layout: Layout, value: bytes) -> StoredPixels:
    """The values of an uncompressed image, one after the other as they are stored."""
    element = header.dataset["PixelData"]
    if element.is_undefined_length:
        raise Rejected("its pixel data is compressed, although the transfer syntax says uncompressed")
    # In 4:2:2 two pixels share their chroma.
    samples = 2 if layout.photometric == "YBR_FULL_422" else layout.components
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


def displayed(stored: StoredPixels, bits: int, layout: Layout, header: Attributes) -> NDArray[np.uint8]:
    """8-bit pixels (H, W) with dense tissue bright, from stored values with so many bits in use.

    Raises Rejected without contrast.
    """
    # Unsigned 8-bit values are used unchanged, whatever window the header suggests.
    if bits == 8 and not layout.signed:
        pixels = stored.astype(np.uint8, copy=False)
    else:
        pixels = _to_8_bits(stored, bits, layout.signed, header)
    with_contrast(pixels)
    shape = text(header, "PresentationLUTShape").upper()
    if shape and shape != SHAPES.get(layout.photometric, shape):
        header.notes.add(f"PresentationLUTShape contradicts {layout.photometric}: not used")
    return 255 - pixels if layout.photometric == "MONOCHROME1" else pixels


def with_contrast(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pixels (H, W) themselves; Rejected if nearly all have one grey."""
    greys = pixels.reshape(-1)
    most = np.bincount(greys[:: max(1, greys.size // SAMPLED_PIXELS)]).argmax()
    if np.count_nonzero(greys == most) >= ONE_GREY * greys.size:
        raise Rejected(f"no contrast: at least {ONE_GREY:.0%} of its pixels have the same grey")
    return pixels


def _to_8_bits(stored: StoredPixels, bits: int, signed: bool, header: Attributes) -> NDArray[np.uint8]:
    """Stored values (H, W) through modality LUT and VOI LUT or window, scaled to 0-255.

    The scale runs over the range of the first useful VOI LUT or window; without one, over the range of the
    image without its padding. Uses a lookup table of all values that the bits can hold (DICOM PS3.3 C.11.1
    and C.11.2).
    """
    pixels = stored.reshape(-1)
    blocks = [slice(k, k + BLOCK_PIXELS) for k in range(0, pixels.size, BLOCK_PIXELS)]
    mask = stored.dtype.type(2**bits - 1)
    levels = np.arange(2**bits, dtype=np.int64)
    if signed:
        levels[2 ** (bits - 1) :] -= 2**bits  # two's complement
    counts = np.zeros(2**bits, np.int64)
    for block in blocks:
        counts += np.bincount(pixels[block] & mask, minlength=2**bits)
    counts[_padding(levels, header)] = 0
    lookup = _greys(_modality(levels, header), counts, header)
    scaled = np.empty(pixels.size, np.uint8)
    for block in blocks:
        scaled[block] = lookup[pixels[block] & mask]
    return scaled.reshape(stored.shape)


def _greys(values: NDArray[np.float64], counts: NDArray[np.int64], header: Attributes) -> NDArray[np.uint8]:
    """The grey of each value; ``counts`` are the pixels that have it."""
    for name, view in chain(_tables(values, header), _windows(values, header)):
        greys = np.rint(view * 255).astype(np.uint8)
        if _is_useful(greys, counts):
            return greys
        header.notes.add(f"{name} outside the image's values: not used")
    present = values[counts > 0]
    low, high = (present.min(), present.max()) if present.size else (0, 0)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint(((values - low) / (high - low) * 255).clip(0, 255)).astype(np.uint8)


def _is_useful(greys: NDArray[np.uint8], counts: NDArray[np.int64]) -> bool:
    """Whether the pixels differ in this view of their values."""
    per_grey = np.bincount(greys, counts)
    shown = np.flatnonzero(per_grey)
    return bool(shown.size and shown[-1] - shown[0] >= MIN_GREYS and per_grey.max() < ONE_GREY * counts.sum())


def _modality(levels: NDArray[np.int64], header: Attributes) -> NDArray[np.float64]:
    """Stored values through modality LUT or rescale (PS3.3 C.11.1); unchanged if these are damaged."""
    if header.get("ModalityLUTSequence"):
        try:
            return np.asarray(apply_modality_lut(levels, header.dataset), np.float64)
        except MemoryError:
            raise
        except Exception:  # pydicom raises many types for damaged tables
            header.is_damaged("ModalityLUTSequence")
    values = levels.astype(np.float64)
    if "RescaleSlope" not in header and "RescaleIntercept" not in header:
        return values
    match header.numbers("RescaleSlope"), header.numbers("RescaleIntercept"):
        case [float(slope), *_], [float(intercept), *_] if slope != 0:
            with np.errstate(over="ignore"):
                rescaled = values * slope + intercept
            if np.isfinite(rescaled).all():
                return rescaled
        case _:
            pass
    header.is_damaged("RescaleSlope or RescaleIntercept")
    return values


def _tables(values: NDArray[np.float64], header: Attributes) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Values through each VOI LUT, 0 to 1 (PS3.3 C.11.2.1.1)."""
    whole = np.rint(values).astype(np.int64)
    for index in range(len(header.values("VOILUTSequence"))):
        try:
            view = np.asarray(apply_voi(whole, header.dataset, index), np.float64)
        except MemoryError:
            raise
        except Exception:  # pydicom raises many types for damaged tables
            header.is_damaged("VOILUTSequence")
            continue
        low, high = view.min(), view.max()
        yield "VOI LUT", (view - low) / max(high - low, 1)


def _windows(values: NDArray[np.float64], header: Attributes) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Values through each valid window, 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    function = text(header, "VOILUTFunction").upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        header.is_damaged("VOILUTFunction")
        function = "LINEAR"
    for centre, width in zip_longest(header.numbers("WindowCenter"), header.numbers("WindowWidth")):
        if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
            header.is_damaged("WindowCenter or WindowWidth")
        elif function == "SIGMOID":  # 1 / (1 + exp(-4 …)) that cannot overflow
            yield "window", (1 + np.tanh(2 * (values - centre) / width)) / 2
        elif function == "LINEAR_EXACT":
            yield "window", ((values - centre) / width + 0.5).clip(0, 1)
        elif width == 1:
            yield "window", (values > centre - 0.5).astype(np.float64)
        else:
            # Half a unit off the other two, so that centre 128, width 256 leaves 0 to 255 unchanged.
            yield "window", ((values - centre + 0.5) / (width - 1) + 0.5).clip(0, 1)


def _padding(levels: NDArray[np.int64], header: Attributes) -> NDArray[np.bool]:
    """Boolean mask of the stored values that are padding (PS3.3 C.7.5.1.1.2)."""
    if header.get("PixelPaddingValue") is None:
        return np.zeros(levels.shape, bool)
    try:
        ends = [integer(header, "PixelPaddingValue")]
        ends.append(integer(header, "PixelPaddingRangeLimit", ends[0]))
    except Rejected:
        header.is_damaged("PixelPaddingValue or PixelPaddingRangeLimit")
        return np.zeros(levels.shape, bool)
    if levels.min() < 0:  # some files write -2000 as 63536
        ends = [(end + 2**15) % 2**16 - 2**15 for end in ends]
    return (levels >= min(ends)) & (levels <= max(ends))
