"""Dice of this package beside torchmetrics and MONAI: the same numbers, their time, and empty masks.

Run in the project's environment: python benchmarks/dice.py [--images 160]

The masks are drawn: ellipses of 1024 x 1024 pixels and predictions that are shifted, larger, empty or equal.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from measure import machine
from monai.metrics import compute_dice
from numpy.typing import NDArray
from torchmetrics.functional.segmentation import dice_score

from pneumo_experiments.metrics.dice import dice

SIDE = 1024
BATCH = 16  # masks at once for the libraries that take batches; the best of 1, 4, 16 and 64 differ little
ROUNDS = 5

Masks = NDArray[np.bool_]
Measure = Callable[[Masks, Masks], list[float]]


def ours(truths: Masks, predictions: Masks) -> list[float]:
    return [dice(truth, prediction) for truth, prediction in zip(truths, predictions, strict=True)]


def _batches(masks: Masks) -> list[torch.Tensor]:
    return [torch.from_numpy(masks[start : start + BATCH])[:, None] for start in range(0, len(masks), BATCH)]


def torchmetrics(truths: Masks, predictions: Masks) -> list[float]:
    values: list[float] = []
    for truth, prediction in zip(_batches(truths), _batches(predictions), strict=True):
        values += dice_score(
            prediction, truth, num_classes=1, input_format="one-hot", average="micro"
        ).tolist()
    return values


def monai(truths: Masks, predictions: Masks, ignore_empty: bool = True) -> list[float]:
    values: list[float] = []
    for truth, prediction in zip(_batches(truths), _batches(predictions), strict=True):
        values += compute_dice(prediction, truth, ignore_empty=ignore_empty).flatten().tolist()
    return values


def monai_with_empty(truths: Masks, predictions: Masks) -> list[float]:
    return monai(truths, predictions, ignore_empty=False)


MEASURES: dict[str, Measure] = {
    "pneumo_experiments": ours,
    "torchmetrics `dice_score`": torchmetrics,
    "MONAI `compute_dice`": monai,
    "MONAI, `ignore_empty=False`": monai_with_empty,
}


def ellipse(x: float, y: float, width: float, height: float) -> Masks:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((columns - x) / width) ** 2 + ((rows - y) / height) ** 2 <= 1


def pairs(images: int) -> tuple[Masks, Masks]:
    """Truths and predictions (n, 1024, 1024): one in five of either is empty."""
    rng = np.random.default_rng(0)
    truths, predictions = (np.zeros((images, SIDE, SIDE), bool) for _ in range(2))
    for image in range(images):
        x, y, width, height = rng.uniform((300, 300, 20, 40), (700, 700, 120, 250))
        if rng.random() > 0.2:
            truths[image] = ellipse(x, y, width, height)
        if rng.random() > 0.2:
            predictions[image] = ellipse(x + rng.normal(0, 20), y, width * rng.uniform(0.7, 1.4), height)
    return truths, predictions


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=160)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore", module="torchmetrics")  # about another default of average
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchmetrics", "monai"))
    print(f"{machine()}, {versions}, {torch.get_num_threads()} threads, {chosen.images} pairs.\n")
    truths, predictions = pairs(chosen.images)
    reference = np.array(ours(truths, predictions))
    seconds = dict.fromkeys(MEASURES, math.inf)
    for _ in range(ROUNDS):  # in turn, so that other work on the machine meets all of them
        for name, measure in MEASURES.items():
            start = time.perf_counter()
            measure(truths, predictions)
            seconds[name] = min(seconds[name], time.perf_counter() - start)

    empty, filled = np.zeros((1, SIDE, SIDE), bool), ellipse(500, 500, 100, 100)[None]
    cases = {"both": (empty, empty), "truth": (empty, filled), "prediction": (filled, empty)}
    print("| | ms a pair | defined | largest difference | both empty | truth empty | prediction empty |")
    print("|---|---|---|---|---|---|---|")
    for name, measure in MEASURES.items():
        values = np.array(measure(truths, predictions))
        defined = ~np.isnan(values)
        difference = np.abs(values - reference)[defined].max()
        assert difference < 1e-6, f"{name} differs from ours by up to {difference:.2g}"
        told = [f"{measure(*case)[0]:g}" for case in cases.values()]
        print(
            f"| {name} | {seconds[name] / chosen.images * 1000:.2f} | {defined.sum()} of {len(values)} |"
            f" {difference:.1g} | {' | '.join(told)} |"
        )
    print("\nThe time is the shortest of five rounds; MONAI and torchmetrics take 16 masks at once.")


if __name__ == "__main__":
    main()
