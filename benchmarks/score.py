"""What the choice of thresholds costs: the exact search, scoring from pixels, and an Optuna study.

Run in the project's environment: python benchmarks/score.py [--images 2400] [--trials 500]

The counts are synthetic, with the challenge's fraction of positives and its areas. Prints Markdown.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from measure import machine
from numpy.typing import NDArray

from pneumo_experiments.scoring.exact import best_of_all
from pneumo_experiments.scoring.metrics import dice
from pneumo_experiments.scoring.thresholds import (
    HUNDREDTHS,
    ThresholdCounts,
    Thresholds,
    apply_thresholds,
    best_on_grid,
)

SIDE = 1024
POSITIVES, MEDIAN_AREA, LOG_DEVIATION = 0.2215, 8630, 1.1  # of the challenge's labels
PIXEL_IMAGES = 16  # scored from pixels


def synthetic_counts(images: int, seed: int) -> ThresholdCounts:
    """Counts of n images 1024 x 1024: most positives are found in part, some negatives have false alarms."""
    rng = np.random.default_rng(seed)
    positive = rng.random(images) < POSITIVES
    area = np.exp(rng.normal(np.log(MEDIAN_AREA), LOG_DEVIATION, images)).clip(55, 161_421) * positive
    highest = np.where(positive, rng.beta(3, 1, images), rng.beta(1.5, 1.5, images))  # largest probability
    remaining = (1 - HUNDREDTHS / highest[:, None]).clip(0)  # falls to 0 at the largest probability
    overlap = area[:, None] * remaining ** rng.uniform(0.2, 2, (images, 1))
    stray = np.where(positive, area, np.exp(rng.normal(7.5, 1.5, images)))[:, None] * rng.random((images, 1))
    outside = stray * remaining ** rng.uniform(1, 4, (images, 1))
    counts = np.stack([overlap + outside, overlap], axis=1).astype(np.int32)
    counts[:, 0, 0], counts[:, 1, 0] = SIDE * SIDE, area  # every pixel reaches 0
    presence = 1 / (1 + np.exp(-rng.normal(np.where(positive, 1, -1.5), 1.4)))
    whole = ThresholdCounts()
    whole.append(counts, presence.astype(np.float32))
    return whole


def synthetic_pixels(images: int, seed: int) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Probabilities and truth (1024, 1024) of n images."""
    rng = np.random.default_rng(seed)
    pixels: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []
    for _ in range(images):
        truth = np.zeros((SIDE, SIDE), bool)
        truth[200:300, 300:386] = rng.random() < POSITIVES
        pixels.append((np.clip(rng.random((SIDE, SIDE), np.float32) * 0.5 + 0.4 * truth, 0, 1), truth))
    return pixels


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=2400)
    options.add_argument("--trials", type=int, default=500)
    chosen = options.parse_args()
    print(f"{machine()}, NumPy {np.__version__}, {chosen.images} images.\n")

    counts = synthetic_counts(chosen.images, seed=0)
    start = time.perf_counter()
    optimum = best_of_all(counts)
    exact_s = time.perf_counter() - start
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    start = time.perf_counter()
    on_grid = best_on_grid(counts)
    grid_s = time.perf_counter() - start

    pixels = synthetic_pixels(PIXEL_IMAGES, seed=0)
    rules = Thresholds()
    start = time.perf_counter()
    for probability, truth in pixels:
        dice(truth, apply_thresholds(probability, 1.0, rules))
    pixels_s = (time.perf_counter() - start) / PIXEL_IMAGES * chosen.images

    from pneumo_experiments.experiment.threshold_search import search_thresholds  # torch, Optuna

    start = time.perf_counter()
    study = search_thresholds(counts, chosen.trials, seed=0).as_metrics()
    study_s = time.perf_counter() - start - exact_s  # it runs the exact search as well

    each_s = exact_s / optimum.combinations
    print("| | seconds | mean Dice found |\n|---|---|---|")
    print(f"| exact search, {optimum.combinations:.2g} combinations | {exact_s:.2f} | {optimum.dice:.4f} |")
    print(f"| coarse grid | {grid_s:.2f} | {counts.dice(on_grid).mean():.4f} |")
    print(
        f"| Optuna, {chosen.trials} trials | {study_s:.2f} | {study['threshold_dice_optuna']:.4f} |\n\n"
        f"Peak memory after the exact search, the whole process: {peak_gb:.2f} GB. The exact search takes"
        f" {each_s:.1e} s per combination.\nScoring one combination from pixels takes {pixels_s:.2f} s"
        f" ({pixels_s / chosen.images * 1000:.2f} ms an image), {pixels_s / each_s:.1g} times as long."
    )


if __name__ == "__main__":
    main()
