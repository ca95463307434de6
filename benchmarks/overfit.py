"""Overfits a handful of real radiographs: proof of loss, masks and geometry on real pixels.

python benchmarks/overfit.py siim/dicom-images-train siim/train-rle.csv

Trains on every image without changing it, on small images first because they pass sooner, and scores the same
images at their own size. A Dice on positives well below the ceiling, which is printed for each image size,
would mean that some part of the way from the file to the mask is wrong. The ceiling is what free logits
reach that are fitted to the true masks on the networks' own grid: one value per 8 pixels is too coarse for a
thin pneumothorax on a small image. Writes overlays.png.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import machine
from PIL import Image
from torch.nn import functional

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.figures import contact_sheet, overlay
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.learning.fit import fit
from pneumo_experiments.learning.loader import StreamedData
from pneumo_experiments.learning.network import build_network
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.metrics.scores import Scores
from pneumo_experiments.metrics.thresholds import Thresholds, apply_thresholds, best_on_grid
from pneumo_experiments.settings import Device, ImageFormat, Preprocess, Recipe, SourceFiles, from_flat
from pneumo_experiments.stages.preprocess import preprocess

ENOUGH = 0.9
EVERY = 10  # epochs between two evaluations
STRIDE = 8  # pixels of the image per value of the network's output, before upsampling


def main() -> None:
    """Reads the options, trains at each size in turn, and tells whether it was enough."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dicom_dir", type=Path)
    parser.add_argument("rle_csv", type=Path)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[128, 256, 384],
        help="sides of the images, in turn",
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[60, 50, 75], help="at each of the sizes")
    parser.add_argument("--picture", type=Path, default=Path("overlays.png"))
    arguments = parser.parse_args()
    values = {"weights": "none", "augment": False, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.1}
    recipe = from_flat(Recipe, values | {"positive_fraction": 0.0})
    predictor = Predictor(
        build_network(recipe.network.network, "none", recipe.seed), choose_compute(Device())
    )
    print(f"{machine()}, {predictor.compute.device}, {predictor.compute.precision}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        start, dice = time.perf_counter(), 0.0
        for size, epochs in zip(arguments.sizes, arguments.epochs, strict=True):
            path = Path(folder) / f"{size}.h5"
            preprocess(
                Preprocess(
                    source=SourceFiles(arguments.dicom_dir, arguments.rle_csv),
                    dataset=path,
                    format=ImageFormat(size),
                )
            )
            with Dataset.open(path) as dataset:
                everything = Subset(dataset, np.arange(len(dataset)))
                overfit(everything, predictor, recipe, epochs, start)
                dice = draw(everything, predictor, arguments.picture)
            print(f"{size} px: Dice on positives {dice:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    verdict = "enough" if dice >= ENOUGH else "NOT enough"
    print(f"Dice on positives {dice:.4f}: {verdict} ({ENOUGH}); {arguments.picture}")


def overfit(everything: Subset, predictor: Predictor, recipe: Recipe, epochs: int, start: float) -> None:
    """Trains on all images of the data set, and scores them every few epochs."""
    dataset = everything.dataset
    present = np.array([entry.area_px > 0 for entry in everything.entries])
    data = StreamedData(dataset, everything.indices, present).load("cpu")
    print(
        f"{dataset.image_size} px, {len(dataset)} images, {present.sum()} positive;"
        f" ceiling of the Dice on positives {ceiling(dataset):.4f}",
        flush=True,
    )
    for epoch in fit(predictor, data, recipe, epochs):
        if epoch.number % EVERY:
            continue
        scores, _ = scored(everything, predictor)
        print(
            f"epoch {epoch.number:3}  loss {epoch.losses['total']:.4f}  Dice {scores.dice:.4f}"
            f"  on positives {scores.dice_positive:.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )


def draw(everything: Subset, predictor: Predictor, picture: Path) -> float:
    """Draws every image with truth and prediction, and returns the Dice on positives."""
    dataset = everything.dataset
    scores, thresholds = scored(everything, predictor)
    drawn: list[np.ndarray] = []
    for index, prediction in everything.predictions(predictor):
        truth = dataset.mask(index)
        mask = apply_thresholds(to_native(prediction.mask, truth.shape), prediction.presence, thresholds)
        drawn.append(
            overlay(dataset.images(np.array([index]))[0], truth, mask, f"{np.count_nonzero(mask):,} px")
        )
    Image.fromarray(contact_sheet(drawn, columns=5)).save(picture)
    return scores.dice_positive


def ceiling(dataset: Dataset) -> float:
    """Mean Dice over the positives of free logits on the networks' grid, fitted to each true mask."""
    side = dataset.image_size
    dice: list[float] = []
    for index, entry in enumerate(dataset.entries):
        if entry.area_px == 0:
            continue
        mask = dataset.mask(index)
        truth = torch.from_numpy(mask).float()[None, None]
        target = functional.interpolate(truth, size=(side, side), mode="area")
        logits = torch.zeros(1, 1, side // STRIDE, side // STRIDE, requires_grad=True)
        prediction = torch.zeros_like(target)
        optimizer = torch.optim.Adam([logits], lr=0.3)
        for _ in range(400):
            prediction = functional.interpolate(logits, size=(side, side), mode="bilinear").sigmoid()
            overlap = 2 * (prediction * target).sum() / (prediction.sum() + target.sum())
            loss = functional.binary_cross_entropy(prediction, target) - overlap
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        native = to_native(prediction[0, 0].detach().numpy(), mask.shape) >= 0.5
        dice.append(2 * np.count_nonzero(native & mask) / (np.count_nonzero(native) + np.count_nonzero(mask)))
    return float(np.mean(dice))


def scored(subset: Subset, predictor: Predictor) -> tuple[Scores, Thresholds]:
    """Scores at native size, at the best thresholds of the coarse grid."""
    counts = subset.count(predictor)
    thresholds = best_on_grid(counts)
    return Evaluation(subset, counts, thresholds).scores, thresholds


if __name__ == "__main__":
    main()
