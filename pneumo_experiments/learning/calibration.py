"""Calibration of the probability of presence, so that of images with 0.3 three in ten are positive.

Training batches hold more positives than the data, and networks are too sure of themselves. A rising line
through the log-odds corrects both and keeps the order of the images (Platt, Probabilistic Outputs for Support
Vector Machines, 1999; Guo et al., On Calibration of Modern Neural Networks, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, isfinite, log

import numpy as np
from numpy.typing import NDArray

EPSILON = 2.0**-24  # float32 knows no probability nearer to 1; nearer ones count as this far from 0 and 1


@dataclass(frozen=True)
class Calibration:
    """Log-odds of presence become slope * log-odds + bias; the defaults leave them as they are."""

    slope: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.slope < inf and isfinite(self.bias)):
            raise ValueError(f"{self}: give a finite slope above 0 and a finite bias")


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
    for _ in range(100):  # of Fisher scoring, each halved until it improves
        change = np.stack([exp(log_slope) * score, np.ones(len(score))])  # of the log-odds with both
        expected = (1 + np.tanh((change[0] + bias) / 2)) / 2
        gradient: NDArray[np.float64] = change @ (expected - target) + np.array([log_slope, 0])
        weighted: NDArray[np.float64] = change * expected * (1 - expected)
        step = np.linalg.solve(weighted @ change.T + np.diag([1.0, EPSILON]), gradient)
        first, second = (step / max(1.0, abs(float(step[0])))).tolist()
        while cost(log_slope - first, bias - second) > cost(log_slope, bias):
            first, second = first / 2, second / 2
        log_slope, bias = log_slope - first, bias - second
        if abs(first) + abs(second) < EPSILON:
            break
    shift = log_odds(min(max(prevalence, 1e-4), 1 - 1e-4))
    return Calibration(exp(log_slope), bias + shift - log_odds(float(target.mean())))
