"""Threshold counts of single images by NumPy, as a reference for those counted on the device."""

from __future__ import annotations

import numpy as np

from pneumo_experiments.metrics.thresholds import HUNDREDTHS, ThresholdCounts


def levels(probability: np.ndarray) -> np.ndarray:
    """Level 0 to 100 of each probability: how many hundredths from 0.01 up it reaches."""
    return np.searchsorted(HUNDREDTHS[1:], probability, side="right")


def add_image(counts: ThresholdCounts, probability: np.ndarray, presence: float, truth: np.ndarray) -> None:
    """Counts one image: probability map and truth (H, W) at native size."""
    assert probability.shape == truth.shape
    level = levels(probability)
    histograms = [np.bincount(some, minlength=101) for some in (level.ravel(), level[truth])]
    at_or_above = np.stack(histograms)[:, ::-1].cumsum(axis=1)[:, ::-1].astype(np.int32)
    counts.append(at_or_above[None], np.array([presence], np.float32))
