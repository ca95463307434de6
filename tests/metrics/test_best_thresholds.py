"""The exact search for thresholds: against all combinations tried one by one, and in its plateau."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_counts import NO_COUNTS, Image, count_images, squares

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import read_annotations
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.thresholds import (
    HUNDREDTHS,
    ThresholdCounts,
    Thresholds,
    apply_thresholds,
    best_on_grid,
)

LEVELS = (0.0, 0.2, 0.5, 0.51, 1.0)  # few, so that images have equal areas
PRESENCES = (0.0, 0.3, np.nextafter(np.float32(0.3), np.float32(1)).item(), 0.9, 1.0)

maps = st.lists(st.sampled_from(LEVELS), min_size=12, max_size=12)
truths = st.one_of(st.just([False] * 12), st.lists(st.booleans(), min_size=12, max_size=12))
few_images = st.lists(  # of 3 x 4 pixels, or of twice or three times as many columns
    st.tuples(maps, st.sampled_from(PRESENCES), truths, st.integers(1, 3)).map(
        lambda image: (
            np.array(image[0], np.float32).reshape(3, 4).repeat(image[3], axis=1),
            image[1],
            np.array(image[2]).reshape(3, 4).repeat(image[3], axis=1),
        )
    ),
    min_size=1,
    max_size=6,
)


def area_of(found: np.ndarray, top: float) -> int:
    """The largest min_area_px that a core reaches: its pixels as of 1024 x 1024."""
    return floor(Fraction(int(np.count_nonzero(found >= np.float32(top))) * 1024**2, found.size))


def mean_dice(images: list[Image], thresholds: Thresholds) -> float:
    """Mean Dice of the images, from their pixels."""
    return float(np.mean([dice(t, apply_thresholds(p, presence, thresholds)) for p, presence, t in images]))


def exhaustive_from_pixels(images: list[Image]) -> float:
    """The largest mean Dice over all hundredths with bottom <= top, all presences and all areas.

    What a pair of scores, a presence or an area does to one image is read from its pixels; no counts.
    """
    presence = np.array([image[1] for image in images], np.float32)
    core = np.array([[np.count_nonzero(p >= level) for level in HUNDREDTHS] for p, _, _ in images])
    shown = np.array([[dice(truth, p >= level) for level in HUNDREDTHS] for p, _, truth in images])
    empty = np.array([dice(truth, np.zeros_like(truth)) for _, _, truth in images])
    present = [presence >= each for each in {*presence.tolist()}]
    best = empty.mean()
    gain = shown - empty[:, None]
    for top in range(101):
        kept = [core[:, top] >= area for area in {*core[:, top].tolist()}]
        keeps = np.array([by_area & by_presence for by_area, by_presence in itertools.product(kept, present)])
        best = max(best, empty.mean() + (keeps.astype(float) @ gain[:, : top + 1]).max() / len(images))
    return float(best)


@settings(deadline=None)
@given(few_images)
def test_the_optimum_is_what_trying_every_combination_finds(images: list[Image]) -> None:
    # Thresholds between two values that occur do what the higher one does.
    presences = {1.0, *(presence for _, presence, _ in images)}
    tried = max(
        mean_dice(images, Thresholds(presence, top, area, bottom))
        for top in LEVELS
        for area in {0, 2**20 + 1, *(area_of(found, top) for found, _, _ in images)}
        for presence, bottom in itertools.product(presences, LEVELS)
        if bottom <= top
    )
    best = best_of_all(count_images(images))
    assert best.dice == pytest.approx(tried, abs=1e-9)
    assert mean_dice(images, best.thresholds) == pytest.approx(tried, abs=1e-9)
    assert best.thresholds.bottom_score <= best.thresholds.top_score


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (8, 3), (33, 5)])
def test_the_optimum_over_all_hundredths_is_found_and_beats_the_grid(count: int, seed: int) -> None:
    images = squares(count, seed)
    counts, expected = count_images(images), exhaustive_from_pixels(images)
    best = best_of_all(counts)
    assert best.dice == pytest.approx(expected, abs=1e-9)
    assert best.dice == pytest.approx(mean_dice(images, best.thresholds), abs=1e-12)
    assert best.dice >= counts.dice(best_on_grid(counts)).mean() - 1e-12


def test_the_optimum_on_real_annotations_is_the_slow_one_from_pixels(real_data: Path) -> None:
    annotations = read_annotations(real_data / "train-rle.csv")
    rng, images = np.random.default_rng(0), list[Image]()
    for image_id, texts in annotations.items():
        truth = np.zeros((1024, 1024), bool)
        for text in texts:
            truth |= rle.decode(text, truth.shape, image_id)
        fraction = np.roll(truth, rng.integers(-30, 30, 2), (0, 1)).reshape(64, 16, 64, 16).mean(axis=(1, 3))
        probability = np.clip(0.1 + 0.7 * fraction + rng.normal(0, 0.15, (64, 64)), 0, 1).astype(np.float32)
        presence = float(np.clip(0.4 + 0.2 * truth.any() + rng.normal(0, 0.15), 0, 1))
        images.append((np.kron(probability, np.ones((16, 16), np.float32)), presence, truth))
    assert sum(truth.any() for _, _, truth in images) >= 5
    counts = count_images(images)
    best = best_of_all(counts)
    assert best.dice == pytest.approx(exhaustive_from_pixels(images), abs=1e-9)
    assert best.dice == pytest.approx(mean_dice(images, best.thresholds), abs=1e-12)
    assert best.dice > counts.dice(best_on_grid(counts)).mean() > counts.dice(Thresholds()).mean()


def test_the_surface_holds_the_best_presence_and_area_of_each_pair_of_scores() -> None:
    images = squares(20, seed=1)
    counts = count_images(images)
    best = best_of_all(counts)
    for top, bottom in ((90, 60), (60, 60), (100, 0), (31, 30)):
        tried = max(
            counts.dice(Thresholds(presence, top / 100, area, bottom / 100)).mean()
            for presence in {*counts.presence.tolist()}
            for area in {*(area_of(found, top / 100) for found, _, _ in images), 2**20 + 1}
        )
        assert best.surface[top, bottom] == pytest.approx(tried, abs=1e-12)
    assert np.nanmax(best.surface) == pytest.approx(best.dice, abs=1e-12)
    assert np.isnan(best.surface[30, 31])


def test_the_number_of_combinations_counts_only_those_that_differ() -> None:
    flat, empty = np.full((2, 2), 0.5, np.float32), np.zeros((2, 2), bool)
    counts = count_images([(flat, 0.4, empty), (flat, 0.4, empty), (flat, 1.0, empty)])
    # Presences up to 0.4 and above, since 1.0 is always present; all areas are equal: reached, or not.
    assert best_of_all(counts).combinations == 101 * 102 // 2 * 2 * 2


def room(images: list[Image], best: Thresholds, name: str, values: list[float]) -> tuple[float, float]:
    """The last of the values below and above the chosen one up to which Dice stays as it is."""
    chosen, dice_now = getattr(best, name), mean_dice(images, best)
    ends: list[float] = []
    for candidates in ([v for v in values if v < chosen][::-1], [v for v in values if v > chosen]):
        ends.append(chosen)
        for value in candidates:
            moved = replace(best, **{name: value})
            if abs(mean_dice(images, moved) - dice_now) > 1e-9:
                break
            ends[-1] = value
    return ends[0], ends[1]


@pytest.mark.parametrize("seed", range(2))
def test_each_threshold_is_centred_in_its_plateau(seed: int) -> None:
    images = squares(8, seed)
    best = best_of_all(count_images(images)).thresholds
    low, high = room(images, best, "presence_threshold", [i / 1000 for i in range(1001)])
    assert best.presence_threshold == pytest.approx((low + high) / 2, abs=0.05 * (high - low) + 0.001)
    edges = [k * 1024**2 // 24**2 for k in range(24**2 + 1)]
    low, high = room(images, best, "min_area_px", sorted([0, *edges, *(edge + 1 for edge in edges)]))
    assert best.min_area_px == pytest.approx((max(low - 1, 0) ** 0.5 / 2 + high**0.5 / 2) ** 2, abs=1)
    hundredths = [k / 100 for k in range(101)]
    low, high = room(images, best, "top_score", [k for k in hundredths if k >= best.bottom_score])
    assert best.top_score == pytest.approx((low + high) / 2, abs=0.0051)
    low, high = room(images, best, "bottom_score", [k for k in hundredths if k <= best.top_score])
    assert best.bottom_score == pytest.approx((low + high) / 2, abs=0.0051)


def test_an_area_of_another_score_is_no_matter() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):  # large cores that shrink with the score, as of large images without a finding
        pixels = np.sort(rng.integers(0, 300_000, (3, 101)), axis=1)[:, ::-1].copy()
        pixels[:, 0] = 2**20
        counts = np.stack([pixels, 0 * pixels], 1).astype(np.int32)
        part = ThresholdCounts.of(counts, rng.random(3).astype(np.float32))
        assert best_of_all(part).dice == 1
        assert not part.predicted_area(best_of_all(part).thresholds).any()


def test_without_images_there_is_nothing_to_choose() -> None:
    best, counts = best_of_all(NO_COUNTS), NO_COUNTS
    assert best.thresholds == best_on_grid(counts) == Thresholds()
    assert best.combinations == 0
    assert counts.dice(Thresholds()).shape == counts.predicted_area(Thresholds()).shape == (0,)
    assert counts.presence.shape == counts.truth_area.shape == (0,)
