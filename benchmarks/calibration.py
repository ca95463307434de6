"""What the calibration of presence is worth: expected calibration error and mean presence before and after.

Run in the project's environment: python benchmarks/calibration.py [--model MODEL --dataset FILE]

First a simulated head that knows Bayes' rule exactly at the fraction of positives of its batches, on images
with that of the challenge: what is left is the batches' prior alone, with and without logits that are too
large. The calibration is fitted on validation images and judged on 5,000 others. With --model and --dataset
then a trained model on its hold-out, without and with its calibration. Prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine

from pneumo_experiments.learning.calibration import Calibration, fit_calibration
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.dice import calibration_error

PREVALENCE = 0.22  # of the challenge's images
BATCHES = (0.8, 0.6, 0.4)  # fractions of positives, from the first epoch to the last
OVERCONFIDENCE = (1.0, 2.0)  # factors of the log-odds
VALIDATION = (200, 2000)
FRESH, SEPARATION = 5000, 1.5  # images; distance of the classes in standard deviations


def head(
    images: int, batches: float, factor: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Presence (n,) by Bayes' rule for two normal distributions at the batches' prior; and truth (n,)."""
    truth = rng.random(images) < PREVALENCE
    evidence = rng.normal(truth * SEPARATION, 1.0)
    log_odds = SEPARATION * evidence - SEPARATION**2 / 2 + np.log(batches / (1 - batches))
    return (1 / (1 + np.exp(-factor * log_odds))).astype(np.float32), truth


def applied(calibration: Calibration, presence: np.ndarray) -> np.ndarray:
    network: Any = torch.nn.Identity()  # it is not asked
    predictor = Predictor(network, ComputeConfig(torch.device("cpu"), "fp32"), calibration=calibration)
    return predictor.calibrated(torch.from_numpy(presence)).numpy()


def error(truth: np.ndarray, presence: np.ndarray) -> float:
    return float(calibration_error(truth, presence, np.ones((1, len(truth))))[0])


def simulated(repeats: int) -> None:
    print(f"Simulated head, prevalence {PREVALENCE}, {FRESH:,} fresh images, means of {repeats} repeats.\n")
    print("| batches | log-odds times | validation images | ECE | calibrated | mean presence | calibrated |")
    print("|---|---|---|---|---|---|---|")
    for batches in BATCHES:
        for factor in OVERCONFIDENCE:
            for images in VALIDATION:
                rng, rows = np.random.default_rng(0), list[tuple[float, ...]]()
                for _ in range(repeats):
                    presence, truth = head(images, batches, factor, rng)
                    calibration = fit_calibration(presence, truth, PREVALENCE)
                    raw, truth = head(FRESH, batches, factor, rng)
                    after = applied(calibration, raw)
                    rows.append((error(truth, raw), error(truth, after), raw.mean(), after.mean()))
                before, now, mean, moved = np.mean(rows, axis=0)
                print(
                    f"| {batches:.0%} | {factor:g} | {images} | {before:.3f} | {now:.3f} | {mean:.2f} |"
                    f" {moved:.2f} |",
                    flush=True,
                )


def of_model(address: str, path: Path) -> None:
    from pneumo_experiments.dataset.hdf5 import Dataset
    from pneumo_experiments.evaluation.load_models import load_models
    from pneumo_experiments.evaluation.subset import Subset, make_split
    from pneumo_experiments.settings import Device

    detector = load_models(address, path, Device())
    print(f"\n{address} on its hold-out of {path}.\n")
    print("| calibration | images | positive | ECE | mean presence |\n|---|---|---|---|---|")
    with Dataset.open(path) as dataset:
        holdout = Subset(dataset, make_split(dataset, detector.members[0].split).holdout)
        for name in ("none", "the model's"):
            ensemble = detector.predictor
            if name == "none":
                members = [replace(member, calibration=Calibration()) for member in ensemble.members]
                ensemble = replace(ensemble, members=tuple(members))
            counts = holdout.count(ensemble, desc=name)
            truth = counts.truth_area > 0
            print(
                f"| {name} | {len(counts)} | {truth.mean():.3f} | {error(truth, counts.presence):.3f} |"
                f" {counts.presence.mean():.3f} |"
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--model", default="")
    options.add_argument("--dataset", type=Path, default=Path("output/dataset.h5"))
    options.add_argument("--repeats", type=int, default=20)
    given = options.parse_args()
    print(f"{machine()}, NumPy {np.__version__}.\n")
    simulated(given.repeats)
    if given.model:
        of_model(given.model, given.dataset)


if __name__ == "__main__":
    main()
