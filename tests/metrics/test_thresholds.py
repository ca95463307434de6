"""Masks, counts and thresholds, against pixels."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_counts import Image, count_images, squares
from samples import write

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.thresholds import (
    AREA_GRID,
    BOTTOM_GRID,
    PRESENCE_GRID,
    TOP_GRID,
    NativeThresholds,
    Thresholds,
    apply_thresholds,
    best_dice_on_positives,
    best_on_grid,
    cross_fitted,
)
from pneumo_experiments.search.trial_training import _halves

hundredths = st.integers(0, 100).map(lambda k: k / 100)
areas = st.one_of(  # of a 1024 x 1024 radiograph; the second is what k of n pixels come to
    st.integers(0, 2**20 + 9),
    st.tuples(st.integers(1, 36), st.integers(0, 36)).map(lambda kn: kn[1] * 2**20 // kn[0]),
)
thresholds_on_grid = st.one_of(
    *(st.builds(kind, hundredths, hundredths, areas, hundredths) for kind in (Thresholds, NativeThresholds)),
    st.builds(NativeThresholds, hundredths, hundredths, st.integers(0, 30), hundredths),
)


def neighbours(k: int) -> list[np.float32]:
    """k/100 as float32, and the float32 just below and just above it, within [0, 1]."""
    exact = np.float32(k / 100)
    around = [np.nextafter(exact, np.float32(-1)), exact, np.nextafter(exact, np.float32(2))]
    return [p for p in around if 0 <= p <= 1]


tricky = st.integers(0, 100).flatmap(lambda k: st.sampled_from(neighbours(k)))
probabilities = st.one_of(tricky, st.floats(0, 1, width=32).map(np.float32))
images_with_truth = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        st.lists(probabilities, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda values: np.array(values, np.float32).reshape(shape)
        ),
        probabilities,
        st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda values: np.array(values).reshape(shape)
        ),
    )
)


def slow_mask(probability: np.ndarray, presence: float, thresholds: Thresholds) -> np.ndarray:
    """The rules of the design, pixel by pixel; thresholds are float32, as probabilities are."""
    core = Fraction(sum(1 for p in probability.flat if p >= np.float32(thresholds.top_score)))
    if not isinstance(thresholds, NativeThresholds):
        core *= Fraction(1024 * 1024, probability.size)
    if np.float32(presence) < np.float32(thresholds.presence_threshold) or core < thresholds.min_area_px:
        return np.zeros(probability.shape, bool)
    mask = [p >= np.float32(thresholds.bottom_score) for p in probability.flat]
    return np.array(mask, bool).reshape(probability.shape)


@given(st.lists(images_with_truth, min_size=1, max_size=4), thresholds_on_grid)
def test_masks_follow_the_rules_pixel_by_pixel_and_counts_give_exactly_their_dice(
    images: list[tuple[np.ndarray, np.float32, np.ndarray]], thresholds: Thresholds
) -> None:
    given = [(probability, float(presence), truth) for probability, presence, truth in images]
    counts, masks = count_images(given), [slow_mask(p, presence, thresholds) for p, presence, _ in given]
    for (probability, presence, _), mask in zip(given, masks, strict=True):
        assert np.array_equal(apply_thresholds(probability, presence, thresholds), mask)
    truths = [truth for _, _, truth in images]
    assert counts.dice(thresholds).tolist() == [dice(t, m) for t, m in zip(truths, masks, strict=True)]
    assert counts.predicted_area(thresholds).tolist() == [int(mask.sum()) for mask in masks]
    assert counts.truth_area.tolist() == [int(truth.sum()) for truth in truths]
    assert counts.presence.tolist() == [float(presence) for _, presence, _ in images]


@pytest.mark.parametrize("kind", [Thresholds, NativeThresholds])
def test_a_finding_passes_at_every_resolution_or_at_none(kind: type[Thresholds]) -> None:
    small = np.zeros((32, 32), np.float32)
    small[3:8, 10:13] = 0.8  # 15 of 1024 cells: 15,360 px of 1024 x 1024
    kept = list[list[bool]]()
    shapes = [(512, 512), (1024, 1024), (2048, 2048), (512, 2048), (96, 32), (32, 32)]
    maps = [np.kron(small, np.ones((rows // 32, columns // 32), np.float32)) for rows, columns in shapes]
    counts = count_images([(probability, 0.9, probability > 0) for probability in maps])
    for area in (0, 15_359, 15_360, 15_361):
        rules = kind(0.5, 0.7, area, 0.3)
        kept.append([bool(apply_thresholds(probability, 0.9, rules).any()) for probability in maps])
        assert (counts.predicted_area(rules) > 0).tolist() == kept[-1]
        assert counts.dice(rules).tolist() == kept[-1]
    if kind is Thresholds:
        assert kept == [[True] * 6] * 3 + [[False] * 6]
    else:  # as models of earlier versions take it
        in_native_pixels = [px >= 15_360 for px in (3_840, 15_360, 61_440, 15_360, 45, 15)]
        assert kept[2] == in_native_pixels
    best = best_of_all(counts).thresholds
    assert isinstance(best, Thresholds) and best.min_area_of == 1024
    assert counts.cores()[:, 70].tolist() == [15_360] * 6


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("presence_threshold", 1.1),
        ("presence_threshold", float("nan")),
        ("top_score", 0.123),
        ("top_score", -0.5),
        ("bottom_score", 1.01),
        ("bottom_score", float("nan")),
        ("min_area_px", -1),
    ],
)
def test_thresholds_off_the_grid_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=setting):
        Thresholds(**{setting: value})


def test_a_hundredth_that_arithmetic_left_a_little_off_is_still_that_hundredth() -> None:
    off = Thresholds(top_score=0.1 + 0.2, bottom_score=0.1 + 0.2)
    assert apply_thresholds(np.array([[0.3]], np.float32), 1.0, off).all()


def test_the_best_on_the_grid_is_what_trying_all_of_it_finds() -> None:
    counts = count_images(squares(40, seed=0, side=80))
    tried: dict[Thresholds, float] = {}
    for presence, top, area, bottom in itertools.product(PRESENCE_GRID, TOP_GRID, AREA_GRID, BOTTOM_GRID):
        if bottom <= top:
            rules = Thresholds(float(presence), float(top), int(area), float(bottom))
            tried[rules] = float(counts.dice(rules).mean())
    best = best_on_grid(counts)
    assert tried[best] == pytest.approx(max(tried.values()), abs=1e-9)
    assert tried[best] > counts.dice(Thresholds()).mean() + 0.05


def test_of_equal_thresholds_the_middle_is_taken() -> None:
    truth, images = np.zeros((100, 100), bool), list[Image]()
    truth[:, :40] = True  # 4000 px at 0.85, so each top up to 0.8, each area and each bottom is right
    for present in (0.05, 0.85):
        is_positive = present > 0.5
        images.append((np.where(truth, 0.85, 0.05).astype(np.float32), present, truth & is_positive))
    counts = count_images(images)
    best = best_on_grid(counts)
    assert counts.dice(best).tolist() == [1.0, 1.0]
    assert best.presence_threshold in (0.4, 0.5)
    assert best.top_score in (0.5, 0.6)
    assert best.min_area_px in (500, 1000)
    assert best.bottom_score in (0.3, 0.4)


def test_where_everything_is_equal_the_defaults_decide_between_two_middles() -> None:
    best = best_on_grid(count_images([(np.zeros((8, 8), np.float32), 0.0, np.zeros((8, 8), bool))]))
    assert (best.presence_threshold, best.min_area_px) == (0.5, 1000)  # of 0.4 and 0.5, of 1000 and 2000


# Thresholds that were chosen on other patients


def slow(images: list[Image], half: np.ndarray) -> list[float]:
    """Dice of each image from the pixels of its mask, with the thresholds of the other half."""
    dices = list[float]()
    for (probability, presence, truth), own in zip(images, half, strict=True):
        others = [image for image, other in zip(images, half, strict=True) if other != own]
        mask = apply_thresholds(probability, presence, best_on_grid(count_images(others)))
        dices.append(float(dice(mask, truth)))
    return dices


@pytest.mark.parametrize("seed", range(2))
def test_each_half_is_scored_with_the_thresholds_of_the_other(seed: int) -> None:
    images = squares(14, seed)
    half = np.random.default_rng(seed).integers(0, 2, 14)
    scores, dices = cross_fitted(count_images(images), half), slow(images, half)
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
    parts = [[count_images(images[start::2]) for start in (0, 1)] for images in (lucky, steady)]
    optimistic = [np.mean([part.dice(best_on_grid(part)).mean() for part in halves]) for halves in parts]
    assert optimistic[0] == 1 > optimistic[1]  # with its own thresholds each half of the first is perfect
    assert cross_fitted(count_images(lucky), half).dice < 0.5 < cross_fitted(count_images(steady), half).dice


def test_masks_that_are_all_empty_are_recognised() -> None:
    empty = np.zeros((10, 10), bool)
    truth = empty.copy()
    truth[0, 0] = True
    flat = np.full((10, 10), 0.3, np.float32)
    images: list[Image] = [(flat, 0.3, truth if number % 4 == 0 else empty) for number in range(12)]
    half = np.arange(12) % 2
    scores = cross_fitted(count_images(images), half)
    assert scores.is_all_empty
    assert (scores.dice, scores.dice_positive) == (0.75, 0.0)
    none = cross_fitted(count_images([(flat, 0.3, empty)] * 4), np.array([0, 0, 1, 1]))
    assert none.dice == 1
    assert np.isnan(none.dice_positive)


@pytest.mark.parametrize("seed", range(2))
def test_the_best_dice_on_positives_is_that_of_brute_force(seed: int) -> None:
    images = squares(9, seed)
    means = [
        np.mean([dice(p >= np.float32(k / 100), truth) for p, _, truth in images if truth.any()])
        for k in range(1, 101)
    ]
    assert best_dice_on_positives(count_images(images)) == pytest.approx(max(means), abs=1e-12)
    assert best_dice_on_positives(count_images([i for i in images if not i[2].any()])) == 0


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
