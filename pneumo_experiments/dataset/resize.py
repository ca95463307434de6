"""Exact area resampling to a square image.

Area instead of nearest-neighbour: `benchmarks/labels.py` compares the two on the real annotations.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONGEST_PATTERN = 64  # source pixels: 255 · 64² < 2**24, and longer patterns are slower than row sums


def area_resize(pixels: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Area mean of pixels (H, W) in each cell of a grid (size, size), for any shape and scale."""
    # Column-major, as decoded masks are: transposing takes a third of the time.
    if pixels.flags.f_contiguous and not pixels.flags.c_contiguous:
        return np.ascontiguousarray(area_resize(pixels.T, size).T)
    rows, columns = pixels.shape
    if not pixels.any():  # four out of five real masks
        return np.zeros((size, size), np.float32)
    down, across = _pattern(rows, size), _pattern(columns, size)
    if max(down.shape[1], across.shape[1]) <= LONGEST_PATTERN:
        return _by_patterns(pixels, size, down, across)
    # Sums of 8-bit pixels with integer weights are exact in both passes, so the mean is rounded only once.
    down = _weighted_rows(pixels, size, np.float32)
    across = _weighted_rows(np.ascontiguousarray(down.T), size, np.float64)
    return (across.T / (rows * columns)).astype(np.float32)


def resize_image(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Area mean of an 8-bit image (H, W) as an 8-bit image (size, size)."""
    return np.rint(area_resize(pixels, size)).astype(np.uint8)


def resize_mask(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask (H, W) at another size: each pixel is as the mask at its centre, which keeps the mean area.

    Half of a pixel's area as the limit would make real masks 2.3% larger at half the size, because of ties.
    """
    rows, columns = shape
    return np.asarray(Image.fromarray(mask).resize((columns, rows), Image.Resampling.NEAREST))


def _by_patterns(
    pixels: NDArray[Any], size: int, down: NDArray[np.float32], across: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Area means for short patterns: every sum is an integer below 2**24, exact in float32."""
    columns = pixels.shape[1]
    blocks = pixels.astype(np.float32).reshape(-1, down.shape[1], columns)
    lines = np.matmul(down, blocks).reshape(-1, across.shape[1])
    return (lines @ across.T).reshape(size, size) / np.float32(down.shape[1] * across.shape[1])


@lru_cache(maxsize=16)
def _pattern(length: int, size: int) -> NDArray[np.float32]:
    """One period of the overlaps of target and source pixels (s, l); each row sums to l.

    1024 -> 384 repeats after 8 source and 3 target pixels.
    """
    repeats = math.gcd(length, size)
    source, overlaps = _overlaps(length // repeats, size // repeats)
    pattern = np.zeros((size // repeats, length // repeats), np.float32)
    np.add.at(pattern, (np.arange(size // repeats), source), overlaps)
    return pattern


def _weighted_rows(pixels: NDArray[Any], size: int, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Rows (size, W): sums of the source rows (H, W) under each target row, weighted by their overlap."""
    total = np.zeros((size, pixels.shape[1]), dtype)
    for rows, overlaps in zip(*_overlaps(pixels.shape[0], size), strict=True):
        weighted = pixels[rows].astype(dtype)
        weighted *= overlaps[:, None].astype(dtype)  # in place: half the time of a fresh array
        total += weighted
    return total


@lru_cache(maxsize=16)
def _overlaps(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source pixels under each of ``size`` target pixels, and their overlaps: both (taps, size).

    In units where a source pixel is ``size`` long and a target pixel ``length``, so that all edges are
    integers; the overlaps of a target pixel sum to ``length``.
    """
    starts = np.arange(size) * length
    stops = starts + length
    first, last = starts // size, (stops - 1) // size
    taps = int(np.max(last - first)) + 1
    source = first + np.arange(taps)[:, None]
    overlaps = np.minimum(stops, (source + 1) * size) - np.maximum(starts, source * size)
    return np.minimum(source, length - 1), np.maximum(overlaps, 0)
