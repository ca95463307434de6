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
from reference_counts import count_images, squares

from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation import threshold_search
from pneumo_experiments.evaluation.threshold_search import (
    TRIAL_COLUMNS,
    counts_file,
    load_counts,
    search_counts,
    search_thresholds,
)
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, best_on_grid


def test_the_study_comes_near_the_exact_optimum_and_each_trial_is_recorded_with_its_dice() -> None:
    counts = count_images(squares(40, seed=2, side=80))
    search = search_thresholds(counts, trials=60, seed=0)
    metrics, trials = search.as_metrics(), search.trials()
    exact, optuna = metrics["thresholds/dice_exact"], metrics["thresholds/dice_optuna"]
    assert exact == counts.dice(search.thresholds).mean()
    assert counts.dice(best_on_grid(counts)).mean() <= optuna < exact
    assert metrics["thresholds/dice_distance"] == exact - optuna
    names = ("trial", "presence_threshold", "top_score", "min_area_px", "bottom_score", "dice")
    assert names == TRIAL_COLUMNS
    assert [trial[0] for trial in trials] == list(range(60))
    for _, presence, top, area, bottom, dice in trials:
        assert bottom <= top
        assert dice == counts.dice(Thresholds(presence, top, int(area), bottom)).mean()
    assert max(trial[-1] for trial in trials) == optuna
    assert search_thresholds(counts, trials=15, seed=0).trials() == trials[:15]
    assert search_thresholds(counts, trials=15, seed=1).trials() != trials[:15]


def test_the_study_does_not_undo_the_choice_of_the_centre() -> None:
    truth = np.zeros((100, 100), bool)
    truth[:, :40] = True
    found = np.where(truth, 0.85, 0.05).astype(np.float32)
    counts = count_images([(found, presence, truth & (presence > 0.5)) for presence in (0.05, 0.85)])
    search = search_thresholds(counts, trials=30, seed=0)
    assert search.as_metrics()["thresholds/dice_distance"] == 0
    assert search.thresholds == best_of_all(counts).thresholds
    assert search.thresholds.presence_threshold == pytest.approx(0.45)


@pytest.mark.usefixtures("no_layout")
@pytest.mark.parametrize("trials", [1, 8])
def test_history_and_contours_are_drawn_without_a_warning(
    trials: int, recwarn: pytest.WarningsRecorder
) -> None:
    pictures = search_thresholds(count_images(squares(10, seed=2)), trials, seed=0).pictures()
    assert set(pictures) == {"threshold_history.png", "threshold_contours.png"}
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert len(np.unique(picture[::3, ::3].reshape(-1, 3), axis=0)) > 20  # not an empty page
    assert not recwarn.list


def test_one_of_a_thing_is_said_as_one() -> None:
    lines = search_counts(count_images(squares(1, seed=2)), trials=1, given={}).lines()
    assert lines[0].startswith("1 image of 1 patient, ")
    assert lines[-1].startswith("Optuna, 1 trial: Dice ")


def test_without_trials_there_is_no_study_and_the_thresholds_are_the_same() -> None:
    counts = count_images(squares(10, seed=2))
    search = search_thresholds(counts, trials=0, seed=0)
    assert search.thresholds == search_thresholds(counts, trials=2, seed=0).thresholds
    assert set(search.as_metrics()) == {"thresholds/dice_exact"}
    assert (search.trials(), search.pictures()) == ([], {})


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


class Trap:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def flipped(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 0xFF]) + content[201:]


COUNTS, PIXELS = "counts", random_counts().pixels
BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "not a zip file"),
    "text": (lambda _: b"image,dice\n", "not a zip file"),
    "cut": (lambda content: content[:-100], "zip"),
    "flipped": (flipped, ""),
}
ARRAYS: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    **{f"no {name}": ({name: None}, name) for name in (COUNTS, "presence", "patients", "parts")},
    "pickle": ({"parts": np.array([Trap()] * 6, dtype=object)}, "allow_pickle"),
    "more at a higher hundredth": ({COUNTS: PIXELS[:, :, ::-1]}, "more pixels at a higher hundredth"),
    "negative": ({COUNTS: PIXELS - 10**7}, "more pixels"),
    "more within": ({COUNTS: PIXELS[:, ::-1]}, "within the truth than in all"),
    "fewer levels": ({COUNTS: PIXELS[:, :, :50]}, "give (n, 2, 101)"),
    "floats": ({COUNTS: PIXELS.astype(float)}, "counts is not of type int32"),
    "presence is nan": ({"presence": np.full(6, np.nan, np.float32)}, "presence outside [0, 1]"),
    "presence is 1.5": ({"presence": np.full(6, 1.5, np.float32)}, "presence outside [0, 1]"),
    "presence is one number": ({"presence": np.array(0.5, np.float32)}, ""),
    "fewer patients": ({"patients": np.zeros(5, np.int32)}, "not one patient and one fold"),
    "a patient in two folds": ({"parts": np.arange(6, dtype=np.int32)}, "a patient in two folds"),
    "no images": (
        {COUNTS: PIXELS[:0], "presence": np.zeros(0, np.float32)}
        | dict.fromkeys(("patients", "parts"), np.zeros(0, np.int32)),
        "no images",
    ),
}


def require_refusal(path: Path, reason: str) -> None:
    with pytest.raises(UserError) as error:
        load_counts(path)
    assert str(error.value).startswith(f"counts={path}: not threshold counts (")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ARRAYS)
def test_wrong_arrays_are_refused(damage: str, path: Path) -> None:
    changes, reason = ARRAYS[damage]
    with np.load(path) as stored:
        arrays = {**stored, **changes}
    kept: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(path, **kept)
    require_refusal(path, reason)


@pytest.mark.parametrize("damage", BYTES)
def test_a_damaged_file_is_one_line(damage: str, path: Path) -> None:
    change, reason = BYTES[damage]
    path.write_bytes(change(path.read_bytes()))
    require_refusal(path, reason)


def test_a_missing_file_a_pipe_and_one_that_grows_too_large_are_refused_before_they_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threshold_search, "MAX_BYTES", 4000)
        assert path.stat().st_size < 4000 < PIXELS.nbytes
        require_refusal(path, "more than 4,000 bytes")
    path.unlink()
    require_refusal(path, "no such file")
    os.mkfifo(path)
    require_refusal(path, "no such file")
