"""Names likely mistakes in the masks of a submission, by how their runs repeat and where usual masks lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import MIN_PAIRS
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError

GRID = 4  # cells of an image in each direction
MIN_POSITIVES = 50  # of a data set, to know from it where masks lie
MIN_MASKS, MIN_STEPS = 2, 20  # to name their size
MIN_AREAS, AREA_FACTOR = 5, 8  # masks, and how far their median area may be from the usual one
TOLERANCE, MAX_RIGHT, MIN_WRONG = (
    0.02,
    0.05,
    0.1,
)  # of a step; fractions of steps of the right and a wrong size
DOUBT, CERTAIN = 5.0, 10.0  # natural logarithm of how much better a mistake explains where the masks lie
MIN_GAIN = 0.5  # of it per mask; masks made row by row have 1.06 on average
TURNED: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "made row by row: run lengths go down columns, so encode each mask transposed": lambda cells: cells.T,
    "upside down": lambda cells: cells[::-1],
    "turned by a quarter": lambda cells: cells[::-1].T,
}


@dataclass(frozen=True)
class UsualMasks:
    """Masks of labelled images: the fraction of images with one, where they lie, and their median area."""

    positives: float | None
    cells: NDArray[np.float64]  # (4, 4): fraction of a mask's pixels in each cell of its image
    median_area: float  # as a fraction of the image


# Means over the 2,669 images with a finding among the challenge's 12,047 labelled ones; both halves alike.
LEFT_HALF = np.array([[2.4, 29.2], [4.0, 5.1], [4.5, 2.8], [1.4, 0.7]]) / 100
CHALLENGE = UsualMasks(None, np.hstack([LEFT_HALF, LEFT_HALF[:, ::-1]]), 8630 / 1024**2)


@dataclass(frozen=True)
class MaskTraits:
    """What tells of mistakes in one mask."""

    shape: tuple[int, int]  # rows and columns of the image
    steps: NDArray[np.int64]  # pixels from the start of a run to the start of the next
    covered: float = 0.0  # fraction of the image; 0 also for what is no mask of this image
    cells: NDArray[np.float64] = field(default_factory=lambda: np.zeros((GRID, GRID)))  # as in UsualMasks
    is_absolute: bool = False  # whether starts count from the first pixel
    is_canonical: bool = True  # whether its text is the only one in the challenge's form
    fault: str = ""  # why it cannot be decoded


def traits_of(text: str, shape: tuple[int, int], image_id: str) -> MaskTraits:
    """The traits of a mask of an image of ``shape`` (H, W); UserError for anything but pairs of integers."""
    lengths = rle.to_lengths(text, image_id)
    is_beyond = sum(lengths.tolist()) > shape[0] * shape[1]
    if rle.are_absolute(lengths) and (is_beyond or lengths.size >= 2 * MIN_PAIRS):
        return MaskTraits(shape, np.diff(lengths[::2]), is_absolute=True)
    steps = np.diff(np.cumsum(lengths)[::2])
    try:
        mask = rle.decode(text, shape, image_id)
    except UserError as error:
        return MaskTraits(shape, steps, fault=str(error))
    is_canonical = rle.encode(mask) == " ".join(text.split())
    return MaskTraits(shape, steps, float(mask.mean()), cells_of(mask), is_canonical=is_canonical)


def cells_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The fraction of a mask's pixels (H, W) in each cell (4, 4) of its image; zeros for an empty mask."""
    bands = [np.array_split(band, GRID, axis=1) for band in np.array_split(mask, GRID)]
    counts = np.array([[np.count_nonzero(part.T) for part in band] for band in bands])
    return counts / max(1, counts.sum())


def usual_masks(dataset: Path) -> UsualMasks:
    """Those of a data set file; of the challenge where it has no labels or fewer than 50 masks."""
    if not dataset.is_file():
        return CHALLENGE
    with Dataset.open(dataset) as opened:
        entries = opened.entries
        if not opened.labelled or not entries:
            return CHALLENGE
        positives = [index for index, entry in enumerate(entries) if entry.area_px > 0]
        fraction = len(positives) / len(entries)
        if len(positives) < MIN_POSITIVES:
            return UsualMasks(fraction, CHALLENGE.cells, CHALLENGE.median_area)
        cells = np.mean([cells_of(opened.mask(index)) for index in positives], axis=0)
        areas = [entries[index].area_px / entries[index].rows / entries[index].columns for index in positives]
        return UsualMasks(fraction, (cells + cells[:, ::-1]) / 2 + 1e-3, float(np.median(areas)))


def likely_mistakes(masks: Sequence[MaskTraits], usual: UsualMasks) -> tuple[list[str], list[str]]:
    """Mistakes in these masks, one line each: those that are certain, and doubts."""
    if wrong_size := _wrong_size(masks):
        return [wrong_size], []
    covered = [mask.covered for mask in masks if mask.covered]
    certain, doubts = list[str](), list[str]()
    cells = np.sum([mask.cells for mask in masks], axis=0)
    gains = {
        name: float((cells * np.log(turned(usual.cells) / usual.cells)).sum())
        for name, turned in TURNED.items()
    }
    name = max(gains, key=lambda name: gains[name])
    if gains[name] > max(DOUBT, MIN_GAIN * len(covered)):
        (certain if gains[name] > CERTAIN else doubts).append(f"the masks look {name}")
    median = float(np.median(covered or [usual.median_area]))
    ratio = median / usual.median_area
    if len(covered) >= MIN_AREAS and not 1 / AREA_FACTOR <= ratio <= AREA_FACTOR:
        doubts.append(
            f"the median mask covers {median:.2%} of its image, usual ones {usual.median_area:.2%}:"
            f" {'are masks and background swapped?' if median > 0.5 else 'look at the masks'}"
        )
    return certain, doubts


def _wrong_size(masks: Sequence[MaskTraits]) -> str:
    """That the masks were made at another size, or row by row where that is certain; else empty.

    The runs of a mask in two neighbouring columns start about as far apart as a column is high.
    """
    shapes = Counter(mask.shape for mask in masks if mask.steps.size)
    if not shapes:
        return ""
    rows, columns = max(shapes, key=lambda shape: shapes[shape])
    steps = np.concatenate([mask.steps for mask in masks if mask.shape == (rows, columns)])
    if shapes[rows, columns] < MIN_MASKS or steps.size < MIN_STEPS:
        return ""
    values, counts = np.unique(steps, return_counts=True)
    step = int(values[counts.argmax()])

    def fraction_near(length: int) -> float:
        return float((np.abs(steps - length) <= max(2, TOLERANCE * length)).mean())

    if fraction_near(rows) > MAX_RIGHT or fraction_near(step) < MIN_WRONG or step <= GRID:
        return ""
    if rows != columns and abs(step - columns) <= max(2, TOLERANCE * columns):
        return f"the masks were {next(iter(TURNED))}"
    return (
        f"the runs repeat every {step} pixels, and columns of the images have {rows}: were the masks made at"
        f" {step} x {step}? scale them to {columns} x {rows} before you encode them"
    )
