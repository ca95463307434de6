"""The official metric, scores of presence, and their intervals.

Dice is the metric of the SIIM-ACR challenge: the mean over images of 2|X∩Y| / (|X| + |Y|) at
native size; 1 for an image whose truth and prediction are both empty.

Scores of a set of images take weights (r, n), r at once: ones give the score itself, zeros leave images out,
and how often the bootstrap drew each image gives its resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import copysign, expm1, isnan, log1p, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 100  # resamples, or groups of the jackknife, in memory
GROUPS = 1000  # of patients, at most, that the jackknife leaves out in turn
Z = 1.959964  # 97.5% of the normal distribution
BINS = 10  # of presence, for its calibration

Weights = NDArray[np.float64]  # (r, n)
Patients = Sequence[str] | NDArray[np.str_]  # (n,): the patient of each image
Measure = Callable[[Weights], NDArray[np.float64]]  # the score (r,) for each row of weights


def dice_of_areas(
    overlap: NDArray[np.int64], predicted: NDArray[np.int64], truth: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Dice of each image (n,) from its areas in pixels; 1.0 where truth and prediction are empty."""
    total = predicted + truth
    return np.divide(2 * overlap, total, out=np.ones(total.shape), where=total > 0)


def dice(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> float:
    """Dice of two boolean masks (H, W); 1.0 when both are empty. ValueError if their shapes differ.

    >>> truth, prediction = np.zeros((2, 4, 4), bool)
    >>> dice(truth, prediction)
    1.0
    >>> truth[:2], prediction[1:3] = True, True
    >>> dice(truth, prediction)
    0.5
    """
    if truth.shape != prediction.shape:
        raise ValueError(
            f"truth is {truth.shape}, prediction {prediction.shape}: masks of one image must match"
        )
    areas = [np.asarray(np.count_nonzero(mask)) for mask in (truth & prediction, prediction, truth)]
    return float(dice_of_areas(*areas))


def mean(
    values: NDArray[Any], weights: Weights, among: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Weighted means (r,) of values (n,), those that are ``among``; NaN where these have no weight."""
    if among is not None:
        values, weights = values[among], weights[:, among]
    return _ratio(weights @ values.astype(np.float64), weights.sum(axis=1))


def auroc(truth: NDArray[np.bool_], presence: NDArray[np.float32], weights: Weights) -> NDArray[np.float64]:
    """Areas (r,) under the ROC curve of presence (n,), ties count half; NaN without both classes.

    The fraction of pairs of a positive and a negative in the right order (Mann-Whitney U).
    """
    positives, negatives = _by_presence(truth, presence, weights)
    below = np.cumsum(negatives, axis=1) - negatives / 2  # of each positive, ties by half
    return _ratio((positives * below).sum(axis=1), positives.sum(axis=1) * negatives.sum(axis=1))


def average_precision(
    truth: NDArray[np.bool_], presence: NDArray[np.float32], weights: Weights
) -> NDArray[np.float64]:
    """Average precisions (r,): the precision at each presence (n,), weighted by the recall that it adds.

    NaN without positives. The sum over thresholds of (R_k - R_(k-1)) P_k, without interpolation.
    """
    positives, negatives = (side[:, ::-1] for side in _by_presence(truth, presence, weights))
    found = np.cumsum(positives, axis=1)
    precision = np.nan_to_num(_ratio(found, found + np.cumsum(negatives, axis=1)))  # 0 above all images
    return _ratio((positives * precision).sum(axis=1), positives.sum(axis=1))


def roc_points(
    truth: NDArray[np.bool_], presence: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False positive rate and sensitivity (k + 1,) at each of k distinct presences, falling, from (0, 0).

    Of n images with both classes. The straight lines between the points enclose the area ``auroc``.
    """
    positives, negatives = _reached(truth, presence)
    return negatives / negatives[-1], positives / positives[-1]


def precision_recall_points(
    truth: NDArray[np.bool_], presence: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall and precision (k,) at each of k distinct presences, falling; of n images with positives."""
    positives, negatives = (side[1:] for side in _reached(truth, presence))
    return positives / positives[-1], positives / (positives + negatives)


def calibration_error(
    truth: NDArray[np.bool_], presence: NDArray[np.float32], weights: Weights
) -> NDArray[np.float64]:
    """Expected calibration errors (r,): mean distance of presence (n,) to the bin's fraction of positives.

    Ten bins of equal width (Guo et al., On Calibration of Modern Neural Networks, 2017).
    """
    gaps = np.zeros(len(weights))
    for here in bins(presence):  # |sum of presence - positives| of each bin
        gaps += np.abs(weights[:, here] @ (presence[here].astype(np.float64) - truth[here]))
    return _ratio(gaps, weights.sum(axis=1))


def bins(presence: NDArray[np.float32]) -> list[NDArray[np.bool_]]:
    """Which images (n,) have a presence in each of BINS intervals of equal width; the last includes 1."""
    number = np.minimum((presence * np.float32(BINS)).astype(np.int64), BINS - 1)
    return [number == each for each in range(BINS)]


def intervals(
    measures: Mapping[str, Measure], among: Mapping[str, NDArray[np.bool_]], patients: Patients
) -> dict[str, tuple[float, float]]:
    """95% interval of each score, which lies in [0, 1]; NaN if it is undefined.

    ``among`` has the images (n,) that a score is computed from, if not all. Wilson's, with the jackknife's
    variance: images of one patient are correlated, so it leaves out each patient in turn, with all images; of
    more than GROUPS patients several at once.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    group, ends = patient % GROUPS, dict[str, tuple[float, float]]()
    groups = int(group.max()) + 1
    without = {name: np.empty(groups) for name in measures}
    for start in range(0, groups, AT_ONCE):
        some = np.arange(start, min(start + AT_ONCE, groups))
        weights = (group != some[:, None]).astype(np.float64)
        for name, measure in measures.items():
            without[name][some] = measure(weights)
    for name, measure in measures.items():
        effective = effective_patients(patient[among[name]] if name in among else patient)
        variance = (groups - 1) * float(np.nanvar(without[name])) if effective > 1 else 0.0
        ends[name] = wilson(float(measure(np.ones((1, len(patient))))[0]), variance, effective)
    return ends


def t_of_normal(z: float, df: float) -> float:
    """Student's t with the tail of this normal deviate (Wallace, Annals of Mathematical Statistics, 1959)."""
    return copysign(sqrt(df * expm1((z * (8 * df + 3) / (8 * df + 1)) ** 2 / df)), z)


def normal_of_t(t: float, df: float) -> float:
    """The normal deviate with the tail of this Student's t: the inverse of ``t_of_normal``."""
    return copysign(sqrt(df * log1p(t**2 / df)) * (8 * df + 1) / (8 * df + 3), t)


def effective_patients(patient: NDArray[Any]) -> float:
    """(sum of m)^2 / sum of m^2, for m images of each patient (Kish, Survey Sampling, 1965); 0 of none."""
    images = np.unique(patient, return_counts=True)[1]
    return float(images.sum() ** 2 / (images**2).sum()) if images.size else 0.0


def wilson(score: float, variance: float, patients: float) -> tuple[float, float]:
    """95% interval in [0, 1] of a score with this variance, from so many (effective) patients.

    Wilson's interval (1927) of a fraction of n images, where n gives this variance (Kott and Carr, 1997), and
    Student's t of ``patients`` - 1 degrees of freedom. Without variance, as where all images are right, n is
    the number of patients, as if each had one image.
    """
    if isnan(score):
        return score, score
    if variance > 1e-20 and 0 < score < 1:
        n, df = score * (1 - score) / variance, max(patients - 1, 1.0)
        z = t_of_normal(Z, df)
    else:
        n, z = patients, Z
    middle, half = score + z**2 / (2 * n), z * sqrt(score * (1 - score) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side) / (1 + z**2 / n) for side in (-half, half))
    return max(0.0, low), min(1.0, high)


def bootstrap(
    measures: Mapping[str, Measure], patients: Patients, rng: np.random.Generator, resamples: int
) -> dict[str, NDArray[np.float64]]:
    """Each score in so many resamples, a multiple of AT_ONCE, of the patients with all their images.

    A measure computes its score for each row of weights (r, n): how often each image was drawn. Images of one
    patient are correlated: resampling images would make intervals too narrow.
    """
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    count = int(patient.max()) + 1
    values = {name: list[NDArray[np.float64]]() for name in measures}
    for _ in range(0, resamples, AT_ONCE):
        drawn = rng.integers(count, size=(AT_ONCE, count)) + count * np.arange(AT_ONCE)[:, None]
        times = np.bincount(drawn.ravel(), minlength=AT_ONCE * count).reshape(AT_ONCE, count)
        weights = times.astype(np.float64)[:, patient]
        for name, measure in measures.items():
            values[name].append(measure(weights))
    return {name: np.concatenate(parts) for name, parts in values.items()}


def interval_of(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the resamples that are not NaN; NaN if all are."""
    defined = values[~np.isnan(values)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _by_presence(
    truth: NDArray[np.bool_], presence: NDArray[np.float32], weights: Weights
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight of the positives and of the negatives at each distinct presence, ascending; (r, values) each."""
    order = np.argsort(presence, kind="stable")
    ranked = presence[order]
    starts = np.flatnonzero(np.append(True, ranked[1:] > ranked[:-1]))
    positives, negatives = (
        np.add.reduceat(weights[:, order] * side[order], starts, axis=1) for side in (truth, ~truth)
    )
    return positives, negatives


def _reached(
    truth: NDArray[np.bool_], presence: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positives and negatives (k + 1,) at or above each of k distinct presences, falling; first none."""
    sides = _by_presence(truth, presence, np.ones((1, len(truth))))
    positives, negatives = (np.append(0.0, np.cumsum(side[0, ::-1])) for side in sides)
    return positives, negatives


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
