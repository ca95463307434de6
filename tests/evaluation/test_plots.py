"""The plots of a score draw what they are given where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from pneumo_experiments.evaluation.plots import dice_by_area_plot, presence_curves, threshold_surface
from pneumo_experiments.metrics.scores import ScoredImages
from pneumo_experiments.metrics.thresholds import Thresholds

ORANGE, RED, BLUE = (255, 127, 14), (255, 0, 0), (31, 119, 180)  # orange and blue are matplotlib's "tab"


def where(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean row and column of the pixels of a colour, as fractions of the picture."""
    rows, columns = np.nonzero((np.abs(picture.astype(int) - colour) <= 3).all(axis=2))
    assert len(rows), colour
    return float(rows.mean() / picture.shape[0]), float(columns.mean() / picture.shape[1])


@pytest.mark.parametrize(("top", "bottom"), [(0.9, 0.1), (0.5, 0.2), (0.9, 0.7)])
def test_the_surface_is_brightest_where_the_dice_is_highest(top: float, bottom: float) -> None:
    tops, bottoms = (np.arange(101) / 100)[:, None], np.arange(101) / 100
    surface = 0.8 - np.hypot(tops - top, bottoms - bottom)
    surface[bottoms > tops] = np.nan
    picture = threshold_surface(surface, Thresholds(), 0.5, Thresholds(0, 1.0, 0, 0.0))
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
    presence = np.linspace(0, 1, 20).astype(np.float32)
    patients = [str(number) for number in range(20)]

    def drawn(truth: np.ndarray, sensitivity: float) -> np.ndarray:
        images = ScoredImages(np.ones(20), presence > 0.3, truth, presence, patients)
        return presence_curves(images, sensitivity, 0.8)

    good, bad = drawn(presence > 0.5, 0.9), drawn(presence < 0.5, 0.2)
    assert good.shape == bad.shape
    half = good.shape[1] // 2
    for side in (slice(None, half), slice(half, None)):
        assert where(good[:, side], BLUE)[0] < where(bad[:, side], BLUE)[0] - 0.1
    assert where(good[: good.shape[0] // 2, :half], ORANGE)[1] < 0.5


def test_a_missed_image_has_a_mark_of_its_own() -> None:
    area, dices = np.array([100, 1000, 10000]), np.array([0.0, 0.5, 0.9])
    some = dice_by_area_plot(area, dices, np.array([False, True, True]))
    none = dice_by_area_plot(area, dices, np.array([True, True, True]))
    red = np.array([(p.astype(int)[..., 0] - p.astype(int)[..., 2] > 100).sum() for p in (some, none)])
    assert red[0] > red[1] + 20
