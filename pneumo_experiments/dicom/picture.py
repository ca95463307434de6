"""PNG and JPEG pictures of radiographs, and of masks: no other format that Pillow knows is tried."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from pneumo_experiments.errors import Rejected

NOTE = "grey picture in three colour components: read as grey"
RGB = ("RGB", "YBR_RCT", "YBR_ICT")  # JPEG 2000's decoder gives RGB of the latter two
LUMINANCE_FIRST = ("YBR_FULL", "YBR_FULL_422")
NEUTRAL = 128  # chroma of a grey pixel, PS3.3 C.7.6.3.1.2
# Rounding of lossy pictures leaves 2 or 3 levels between red, green and blue. 4 of chroma are 7 of these.
MAX_CHROMA, MAX_DIFFERENCE = 4, 8
BLOCK_PIXELS = 2**20  # compared at once, in 16 bits
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
SUFFIXES = (".png", ".jpg", ".jpeg")
PNG_DEPTH = 24  # byte of the bits a channel; the next is 0 for grey without transparency
FEW_VALUES, DARKEST_JPEG = 8, 64
MAX_BETWEEN = 0.05  # fraction of a mask's pixels that may be neither dark nor bright, at its edges


def split_components(
    value: NDArray[np.uint8], shape: tuple[int, ...], photometric: str, planar: bool
) -> list[NDArray[np.uint8]]:
    """The three components of uncompressed values: the first is (H, W), the others too, or (H, W / 2)."""
    rows, columns = shape[:2]
    if photometric == "YBR_FULL_422":  # two of luminance and one of each chroma for two pixels
        pairs = value.reshape(rows, columns // 2, 4)
        return [pairs[..., :2].reshape(rows, columns), pairs[..., 2], pairs[..., 3]]
    return list(value.reshape(3, rows, columns) if planar else np.moveaxis(value.reshape(shape), 2, 0))


def grey(
    components: Iterable[NDArray[np.uint8]], photometric: str, is_jpeg: bool = False
) -> NDArray[np.uint8]:
    """The first component (H, W), if the others equal it (RGB) or have no colour (YBR); Rejected otherwise.

    The components of a JPEG are one or the other, whatever the header calls them: many call YBR RGB.
    """
    first, *others = components
    greys: list[tuple[NDArray[np.uint8] | int, int]] = []
    if is_jpeg or photometric in RGB:
        greys.append((first, MAX_DIFFERENCE))
    if is_jpeg or photometric in LUMINANCE_FIRST:
        greys.append((NEUTRAL, MAX_CHROMA))
    if not any(all(_is_near(other, *each) for other in others) for each in greys):
        raise Rejected(f"not a grayscale image ({photometric})")
    return np.ascontiguousarray(first)


def _is_near(values: NDArray[np.uint8], expected: NDArray[np.uint8] | int, tolerance: int) -> bool:
    step = max(1, BLOCK_PIXELS // values.shape[1])
    for k in range(0, len(values), step):
        block = expected if isinstance(expected, int) else expected[k : k + step]
        if np.abs(values[k : k + step].astype(np.int16) - block).max() > tolerance:
            return False
    return True


def is_picture(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a PNG or JPEG picture."""
    return start.startswith((PNG, JPEG))


def read_picture(content: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], str, tuple[str, ...]]:
    """A grey picture as 8-bit greys (H, W), its format in words, and notes for the report.

    8-bit greys are unchanged. 16-bit greys are unchanged up to 255, divided by 257 if all are multiples of
    that, as programs write 8-bit greys, and otherwise scaled from darkest to brightest. Raises Rejected for a
    picture in colour or larger than ``max_pixels``, which one in colour channels is three times; Pillow's
    errors if it is damaged.
    """
    image = _open(content, max_pixels)
    kind = f"{image.format}, {16 if image.mode.startswith('I') else 8} bit"
    values = _channels(image)
    if values.ndim == 3:
        return grey(np.moveaxis(values, 2, 0), "RGB"), kind, (NOTE,)
    return values.astype(np.uint8) if values.dtype == np.uint8 else _to_8_bits(values), kind, ()


def read_mask(content: bytes, max_pixels: int) -> NDArray[np.bool_]:
    """A picture of a mask (H, W): True from half of its brightest value, whatever its colour.

    In a mask of numbers from 0 to at most 8 all but 0 are True. A picture in one colour has its mask in its
    transparency. Raises Rejected for a picture that is no mask, or larger than ``max_pixels``; Pillow's
    errors if it is damaged.
    """
    image = _open(content, max_pixels)
    values = _channels(image)
    values = values if values.ndim == 2 else values.max(axis=2)
    if "A" in image.getbands() and not values.any():
        values = np.asarray(image.getchannel("A"))
    counts = np.bincount(values.reshape(-1))
    found, high = counts.nonzero()[0].tolist(), len(counts) - 1
    if image.format == "JPEG" and 0 < high < DARKEST_JPEG:
        raise Rejected(f"its mask is too dark for a JPEG, which changes greys: at most {high} of 255")
    if high <= FEW_VALUES or len(found) <= 2:
        return values > 0
    if image.format == "PNG" and len(found) <= FEW_VALUES:
        raise Rejected(f"its mask has the values {', '.join(map(str, found))}; write 0 and one other")
    between = counts[high // 4 + 1 : high - high // 4].sum() / values.size
    if between > MAX_BETWEEN:
        raise Rejected(f"its mask is none: {between:.0%} of its pixels are neither 0 nor {high}")
    return values > high // 2


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """The picture's header, checked."""
    is_png = content.startswith(PNG)
    if is_png:
        PngImageFile(BytesIO(content)).verify()  # the checksums, which reading ignores
    image = PngImageFile(BytesIO(content)) if is_png else JpegImageFile(BytesIO(content))
    columns, rows = image.size
    is_grey = len(image.getbands()) == 1 and image.mode != "P"
    if rows * columns * (1 if is_grey else 3) > max_pixels:
        in_colour = "" if is_grey else " in three colour channels"
        raise Rejected(
            f"{rows} x {columns} pixels{in_colour} exceed max_pixels={max_pixels};"
            " raise it if the size is right"
        )
    if is_png and content[PNG_DEPTH] == 16 and content[PNG_DEPTH + 1]:
        raise Rejected("a 16-bit PNG picture in several channels; save it as grey")
    if is_png and getattr(image, "n_frames", 1) != 1:
        raise Rejected("an animated picture")
    return image


def _channels(image: Image.Image) -> NDArray[Any]:
    """Greys (H, W) or red, green and blue (H, W, 3); what is transparent is black."""
    image.load()
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I"):
        return np.asarray(image)
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = int(values.min()), int(values.max())
    if high <= 255:
        return values.astype(np.uint8)
    levels = np.arange(high + 1)
    if not (values % 257).any():
        return (levels // 257).astype(np.uint8)[values]
    return np.rint((levels - low).clip(0) * (255 / max(high - low, 1))).astype(np.uint8)[values]
