"""How far scores can be trusted whose thresholds were chosen on the same images.

Run in the project's environment: python benchmarks/optimism.py [--repeats 200]

The images are drawn from a synthetic population with the challenge's fraction of positives and areas, those
of benchmarks/score.py. Prints Markdown.
"""

from __future__ import annotations

import argparse

import numpy as np
from measure import machine
from score import synthetic_counts

from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid, cross_fitted

POPULATION = 20_000
IMAGES = (40, 200, 2000)  # that choose thresholds


def exact(counts: ThresholdCounts) -> Thresholds:
    return best_of_all(counts).thresholds


def optimism(population: ThresholdCounts, repeats: int) -> None:
    """Dice of thresholds on the images that chose them, by another half of these, and on the population."""
    print(
        "| images | thresholds | on the images that chose them | cross-fitted, 2 parts | on the population |"
    )
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for images in IMAGES:
        for name, choose in {"coarse grid": best_on_grid, "exact optimum": exact}.items():
            dices = np.empty((repeats, 3))
            for repeat in range(repeats):
                drawn = population.rows(rng.choice(POPULATION, images, replace=False))
                thresholds = choose(drawn)
                dices[repeat] = (
                    drawn.dice(thresholds).mean(),
                    cross_fitted(drawn, np.arange(images) % 2, choose).dice,
                    population.dice(thresholds).mean(),
                )
            here, crossed, true = dices.mean(axis=0)
            print(
                f"| {images:,} | {name} | {here:.4f} ({here - true:+.4f}) |"
                f" {crossed:.4f} ({crossed - true:+.4f}) | {true:.4f} |",
                flush=True,
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=200)
    repeats = options.parse_args().repeats
    print(f"{machine()}, NumPy {np.__version__}, {repeats} repeats.\n")
    optimism(synthetic_counts(POPULATION, seed=1), repeats)


if __name__ == "__main__":
    main()
