"""The Dice that the networks' grid allows: on real masks, for image sizes and strides. Some minutes.

python benchmarks/ceiling.py           the labels where they lie: train-rle.csv.gz
python benchmarks/ceiling.py FOLDER    another folder with them

A network of stride 8 predicts one value per 8 x 8 pixels of its image. These logits are upsampled bilinearly
to the radiograph, whose mask are the pixels with a probability of at least 0.5. Here free logits are fitted to
each true mask: their Dice is about the most that any network with that grid reaches. Positives are drawn in
equal numbers from the thirds by area. The radiographs are not needed; all are of 1024 x 1024 pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from labels import REAL_DATA, SHAPE, mask_of
from measure import machine
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.errors import UserError

SIZES, STRIDES = (128, 256, 384, 512), (8, 4)
THIRDS = ("smallest", "middle", "largest")
STEPS = 150  # of Adam
EVERY = 25  # steps between two looks at the Dice
START = 6.0  # logit where the mask covers all of a cell; minus that where none of it


@cache
def upsampling(side: int) -> Tensor:
    """Matrix (1024, side) that interpolates values linearly as the networks do along each axis."""
    return functional.interpolate(torch.eye(side)[None], size=SHAPE[0], mode="linear")[0].T


def around(is_marked: np.ndarray, side: int) -> tuple[slice, slice]:
    """Cells and pixels along an axis (1024,) from the first to the last marked pixel, with a margin of two cells."""
    cell = SHAPE[0] // side
    marked = np.flatnonzero(is_marked) // cell
    first, last = max(0, marked[0] - 2), min(side, marked[-1] + 3)
    return slice(first, last), slice(first * cell, last * cell)


def ceiling(mask: np.ndarray, side: int) -> float:
    """Largest Dice with a mask (1024, 1024) that was found for logits (side, side)."""
    axes = [around(mask.any(axis=1 - axis), side) for axis in (0, 1)]
    truth = torch.from_numpy(mask[axes[0][1], axes[1][1]]).float()
    down, across = (upsampling(side)[pixels, cells].contiguous() for cells, pixels in axes)
    cell = SHAPE[0] // side
    covered = functional.avg_pool2d(truth[None], cell)[0]
    logits = (START * (2 * covered - 1)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    best = 0.0
    for step in range(STEPS + 1):
        values = down @ logits @ across.T
        if step % EVERY == 0:
            marked = values.detach() >= 0
            best = max(best, float(2 * truth[marked].sum() / (marked.sum() + truth.sum())))
        probability = values.sigmoid()
        overlap = 2 * (probability * truth).sum() / (probability.sum() + truth.sum())
        loss = functional.binary_cross_entropy_with_logits(values, truth) - overlap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def drawn(areas: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Indices of the masks drawn from each third of ``areas`` (n,), smallest first."""
    rng = np.random.default_rng(seed)
    thirds = np.array_split(np.argsort(areas, kind="stable"), len(THIRDS))
    return [rng.permutation(third)[: count // len(THIRDS)] for third in thirds]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=REAL_DATA / "labels")
    parser.add_argument("--images", type=int, default=150, help="positives to draw")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    annotations = read_annotations(arguments.folder / "train-rle.csv.gz")
    positives = [(texts, image_id) for image_id, texts in annotations.items() if texts]
    areas = np.array([np.count_nonzero(mask_of(*positive)) for positive in positives])
    thirds = drawn(areas, arguments.images, arguments.seed)
    print(
        f"{machine()}\n\n{sum(map(len, thirds))} of {len(areas):,} positives; thirds up to"
        f" {', '.join(f'{areas[third].max():,}' for third in thirds)} px\n"
    )
    print("| image size, px | stride | grid | mean Dice | " + " | ".join(THIRDS) + " third |")
    print("|---|---|---|---|" + "---|" * len(THIRDS))
    sides = sorted({size // stride for size in SIZES for stride in STRIDES})
    dices = {
        side: [
            np.array([ceiling(mask_of(*positives[index]), side) for index in tqdm(third, leave=False)])
            for third in thirds
        ]
        for side in sides
    }
    for stride in STRIDES:
        for size in SIZES:
            by_third = dices[size // stride]
            each = " | ".join(f"{values.mean():.3f}" for values in by_third)
            grid = f"{size // stride} × {size // stride}"
            print(f"| {size} | {stride} | {grid} | {np.concatenate(by_third).mean():.3f} | {each} |")
    print(f"\n{time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
