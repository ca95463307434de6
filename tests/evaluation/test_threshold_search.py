"""The exact thresholds and the Optuna study on the same counts; counts as a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_counts import Image, count_images

from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation import threshold_search
from pneumo_experiments.evaluation.threshold_search import (
    TRIAL_COLUMNS,
    ThresholdSearch,
    counts_file,
    load_counts,
    search_counts,
    search_thresholds,
)
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid


def noisy_squares(images: int) -> ThresholdCounts:
    """Noisy guesses at random squares of up to 120 x 120 px."""
    rng, made = np.random.default_rng(2), list[Image]()
    for _ in range(images):
        truth = np.zeros((160, 160), bool)
        side = int(rng.integers(20, 120)) * int(rng.random() < 0.5)
        truth[10 : 10 + side, 20 : 20 + side] = True
        probability = np.clip(0.3 + 0.3 * truth + rng.normal(0, 0.3, truth.shape), 0, 1).astype(np.float32)
        made.append((probability, float(np.clip(rng.normal(0.4 + 0.2 * (side > 0), 0.2), 0, 1)), truth))
    return count_images(made)


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


def test_the_study_does_not_undo_the_choice_of_the_centre() -> None:
    truth = np.zeros((100, 100), bool)
    truth[:, :40] = True
    found = np.where(truth, 0.85, 0.05).astype(np.float32)
    counts = count_images([(found, presence, truth & (presence > 0.5)) for presence in (0.05, 0.85)])
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


# Counts as a file


PATIENTS = ["b", "a", "b", "c", "a", "d"]
FOLDS = np.array([0, 1, 0, 7, 1, 7])


def random_counts() -> ThresholdCounts:
    rng = np.random.default_rng(3)
    inside = np.sort(rng.integers(0, 10**6, (len(PATIENTS), 101)), axis=1)[:, ::-1]
    outside = np.sort(rng.integers(0, 2 * 10**6, (len(PATIENTS), 101)), axis=1)[:, ::-1]
    inside[::2] = 0
    pixels = np.stack((inside + outside, inside), 1).astype(np.int32)
    return ThresholdCounts(pixels, rng.random(len(PATIENTS), np.float32), np.array(PATIENTS), FOLDS)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with counts_file(random_counts()) as file:
        return Path(shutil.copy(file, tmp_path))


def test_counts_that_were_saved_are_read(path: Path) -> None:
    counts, stored = random_counts(), load_counts(path)
    np.testing.assert_array_equal(stored.pixels, counts.pixels)
    np.testing.assert_array_equal(stored.presence, counts.presence)
    assert stored.patient.tolist() == ["1", "0", "1", "2", "0", "3"]  # who is who, and no name
    np.testing.assert_array_equal(stored.fold, FOLDS)
    with counts_file(replace(counts, fold=np.zeros(6, np.int64))) as file:
        folds = load_counts(file).fold
    assert len(np.unique(folds)) == 4  # as many as patients, at most 5
    assert folds[0] == folds[2] and folds[1] == folds[4]


def test_each_fold_is_scored_with_the_thresholds_of_all_others(path: Path) -> None:
    stored = load_counts(path)
    crossed = search_counts(stored, 0, {}).cross_fitted_dice
    dices: list[float] = []
    for scored in ([0, 2], [1, 4], [3, 5]):
        others = np.setdiff1d(np.arange(6), scored)
        thresholds = best_of_all(stored.rows(others)).thresholds
        dices += stored.rows(np.array(scored)).dice(thresholds).tolist()
    assert crossed == pytest.approx(np.mean(dices))


def changed(**arrays: np.ndarray) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        np.savez_compressed(path, **(arrays_of(path) | arrays))  # pyright: ignore[reportArgumentType]

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        arrays = arrays_of(path)
        del arrays[name]
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


class Trap:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


PIXELS = random_counts().pixels
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "no such file"),
    "pipe": (pipe, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip file"),
    "text": (lambda path: path.write_text("image,dice\n"), "not a zip file"),
    "cut": (cut, "zip"),
    "flipped": (flipped, ""),
    **{f"no {name}": (without(name), name) for name in ("counts", "presence", "patients", "parts")},
    "pickle": (changed(parts=np.array([Trap()] * 6, dtype=object)), "allow_pickle"),
    "more at a higher hundredth": (changed(counts=PIXELS[:, :, ::-1]), "more pixels at a higher hundredth"),
    "negative": (changed(counts=PIXELS - 10**7), "more pixels"),
    "more within": (changed(counts=PIXELS[:, ::-1]), "within the truth than in all"),
    "fewer levels": (changed(counts=PIXELS[:, :, :50]), "give (n, 2, 101)"),
    "floats": (changed(counts=PIXELS.astype(float)), "counts is not of type int32"),
    "presence is nan": (changed(presence=np.full(6, np.nan, np.float32)), "presence outside [0, 1]"),
    "presence is one number": (changed(presence=np.array(0.5, np.float32)), ""),
    "fewer patients": (changed(patients=np.zeros(5, np.int32)), "not one patient and one fold"),
    "a patient in two folds": (changed(parts=np.arange(6, dtype=np.int32)), "a patient in two folds"),
    "no images": (
        changed(
            counts=PIXELS[:0],
            presence=np.zeros(0, np.float32),
            patients=np.zeros(0, np.int32),
            parts=np.zeros(0, np.int32),
        ),
        "no images",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(damage: str, path: Path) -> None:
    damaged, reason = DAMAGES[damage]
    damaged(path)
    with pytest.raises(UserError) as error:
        load_counts(path)
    assert str(error.value).startswith(f"counts={path}: not threshold counts (")
    assert reason in str(error.value)
    assert "threshold_counts.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_grows_too_large_is_refused_before_it_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold_search, "MAX_BYTES", 4000)
    assert path.stat().st_size < 4000 < PIXELS.nbytes
    with pytest.raises(UserError, match="more than 4,000 bytes"):
        load_counts(path)
