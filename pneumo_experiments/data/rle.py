"""The run lengths of the SIIM-ACR annotations.

Pairs ``gap length``: the first gap is the 0-based start, each later one counts from the end of the run
before it. Pixels are counted down columns: pixel p lies at x = p // rows, y = p % rows. ``-1`` is an
empty mask.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError

EMPTY = "-1"


def decode(text: str, shape: tuple[int, int], image_id: str = "") -> NDArray[np.bool_]:
    """Mask of ``shape`` (H, W) from run lengths; all False for -1, and a run of length 0 adds nothing."""
    rows, columns = shape
    pixels = np.zeros(rows * columns, np.bool_)
    edges = list(accumulate(_lengths(text, image_id)))
    if edges and edges[-1] > pixels.size:
        raise UserError(
            f"{image_id}: run lengths reach pixel {edges[-1]} of an image with {pixels.size}"
            f" ({columns} x {rows}); check that the annotation belongs to this image"
        )
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        pixels[start:stop] = True
    return pixels.reshape(columns, rows).T  # SIIM counts pixels down columns


def encode(mask: NDArray[np.bool_]) -> str:
    """Run lengths of a mask (H, W); -1 when it is empty."""
    edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False, append=False))
    if edges.size == 0:
        return EMPTY
    return " ".join(map(str, np.diff(edges, prepend=0).tolist()))


def _lengths(text: str, image_id: str) -> list[int]:
    """Whole numbers in pairs; none for -1."""
    parts = text.split()
    if parts == [EMPTY]:
        return []
    if not parts:
        raise UserError(f"{image_id}: no run lengths; an empty mask is written {EMPTY}")
    for part in parts:
        # int() takes more than digits ("+1", "1_0"); past 18 digits no image reaches.
        if not (part.isascii() and part.isdigit() and len(part) <= 18):
            fault = "negative" if part.startswith("-") else "not a whole number of pixels"
            raise UserError(
                f"{image_id}: run length {part[:20]!r} is {fault}; write pairs 'gap length', or {EMPTY} alone"
            )
    if len(parts) % 2:
        raise UserError(f"{image_id}: odd number of run lengths ({len(parts)}); write pairs 'gap length'")
    return [int(part) for part in parts]
