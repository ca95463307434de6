"""Decodes and encodes the run lengths of the SIIM-ACR annotations.

Pairs ``gap length``: the first gap is the 0-based start, each later one counts from the end of the
previous run. Pixels are counted down columns: pixel p is at x = p // rows, y = p % rows. ``-1`` is an
empty mask.

>>> mask = rle.decode("5 2", (4, 3))
>>> mask.astype(int)
array([[0, 0, 0],
       [0, 1, 0],
       [0, 1, 0],
       [0, 0, 0]])
>>> rle.encode(mask)
'5 2'
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import Rejected

EMPTY = "-1"
ABSOLUTE = (
    "the run lengths look absolute: each start counts from the first pixel, as in other contests; here each"
    " gap counts from the end of the previous run; convert: gap = start - end of the previous run, and first"
    " subtract 1 from all starts if the first pixel is 1"
)
# Pairs of integers below 10**18. Possessive quantifiers: no backtracking on invalid texts.
PAIRS = re.compile(r"\s*+(?:[0-9]{1,18}+\s++[0-9]{1,18}+(?:\s++|\Z))++", re.ASCII)


def decode(text: str, shape: tuple[int, int], image_id: str = "") -> NDArray[np.bool_]:
    """Mask of ``shape`` (H, W) from run lengths; all False for -1; runs of length 0 are allowed.

    Raises Rejected for anything but pairs of integers, and for runs beyond the last pixel.
    """
    rows, columns = shape
    if text == EMPTY:  # most images; zeroed lazily by the system
        return np.zeros((columns, rows), bool).T
    lengths = to_lengths(text, image_id)
    end = sum(lengths.tolist())  # Python integers, since int64 could overflow
    rest = rows * columns - end
    if rest < 0:
        if are_absolute(lengths) and lengths[-2:].sum() <= rows * columns + 1:  # a first pixel may be 1
            raise Rejected(ABSOLUTE, image_id)
        raise Rejected(
            f"run lengths reach pixel {end} of an image with {rows * columns} ({columns} x {rows}); check"
            " that the annotation belongs to this image; rle_size is for copies of another size",
            image_id,
        )
    lengths = np.append(lengths, rest)
    filled = np.arange(lengths.size) % 2 == 1  # gap, run, gap, run, …, gap
    return np.repeat(filled, lengths).reshape(columns, rows).T  # SIIM counts pixels down columns


def encode(mask: NDArray[np.bool_]) -> str:
    """Run lengths of a mask (H, W); -1 if it is empty."""
    if not mask.any():
        return EMPTY
    if mask.flags.f_contiguous:  # as decoded masks are: memory order is counting order
        mask = mask.reshape(-1, 1, order="F")
    rows, columns = mask.shape
    # Finds changes in memory order and sorts them: faster than transposing the mask.
    above, x = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), columns)
    tops = np.flatnonzero(np.append(mask[0], False) != np.append(False, mask[-1]))  # changes between columns
    edges = np.sort(np.concatenate([x * rows + above + 1, tops * rows]))
    lengths = np.diff(edges, prepend=0).tolist()
    return str(lengths)[1:-1].replace(",", "")  # twice as fast as join


def are_absolute(lengths: NDArray[np.int64]) -> bool:
    """Whether pairs (2n,) can be start and length of n > 1 separate runs in order, as in other contests."""
    starts, ends = lengths[::2], lengths[::2] + lengths[1::2]
    return starts.size > 1 and bool((starts[1:] >= ends[:-1]).all())


def to_lengths(text: str, image_id: str = "") -> NDArray[np.int64]:
    """The integers of the text, an even number; empty for -1. Raises Rejected for anything but pairs."""
    if PAIRS.fullmatch(text):
        return np.fromstring(text, np.int64, sep=" ")
    parts = text.split()
    if parts == [EMPTY]:
        return np.zeros(0, np.int64)
    if not parts:
        raise Rejected(f"no run lengths; an empty mask is written {EMPTY}", image_id)
    for part in parts:
        # int() would also accept "+1" and "1_0".
        if not (part.isascii() and part.isdigit() and len(part) <= 18):
            problem = "negative" if part.startswith("-") else "not a whole number of pixels"
            raise Rejected(
                f"run length {part[:20]!r} is {problem}; write pairs 'gap length' or {EMPTY}", image_id
            )
    if len(parts) % 2:
        raise Rejected(f"odd number of run lengths ({len(parts)}); write pairs 'gap length'", image_id)
    return np.array(parts, np.int64)  # separated by Unicode white space, which only split() recognises
