"""Dice with thresholds that were chosen on other patients.

Thresholds that are chosen and judged on the same images flatter: of several trainings the one with the
luckiest thresholds would win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.metrics.dice import dice_of_areas
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid


@dataclass(frozen=True)
class CrossFitted:
    """Each image judged with thresholds from other patients."""

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
    parts: NDArray[np.int64],
    choose: Callable[[ThresholdCounts], Thresholds] = best_on_grid,
) -> CrossFitted:
    """Scores of n counted images; ``parts`` (n,) are numbers, with all images of a patient in one part.

    Each part is judged with the thresholds chosen for all others; a single part with those for no images.
    """
    dices, areas = np.empty(len(counts)), np.empty(len(counts), np.int64)
    for number in np.unique(parts):
        thresholds = choose(counts.rows(np.flatnonzero(parts != number)))
        judged = np.flatnonzero(parts == number)
        dices[judged] = counts.rows(judged).dice(thresholds)
        areas[judged] = counts.rows(judged).predicted_area(thresholds)
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
    positive = counts.rows(np.flatnonzero(counts.truth_area > 0))
    if len(positive) == 0:
        return 0.0
    area, overlap = positive.pixels()  # at hundredth 0 every pixel is in the mask
    dices = dice_of_areas(overlap, area, positive.truth_area[:, None])
    return float(dices.mean(axis=0)[1:].max())
