"""Scores of a set of images: the official metric and the numbers always reported with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError
from pneumo_experiments.scoring.metrics import auroc, bootstrap_interval
from pneumo_experiments.scoring.thresholds import ThresholdCounts, Thresholds

MIN_PATIENTS = 20  # with fewer the interval covers too rarely: see docs/training.md
CONSTANTS = (
    "images",
    "positives",
    "patients",
    "dice_baseline",
)  # properties of the images, whatever is predicted


@dataclass(frozen=True)
class Scores:
    """Segmentation and detection scores of a set of images; NaN where a score is undefined."""

    dice: float
    """the official metric"""
    dice_low: float
    dice_high: float
    """95% interval of dice, from a bootstrap over patients"""
    dice_baseline: float
    """dice of predicting every image empty: the fraction of images with empty truth"""
    dice_positive: float
    """mean Dice over the images with truth"""
    sensitivity: float
    """fraction of the images with truth whose prediction is not empty"""
    specificity: float
    """fraction of the images without truth whose prediction is empty"""
    auroc: float
    """of the probability of presence, before any threshold"""
    images: int
    positives: int
    """images with truth"""
    patients: int

    @property
    def interval_reliable(self) -> bool:
        """Whether there are enough patients for dice_low and dice_high to be valid."""
        return self.patients >= MIN_PATIENTS

    @property
    def interval(self) -> str:
        """dice_low and dice_high as text, with a warning when they are unreliable."""
        warning = "" if self.interval_reliable else f", unreliable with {self.patients} patients"
        return f"95% {self.dice_low:.3f} to {self.dice_high:.3f}{warning}"

    @property
    def on_positives(self) -> str:
        """dice_positive as text."""
        return f"{self.dice_positive:.4f}" if self.positives else "undefined"

    def as_metrics(self, prefix: str = "") -> dict[str, float]:
        """Every defined score by name, without the constants."""
        measured = {name: value for name, value in asdict(self).items() if name not in CONSTANTS}
        return {prefix + name: float(value) for name, value in measured.items() if not isnan(value)}

    def as_facts(self, prefix: str = "") -> dict[str, object]:
        """The constants, which depend on the images alone, and whether the interval is reliable, by name."""
        facts = {name: getattr(self, name) for name in (*CONSTANTS, "interval_reliable")}
        return {prefix + name: value for name, value in facts.items()}


def score(counts: ThresholdCounts, thresholds: Thresholds, patients: Sequence[str], seed: int = 0) -> Scores:
    """Scores of n >= 1 counted images; ``patients`` holds the patient of each. UserError without images."""
    if len(counts) == 0:
        raise UserError("no images to score: choose a subset that has some")
    if len(patients) != len(counts):
        raise ValueError(f"{len(patients)} patients for {len(counts)} images")
    predicted, truth = counts.predicted_area(thresholds) > 0, counts.truth_area > 0
    return score_images(counts.dice(thresholds), predicted, truth, counts.presence, patients, seed)


def score_images(
    dices: NDArray[np.float64],
    predicted: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    presence: NDArray[np.float32],
    patients: Sequence[str],
    seed: int = 0,
) -> Scores:
    """Scores of n >= 1 images (n,) from Dice, whether prediction and truth have pixels, and presence."""
    low, high = bootstrap_interval(dices, patients, np.random.default_rng(seed))
    return Scores(
        dice=float(dices.mean()),
        dice_low=low,
        dice_high=high,
        dice_baseline=float(np.mean(~truth)),
        dice_positive=_mean(dices[truth]),
        sensitivity=_mean(predicted[truth]),
        specificity=_mean(~predicted[~truth]),
        auroc=auroc(truth, presence),
        images=len(dices),
        positives=int(np.count_nonzero(truth)),
        patients=len(set(patients)),
    )


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
    """Mean of (n,); NaN when n is 0."""
    return float(values.mean()) if values.size else float("nan")
