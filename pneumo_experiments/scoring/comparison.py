"""Whether one model is better than another, on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.scoring.metrics import Measure, bootstrap, interval_of, mean


@dataclass(frozen=True)
class Comparison:
    """The difference of mean Dice, model minus baseline, and how sure it is."""

    difference: float
    low: float
    high: float
    """95% interval of the difference, from a paired bootstrap over patients"""
    probability_better: float
    """fraction of the resamples in which the model is better; those without a difference count half"""
    resamples: NDArray[np.float64]
    """the difference in each resample"""

    @property
    def line(self) -> str:
        """The comparison in words."""
        return (
            f"{self.difference:+.4f} Dice (95% {self.low:+.4f} to {self.high:+.4f}),"
            f" better with a probability of {self.probability_better:.3f}"
        )


def compare(dices: NDArray[np.float64], baseline: NDArray[np.float64], patients: Sequence[str]) -> Comparison:
    """Compares the Dice of two models on n >= 1 images, all (n,).

    Paired: each resample draws patients, with all their images, for both models at once. What is hard for
    both cancels out, so small differences show on few images.
    """
    if not len(dices) == len(baseline) == len(patients):
        raise ValueError(f"{len(dices)}, {len(baseline)} and {len(patients)} values for the same images")
    differences = dices - baseline
    measures: dict[str, Measure] = {"difference": lambda weights: mean(differences, weights)}
    resamples = bootstrap(measures, patients, np.random.default_rng(0))["difference"]
    low, high = interval_of(resamples)
    better = np.count_nonzero(resamples > 0) + 0.5 * np.count_nonzero(resamples == 0)
    return Comparison(float(differences.mean()), low, high, better / len(resamples), resamples)
