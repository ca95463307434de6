"""The Dice that the networks' grid allows: on real masks, for image sizes and strides. About five minutes.

python benchmarks/ceiling.py           the labels where they lie: train-rle.csv.gz
python benchmarks/ceiling.py FOLDER    another folder with them

A network of stride 8 predicts one value per 8 x 8 pixels of its image. Here free logits on that grid are
fitted to each true mask. They are upsampled bilinearly to the radiograph; where they are at least 0, which is
a probability of 0.5, is the mask. Its Dice is about the most that a network with that grid reaches: a longer
fit (--steps) finds a little more. Positives are drawn in equal numbers from the thirds by area. The
radiographs are not needed; all are of 1024 x 1024 pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from labels import SHAPE, mask_of
from measure import REAL_DATA, machine
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.errors import UserError

SIZES, STRIDES = (128, 256, 384, 512), (8, 4)
THIRDS = ("smallest", "middle", "largest")
NATIVE, FITTED = SHAPE[0], SHAPE[0] // 2  # sides; at half the native size the fit takes a third of the time
RATE = 3.0  # of Adam: the logits may grow until their sigmoid is nearly a mask
EVERY = 50  # steps between two looks at the Dice
START = 6.0  # logit where the mask covers all of a cell; minus that where none of it


@cache
def upsampling(side: int, size: int) -> Tensor:
    """Matrix (size, side) that interpolates values along an axis as the networks do."""
    return functional.interpolate(torch.eye(side)[None], size=size, mode="linear")[0].T


def around(is_marked: np.ndarray, side: int) -> tuple[slice, slice, slice]:
    """The marked part of an axis (1024,): cells with a margin of two, native and halved pixels of one."""
    marked = np.flatnonzero(is_marked) * side // NATIVE
    cells = slice(max(0, int(marked[0]) - 2), min(side, int(marked[-1]) + 3))
    first, last = max(0, int(marked[0]) - 1) * NATIVE // side, min(side, int(marked[-1]) + 2) * NATIVE // side
    halved = slice(first // 2, -(-last // 2))
    return cells, slice(2 * halved.start, 2 * halved.stop), halved


def ceiling(mask: np.ndarray, side: int, steps: int) -> float:
    """Largest Dice with a mask (1024, 1024) that was found for logits (side, side)."""
    (rows, y, half_y), (columns, x, half_x) = (
        around(np.asarray(mask.any(axis=1 - axis)), side) for axis in (0, 1)
    )
    whole = torch.from_numpy(mask).float()[None, None]
    truth, target = whole[0, 0, y, x], functional.avg_pool2d(whole, 2)[0, 0, half_y, half_x]
    down, across = upsampling(side, NATIVE)[y, rows], upsampling(side, NATIVE)[x, columns]
    half_down, half_across = upsampling(side, FITTED)[half_y, rows], upsampling(side, FITTED)[half_x, columns]
    covered = functional.interpolate(whole, size=(side, side), mode="area")[0, 0, rows, columns]
    logits = (START * (2 * covered - 1)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    best = 0.0
    for step in range(steps + 1):
        if step % EVERY == 0:
            found = down @ logits.detach() @ across.T >= 0
            best = max(best, float(2 * truth[found].sum() / (found.sum() + truth.sum())))
        values = half_down @ logits @ half_across.T
        probability = values.sigmoid()
        overlap = 2 * (probability * target).sum() / (probability.sum() + target.sum())
        loss = functional.binary_cross_entropy_with_logits(values, target) - overlap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def drawn(areas: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Indices of the masks drawn from each third of the areas (n,), the smallest first."""
    rng = np.random.default_rng(seed)
    thirds = np.array_split(np.argsort(areas, kind="stable"), len(THIRDS))
    return [rng.permutation(third)[: count // len(THIRDS)] for third in thirds]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=REAL_DATA / "labels")
    parser.add_argument("--images", type=int, default=120, help="positives to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--steps", type=int, default=200, help="of each fit")
    arguments = parser.parse_args()
    annotations = read_annotations(arguments.folder / "train-rle.csv.gz")
    positives = [(texts, image_id) for image_id, texts in annotations.items() if texts]
    areas = np.array([np.count_nonzero(mask_of(*positive)) for positive in positives])
    thirds = drawn(areas, arguments.images, arguments.seed)
    chosen = [mask_of(*positives[index]) for index in np.concatenate(thirds)]
    sides = sorted({size // stride for size in SIZES for stride in STRIDES})
    fits = [
        [ceiling(mask, side, arguments.steps) for side in sides]
        for mask in tqdm(chosen, unit="mask", leave=False)
    ]
    # Grids are the same where size / stride is.
    means = np.array(fits).reshape(len(THIRDS), -1, len(sides)).mean(axis=1)
    print(f"{machine()}, torch {torch.__version__}, {time.process_time():.0f} CPU seconds\n")
    largest = ", ".join(f"{np.sort(areas)[len(areas) * (k + 1) // 3 - 1]:,}" for k in range(len(THIRDS)))
    print(f"{len(chosen)} of {len(areas):,} positives, thirds up to {largest} px; {arguments.steps} steps\n")
    print(
        "| image size, px | stride | grid | mean Dice | "
        + " | ".join(f"{name} third" for name in THIRDS)
        + " |"
    )
    print("|---|---|---|---|" + "---|" * len(THIRDS))
    for stride in STRIDES:
        for size in SIZES:
            by_third = means[:, sides.index(size // stride)]
            grid, each = f"{size // stride} × {size // stride}", " | ".join(f"{one:.3f}" for one in by_third)
            print(f"| {size} | {stride} | {grid} | {by_third.mean():.3f} | {each} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
