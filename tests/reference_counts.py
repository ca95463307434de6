"""Threshold counts by NumPy, as a reference for those counted on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pneumo_experiments.metrics.thresholds import HUNDREDTHS, ThresholdCounts

Image = tuple[np.ndarray, float, np.ndarray]  # probability map, presence, truth at native size

NO_COUNTS = ThresholdCounts.of(np.zeros((0, 2, 101), np.int32), np.zeros(0, np.float32))


def levels(probability: np.ndarray) -> np.ndarray:
    """Level 0 to 100 of each probability: how many hundredths from 0.01 up it reaches."""
    return np.searchsorted(HUNDREDTHS[1:], probability, side="right")


def count_images(images: Sequence[Image]) -> ThresholdCounts:
    """Counts n images, each of a patient of its own."""
    pixels = np.zeros((len(images), 2, 101), np.int32)
    for row, (probability, _, truth) in enumerate(images):
        assert probability.shape == truth.shape
        level = levels(probability)
        histograms = [np.bincount(some, minlength=101) for some in (level.ravel(), level[truth])]
        pixels[row] = np.stack(histograms)[:, ::-1].cumsum(axis=1)[:, ::-1]
    return ThresholdCounts.of(pixels, np.array([presence for _, presence, _ in images], np.float32))


def squares(images: int, seed: int, side: int = 24) -> list[Image]:
    """Noisy guesses at random squares; presence and pixels are informative but often wrong."""
    rng, made = np.random.default_rng(seed), list[Image]()
    for _ in range(images):
        truth = np.zeros((side, side), bool)
        if rng.random() < 0.5:
            top, left, size = rng.integers(2, side // 2, 3)
            truth[top : top + size, left : left + size] = True
        noise = rng.normal(0, 0.35, truth.shape)
        probability = np.clip(0.25 + 0.4 * truth + noise, 0, 1).astype(np.float32)
        made.append((probability, float(np.clip(0.3 + 0.4 * truth.any() + rng.normal(0, 0.2), 0, 1)), truth))
    return made
