"""How often a search ends with worse settings than those as given, and how much too high its value is.

    python benchmarks/search_choice.py [--studies 1000] [--seed_sd 0.0022]

Simulates studies; trains nothing. A fold has the challenge's size: 990 patients with 1,930 images. Trials
differ by their settings, by what their seed adds to all images alike (normal, ``seed_sd``), and image by
image: by masks that are better or worse, and findings where there are none. Together the values of equally
good trials have a standard deviation of 0.003. `before`: of the best two trials that with the best mean of
both trainings wins. `confirm=2`, `confirm=0`: what the package does. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure  # noqa: F401 # makes the package importable from its folder
import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.search.winner import better_than

PATIENTS, IMAGES, POSITIVES = 990, 1930, 0.2215  # of a fold: a fifth of 80% of the challenge's
MASK_SD, FALSE_ALARMS = 0.13, 0.007  # image by image: of positives, and the fraction of negatives
TRIALS = (8, 30)
Truths = NDArray[np.float64]  # (trials,): Dice of the settings, less that of those as given, which are first


def equal(rng: np.random.Generator, trials: int) -> Truths:
    return np.zeros(trials)


def spread(rng: np.random.Generator, trials: int) -> Truths:
    return np.append(0, rng.normal(0, 0.003, trials - 1))


def all_worse(rng: np.random.Generator, trials: int) -> Truths:
    return -np.abs(spread(rng, trials))


def one_better(gain: float) -> Callable[[np.random.Generator, int], Truths]:
    return lambda rng, trials: np.append(np.zeros(trials - 1), gain)


CASES = {
    "all equal": equal,
    "spread of 0.003": spread,
    "all others worse": all_worse,
    "one better by 0.01": one_better(0.01),
    "one better by 0.02": one_better(0.02),
}


class Fold:
    """Images of patients: what trainings with some settings are worth on them."""

    def __init__(self, rng: np.random.Generator, seed_sd: float) -> None:
        self._rng, self._seed_sd = rng, seed_sd
        self._patient = np.append(np.arange(PATIENTS), rng.integers(PATIENTS, size=IMAGES - PATIENTS))
        self._positive = rng.random(IMAGES) < POSITIVES

    def train(self, truths: Truths) -> NDArray[np.float64]:
        """What each patient adds to the Dice (trials, patients), less what all trainings have in common."""
        rng, shape = self._rng, (len(truths), IMAGES)
        mask = rng.normal(0, MASK_SD, shape)
        alarm = FALSE_ALARMS - (rng.random(shape) < FALSE_ALARMS)
        dices = np.where(self._positive, mask, alarm) + truths[:, None]
        dices += rng.normal(0, self._seed_sd, (len(truths), 1))
        sums = np.zeros((len(truths), PATIENTS))
        for row, sum_ in zip(dices, sums, strict=True):
            sum_ += np.bincount(self._patient, row)
        return sums * (PATIENTS / IMAGES)


def study(rng: np.random.Generator, truths: Truths, seed_sd: float) -> dict[str, tuple[int, float]]:
    """The winner by each rule, and its logged value."""
    fold = Fold(rng, seed_sd)
    trained = fold.train(truths)
    first = trained.mean(axis=1)
    best = np.argsort(-first)

    def before() -> tuple[int, float]:
        means = {n: (first[n] + fold.train(truths[n : n + 1]).mean()) / 2 for n in best[:2].tolist()}
        winner = max(means, key=means.__getitem__)
        return winner, means[winner]

    def present(dices: dict[int, NDArray[np.float64]]) -> tuple[int, float]:
        better = better_than(dices[0], {n: each for n, each in dices.items() if n})
        winner = max(better, key=better.__getitem__, default=0)
        return winner, float(dices[winner].mean())

    confirmed = [0, *[n for n in best.tolist() if n][:2]]
    second = Fold(rng, seed_sd).train(truths[confirmed])
    return {
        "before": before(),
        "confirm=2": present(dict(zip(confirmed, second, strict=True))),
        "confirm=0": present(dict(enumerate(trained))),
    }


def noise(seed_sd: float) -> float:
    """Standard deviation of the values of equally good trials on the same images."""
    return float(Fold(np.random.default_rng(0), seed_sd).train(np.zeros(200)).mean(axis=1).std())


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--studies", type=int, default=1000)
    options.add_argument("--seed_sd", type=float, default=0.0022)
    chosen = options.parse_args()
    print(f"{chosen.studies} studies a row; equally good trials differ by {noise(chosen.seed_sd):.4f}\n")
    print("| trials | settings | rule | others win | worse than as given | mean gain | value too high by |")
    print("|---|---|---|---|---|---|---|")
    for trials in TRIALS:
        for case, draw in CASES.items():
            rng = np.random.default_rng([trials, len(case)])
            ends: dict[str, list[tuple[int, float, float]]] = {}
            for _ in range(chosen.studies):
                truths = draw(rng, trials)
                for rule, (winner, value) in study(rng, truths, chosen.seed_sd).items():
                    ends.setdefault(rule, []).append((winner, truths[winner], value - truths[winner]))
            for rule, rows in ends.items():
                winners, gains, excess = np.array(rows).T
                print(
                    f"| {trials} | {case} | {rule} | {(winners > 0).mean():.1%} | {(gains < 0).mean():.1%} |"
                    f" {gains.mean():+.4f} | {excess.mean():+.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
