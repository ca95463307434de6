from __future__ import annotations

import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_counts import add_image

from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.exact import best_of_all
from pneumo_experiments.metrics.thresholds import (
    AREA_GRID,
    BOTTOM_GRID,
    PRESENCE_GRID,
    TOP_GRID,
    NativeThresholds,
    ThresholdCounts,
    Thresholds,
    apply_thresholds,
    best_on_grid,
)

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


def random_counts(images: int, seed: int = 0, size: int = 24) -> ThresholdCounts:
    """Blurred guesses at random squares; presence and pixels are informative but often wrong."""
    rng = np.random.default_rng(seed)
    counts = ThresholdCounts()
    for _ in range(images):
        truth = np.zeros((size, size), bool)
        if rng.random() < 0.5:
            top, left, side = rng.integers(2, size // 2, 3)
            truth[top : top + side, left : left + side] = True
        noise = rng.normal(0, 0.35, truth.shape)
        probability = np.clip(0.25 + 0.4 * truth + noise, 0, 1).astype(np.float32)
        add_image(
            counts, probability, float(np.clip(0.3 + 0.4 * truth.any() + rng.normal(0, 0.2), 0, 1)), truth
        )
    return counts


@given(images_with_truth, thresholds_on_grid)
def test_a_mask_follows_the_rules_pixel_by_pixel(
    image: tuple[np.ndarray, np.float32, np.ndarray], thresholds: Thresholds
) -> None:
    probability, presence, _ = image
    expected = slow_mask(probability, float(presence), thresholds)
    assert np.array_equal(apply_thresholds(probability, float(presence), thresholds), expected)


@given(st.lists(images_with_truth, min_size=1, max_size=4), thresholds_on_grid)
def test_counts_give_exactly_the_dice_of_the_masks(
    images: list[tuple[np.ndarray, np.float32, np.ndarray]], thresholds: Thresholds
) -> None:
    counts = ThresholdCounts()
    for probability, presence, truth in images:
        add_image(counts, probability, float(presence), truth)
    masks = [slow_mask(probability, float(presence), thresholds) for probability, presence, _ in images]
    truths = [truth for _, _, truth in images]
    assert counts.dice(thresholds).tolist() == [dice(t, m) for t, m in zip(truths, masks, strict=True)]
    assert counts.predicted_area(thresholds).tolist() == [int(mask.sum()) for mask in masks]
    assert counts.truth_area.tolist() == [int(truth.sum()) for truth in truths]
    assert counts.presence.tolist() == [float(presence) for _, presence, _ in images]


def test_presence_and_core_area_empty_a_mask_only_from_below() -> None:
    probability = np.array([[0.9, 0.9, 0.4, 0.1]], np.float32)
    half = 1024 * 1024 // 2
    rules = Thresholds(presence_threshold=0.7, top_score=0.9, min_area_px=half, bottom_score=0.4)
    assert apply_thresholds(probability, 0.7, rules).tolist() == [[True, True, True, False]]
    assert not apply_thresholds(probability, 0.69, rules).any()
    assert not apply_thresholds(np.array([[0.9, 0.89, 0.4, 0.1]], np.float32), 0.7, rules).any()


@pytest.mark.parametrize("kind", [Thresholds, NativeThresholds])
def test_a_finding_passes_at_every_resolution_or_at_none(kind: type[Thresholds]) -> None:
    small = np.zeros((32, 32), np.float32)
    small[3:8, 10:13] = 0.8  # 15 of 1024 cells: 15,360 px of 1024 x 1024
    counts, kept = ThresholdCounts(), list[list[bool]]()
    shapes = [(512, 512), (1024, 1024), (2048, 2048), (512, 2048), (96, 32), (32, 32)]
    maps = [np.kron(small, np.ones((rows // 32, columns // 32), np.float32)) for rows, columns in shapes]
    for probability in maps:
        add_image(counts, probability, 0.9, probability > 0)
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


def test_a_least_area_of_0_never_empties_a_mask() -> None:
    rules = Thresholds(top_score=0.9, min_area_px=0, bottom_score=0.3)
    assert apply_thresholds(np.full((2, 2), 0.3, np.float32), 1.0, rules).all()


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


def test_empty_counts_give_empty_arrays_and_the_default_thresholds() -> None:
    counts = ThresholdCounts()
    assert len(counts) == 0
    assert counts.dice(Thresholds()).shape == counts.predicted_area(Thresholds()).shape == (0,)
    assert counts.presence.shape == counts.truth_area.shape == (0,)
    assert best_on_grid(counts) == Thresholds()


def test_counts_need_less_than_2_kb_for_a_large_image() -> None:
    probability = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
    truth = probability > 0.8
    counts = ThresholdCounts()
    add_image(counts, probability, 0.5, truth)
    tracemalloc.start()
    try:
        for _ in range(10):
            add_image(counts, probability, 0.5, truth)
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert allocated / 10 < 2000


def test_the_best_on_the_grid_is_what_trying_all_of_it_finds() -> None:
    counts = random_counts(40, size=80)
    tried: dict[Thresholds, float] = {}
    for presence, top, area, bottom in itertools.product(PRESENCE_GRID, TOP_GRID, AREA_GRID, BOTTOM_GRID):
        if bottom <= top:
            rules = Thresholds(float(presence), float(top), int(area), float(bottom))
            tried[rules] = float(counts.dice(rules).mean())
    best = best_on_grid(counts)
    assert tried[best] == pytest.approx(max(tried.values()), abs=1e-9)
    assert tried[best] > counts.dice(Thresholds()).mean() + 0.05


def test_of_equal_thresholds_the_middle_is_taken() -> None:
    counts = ThresholdCounts()
    truth = np.zeros((100, 100), bool)
    truth[:, :40] = True  # 4000 px at 0.85, so each top up to 0.8, each area and each bottom is right
    for present in (0.05, 0.85):
        is_positive = present > 0.5
        add_image(counts, np.where(truth, 0.85, 0.05).astype(np.float32), present, truth & is_positive)
    best = best_on_grid(counts)
    assert counts.dice(best).tolist() == [1.0, 1.0]
    assert best.presence_threshold in (0.4, 0.5)
    assert best.top_score in (0.5, 0.6)
    assert best.min_area_px in (500, 1000)
    assert best.bottom_score in (0.3, 0.4)


def test_where_everything_is_equal_the_defaults_decide_between_two_middles() -> None:
    counts = ThresholdCounts()
    add_image(counts, np.zeros((8, 8), np.float32), 0.0, np.zeros((8, 8), bool))
    best = best_on_grid(counts)
    assert (best.presence_threshold, best.min_area_px) == (0.5, 1000)  # of 0.4 and 0.5, of 1000 and 2000


@pytest.mark.parametrize("seed", range(5))
def test_the_bottom_never_exceeds_the_top(seed: int) -> None:
    best = best_on_grid(random_counts(12, seed))
    assert best.bottom_score <= best.top_score
