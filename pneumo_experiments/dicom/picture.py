"""PNG and JPEG pictures of radiographs, and of masks: no other format that Pillow knows is tried."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from pneumo_experiments.dicom import colour
from pneumo_experiments.errors import Rejected

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_BETWEEN = 0.05  # fraction of a mask's pixels that may be neither dark nor bright, at its edges


def is_picture(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a PNG or JPEG picture."""
    return start.startswith((PNG, JPEG))


def read_picture(content: bytes, max_pixels: int) -> tuple[NDArray[np.uint8], str]:
    """A grey picture as 8-bit greys (H, W), and its format in words.

    8-bit greys are unchanged. 16-bit greys are unchanged up to 255, divided by 257 if all are multiples of
    that, as programs write 8-bit greys, and otherwise scaled from darkest to brightest. Raises Rejected for a
    picture in colour or larger than ``max_pixels``; Pillow's errors if it is damaged.
    """
    image = _open(content, max_pixels)
    kind = f"{image.format}, {16 if image.mode.startswith('I') else 8} bit"
    values = _channels(image)
    if values.ndim == 3:
        return colour.grey(np.moveaxis(values, 2, 0), "RGB"), kind
    return values.astype(np.uint8) if values.dtype == np.uint8 else _to_8_bits(values), kind


def read_mask(content: bytes, max_pixels: int) -> NDArray[np.bool_]:
    """A picture of a mask (H, W): True from half of its brightest value, whatever its colour.

    Raises Rejected for a picture with more than two values, or larger than ``max_pixels``; Pillow's errors if
    it is damaged.
    """
    values = _channels(_open(content, max_pixels))
    values = values if values.ndim == 2 else values.max(axis=2)
    high = int(values.max())
    between = np.count_nonzero((values > high // 4) & (values < high - high // 4))
    if between > MAX_BETWEEN * values.size:
        raise Rejected(
            f"its mask is none: {between / values.size:.0%} of its pixels are neither 0 nor {high}"
        )
    return values > high // 2 if high else np.zeros(values.shape, bool)


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """The picture's header."""
    image = (PngImageFile if content.startswith(PNG) else JpegImageFile)(BytesIO(content))
    columns, rows = image.size
    if rows * columns > max_pixels:
        raise Rejected(
            f"{rows} x {columns} pixels exceed max_pixels={max_pixels}; raise it if the size is right"
        )
    if getattr(image, "n_frames", 1) != 1 and image.format == "PNG":
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
