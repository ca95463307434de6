"""The official metric, AUROC and the bootstrap interval.

Dice is the metric of the SIIM-ACR challenge: the mean over images of 2|X∩Y| / (|X| + |Y|) at
native size; 1 for an image whose truth and prediction are both empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


def dice_of_areas(
    overlap: NDArray[np.int64], predicted: NDArray[np.int64], truth: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Dice of each image (n,) from its areas in pixels; 1.0 where truth and prediction are empty."""
    total = predicted + truth
    return np.divide(2 * overlap, total, out=np.ones(total.shape), where=total > 0)


def dice(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> float:
    """Dice of two boolean masks (H, W); 1.0 when both are empty."""
    if truth.shape != prediction.shape:
        raise ValueError(
            f"truth is {truth.shape}, prediction {prediction.shape}: masks of one image must match"
        )
    areas = [np.asarray(np.count_nonzero(mask)) for mask in (truth & prediction, prediction, truth)]
    return float(dice_of_areas(*areas))


def auroc(truth: NDArray[np.bool_], presence: NDArray[np.float32]) -> float:
    """Area under the ROC curve of presence (n,), ties count half; NaN without both classes.

    The Mann-Whitney U of the positives' average ranks over the number of pairs. By hand, since six lines
    are not worth importing scikit-learn.
    """
    positives = np.count_nonzero(truth)
    negatives = truth.size - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, ties = np.unique(presence, return_inverse=True, return_counts=True)
    ranks = np.cumsum(ties) - (ties - 1) / 2  # of each distinct value, from 1
    u = ranks[inverse][truth].sum() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))


def bootstrap_interval(
    values: NDArray[np.float64], patients: Sequence[str], rng: np.random.Generator
) -> tuple[float, float]:
    """95% percentile interval of the mean of values (n,), by resampling patients with all their images.

    Images of one patient are correlated: resampling images would make the interval too narrow.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.bincount(patient, weights=values)
    images = np.bincount(patient)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / images[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
