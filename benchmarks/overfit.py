"""Learns a handful of real radiographs by heart: proof of loss, masks and geometry on real pixels.

python benchmarks/overfit.py siim/dicom-images-train siim/train-rle.csv

Trains on every image without changing it and judges the same images at their own size. A Dice on positives
below 0.9 would mean that some part of the way from the file to the outline is wrong. Writes overlays.png.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import machine
from PIL import Image

from pneumo_experiments.data.store import Dataset
from pneumo_experiments.learning.device import choose_machine
from pneumo_experiments.learning.fit import fit
from pneumo_experiments.learning.loader import load
from pneumo_experiments.learning.network import build
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.scoring.figures import contact_sheet, overlay
from pneumo_experiments.scoring.scores import Scores
from pneumo_experiments.scoring.thresholds import Thresholds, best_on_grid, outline
from pneumo_experiments.settings import Preprocess, Recipe
from pneumo_experiments.stages.cohort import Cohort
from pneumo_experiments.stages.preprocess import preprocess

ENOUGH = 0.9
EVERY = 5  # epochs between two judgements


def main() -> None:
    """Reads the options, trains until it is enough or the epochs are over, and tells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dicom_dir", type=Path)
    parser.add_argument("rle_csv", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--picture", type=Path, default=Path("overlays.png"))
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "real.h5"
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        preprocess(
            Preprocess(
                dicom_dir=wishes.dicom_dir, rle_csv=wishes.rle_csv, dataset=path, image_size=wishes.size
            )
        )
        with Dataset.open(path) as dataset:
            overfit(dataset, wishes)


def overfit(dataset: Dataset, wishes: argparse.Namespace) -> None:
    """Trains on all images of the data set, judges them every few epochs, and draws them at the end."""
    recipe = Recipe(weights="none", augment=False, batch_size=4, learning_rate=1e-3, positive_share=0)
    everything = Cohort(dataset, np.arange(len(dataset)))
    present = np.array([entry.area_px > 0 for entry in everything.entries])
    examples = load(dataset, everything.indices, present, dataset.image_size, "cpu")
    place = choose_machine(recipe)
    predictor = Predictor(build(recipe.network, recipe.weights, recipe.seed), place)
    print(f"{machine()}, {place.device}, {place.precision}; {len(present)} images, {present.sum()} positive")
    start = time.perf_counter()
    for epoch in fit(predictor.network, examples, recipe, wishes.epochs, place):
        if epoch.number % EVERY and epoch.number < wishes.epochs:
            continue
        scores, thresholds = judged(everything, predictor)
        print(
            f"epoch {epoch.number:3}  loss {epoch.losses['loss']:.4f}  Dice {scores.dice:.4f}"
            f"  on positives {scores.dice_positive:.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    scores, thresholds = judged(everything, predictor)
    drawn: list[np.ndarray] = []
    for index, answer in everything.predictions(predictor):
        truth = dataset.mask(index)
        mask = outline(to_native(answer.mask, truth.shape), answer.presence, thresholds)
        drawn.append(
            overlay(dataset.images(np.array([index]))[0], truth, mask, f"{np.count_nonzero(mask):,} px")
        )
    Image.fromarray(contact_sheet(drawn, columns=5)).save(wishes.picture)
    verdict = "enough" if scores.dice_positive >= ENOUGH else "NOT enough"
    print(f"Dice on positives {scores.dice_positive:.4f}: {verdict} ({ENOUGH}); {wishes.picture}")


def judged(cohort: Cohort, predictor: Predictor) -> tuple[Scores, Thresholds]:
    """Scores at native size, at the best thresholds of the coarse grid."""
    tally = cohort.tally(predictor)
    thresholds = best_on_grid(tally)
    return cohort.score(tally, thresholds), thresholds


if __name__ == "__main__":
    main()
