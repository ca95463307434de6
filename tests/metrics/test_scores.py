"""Scores by group of images, and the calibration of presence."""

from __future__ import annotations

import numpy as np
import pytest

from pneumo_experiments.metrics.scores import (
    CALIBRATION_COLUMNS,
    GROUP_COLUMNS,
    ScoredImages,
    age_band,
    area_terciles,
    by_group,
    calibration,
    score_images,
)


def scored(count: int, seed: int = 0) -> ScoredImages:
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < 0.4
    presence = np.clip(0.3 + 0.3 * truth + rng.normal(0, 0.25, count), 0, 1).astype(np.float32)
    predicted = presence > 0.45
    dices = np.where(truth & predicted, rng.random(count), truth == predicted)
    return ScoredImages(dices, predicted, truth, presence, (np.arange(count) // 2).astype(np.str_))


def test_each_row_has_the_scores_of_its_images() -> None:
    images = scored(80)
    sex = ["FM"[number % 2] for number in range(80)]
    rows = [dict(zip(GROUP_COLUMNS, row, strict=True)) for row in by_group(images, {"sex": sex})]
    assert [(row["group"], row["value"]) for row in rows] == [("all", ""), ("sex", "F"), ("sex", "M")]
    for row, chosen in zip(rows, (range(80), range(0, 80, 2), range(1, 80, 2)), strict=True):
        alone = score_images(images.select(np.isin(np.arange(80), chosen)))
        found = [number for number in chosen if images.truth[number]]
        assert (row["images"], row["patients"]) == (len(chosen), 40)
        assert (row["positives"], row["positive_patients"]) == (len(found), len({n // 2 for n in found}))
        assert row["dice"] == pytest.approx(sum(images.dices[n] for n in chosen) / len(chosen))
        for name in ("dice", "dice_low", "dice_high", "dice_positive", "sensitivity", "specificity"):
            assert row[name] == getattr(alone, name), name
        assert row["dice_low"] < row["dice"] < row["dice_high"]


def test_undefined_scores_are_none_and_left_out_images_in_no_group() -> None:
    images = scored(30)
    values = ["with" if truth else "" for truth in images.truth]
    (_, row) = by_group(images, {"area": values})
    row = dict(zip(GROUP_COLUMNS, row, strict=True))
    assert row["images"] == row["positives"] == images.truth.sum()
    assert row["specificity"] is row["specificity_low"] is row["specificity_high"] is None
    assert row["dice"] == row["dice_positive"]


def test_age_bands_are_in_order_and_what_is_unknown_comes_last() -> None:
    bands = ["under 18", "18 to 39", "40 to 59", "60 to 79", "80 and over", "unknown"]
    for ages in ((0, 18, 40, 60, 80, -1), (17, 39, 59, 79, 120, -1)):  # the first and the last of each
        assert [age_band(age) for age in ages] == bands
    ages = [age_band(age) for age in (-1, 95, 70, 45, 20, 3)] * 2
    rows = by_group(scored(12), {"age": ages})
    assert [row[1] for row in rows[1:]] == bands
    assert {row[2] for row in rows[1:]} == {2}


def test_terciles_hold_a_third_of_the_findings_each() -> None:
    areas = np.array([0, 10, 20, 30, 40, 50, 60, 0, 70, 80, 90])
    expected = ["1: 10 to 30 px"] * 3 + ["2: 40 to 60 px"] * 3 + ["3: 70 to 90 px"] * 3
    assert area_terciles(areas) == ["", *expected[:6], "", *expected[6:]]
    assert area_terciles(np.array([5, 5, 5])) == ["1: 5 to 5 px"] * 3
    assert area_terciles(np.array([0, 0])) == ["", ""]


def test_the_calibration_curve_has_a_point_for_each_tenth_with_images() -> None:
    presence = np.array([0.05, 0.08, 0.35, 0.31, 0.39, 0.36, 1.0, 0.95], np.float32)
    truth = np.array([False, False, True, False, False, False, True, True])
    images = ScoredImages(np.ones(8), truth, truth, presence, np.array(list("abcdefgh")))
    rows = [dict(zip(CALIBRATION_COLUMNS, row, strict=True)) for row in calibration(images)]
    assert [(row["presence_from"], row["presence_to"], row["images"]) for row in rows] == [
        (0.0, 0.1, 2),
        (0.3, 0.4, 4),
        (0.9, 1.0, 2),
    ]
    assert [row["mean_presence"] for row in rows] == pytest.approx([0.065, 0.3525, 0.975])
    assert [row["fraction_positive"] for row in rows] == [0.0, 0.25, 1.0]
    # Wilson's of n = 3, for a variance of 0.25 * 0.75 / 3, with Student's t of 3 degrees of freedom, 3.18.
    middle, half = 0.25 + 3.18**2 / 6, 3.18 * (0.25 * 0.75 / 3 + 3.18**2 / 36) ** 0.5
    ends = [(middle + side) / (1 + 3.18**2 / 3) for side in (-half, half)]
    found = [rows[1][f"fraction_positive_{end}"] for end in ("low", "high")]
    assert found == pytest.approx(ends, abs=0.01)
    assert rows[0]["fraction_positive_high"] == pytest.approx(1.96**2 / (2 + 1.96**2), abs=1e-4)
    error = sum(row["images"] * abs(row["mean_presence"] - row["fraction_positive"]) for row in rows) / 8
    assert score_images(images).calibration_error == pytest.approx(error, abs=1e-7)
