"""What decisions about the champion cost: false champions, a Dice that is too high, and power; two minutes.

Run in the project's environment: python benchmarks/promotion.py [--repeats 1000]

The patients and their numbers of images are those of the table that ships with the package, the labels those
of train-rle.csv.gz in $PNEUMO_REAL_DATA/labels. Without these, an image has a finding with a probability of
0.2215; a normal variable decides which, with a correlation of 0.5 within patients. Of the real patients fewer
have findings, and more each.

A model is a normal variable, how well it does on each image, with a correlation of 0.3 within patients. All
models share a part of it: 0.6 of the variance ("different" ones), or 0.95 ("similar" ones). An image without
a finding has Dice 0 below the 6th percentile (a false alarm), else 1. A finding has Dice 0 below the 25th
percentile (a miss), else 0.95 v^0.4 with v uniform. A better model has a higher mean. The champion is a model
like the others, and the first challenger is decision 1: after a first champion by these images all come one
later. Prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from measure import REAL_DATA, machine
from numpy.typing import NDArray

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.dataset.patients import ROW, SHIPPED, image_number
from pneumo_experiments.metrics.comparison import RESAMPLES, certainty, compare, required_probability
from pneumo_experiments.metrics.dice import bootstrap
from pneumo_experiments.registry.promotion import MIN_REPLACING
from pneumo_experiments.settings import Registry

POSITIVES = 0.2215
SHARED = {"different": 0.6, "similar": 0.95}  # part of the variance that all models have in common
WITHIN = 0.3  # correlation of the images of a patient
FALSE_ALARMS, MISSES = 0.06, 0.25
LOOKS = 20
GAINS, DECISIONS = (0.005, 0.01, 0.02), (1, 5, 20)
OLD_PROBABILITY, OLD_RESAMPLES = 0.95, 1000
NORMAL = NormalDist()
LATENT = np.linspace(-6, 6, 2001)
UNIFORM = np.array([NORMAL.cdf(value) for value in LATENT])


def population() -> tuple[NDArray[np.int64], NDArray[np.bool_], str]:
    """Patient and truth of each image, and where the labels come from."""
    table = np.frombuffer(SHIPPED.read_bytes(), ROW)
    patients = np.unique(table["patient"], return_inverse=True)[1]
    labels = REAL_DATA / "labels" / "train-rle.csv.gz"
    if labels.is_file():
        positive = [image_number(name) for name, texts in read_annotations(labels).items() if texts]
        return patients, np.isin(table["image"], np.array(positive, np.uint64)), "real labels"
    values = normal(np.random.default_rng(0), 1, patients, within=0.5)[0]
    return patients, values < NORMAL.inv_cdf(POSITIVES), "synthetic labels"


def normal(rng: np.random.Generator, rows: int, patients: NDArray[np.int64], within: float) -> NDArray:
    """Standard normal values (rows, images), with that correlation within patients."""
    shared = rng.standard_normal((rows, patients.max() + 1))[:, patients]
    return np.sqrt(within) * shared + np.sqrt(1 - within) * rng.standard_normal((rows, len(patients)))


def dices_of(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Dice (models, images) of a model's normal variable."""
    v = (np.interp(values, LATENT, UNIFORM) - MISSES) / (1 - MISSES)
    positive = np.where(v > 0, 0.95 * np.maximum(v, 0) ** 0.4, 0)
    return np.where(truth, positive, values > NORMAL.inv_cdf(FALSE_ALARMS))


@cache
def mean_of(gain: float, positives: float) -> float:
    """The mean of the variable that gives so much more Dice with that fraction of positives, by bisection."""
    nodes = np.array([NORMAL.inv_cdf((k + 0.5) / 1000) for k in range(1000)])

    def dice(mean: float) -> float:
        both = dices_of(np.stack([nodes + mean] * 2), np.array([[True], [False]]))
        return float(np.array([positives, 1 - positives]) @ both.mean(axis=1))

    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if dice(middle) < dice(0) + gain else (low, middle)
    return low


@dataclass(frozen=True)
class Means:
    """Mean Dice (models,), its sums by patient (models, patients), and its resamples (models, r)."""

    dice: NDArray[np.float64]
    sums: NDArray[np.float64]
    resamples: NDArray[np.float32]

    def probability(self, new: int, old: int) -> float:
        """That the new one is better, as ``compare`` has it."""
        differing = np.count_nonzero(self.sums[new] - self.sums[old])
        resamples = (self.resamples[new] - self.resamples[old]).astype(np.float64)
        resamples[np.abs(resamples) < 1e-7] = 0  # of float32
        return certainty(float(self.dice[new] - self.dice[old]), resamples, differing)


class Holdout:
    """Patients of about so many images, and the weights of the resamples, which no model changes."""

    def __init__(
        self, patients: NDArray[np.int64], truth: NDArray[np.bool_], rng: np.random.Generator
    ) -> None:
        self.patients, self.truth = patients, truth
        first = np.unique(patients, return_index=True)[1]
        drawn = {"weights": lambda weights: weights[:, first].astype(np.float32)}
        self.weights = bootstrap(drawn, patients.tolist(), np.random.default_rng(0), RESAMPLES)["weights"]
        self.images = self.weights @ np.bincount(patients).astype(np.float32)
        self.rng = rng

    def models(self, gains: NDArray[np.float64], shared: float) -> NDArray[np.float64]:
        """Dice (models, images) of models that are better by these gains than the first."""
        common = normal(self.rng, 1, self.patients, WITHIN)
        own = normal(self.rng, len(gains), self.patients, WITHIN)
        means = np.array([mean_of(gain, self.truth.mean()) for gain in gains.tolist()])
        values = np.sqrt(shared) * common + np.sqrt(1 - shared) * own + means[:, None]
        return dices_of(values, self.truth)

    def means(self, dices: NDArray[np.float64]) -> Means:
        """Of models (models, images), all less the first model's, so that ties are exact."""
        sums = np.stack([np.bincount(self.patients, each - dices[0]) for each in dices])
        resamples = (self.weights @ sums.T.astype(np.float32)) / self.images[:, None]
        return Means(dices.mean(axis=1), sums, resamples.T)


def is_better(means: Means, new: int, old: int, required: float | None) -> bool:
    """Whether a model replaces another; None: by the old rule, 0.95 of 1,000 resamples each time."""
    if means.dice[new] <= means.dice[old]:
        return False
    if required is not None:
        return means.probability(new, old) >= required
    few = (means.resamples[new] - means.resamples[old])[:OLD_RESAMPLES]
    return (np.count_nonzero(few > 0) + 0.5 * np.count_nonzero(few == 0)) / OLD_RESAMPLES >= OLD_PROBABILITY


def equal_models(holdout: Holdout, shared: float, repeats: int) -> NDArray[np.float64]:
    """False champions, and Dice above the mean of all models: (rules, in a row and best of, both)."""
    level, found = Registry().min_probability, np.zeros((2, 2, 2))
    for _ in range(repeats):
        dices = holdout.models(np.zeros(LOOKS + 1), shared)
        means = holdout.means(dices)
        best = 1 + int(np.argmax(means.dice[1:]))
        for rule in range(2):
            champion = 0
            for look in range(1, LOOKS + 1):
                required = required_probability(level, look) if rule else None
                champion = look if is_better(means, look, champion, required) else champion
            required = required_probability(level, 1, LOOKS) if rule else None
            chosen = best if is_better(means, best, 0, required) else 0
            for way, last in enumerate((champion, chosen)):
                found[rule, way] += last > 0, means.dice[last] - means.dice.mean()
    return found / repeats


def power(holdout: Holdout, shared: float, repeats: int) -> NDArray[np.float64]:
    """How often better models replace the champion: (gains, the old rule and the decisions)."""
    required = [None] + [required_probability(Registry().min_probability, k) for k in DECISIONS]
    found = np.zeros((len(GAINS), len(required)))
    for _ in range(repeats):
        means = holdout.means(holdout.models(np.array([0.0, *GAINS]), shared))
        for row in range(len(GAINS)):
            found[row] += [is_better(means, row + 1, 0, each) for each in required]
    return found / repeats


def check(holdout: Holdout) -> None:
    """The shortcut by patients is what ``compare`` does."""
    first, second = holdout.models(np.array([0.0, 0.01]), 0.6)
    slow = compare(second, first, holdout.patients.tolist())
    fast = holdout.means(np.stack([first, second]))
    assert np.allclose(fast.resamples[1], slow.resamples, atol=1e-6)
    assert abs(fast.probability(1, 0) - slow.probability_better) < 1e-4


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--repeats", type=int, default=1000)
    repeats: int = options.parse_args().repeats
    patients, truth, labels = population()
    rng = np.random.default_rng(1)
    counts = np.bincount(patients)

    def draw(images: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        order = rng.permutation(len(counts))
        chosen = order[: np.searchsorted(np.cumsum(counts[order]), images) + 1]
        here = np.isin(patients, chosen)
        return np.unique(patients[here], return_inverse=True)[1], truth[here]

    def positives(drawn: tuple[NDArray[np.int64], NDArray[np.bool_]]) -> int:
        return len(np.unique(drawn[0][drawn[1]]))

    small = [draw(200) for _ in range(1000)]
    enough = [drawn for drawn in small if positives(drawn) >= MIN_REPLACING]
    enough.sort(key=positives)
    print(f"{machine()}, NumPy {np.__version__}, {labels}, {repeats} repeats.")
    print(
        f"Of 1,000 hold-outs of about 200 images {len(enough) / 1000:.1%} have {MIN_REPLACING} patients with"
        " a finding; on the others no version replaces another by itself.\n"
    )
    holdouts = [Holdout(*drawn, rng) for drawn in (enough[0], draw(2407))]
    names = [
        f"{len(each.truth):,} images, {positives((each.patients, each.truth))} patients with a finding"
        for each in holdouts
    ]
    for holdout in holdouts:
        check(holdout)
    print(
        f"| hold-out | models | {LOOKS} in a row, old rule | present rule | best of {LOOKS}, old | present |"
    )
    print("|---|---|---|---|---|---|")
    for holdout, name in zip(holdouts, names, strict=True):
        for kind, shared in SHARED.items():
            found = equal_models(holdout, shared, repeats)
            cells = [f"{false:.1%}, {high:+.4f}" for way in (0, 1) for false, high in found[:, way]]
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)
    decisions = " | ".join(f"decision {k}" for k in DECISIONS)
    print(f"\n| hold-out | models | truly better by | old rule | {decisions} |")
    print("|---|---|---|---" + "|---" * len(DECISIONS) + "|")
    for holdout, name in zip(holdouts, names, strict=True):
        for kind, shared in SHARED.items():
            for gain, row in zip(GAINS, power(holdout, shared, repeats), strict=True):
                cells = " | ".join(f"{each:.0%}" for each in row)
                print(f"| {name} | {kind} | {gain:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
