from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_counts import NO_COUNTS, Image, count_images

from pneumo_experiments.dataset.annotations import read_annotations, unite
from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics import dice as metrics
from pneumo_experiments.metrics.dice import (
    auroc,
    average_precision,
    bootstrap,
    calibration_error,
    dice,
    effective_patients,
    interval_of,
    intervals,
    mean,
    precision_recall_points,
    roc_points,
    wilson,
)
from pneumo_experiments.metrics.scores import ScoredImages, Scores, notes, score_images
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds

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
    return count_images([(np.array([[p]], np.float32), at, np.array([[truth]])) for p, at, truth in images])


def score(counts: ThresholdCounts, thresholds: Thresholds, patients: Sequence[str]) -> Scores:
    return score_images(ScoredImages.of(replace(counts, patient=np.array(patients, np.str_)), thresholds))


def interval_of_mean(values: np.ndarray, patients: Sequence[str]) -> tuple[float, float]:
    return intervals({"mean": lambda weights: mean(values, weights)}, {}, patients)["mean"]


@given(pairs)
def test_dice_equals_the_count_of_pixel_positions(masks: tuple[np.ndarray, np.ndarray]) -> None:
    assert dice(*masks) == slow_dice(*masks)


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must match"):
        dice(np.zeros((4, 4), bool), np.zeros((1, 4), bool))


def slow_average_precision(truth: np.ndarray, presence: np.ndarray) -> float:
    """At each distinct threshold from above: the recall that it adds, times its precision."""
    total, recall = 0.0, 0.0
    for threshold in sorted({*presence.tolist()}, reverse=True):
        found = [bool(t) for t, p in zip(truth, presence, strict=True) if p >= threshold]
        total += (sum(found) / truth.sum() - recall) * (sum(found) / len(found))
        recall = sum(found) / truth.sum()
    return total


@given(ranked)
def test_rankings_are_scored_pair_by_pair_and_curves_counted_at_each_threshold(
    cases: list[tuple[bool, int]],
) -> None:
    truth = np.array([positive for positive, _ in cases])
    presence = np.array([tenths / 10 for _, tenths in cases], np.float32)
    positives, itself = sum(truth.tolist()), np.ones((1, len(cases)))
    pairs = [np.sign(high - low) for one, high in cases if one for other, low in cases if not other]
    (area,), (precision_area,) = (measure(truth, presence, itself) for measure in (auroc, average_precision))
    assert area == pytest.approx(np.mean(pairs) / 2 + 0.5 if pairs else np.nan, abs=1e-12, nan_ok=True)
    slow = slow_average_precision(truth, presence) if positives else np.nan
    assert precision_area == pytest.approx(slow, abs=1e-12, nan_ok=True)
    if not pairs:
        return
    roc, recall_precision = [(0.0, 0.0)], list[tuple[float, float]]()
    for threshold in sorted({tenths for _, tenths in cases}, reverse=True):
        hits = sum(positive for positive, tenths in cases if tenths >= threshold)
        alarms = sum(not positive for positive, tenths in cases if tenths >= threshold)
        roc.append((alarms / (len(cases) - positives), hits / positives))
        recall_precision.append((hits / positives, hits / (hits + alarms)))
    assert np.stack(roc_points(truth, presence), axis=1) == pytest.approx(np.array(roc), abs=1e-12)
    found = np.stack(precision_recall_points(truth, presence), axis=1)
    assert found == pytest.approx(np.array(recall_precision), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1, width=32)), min_size=1, max_size=30))
def test_the_calibration_error_is_the_mean_distance_within_tenths(cases: list[tuple[bool, float]]) -> None:
    tenths: dict[int, list[tuple[bool, float]]] = {}
    for positive, presence in cases:
        tenths.setdefault(min(9, int(np.float32(presence) * np.float32(10))), []).append((positive, presence))
    expected = sum(
        len(some) * abs(sum(p for _, p in some) / len(some) - sum(t for t, _ in some) / len(some))
        for some in tenths.values()
    ) / len(cases)
    truth = np.array([positive for positive, _ in cases])
    presences = np.array([presence for _, presence in cases], np.float32)
    (found,) = calibration_error(truth, presences, np.ones((1, len(cases))))
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("measure", [auroc, average_precision, calibration_error])
def test_an_image_of_weight_2_counts_as_two_and_one_of_weight_0_not_at_all(
    measure: Callable[..., np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    truth, presence = rng.random(40) < 0.4, (rng.integers(0, 12, 40) / 12).astype(np.float32)
    weights = rng.integers(0, 4, (5, 40)).astype(np.float64)
    found = measure(truth, presence, weights)
    for row, times in zip(found, weights.astype(int), strict=True):
        repeated = np.repeat(np.arange(40), times)
        (alone,) = measure(truth[repeated], presence[repeated], np.ones((1, len(repeated))))
        assert row == pytest.approx(alone, abs=1e-12)


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
    assert scores.precision == pytest.approx(1 / 2)
    assert scores.false_alarms == pytest.approx(1 / 6)
    assert scores.misses == pytest.approx(2 / 6)
    assert (scores.images, scores.positives) == (6, 3)
    assert scores.dice_low <= scores.dice <= scores.dice_high


def test_a_perfect_prediction_scores_1_throughout() -> None:
    truth = np.random.default_rng(0).random((20, 16, 16)) < 0.3
    truth[:8] = False
    counts = count_images([(mask.astype(np.float32), float(mask.any()), mask) for mask in truth])
    scores = score(counts, Thresholds(), patients=[str(i) for i in range(20)])
    perfect = ("dice", "dice_high", "dice_positive", "sensitivity", "specificity", "precision", "auroc")
    perfect = dict.fromkeys((*perfect, "average_precision"), 1.0) | {"dice_low": scores.dice_low}
    none = dict.fromkeys(("false_alarms", "misses", "calibration_error"), 0.0)
    assert scores == Scores(
        **perfect, **none, dice_baseline=8 / 20, images=20, positives=12, patients=20, positive_patients=12
    )
    assert scores.dice_low == pytest.approx(0.839, abs=5e-4)  # Wilson's of 20 of 20
    assert scores.interval_reliable


def test_without_positives_the_undefined_numbers_are_left_out_of_the_metrics() -> None:
    scores = score(counts_of([(0.1, 0.1, False), (0.9, 0.9, False)]), Thresholds(), ["a", "b"])
    metrics = scores.as_metrics("val_")
    assert set(metrics) == {
        *("val_dice", "val_dice_low", "val_dice_high", "val_specificity", "val_precision"),
        *("val_false_alarms", "val_misses", "val_calibration_error"),
    }
    assert metrics["val_dice"] == metrics["val_specificity"] == metrics["val_false_alarms"] == 0.5
    assert metrics["val_precision"] == metrics["val_misses"] == 0.0
    assert metrics["val_calibration_error"] == pytest.approx(0.5)
    assert all(type(value) is float for value in metrics.values())
    facts = {"images": 2, "positives": 0, "patients": 2, "positive_patients": 0, "dice_baseline": 1.0}
    assert scores.as_facts() == facts | {"interval_reliable": False}


def test_an_interval_from_few_patients_with_a_finding_is_called_unreliable() -> None:
    few, enough = (
        score(
            counts_of([(0.1, 0.1, i < positive_patients) for i in range(20)] * 2),
            Thresholds(),
            [f"{i}" for i in range(20)] * 2,
        )
        for positive_patients in (4, 5)
    )
    assert (few.positive_patients, enough.positive_patients) == (4, 5)
    assert (few.interval_reliable, enough.interval_reliable) == (False, True)
    assert few.interval.endswith(", unreliable with 4 patients with a finding")
    assert enough.interval == f"95% {enough.dice_low:.3f} to {enough.dice_high:.3f}"
    row = asdict(few) | dict.fromkeys(
        (f"{name}_low" for name in ("specificity", "auroc", "calibration_error", "misses")), 0.5
    )
    assert notes(row) == {
        "dice_note": "unreliable",
        "specificity_note": "32 of 32",  # of 20 patients
        "auroc_note": "unreliable",
        "calibration_error_note": "unreliable",
        "misses_note": "8 of 40, unreliable",
    }
    counts = {"images": 10, "positives": 4, "patients": 9, "positive_patients": 5}
    alarmed = counts | {"precision": 0.6, "precision_low": 0.2, "false_alarms": 0.2, "misses": 0.1}
    assert notes(alarmed) == {"precision_note": "3 of 5"}
    for name, least in {"specificity": 5, "false_alarms": 5, "calibration_error": 250}.items():
        rows = [counts | {"patients": n, name: 0.2, f"{name}_low": 0.1} for n in (least - 1, least)]
        assert ["unreliable" in notes(each)[f"{name}_note"] for each in rows] == [True, False]
    older = {name: value for name, value in row.items() if name != "positive_patients"}
    assert notes(older)["auroc_note"] == ""  # 8 positives are the most that is known


def test_no_images_and_a_wrong_number_of_patients_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        score(NO_COUNTS, Thresholds(), [])
    with pytest.raises(ValueError, match="not one patient and one fold for each image"):
        score(counts_of([(0.1, 0.1, False)] * 2), Thresholds(), ["a"])


def test_wilsons_interval_is_that_of_published_tables() -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3."""
    for right, images, low, high in (
        *((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)),
        *((1, 29, 0.0061, 0.1718), (14, 14, 0.7847, 1)),
    ):
        fraction = right / images
        # So many patients that Student's t is the normal distribution's; the number counts at 0 and 1 only.
        patients = images if fraction in (0, 1) else 10**6
        found = wilson(fraction, fraction * (1 - fraction) / images, patients)
        assert found == pytest.approx((low, high), abs=6e-5), (right, images)


def test_the_interval_counts_patients_and_not_images() -> None:
    values = np.repeat([1.0, 0.0], 500)
    low, high = interval_of_mean(values, ["a"] * 500 + ["b"] * 500)
    assert low < 0.01 < 0.99 < high
    low, high = interval_of_mean(values, [str(i) for i in range(1000)])
    assert (low, high) == pytest.approx((0.469, 0.531), abs=5e-4)
    # One patient tells as little as one image, whatever its number of images.
    for score_ in (0.0, 0.7, 1.0):
        assert interval_of_mean(np.full(30, score_), ["a"] * 30) == pytest.approx(wilson(score_, 0, 1))


def test_equal_values_have_an_interval_with_a_width() -> None:
    """As if each of 20 patients had one image, or each of an effective number of them."""
    for value, low, high in ((1.0, 0.8389, 1.0), (0.0, 0.0, 0.1611), (0.7, 0.4810, 0.8545)):
        ends = interval_of_mean(np.full(60, value), [str(i % 20) for i in range(60)])
        assert ends == pytest.approx((low, high), abs=6e-5), value
    # Images of 9, 1, 1 and 1: 12^2 / (81 + 3) patients of equal weight.
    assert effective_patients(np.array(list("aaaaaaaaabcd"))) == pytest.approx(144 / 84)
    few = interval_of_mean(np.ones(12), list("aaaaaaaaabcd"))
    assert few == pytest.approx((1 / (1 + 1.959964**2 * 84 / 144), 1))


def test_the_interval_of_a_sensitivity_of_1_counts_the_patients_with_a_finding() -> None:
    """7 patients with two found images each, and many without a finding."""
    truth = np.arange(114) < 14
    patients = (np.arange(114) // 2).astype(np.str_)
    ends = ScoredImages(truth * 1.0, truth, truth, truth.astype(np.float32), patients).intervals()
    for name in ("sensitivity", "precision", "auroc", "average_precision"):
        found = (ends[f"{name}_low"], ends[f"{name}_high"])
        assert found == pytest.approx((7 / (7 + 1.959964**2), 1)), name
    assert ends["specificity_low"] == pytest.approx(50 / (50 + 1.959964**2))
    assert ends["misses_high"] == pytest.approx(1 - 57 / (57 + 1.959964**2))


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=12), st.randoms())
def test_an_interval_holds_its_score_in_any_order(
    cases: list[tuple[int, float]], order: random.Random
) -> None:
    shuffled = order.sample(cases, len(cases))
    (low, high), again = (
        interval_of_mean(np.array([v for _, v in some]), [str(p) for p, _ in some])
        for some in (cases, shuffled)
    )
    assert again == pytest.approx((low, high), abs=1e-6)
    assert 0 <= low <= np.mean([v for _, v in cases]) + 1e-12
    assert np.mean([v for _, v in cases]) - 1e-12 <= high <= 1
    assert low < high


def test_more_patients_than_groups_are_left_out_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 400, 900)
    values = 0.6 * rng.random(400)[patients] + 0.4 * rng.random(900)
    names = [f"{patient:03}" for patient in patients]
    low, high = interval_of_mean(values, names)
    monkeypatch.setattr(metrics, "GROUPS", 130)  # one of three or four patients
    assert interval_of_mean(values, names) == pytest.approx((low, high), rel=0.01)
    assert interval_of_mean(values, names) != (low, high)
    assert interval_of_mean(np.ones(900), names)[0] == wilson(1, 0, effective_patients(patients))[0]


def test_intervals_of_clustered_images_cover_the_truth() -> None:
    rng, held = np.random.default_rng(7), 0
    for _ in range(400):
        sizes = np.minimum(rng.geometric(0.4, 20), 12)
        values = rng.random(sizes.sum()) < np.repeat(rng.beta(2.4, 0.6, 20), sizes)  # 0.8 of the images
        low, high = interval_of_mean(values, np.repeat(np.arange(20), sizes).astype(str).tolist())
        held += low <= 0.8 <= high
    assert 0.93 < held / 400 < 0.98


def test_the_bootstrap_weighs_patients_by_their_images_as_a_slow_one_does() -> None:
    patients = ["a"] * 7 + ["b"] * 2 + ["c"] + ["d"] * 3 + ["e"] + ["f"] * 5
    values = np.random.default_rng(1).random(len(patients)).round(2)
    groups = {p: [v for v, q in zip(values, patients, strict=True) if p == q] for p in set(patients)}
    dealer, means = random.Random(0), []
    for _ in range(20_000):
        drawn = [value for name in dealer.choices(sorted(groups), k=6) for value in groups[name]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    measures = {"mean": lambda weights: mean(values, weights)}
    low, high = interval_of(bootstrap(measures, patients, np.random.default_rng(0), 1000)["mean"])
    assert low == pytest.approx(means[500], abs=0.02)
    assert high == pytest.approx(means[19_500], abs=0.02)


def test_predicting_nothing_scores_0_7785_on_all_real_labels(real_data: Path) -> None:
    positive: dict[str, bool] = {}
    with gzip.open(real_data / "labels" / "train-rle.csv.gz", "rt", encoding="utf-8") as stream:
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


def dilated(mask: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce([np.roll(mask, (dy, dx), (0, 1)) for dy in (-9, 0, 9) for dx in (-9, 0, 9)])


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        (lambda mask: np.roll(mask, 25, axis=1), 0.3, 0.9),
        (dilated, 0.6, 0.95),
        (np.zeros_like, 0.3, 0.6),  # the fraction of negatives
    ],
    ids=["shifted", "dilated", "emptied"],
)
def test_scores_on_real_annotations_are_those_of_sets_of_pixels(
    change: Callable[[np.ndarray], np.ndarray], least: float, most: float, real_data: Path
) -> None:
    images, dices, kinds = list[Image](), list[float](), list[tuple[bool, bool]]()
    for image_id, texts in read_annotations(real_data / "train-rle.csv").items():
        truth, _ = unite(texts, (1024, 1024), image_id)
        prediction = change(truth)
        images.append((prediction.astype(np.float32), 1.0, truth))
        x, y = ({*np.flatnonzero(mask.T).tolist()} for mask in (truth, prediction))
        dices.append(2 * len(x & y) / (len(x) + len(y)) if x or y else 1.0)
        kinds.append((bool(x), bool(y)))
    counts = count_images(images)
    scores = score_images(ScoredImages.of(counts, Thresholds()))
    assert len(dices) == 13
    assert counts.dice(Thresholds()).tolist() == dices
    assert least <= scores.dice <= most
    assert scores.dice == pytest.approx(sum(dices) / 13)
    assert scores.dice_positive == pytest.approx(
        sum(value for value, (x, _) in zip(dices, kinds, strict=True) if x) / scores.positives
    )
    assert scores.misses == pytest.approx(kinds.count((True, False)) / 13)
    assert scores.false_alarms == pytest.approx(kinds.count((False, True)) / 13)
    assert scores.sensitivity == pytest.approx(kinds.count((True, True)) / scores.positives)
    found = kinds.count((True, True)) + kinds.count((False, True))
    if found:
        assert scores.precision == pytest.approx(kinds.count((True, True)) / found)
    else:
        assert np.isnan(scores.precision)


def student_t(degrees: float) -> float:
    """The 97.5th percentile of Student's distribution, from its density (1 + x^2 / df)^-(df + 1)/2."""
    x = np.linspace(0, 100, 200_001)
    mass = np.cumsum((1 + x**2 / degrees) ** (-(degrees + 1) / 2))
    return float(x[np.searchsorted(mass, 0.95 * mass[-1])])


def test_the_interval_of_each_score_is_that_of_a_slow_jackknife() -> None:
    rng = np.random.default_rng(4)
    patients = sorted([str(int(number)) for number in 40 * rng.random(120) ** 1.5])
    truth = rng.random(120) < 0.4
    presence = np.clip(0.3 + 0.3 * truth + rng.normal(0, 0.25, 120), 0, 1).astype(np.float32)
    predicted = presence > 0.45
    dices = np.where(truth & predicted, rng.random(120), truth == predicted)
    images = ScoredImages(dices, predicted, truth, presence, np.array(patients))

    def slow(some: np.ndarray) -> dict[str, float]:
        above = np.subtract.outer(presence[some][truth[some]], presence[some][~truth[some]])
        return {
            "dice": dices[some].mean(),
            "dice_positive": dices[some][truth[some]].mean(),
            "sensitivity": predicted[some][truth[some]].mean(),
            "specificity": (~predicted[some][~truth[some]]).mean(),
            "precision": truth[some][predicted[some]].mean(),
            "false_alarms": (predicted & ~truth)[some].mean(),
            "misses": (truth & ~predicted)[some].mean(),
            "average_precision": slow_average_precision(truth[some], presence[some]),
            "auroc": np.mean(np.sign(above)) / 2 + 0.5,
        }

    names, whole, ends = sorted(set(patients)), slow(np.arange(120)), images.intervals()
    without = [slow(np.array([i for i in range(120) if patients[i] != name])) for name in names]
    assert set(images.measures()) - {"calibration_error"} == set(whole)
    counted = dict.fromkeys(whole, np.full(120, True)) | {"specificity": ~truth, "precision": predicted}
    counted |= dict.fromkeys(("dice_positive", "sensitivity", "average_precision"), truth)
    counted["auroc"] = truth  # of fewer patients than the negatives
    for name, value in whole.items():
        left = [each[name] for each in without]
        mean_left = sum(left) / len(left)
        variance = (len(left) - 1) / len(left) * sum((each - mean_left) ** 2 for each in left)
        of = [sum(p == q for q, c in zip(patients, counted[name], strict=True) if c) for p in names]
        t = student_t(sum(of) ** 2 / sum(m**2 for m in of) - 1)
        # Wilson's ends are where a score of the population is t of its standard errors away.
        n = value * (1 - value) / variance
        for end in (ends[f"{name}_low"], ends[f"{name}_high"]):
            assert (value - end) ** 2 == pytest.approx(t**2 * end * (1 - end) / n, rel=5e-3), name
        assert 0 < ends[f"{name}_low"] < value - 0.02 < value + 0.02 < ends[f"{name}_high"] < 1
    assert images.intervals(["dice", "auroc"]).items() <= ends.items()
    scores = score_images(images)
    assert (ends["dice_low"], ends["dice_high"]) == (scores.dice_low, scores.dice_high)


def test_an_undefined_score_has_an_undefined_interval() -> None:
    nothing = np.zeros(3, bool)
    images = ScoredImages(np.ones(3), nothing, nothing, np.zeros(3, np.float32), np.array(["a", "b", "c"]))
    ends = images.intervals()
    assert np.isnan(ends["sensitivity_low"])
    assert np.isnan(ends["auroc_high"])
    low = 3 / (3 + 1.959964**2)  # of three patients
    assert (ends["specificity_low"], ends["dice_low"], ends["dice_high"]) == pytest.approx((low, low, 1.0))
