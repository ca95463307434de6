"""The plots of a score draw what they are given where it belongs."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from reference_counts import count_images

from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.pictures import (
    calibration_plot,
    dice_by_area_plot,
    presence_curves,
    threshold_surface,
)
from pneumo_experiments.metrics.best_thresholds import Optimum
from pneumo_experiments.metrics.thresholds import Thresholds

ORANGE, RED, BLUE = (255, 127, 14), (255, 0, 0), (31, 119, 180)  # orange and blue are matplotlib's "tab"


def where(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean row and column of the pixels of a colour, as fractions of the picture."""
    rows, columns = np.nonzero((np.abs(picture.astype(int) - colour) <= 3).all(axis=2))
    assert len(rows), colour
    return float(rows.mean() / picture.shape[0]), float(columns.mean() / picture.shape[1])


def evaluation_of(truth_px: list[int], predicted_px: list[int], presence: list[float]) -> Evaluation:
    """Of images of 200 x 200 pixels, whose smaller area lies in the larger one; all at presence 0.3."""
    images = list[tuple[np.ndarray, float, np.ndarray]]()
    for truth_area, predicted_area, present in zip(truth_px, predicted_px, presence, strict=True):
        truth, probability = np.zeros((200, 200), bool), np.zeros((200, 200), np.float32)
        truth.flat[:truth_area], probability.flat[:predicted_area] = True, 1
        images.append((probability, present, truth))
    return Evaluation(cast("Any", None), count_images(images), Thresholds(presence_threshold=0.3))


@pytest.mark.parametrize(("top", "bottom"), [(0.9, 0.1), (0.5, 0.2), (0.9, 0.7)])
def test_the_surface_is_brightest_where_the_dice_is_highest(top: float, bottom: float) -> None:
    tops, bottoms = (np.arange(101) / 100)[:, None], np.arange(101) / 100
    surface = 0.8 - np.hypot(tops - top, bottoms - bottom)
    surface[bottoms > tops] = np.nan
    optimum = Optimum(Thresholds(0, 1.0, 0, 0.0), 0.8, 1, surface)
    picture = threshold_surface(evaluation_of([9], [9], [1]), optimum)
    plain = picture[:, : picture.shape[1] * 3 // 4].astype(int)  # without the colour bar
    yellow = (plain[..., 0] > 200) & (plain[..., 1] > 200) & (plain[..., 2] < 80)
    rows, columns = np.nonzero(yellow)
    axes_rows, axes_columns = np.nonzero((plain < 20).all(axis=2))  # its frame and texts
    height = picture.shape[0]
    assert rows.mean() / height == pytest.approx(0.01 + 0.9 * (1 - top), abs=0.05)
    left, right = axes_columns.min() + 70, axes_columns.max()
    assert axes_rows.size
    assert (columns.mean() - left) / (right - left) == pytest.approx(bottom, abs=0.08)


def test_the_curves_and_the_dot_move_with_the_images() -> None:
    presence = np.linspace(0, 1, 20)

    def drawn(truth: np.ndarray) -> np.ndarray:
        return presence_curves(evaluation_of((9 * truth).tolist(), [9] * 20, presence.tolist()))

    good, bad = drawn(presence > 0.5), drawn(presence < 0.5)
    assert good.shape == bad.shape
    half = good.shape[1] // 2
    for side in (slice(None, half), slice(half, None)):
        assert where(good[:, side], BLUE)[0] < where(bad[:, side], BLUE)[0] - 0.1
    assert where(good[: good.shape[0] // 2, :half], ORANGE)[1] < 0.5


def test_a_missed_image_has_a_mark_of_its_own() -> None:
    area = [100, 1000, 10000]
    some = dice_by_area_plot(evaluation_of(area, [0, 300, 8000], [1] * 3))
    none = dice_by_area_plot(evaluation_of(area, [20, 300, 8000], [1] * 3))
    red = np.array([(p.astype(int)[..., 0] - p.astype(int)[..., 2] > 100).sum() for p in (some, none)])
    assert red[0] > red[1] + 20


def test_the_calibration_plot_draws_its_points_where_they_are() -> None:
    low, high, other = [0.1, 0.0, 0.0, 0.1], [0.9, 1.0, 0.8, 1.0], [0.1, 0.5, 0.0, 0.1]
    picture = calibration_plot([low, high])
    assert picture.dtype == np.uint8
    assert picture.shape == (500, 600, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert not np.array_equal(picture, calibration_plot([other, high]))
