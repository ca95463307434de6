"""Masks from probabilities, and the choice of thresholds.

``ThresholdCounts`` stores for each image only how many pixels reach each hundredth of probability, so any
thresholds can be evaluated in milliseconds without storing predictions. Therefore pixel thresholds are whole
hundredths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.dice import dice_of_areas

Pixels = TypeVar("Pixels", int, NDArray[np.int64])

# In float32: pixel probabilities are compared with exactly these numbers everywhere.
HUNDREDTHS = (np.arange(101) / 100).astype(np.float32)

PRESENCE_GRID = np.arange(0, 100, 10) / 100
TOP_GRID = np.arange(20, 100, 10) / 100
AREA_GRID = np.array([0, 250, 1000, 2000, 4000, 8000])
BOTTOM_GRID = np.arange(10, 70, 10) / 100
_DEFAULT_STEPS = (5, 3, 0, 4)  # indices of the defaults of Thresholds in the four grids


@dataclass(frozen=True)
class Thresholds:
    """When an image counts as empty, and which pixels belong to its mask.

    top_score, min_area_px and bottom_score are the triplet thresholds of the winner of the SIIM-ACR
    challenge; presence_threshold applies to the network's presence head. Raises UserError for other values.
    """

    presence_threshold: float = 0.5
    """below this probability of presence the image is empty"""
    top_score: float = 0.5
    """probability, in whole hundredths, that defines the core of a finding"""
    min_area_px: int = 0
    """with fewer pixels than this at top_score, scaled to 1024 x 1024 so that a finding passes at every
    resolution or at none, the image is empty; 0 requires none"""
    bottom_score: float = 0.5
    """probability, in whole hundredths, from which a pixel is in the mask"""

    min_area_of: ClassVar[int | None] = 1024
    """side of the radiograph whose pixels min_area_px counts; None: it counts those of each image itself"""

    def __post_init__(self) -> None:
        if not 0 <= self.presence_threshold <= 1:
            raise UserError(f"presence_threshold={self.presence_threshold}: give a number from 0 to 1")
        for name, value in (("top_score", self.top_score), ("bottom_score", self.bottom_score)):
            if not (0 <= value <= 1 and abs(value * 100 - round(value * 100)) < 1e-6):
                raise UserError(f"{name}={value}: give a whole hundredth from 0 to 1, such as 0.35")
        if self.min_area_px < 0:
            raise UserError(f"min_area_px={self.min_area_px}: give a number of pixels from 0 up")

    @property
    def scores(self) -> tuple[np.float32, np.float32]:
        """top_score and bottom_score as the numbers that pixels are compared with."""
        return HUNDREDTHS[_level(self.top_score)], HUNDREDTHS[_level(self.bottom_score)]

    def least_core_px(self, pixels: Pixels) -> Pixels:
        """Pixels at top_score that keep an image of so many pixels, rows * columns, from being empty."""
        if self.min_area_of is None:
            return pixels * 0 + self.min_area_px
        whole = self.min_area_of**2
        return -(-min(self.min_area_px, whole + 1) * pixels // whole)

    def are_reached(self, presence: float) -> bool:
        """Whether the probability of presence alone leaves the image not empty."""
        return bool(np.float32(presence) >= np.float32(self.presence_threshold))


class NativeThresholds(Thresholds):
    """Those of models that name no ``min_area_of``: ``min_area_px`` counts pixels of each image itself."""

    min_area_of = None


def apply_thresholds(
    probability: NDArray[np.float32], presence: float, thresholds: Thresholds
) -> NDArray[np.bool_]:
    """Mask (H, W) of a probability map at native size; all False when the image counts as empty."""
    top, bottom = thresholds.scores
    least_px = thresholds.least_core_px(probability.size)
    if thresholds.are_reached(presence) and np.count_nonzero(probability >= top) >= least_px:
        return probability >= bottom
    return np.zeros(probability.shape, dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class ThresholdCounts:
    """n counted images; about 1 kB an image. Raises ValueError for impossible values."""

    pixels: NDArray[np.int32]
    """(n, 2, 101): pixels at or above each hundredth, all and within the truth"""
    presence: NDArray[np.float32]
    """(n,): probability of presence"""
    patient: NDArray[np.str_]
    """(n,): of one patient are the images with the same text"""
    fold: NDArray[np.int64]
    """(n,): the images of a fold are scored with thresholds from the others; each patient is in one"""

    def __post_init__(self) -> None:
        pixels, presence = self.pixels, self.presence
        if pixels.shape != (len(self), 2, 101) or presence.ndim != 1:
            raise ValueError(f"counts {pixels.shape}, presence {presence.shape}: give (n, 2, 101) and (n,)")
        if not self.patient.shape == self.fold.shape == presence.shape:
            raise ValueError("not one patient and one fold for each image")
        if not ((presence >= 0) & (presence <= 1)).all():
            raise ValueError("presence outside [0, 1]")
        if (np.diff(pixels) > 0).any() or (pixels[:, 1] > pixels[:, 0]).any() or (pixels < 0).any():
            raise ValueError("counts hold more pixels at a higher hundredth, or within the truth than in all")

    @classmethod
    def of(cls, pixels: NDArray[np.int32], presence: NDArray[np.float32]) -> ThresholdCounts:
        """Images that each have a patient of their own."""
        images = len(presence)
        return cls(pixels, presence, np.arange(images).astype(np.str_), np.zeros(images, np.int64))

    def __len__(self) -> int:
        return len(self.presence)

    @property
    def truth_area(self) -> NDArray[np.int64]:
        """Annotated pixels of each image (n,)."""
        return self.at(0)[1]

    @property
    def image_area(self) -> NDArray[np.int64]:
        """All pixels of each image (n,): every one reaches 0."""
        return self.at(0)[0]

    def cores(self) -> NDArray[np.int64]:
        """Pixels at or above each hundredth as of 1024 x 1024 (n, 101); whole, as ``min_area_px`` is."""
        return self.pixels[:, 0] * np.int64(1024**2) // np.maximum(self.image_area, 1)[:, None]

    def at(self, score: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pixels of each image at or above a probability: all (n,), and those within the truth (n,)."""
        reached = self.pixels[:, :, _level(score)].astype(np.int64)
        return reached[:, 0], reached[:, 1]

    def predicted_area(self, thresholds: Thresholds) -> NDArray[np.int64]:
        """Pixels of each image's mask (n,) from ``apply_thresholds``."""
        return self._masked(thresholds)[0]

    def dice(self, thresholds: Thresholds) -> NDArray[np.float64]:
        """Dice of each image (n,) for the mask from ``apply_thresholds``."""
        area, overlap = self._masked(thresholds)
        return dice_of_areas(overlap, area, self.truth_area)

    def rows(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> ThresholdCounts:
        """The counts of some images, by index or mask."""
        return ThresholdCounts(
            self.pixels[chosen], self.presence[chosen], self.patient[chosen], self.fold[chosen]
        )

    @staticmethod
    def joined(several: Sequence[ThresholdCounts]) -> ThresholdCounts:
        """The images of several counts, in order; those of each are a fold."""
        return ThresholdCounts(
            np.concatenate([counts.pixels for counts in several]),
            np.concatenate([counts.presence for counts in several]),
            np.concatenate([counts.patient for counts in several]),
            np.repeat(np.arange(len(several)), [len(counts) for counts in several]),
        )

    def _masked(self, thresholds: Thresholds) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Area of each image's mask (n,), and of its overlap with the truth (n,)."""
        core, _ = self.at(thresholds.top_score)
        present = self.presence >= np.float32(thresholds.presence_threshold)
        not_empty = present & (core >= thresholds.least_core_px(self.image_area))
        area, overlap = self.at(thresholds.bottom_score)
        return area * not_empty, overlap * not_empty


def best_on_grid(counts: ThresholdCounts) -> Thresholds:
    """The thresholds of a coarse grid with the highest mean Dice; the defaults without images.

    On few images many thresholds are equally good. The one nearest to their centre, in grid steps, is chosen,
    since it is far from where Dice falls; among several such the one nearest to the defaults.
    """
    if len(counts) == 0:
        return Thresholds()
    truth = counts.truth_area
    dice_if_empty = (truth == 0).astype(np.float64)
    present = counts.presence >= PRESENCE_GRID.astype(np.float32)[:, None]
    tops = counts.cores()[:, [_level(top) for top in TOP_GRID]].T
    has_core = tops[:, None] >= AREA_GRID[:, None]  # (top, area, image)
    mean = np.empty((len(PRESENCE_GRID), len(TOP_GRID), len(AREA_GRID), len(BOTTOM_GRID)))
    for i, bottom in enumerate(BOTTOM_GRID):
        area, overlap = counts.at(bottom)
        gain = dice_of_areas(overlap, area, truth) - dice_if_empty
        gains = (present * gain) @ has_core.reshape(-1, len(counts)).T
        mean[..., i] = (gains.reshape(mean.shape[:3]) + dice_if_empty.sum()) / len(counts)
    mean = np.where(TOP_GRID[:, None, None] >= BOTTOM_GRID, mean, -np.inf)
    # Grid indices (combinations, 4) of equal means; their sums may differ in the last bits.
    tied = np.argwhere(mean >= mean.max() - 1e-9)
    from_centre = ((tied - tied.mean(axis=0)) ** 2).sum(axis=1).round(6)
    from_default = ((tied - _DEFAULT_STEPS) ** 2).sum(axis=1)
    step = tied[np.lexsort((from_default, from_centre))[0]]
    return Thresholds(
        presence_threshold=float(PRESENCE_GRID[step[0]]),
        top_score=float(TOP_GRID[step[1]]),
        min_area_px=int(AREA_GRID[step[2]]),
        bottom_score=float(BOTTOM_GRID[step[3]]),
    )


@dataclass(frozen=True)
class CrossFitted:
    """Scores of images with thresholds from other patients.

    Thresholds that are chosen and scored on the same images flatter: of several trainings the one with the
    luckiest thresholds would win.
    """

    dices: NDArray[np.float64]
    """of each image (n,)"""
    dice: float
    """mean over all images"""
    dice_positive: float
    """mean over the images with truth; NaN without any"""
    false_alarms: float
    """fraction of all images that have a predicted mask, but no truth"""
    is_all_empty: bool
    """whether no image has a predicted mask"""


def cross_fitted(
    counts: ThresholdCounts,
    folds: NDArray[np.int64],
    choose: Callable[[ThresholdCounts], Thresholds] = best_on_grid,
) -> CrossFitted:
    """Scores of n counted images; ``folds`` (n,) are numbers, with all images of a patient in one fold.

    Each fold is scored with the thresholds chosen for all others; a single one with those for no images.
    """
    dices, areas = np.empty(len(counts)), np.empty(len(counts), np.int64)
    for number in np.unique(folds):
        here = folds == number
        thresholds, scored = choose(counts.rows(~here)), counts.rows(here)
        dices[here], areas[here] = scored.dice(thresholds), scored.predicted_area(thresholds)
    positive = counts.truth_area > 0
    return CrossFitted(
        dices=dices,
        dice=float(dices.mean()),
        dice_positive=float(dices[positive].mean()) if positive.any() else float("nan"),
        false_alarms=float(((areas > 0) & ~positive).mean()),
        is_all_empty=not areas.any(),
    )


def best_dice_on_positives(counts: ThresholdCounts) -> float:
    """Mean Dice over the images with truth at the best single score, none taken as empty; 0.0 without truth.

    It grows from the first steps of a training on, long before the masks beat predicting nothing.
    """
    positive = counts.rows(counts.truth_area > 0)
    if len(positive) == 0:
        return 0.0
    area, overlap = positive.pixels[:, 0].astype(np.int64), positive.pixels[:, 1].astype(np.int64)
    dices = dice_of_areas(overlap, area, positive.truth_area[:, None])  # at hundredth 0 all pixels are in it
    return float(dices.mean(axis=0)[1:].max())


def _level(score: float) -> int:
    return round(score * 100)
