from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_counts import add_image

from pneumo_experiments.errors import UserError
from pneumo_experiments.scoring.metrics import auroc, bootstrap_interval, dice
from pneumo_experiments.scoring.scores import Scores, score
from pneumo_experiments.scoring.thresholds import ThresholdCounts, Thresholds

pairs = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(arrays(np.bool_, shape), arrays(np.bool_, shape))
)
ranked = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30)


def slow_dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Dice by sets of pixel positions."""
    x = {(i, j) for i in range(truth.shape[0]) for j in range(truth.shape[1]) if truth[i, j]}
    y = {(i, j) for i in range(truth.shape[0]) for j in range(truth.shape[1]) if prediction[i, j]}
    return 2 * len(x & y) / (len(x) + len(y)) if x or y else 1.0


def counts_of(images: list[tuple[float, float, bool]]) -> ThresholdCounts:
    """Counts of one-pixel images: probability, presence, truth."""
    counts = ThresholdCounts()
    for probability, presence, truth in images:
        add_image(counts, np.full((1, 1), probability, np.float32), presence, np.full((1, 1), truth))
    return counts


@given(pairs)
def test_dice_equals_the_count_of_pixel_positions(masks: tuple[np.ndarray, np.ndarray]) -> None:
    assert dice(*masks) == slow_dice(*masks)


@given(pairs)
def test_dice_is_symmetric_and_lies_between_0_and_1(masks: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = masks
    assert 0 <= dice(truth, prediction) == dice(prediction, truth) <= 1
    assert (dice(truth, prediction) == 1) == np.array_equal(truth, prediction)


def test_dice_of_two_empty_masks_is_1_and_of_one_is_0() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert dice(empty, empty) == 1.0
    assert dice(empty, full) == dice(full, empty) == 0.0


def test_dice_counts_the_overlap_twice() -> None:
    truth, prediction = np.zeros((2, 6), bool), np.zeros((2, 6), bool)
    truth[0, :4] = True
    prediction[0, 3:] = True
    prediction[1, :2] = True
    assert dice(truth, prediction) == pytest.approx(2 * 1 / (4 + 5))


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must match"):
        dice(np.zeros((4, 4), bool), np.zeros((1, 4), bool))


@given(ranked)
def test_auroc_is_the_fraction_of_pairs_in_the_right_order(cases: list[tuple[bool, int]]) -> None:
    truth = np.array([positive for positive, _ in cases])
    presence = np.array([tenths / 10 for _, tenths in cases], np.float32)
    ordered = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for positive, high in cases
        if positive
        for other, low in cases
        if not other
    ]
    if ordered:
        assert auroc(truth, presence) == pytest.approx(sum(ordered) / len(ordered), abs=1e-12)
    else:
        assert np.isnan(auroc(truth, presence))


def test_scores_of_six_images_are_those_counted_by_hand() -> None:
    counts = counts_of(
        [
            (0.9, 0.9, True),  # detected
            (0.9, 0.2, True),  # missed by presence
            (0.1, 0.8, True),  # missed by the mask
            (0.9, 0.8, False),  # false alarm
            (0.1, 0.3, False),
            (0.9, 0.1, False),
        ]
    )
    scores = score(counts, Thresholds(), patients=list("aabbcc"))
    assert scores.dice == pytest.approx(3 / 6)
    assert scores.dice_baseline == pytest.approx(3 / 6)
    assert scores.dice_positive == pytest.approx(1 / 3)
    assert scores.sensitivity == pytest.approx(1 / 3)
    assert scores.specificity == pytest.approx(2 / 3)
    assert scores.auroc == pytest.approx((3 + 1 + 2.5) / 9)
    assert (scores.images, scores.positives) == (6, 3)
    assert scores.dice_low <= scores.dice <= scores.dice_high


def test_a_perfect_prediction_scores_1_throughout() -> None:
    truth = np.random.default_rng(0).random((20, 16, 16)) < 0.3
    truth[:8] = False
    counts = ThresholdCounts()
    for mask in truth:
        add_image(counts, mask.astype(np.float32), float(mask.any()), mask)
    scores = score(counts, Thresholds(), patients=[str(i) for i in range(20)])
    assert scores == Scores(1.0, 1.0, 1.0, 8 / 20, 1.0, 1.0, 1.0, 1.0, 20, 12, 20)
    assert scores.interval_reliable


def test_without_positives_the_undefined_numbers_are_left_out_of_the_metrics() -> None:
    scores = score(counts_of([(0.1, 0.1, False), (0.9, 0.9, False)]), Thresholds(), ["a", "b"])
    metrics = scores.as_metrics("val_")
    assert set(metrics) == {"val_dice", "val_dice_low", "val_dice_high", "val_specificity"}
    assert metrics["val_dice"] == metrics["val_specificity"] == 0.5
    assert all(type(value) is float for value in metrics.values())
    facts = {"images": 2, "positives": 0, "patients": 2, "dice_baseline": 1.0, "interval_reliable": False}
    assert scores.as_facts() == facts


def test_an_interval_from_fewer_than_20_patients_is_called_unreliable() -> None:
    few, enough = (
        score(counts_of([(0.1, 0.1, False)] * 40), Thresholds(), [str(i % patients) for i in range(40)])
        for patients in (19, 20)
    )
    assert (few.interval_reliable, enough.interval_reliable) == (False, True)
    assert few.interval == "95% 1.000 to 1.000, unreliable with 19 patients"
    assert enough.interval == "95% 1.000 to 1.000"


def test_no_images_and_a_wrong_number_of_patients_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        score(ThresholdCounts(), Thresholds(), [])
    with pytest.raises(ValueError, match="1 patients for 2 images"):
        score(counts_of([(0.1, 0.1, False)] * 2), Thresholds(), ["a"])


def test_the_bootstrap_draws_patients_and_not_images() -> None:
    values = np.repeat([1.0, 0.0], 500)
    rng = np.random.default_rng(0)
    assert bootstrap_interval(values, ["a"] * 500 + ["b"] * 500, rng) == (0.0, 1.0)
    low, high = bootstrap_interval(values, [str(i) for i in range(1000)], rng)
    assert 0.46 < low < 0.48 < 0.52 < high < 0.54
    assert bootstrap_interval(values, ["a"] * 1000, rng) == (0.5, 0.5)


def test_the_bootstrap_weighs_patients_by_their_images_as_a_slow_one_does() -> None:
    patients = ["a"] * 7 + ["b"] * 2 + ["c"] + ["d"] * 3 + ["e"] + ["f"] * 5
    values = np.random.default_rng(1).random(len(patients)).round(2)
    groups = {p: [v for v, q in zip(values, patients, strict=True) if p == q] for p in set(patients)}
    dealer, means = random.Random(0), []
    for _ in range(20_000):
        drawn = [value for name in dealer.choices(sorted(groups), k=6) for value in groups[name]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    low, high = bootstrap_interval(values, patients, np.random.default_rng(0))
    assert low == pytest.approx(means[500], abs=0.02)
    assert high == pytest.approx(means[19_500], abs=0.02)


def test_a_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(3)
    counts = counts_of([(rng.random(), rng.random(), rng.random() < 0.4) for _ in range(300)])
    patients = [str(int(i**0.8)) for i in range(300)]
    first, again, other = (score(counts, Thresholds(), patients, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert (first.dice_low, first.dice_high) != (other.dice_low, other.dice_high)


def test_predicting_nothing_scores_0_7785_on_all_real_labels(real_data: Path) -> None:
    labels = real_data / "labels" / "train-rle.csv.gz"
    if not labels.exists():
        pytest.skip(f"{labels.name} is not there")
    positive: dict[str, bool] = {}
    with gzip.open(labels, "rt", encoding="utf-8") as stream:
        for image_id, text in list(csv.reader(stream))[1:]:
            positive[image_id] = positive.get(image_id, False) or text.strip() != "-1"
    with gzip.open(real_data / "labels" / "patients.csv.gz", "rt", encoding="utf-8") as stream:
        patient = {image_id: name.split("_")[0] for image_id, name in list(csv.reader(stream))[1:]}
    counts = counts_of([(0.0, 0.0, truth) for truth in positive.values()])
    patients = [patient.get(image_id, image_id) for image_id in positive]
    scores = score(counts, Thresholds(), patients)
    assert (scores.images, scores.positives) == (12_047, 2_669)
    assert round(scores.dice, 4) == round(scores.dice_baseline, 4) == 0.7785
    assert scores.dice_positive == scores.sensitivity == 0.0
    assert scores.specificity == 1.0
    assert scores.auroc == 0.5
    image_level = 1.96 * (0.7785 * 0.2215 / 12_047) ** 0.5
    assert scores.dice_high - scores.dice_low > 2 * image_level  # images of a patient are not independent
