"""What the real labels say, and what the project's own steps cost them: about a minute.

python benchmarks/labels.py           the labels where they lie: train-rle.csv.gz beside patients.csv.gz
python benchmarks/labels.py FOLDER    another folder with the two

The radiographs are not needed; all are of 1024 x 1024 pixels.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import reduce
from itertools import combinations
from pathlib import Path

import numpy as np
from measure import REAL_DATA, machine
from tqdm import tqdm

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import read_annotations, read_patients
from pneumo_experiments.dataset.patients import shipped_grouping
from pneumo_experiments.dataset.resize import area_resize
from pneumo_experiments.dataset.splits import assign_folds, audit, split
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.loader import epoch_indices
from pneumo_experiments.learning.predict import to_native
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.settings import Batches, Recipe, SplitSettings

SHAPE = (1024, 1024)
SIZE = 384
FOLDS = 5
SEEDS = 10  # divisions by chance


def mask_of(texts: list[str], image_id: str) -> np.ndarray:
    """All annotations of one positive image in one mask, in C order as the steps below are fastest."""
    masks = [rle.decode(text, SHAPE, image_id) for text in texts]
    return np.ascontiguousarray(reduce(np.logical_or, masks))


# What becomes of a mask that is stored small and enlarged again.


def by_area(mask: np.ndarray) -> np.ndarray:
    """The project's way: area share of each small pixel as float32, enlarged bilinearly."""
    return to_native(area_resize(mask, SIZE), SHAPE) >= 0.5


def by_nearest_then_bilinear(mask: np.ndarray) -> np.ndarray:
    """The small pixel takes its middle's value; enlarged as above."""
    return to_native(nearest(mask, SIZE).astype(np.float32), SHAPE) >= 0.5


def by_nearest(mask: np.ndarray) -> np.ndarray:
    """Nearest both ways."""
    return nearest(nearest(mask, SIZE), SHAPE[0])


def nearest(mask: np.ndarray, size: int) -> np.ndarray:
    """The pixel in which the middle of each pixel of (size, size) lies."""
    middle = (2 * np.arange(size) + 1) * len(mask) // (2 * size)
    return mask[np.ix_(middle, middle)]


WAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "share of area, float32 | bilinearly, then >= 0.5": by_area,
    "nearest pixel | bilinearly, then >= 0.5": by_nearest_then_bilinear,
    "nearest pixel | nearest pixel": by_nearest,
}


def known_areas(path: Path) -> dict[str, int]:
    """Area of the united annotations of some images, counted elsewhere."""
    if not path.exists():
        return {}
    with path.open(newline="") as table:
        return {row["ImageId"]: int(row["union_area_px"]) for row in csv.DictReader(table)}


def spread(counts: list[int]) -> str:
    """Counts, and by how many percent the most exceeds the least."""
    return f"{', '.join(map(str, counts))} (the most is {max(counts) / min(counts) - 1:.1%} above the least)"


def percent(targets: list[float]) -> str:
    """Mean of some shares, and their range."""
    return f"{np.mean(targets):.1%} ({min(targets):.1%} to {max(targets):.1%})"


def main() -> None:
    """Prints the facts and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=REAL_DATA / "labels")
    folder: Path = parser.parse_args().folder
    annotations = read_annotations(folder / "train-rle.csv.gz")
    patient_of = read_patients(folder / "patients.csv.gz")
    patients = [patient_of.get(image_id, image_id) for image_id in annotations]
    area_of = dict.fromkeys(annotations, 0)
    dices: dict[str, list[float]] = {name: [] for name in WAYS}
    positives = {image_id: texts for image_id, texts in annotations.items() if texts}
    for image_id, texts in tqdm(positives.items(), desc="positives", unit="image", leave=False):
        mask = mask_of(texts, image_id)
        area_of[image_id] = np.count_nonzero(mask)
        for name, way in WAYS.items():
            dices[name].append(dice(mask, way(mask)))
    areas = np.array(list(area_of.values()))
    print_labels(annotations, areas, patients)
    known = known_areas(folder.parent / "known_areas.csv")
    agreeing = sum(area_of.get(image_id) == area for image_id, area in known.items())
    print(f"- united area as counted in known_areas.csv: {agreeing} of its {len(known)} images")
    print_overlaps(positives)
    print_balance(patients, areas)
    print_folds(patients, areas)
    print_holdout(list(annotations), patients, areas)
    print(f"\n{len(positives):,} positive masks, stored at {SIZE} x {SIZE}, enlarged to their own size:\n")
    print("| stored as | enlarged | mean Dice with the truth | least, and the area of that mask |")
    print("|---|---|---|---|")
    found = areas[areas > 0]
    for name, values in dices.items():
        least = int(np.argmin(values))
        print(f"| {name} | {np.mean(values):.4f} | {values[least]:.4f}, {found[least]:,} px |")


def print_labels(annotations: dict[str, list[str]], areas: np.ndarray, patients: list[str]) -> None:
    """What the tables hold."""
    rows = sum(max(1, len(texts)) for texts in annotations.values())
    positive = sum(map(bool, annotations.values()))
    print(f"{machine()}\n")
    print(
        f"- {rows:,} rows, {len(annotations):,} images of {len(set(patients)):,} patients,"
        f" {positive:,} positive"
    )
    print(f"- decoded to a mask with pixels: {np.count_nonzero(areas):,} of {positive:,} positives")
    print(f"- mean Dice of all-empty answers: {np.mean(areas == 0):.4f}")


def print_overlaps(positives: dict[str, list[str]]) -> None:
    """How many images two people may have annotated: a pair of rows of the same place."""
    several = {image_id: texts for image_id, texts in positives.items() if len(texts) > 1}
    best = list[float]()
    for image_id, texts in several.items():
        masks = [rle.decode(text, SHAPE, image_id) for text in texts]
        common = [(np.count_nonzero(a & b), np.count_nonzero(a | b)) for a, b in combinations(masks, 2)]
        best.append(max(inside / union for inside, union in common))
    overlaps = np.array([iou for iou in best if iou])
    print(
        f"- {len(several)} positives with several rows; in {len(overlaps)} two rows overlap"
        f" (median IoU of the best pair {np.median(overlaps):.2f}), in {(overlaps >= 0.3).sum()} with IoU 0.3"
        f" and more, in {(overlaps >= 0.5).sum()} with 0.5 and more:"
        f" {(overlaps >= 0.5).sum() / len(positives):.1%} of the positives"
    )


def print_balance(patients: list[str], areas: np.ndarray) -> None:
    """Draws of positives of the tenth of the ill patients with the most, in the first fold's training."""
    chosen = SplitSettings()
    training = split(
        patients, areas, holdout=chosen.holdout, folds=chosen.folds, fold=0, seed=chosen.split_seed
    ).train
    present = areas[training] > 0
    _, numbers = np.unique(np.array(patients)[training], return_inverse=True)
    counts = np.bincount(numbers[present])
    ill = np.count_nonzero(counts)
    top = np.argsort(-counts, kind="stable")[: round(ill / 10)]
    print(
        f"- {present.sum():,} positives in training, of {ill} patients; draws that fall on the {len(top)}"
        " with the most, in epoch 1 of 30:"
    )
    for balance in ("image", "patient"):
        recipe = Recipe(batches=Batches(balance=balance))
        order = epoch_indices(present, recipe, 1, 30, numbers)
        print(f"  - balance={balance}: {np.isin(numbers[order[present[order]]], top).mean():.1%}")


def print_folds(patients: list[str], areas: np.ndarray) -> None:
    """The project's folds, and folds by chance."""
    start = time.perf_counter()
    folds = assign_folds(patients, areas, FOLDS, seed=0)
    seconds = time.perf_counter() - start
    ours = audit(patients, areas, folds)
    print(f"- {FOLDS} folds of the project, in {seconds:.2f} s: {ours.shared_patients} patients in two folds")
    print(f"  - images per fold: {spread([part.images for part in ours.parts])}")
    print(f"  - positives per fold: {spread([part.positives for part in ours.parts])}")
    medians = [round(part.area_deciles_px[4]) for part in ours.parts]
    print(f"  - median area of the positives, px: {spread(medians)}")

    images_of = Counter(patients)
    several = sum(images_of[patient] > 1 for patient in patients)
    by_chance = [
        audit(patients, areas, np.random.default_rng(seed).permutation(len(patients)) % FOLDS)
        for seed in range(SEEDS)
    ]
    print(
        f"- {FOLDS} equal folds by chance, whoever the patients are ({SEEDS} seeds: mean, least to most);"
        " images whose patient also has an image in another fold:"
    )
    print(f"  - of all {len(patients):,} images: {percent([one.separated_share for one in by_chance])}")
    targets = [one.separated_images / several for one in by_chance]
    print(f"  - of the {several:,} images whose patient has two or more: {percent(targets)}")


def print_holdout(image_ids: list[str], patients: list[str], areas: np.ndarray) -> None:
    """The hold-out of the default settings with the table that ships, and where each file is a patient."""
    chosen, names = SplitSettings(), np.array(patients)
    shipped = shipped_grouping(image_ids).hashes
    groupings = {
        "the table that ships": [shipped.get(image_id, image_id) for image_id in image_ids],
        "PatientID, of which each file has its own": image_ids,
    }
    for source, grouping in groupings.items():
        parts = split(
            grouping,
            areas,
            holdout=chosen.holdout,
            folds=chosen.folds,
            fold=int(chosen.fold),
            seed=chosen.split_seed,
        )
        sibling = np.isin(names[parts.holdout], names[parts.train])
        positive = areas[parts.holdout] > 0
        print(
            f"- hold-out of {len(parts.holdout):,} images by {source}; their patient has another image in"
            f" training: {sibling.mean():.1%} of all, {sibling[positive].mean():.1%} of the positives"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
