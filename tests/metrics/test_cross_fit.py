"""Dice with thresholds that were chosen on other patients, against pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from reference_counts import add_image
from samples import write

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.metrics.cross_fit import best_dice_on_positives, cross_fitted
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.thresholds import ThresholdCounts, apply_thresholds, best_on_grid
from pneumo_experiments.search.trial_training import _halves

Image = tuple[NDArray[np.float32], float, NDArray[np.bool_]]  # probability, presence, truth


def counted(images: list[Image]) -> ThresholdCounts:
    counts = ThresholdCounts()
    for image in images:
        add_image(counts, *image)
    return counts


def random_images(count: int, seed: int, side: int = 20) -> list[Image]:
    """Every other one with a square of truth, where the probability tends to be higher."""
    rng, images = np.random.default_rng(seed), list[Image]()
    for number in range(count):
        truth = np.zeros((side, side), bool)
        truth[4:12, 4 : 8 + number % 5] = number % 2 == 0
        probability = np.clip(rng.normal(0.3, 0.2, truth.shape) + 0.3 * truth, 0, 1).astype(np.float32)
        images.append((probability, float(np.clip(rng.normal(0.3 + 0.3 * truth.any(), 0.2), 0, 1)), truth))
    return images


def slow(images: list[Image], half: NDArray[np.int64]) -> list[float]:
    """Dice of each image from the pixels of its mask, with the thresholds of the other half."""
    dices = list[float]()
    for (probability, presence, truth), own in zip(images, half, strict=True):
        others = [image for image, other in zip(images, half, strict=True) if other != own]
        mask = apply_thresholds(probability, presence, best_on_grid(counted(others)))
        dices.append(float(dice(mask, truth)))
    return dices


@pytest.mark.parametrize("seed", range(4))
def test_each_half_is_scored_with_the_thresholds_of_the_other(seed: int) -> None:
    images = random_images(14, seed)
    half = np.random.default_rng(seed).integers(0, 2, 14)
    scores, dices = cross_fitted(counted(images), half), slow(images, half)
    positive = [d for d, (_, _, truth) in zip(dices, images, strict=True) if truth.any()]
    assert scores.dice == pytest.approx(np.mean(dices), abs=1e-12)
    assert scores.dice_positive == pytest.approx(np.mean(positive), abs=1e-12)
    assert not scores.is_all_empty
    alarms = [d == 0 for d, (_, _, truth) in zip(dices, images, strict=True) if not truth.any()]
    assert scores.false_alarms == sum(alarms) / 14


def test_a_lucky_threshold_does_not_win() -> None:
    """What is a finding in one half of the patients is background in the other: no thresholds suit both."""
    truth = np.zeros((10, 10), bool)
    truth[2:6, 2:6] = True
    lucky, steady = list[Image](), list[Image]()
    for number in range(8):
        score, background = (0.95, 0.4) if number % 2 else (0.3, 0.05)
        lucky.append((np.where(truth, score, background).astype(np.float32), 0.95, truth))
        steady.append((np.where(truth | (np.arange(10) == 9), 0.9, 0.1).astype(np.float32), 0.95, truth))
    half = np.arange(8) % 2
    optimistic = [
        np.mean(
            [counted(part).dice(best_on_grid(counted(part))).mean() for part in (images[::2], images[1::2])]
        )
        for images in (lucky, steady)
    ]
    assert optimistic[0] == 1 > optimistic[1]  # with its own thresholds each half of the first is perfect
    assert cross_fitted(counted(lucky), half).dice < 0.5 < cross_fitted(counted(steady), half).dice


def test_masks_that_are_all_empty_are_recognised() -> None:
    empty = np.zeros((10, 10), bool)
    truth = empty.copy()
    truth[0, 0] = True
    flat = np.full((10, 10), 0.3, np.float32)
    images: list[Image] = [(flat, 0.3, truth if number % 4 == 0 else empty) for number in range(12)]
    half = np.arange(12) % 2
    scores = cross_fitted(counted(images), half)
    assert scores.is_all_empty
    assert (scores.dice, scores.dice_positive) == (0.75, 0.0)
    none = cross_fitted(counted([(flat, 0.3, empty)] * 4), np.array([0, 0, 1, 1]))
    assert none.dice == 1
    assert np.isnan(none.dice_positive)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_dice_on_positives_is_that_of_brute_force(seed: int) -> None:
    images = random_images(9, seed)
    means = [
        np.mean([dice(p >= np.float32(k / 100), truth) for p, _, truth in images if truth.any()])
        for k in range(1, 101)
    ]
    assert best_dice_on_positives(counted(images)) == pytest.approx(max(means), abs=1e-12)
    assert best_dice_on_positives(counted([i for i in images if not i[2].any()])) == 0


def test_no_patient_is_in_both_halves_and_each_has_positives(tmp_path: Path) -> None:
    write(tmp_path / "d.h5", count=24)  # two images a patient
    with Dataset.open(tmp_path / "d.h5") as dataset:
        subset = Subset(dataset, np.arange(24))
        half = _halves(subset)
        halves: dict[str, set[int]] = {}
        for entry, number in zip(subset.entries, half, strict=True):
            halves.setdefault(entry.patient, set()).add(int(number))
        assert all(len(numbers) == 1 for numbers in halves.values())
        assert sorted(np.bincount(half)) == [12, 12]
        areas = np.array([entry.area_px for entry in subset.entries])
        assert (areas[half == 0] > 0).any() and (areas[half == 1] > 0).any()
        with pytest.raises(UserError, match=r"^folds: 1 patients to validate, but a search needs 2"):
            _halves(Subset(dataset, np.arange(2)))
