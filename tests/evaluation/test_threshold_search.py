"""The exact thresholds, and the Optuna study beside them."""

from __future__ import annotations

import numpy as np
import pytest
from reference_counts import add_image

from pneumo_experiments.evaluation.threshold_search import (
    TRIAL_COLUMNS,
    ThresholdSearch,
    search_thresholds,
)
from pneumo_experiments.metrics.exact import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid


def noisy_squares(images: int) -> ThresholdCounts:
    """Noisy guesses at random squares of up to 120 x 120 px."""
    rng, counts = np.random.default_rng(2), ThresholdCounts()
    for _ in range(images):
        truth = np.zeros((160, 160), bool)
        side = int(rng.integers(20, 120)) * int(rng.random() < 0.5)
        truth[10 : 10 + side, 20 : 20 + side] = True
        probability = np.clip(0.3 + 0.3 * truth + rng.normal(0, 0.3, truth.shape), 0, 1).astype(np.float32)
        add_image(counts, probability, float(np.clip(rng.normal(0.4 + 0.2 * (side > 0), 0.2), 0, 1)), truth)
    return counts


def test_the_study_comes_near_the_exact_optimum_and_its_distance_is_logged() -> None:
    counts = noisy_squares(40)
    search = search_thresholds(counts, trials=60, seed=0)
    metrics = search.as_metrics()
    exact, optuna = metrics["threshold_dice_exact"], metrics["threshold_dice_optuna"]
    assert exact == counts.dice(search.thresholds).mean()
    assert counts.dice(best_on_grid(counts)).mean() <= optuna < exact
    assert metrics["threshold_dice_distance"] == exact - optuna


def test_each_trial_is_recorded_with_the_dice_of_the_thresholds_that_it_used() -> None:
    counts = noisy_squares(20)
    search = search_thresholds(counts, trials=15, seed=0)
    trials = search.trials()
    assert len(trials) == 15
    assert [trial[0] for trial in trials] == list(range(15))
    for _, presence, top, area, bottom, dice in trials:
        assert bottom <= top
        assert dice == counts.dice(Thresholds(presence, top, int(area), bottom)).mean()
    assert max(trial[-1] for trial in trials) == search.as_metrics()["threshold_dice_optuna"]
    assert (
        *("trial", "presence_threshold", "top_score", "min_area_px", "bottom_score", "dice"),
    ) == TRIAL_COLUMNS
    assert search_thresholds(counts, trials=15, seed=0).trials() == trials
    assert search_thresholds(counts, trials=15, seed=1).trials() != trials


def test_the_study_does_not_undo_the_choice_of_the_middle() -> None:
    counts, truth = ThresholdCounts(), np.zeros((100, 100), bool)
    truth[:, :40] = True
    for presence in (0.05, 0.85):
        add_image(counts, np.where(truth, 0.85, 0.05).astype(np.float32), presence, truth & (presence > 0.5))
    search = search_thresholds(counts, trials=30, seed=0)
    assert search.as_metrics()["threshold_dice_distance"] == 0
    assert search.thresholds == best_of_all(counts).thresholds
    assert search.thresholds.presence_threshold == pytest.approx(0.45)


@pytest.mark.parametrize("trials", [1, 8])
def test_history_and_contours_are_drawn_without_a_warning(
    trials: int, recwarn: pytest.WarningsRecorder
) -> None:
    pictures = search_thresholds(noisy_squares(10), trials, seed=0).pictures()
    assert set(pictures) == {"threshold_history.png", "threshold_contours.png"}
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20  # not an empty page
    assert not recwarn.list


def test_without_trials_there_is_no_study_and_the_thresholds_are_the_same() -> None:
    counts = noisy_squares(10)
    search: ThresholdSearch = search_thresholds(counts, trials=0, seed=0)
    assert search.thresholds == search_thresholds(counts, trials=2, seed=0).thresholds
    assert set(search.as_metrics()) == {"threshold_dice_exact"}
    assert search.trials() == []
    assert search.pictures() == {}
