"""Whether one model is better than another, on the same images, and how sure that has to be."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.metrics.dice import Measure, Patients, bootstrap, interval_of, mean, normal_of_t

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """The difference of mean Dice, model minus baseline, and how sure it is."""

    difference: float
    low: float
    high: float
    """95% interval of the difference, from a paired bootstrap over patients"""
    probability_better: float
    """that the difference is above 0: see ``certainty``"""
    resamples: NDArray[np.float64]
    """the difference in each resample"""

    @property
    def line(self) -> str:
        """The comparison in words."""
        return (
            f"{self.difference:+.4f} Dice (95% {self.low:+.4f} to {self.high:+.4f}),"
            f" better with a probability of {self.probability_better:.6g}"
        )


def compare(dices: NDArray[np.float64], baseline: NDArray[np.float64], patients: Patients) -> Comparison:
    """Compares the Dice of two models on n >= 1 images, all (n,).

    Paired: each resample draws patients, with all their images, for both models at once. What is hard for
    both cancels out, so small differences show on few images. ``patients`` are the patients' names.

    >>> rng = np.random.default_rng(0)
    >>> baseline, patients = rng.uniform(0.2, 0.8, 200), [f"patient {number // 2}" for number in range(200)]
    >>> print(compare(baseline + rng.normal(0.02, 0.05, 200), baseline, patients).line)
    +0.0155 Dice (95% +0.0086 to +0.0224), better with a probability of 0.9999...
    """
    differences = dices - baseline
    measures: dict[str, Measure] = {"difference": lambda weights: mean(differences, weights)}
    resamples = bootstrap(measures, patients, np.random.default_rng(0), RESAMPLES)["difference"]
    difference, (low, high) = float(differences.mean()), interval_of(resamples)
    sums = np.bincount(np.unique(patients, return_inverse=True)[1], differences)  # of each patient
    probability = certainty(difference, resamples, int(np.count_nonzero(sums)))
    return Comparison(difference, low, high, probability, resamples)


def certainty(difference: float, resamples: NDArray[np.float64], patients: int) -> float:
    """The probability that a difference, which so many patients make, is above 0, by its resamples (r,).

    Of the fraction above 0 (zeros count half) and Student's t with their standard deviation the one nearer to
    1/2. With few patients the resamples' tails are too light, and they tell nothing beyond 1 - 1/r.
    """
    better = float((resamples > 0).mean() + (resamples == 0).mean() / 2)
    spread, freedom = float(resamples.std()), patients - 1
    if spread == 0 or freedom < 1:
        return better if spread == 0 else 0.5
    z = normal_of_t(difference / spread, freedom)
    return min(better, NormalDist().cdf(z), key=lambda probability: abs(probability - 0.5))


def required_probability(first: float, decision: int, models: int = 1) -> float:
    """The probability that the k-th decision on the same images requires; ``first`` is that of the first one.

    With ``models`` it is required of the best of so many on these images. 1 - (1 - first) / (k² models): a
    Bonferroni correction whose weights 1/k² sum to π²/6, so that all decisions together, however many come,
    err with a probability of at most (1 - first) π²/6 (alpha spending).
    """
    return 1 - (1 - first) / (decision**2 * models)
