"""Calibration of the probability of presence, so that of images with 0.3 three in ten are positive.

Training batches hold more positives than the data, and networks are too sure of themselves. A rising line
through the log-odds corrects both and keeps the order of the images (Platt, Probabilistic Outputs for Support
Vector Machines, 1999; Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

EPSILON = 2.0**-24  # float32 knows no probability nearer to 1; nearer ones count as this far from 0 and 1
LEAST_PREVALENCE = 1e-4
STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """Log-odds of presence become slope * log-odds + bias; the defaults leave them as they are."""

    slope: float = 1.0
    bias: float = 0.0


def log_odds(probability: float) -> float:
    """ln(p / (1 - p)) of a probability between 0 and 1."""
    return log(probability / (1 - probability))


def fit_calibration(
    presence: NDArray[np.float32], truth: NDArray[np.bool_], prevalence: float
) -> Calibration:
    """The most likely calibration of n >= 1 images (n,), for images of which this fraction is positive.

    Finite for any images, also without positives or where presence separates them: Platt's targets are
    (positives + 1) / (positives + 2) and 1 / (negatives + 2) in place of 1 and 0, and the logarithm of the
    slope has the standard normal distribution as prior. The bias is then moved from the prevalence of these
    targets to the given one.
    """
    probability = presence.astype(np.float64).clip(EPSILON, 1 - EPSILON)
    score = np.log(probability / (1 - probability))
    positives = np.count_nonzero(truth)
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2))

    def cost(log_slope: float, bias: float) -> float:
        calibrated = exp(log_slope) * score + bias
        return float(np.logaddexp(0, calibrated).sum() - target @ calibrated + log_slope**2 / 2)

    log_slope, bias = 0.0, 0.0
    for _ in range(STEPS):  # of Fisher scoring, each halved until it improves
        calibrated = exp(log_slope) * score
        expected = (1 + np.tanh((calibrated + bias) / 2)) / 2
        first = float(calibrated @ (expected - target)) + log_slope
        second = float((expected - target).sum())
        weights = expected * (1 - expected)
        both = float(weights @ calibrated)
        one, other = float(weights @ calibrated**2) + 1, float(weights.sum()) + EPSILON
        determinant = one * other - both**2
        first, second = (
            (other * first - both * second) / determinant,
            (one * second - both * first) / determinant,
        )
        longest = max(1, abs(first))
        first, second = first / longest, second / longest
        while cost(log_slope - first, bias - second) > cost(log_slope, bias):
            first, second = first / 2, second / 2
        log_slope, bias = log_slope - first, bias - second
        if abs(first) + abs(second) < EPSILON:
            break
    shift = log_odds(min(max(prevalence, LEAST_PREVALENCE), 1 - LEAST_PREVALENCE))
    return Calibration(exp(log_slope), bias + shift - log_odds(float(target.mean())))
