"""A grey picture that is stored in three colour components, as viewers and converters write it.

Every pixel has to be grey: a coloured outline may be somebody's finding, which a network must not see.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import Rejected

NOTE = "grey picture in three colour components: read as grey"
RGB = ("RGB", "YBR_RCT", "YBR_ICT")  # JPEG 2000's decoder gives RGB of the latter two
LUMINANCE_FIRST = ("YBR_FULL", "YBR_FULL_422")
NEUTRAL = 128  # chroma of a grey pixel, PS3.3 C.7.6.3.1.2
# Rounding of lossy pictures leaves 2 or 3 levels between red, green and blue. 4 of chroma are 7 of these.
MAX_CHROMA, MAX_DIFFERENCE = 4, 8
BLOCK_PIXELS = 2**20  # compared at once, in 16 bits


def split(
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
