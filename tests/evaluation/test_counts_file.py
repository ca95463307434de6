"""Threshold counts as files: written, read, refused when damaged, and searched again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation import counts_file
from pneumo_experiments.evaluation.counts_file import load_counts, save_counts
from pneumo_experiments.metrics.cross_fit import cross_fitted
from pneumo_experiments.metrics.exact import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds

PATIENTS = ["b", "a", "b", "c", "a", "d"]
PARTS = np.array([0, 1, 0, 7, 1, 7])


def random_counts(images: int = len(PATIENTS)) -> ThresholdCounts:
    rng, counts = np.random.default_rng(3), ThresholdCounts()
    inside = np.sort(rng.integers(0, 10**6, (images, 101)), axis=1)[:, ::-1]
    outside = np.sort(rng.integers(0, 2 * 10**6, (images, 101)), axis=1)[:, ::-1]
    inside[::2] = 0
    counts.append(np.stack((inside + outside, inside), 1).astype(np.int32), rng.random(images, np.float32))
    return counts


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "threshold_counts.npz"
    save_counts(path, random_counts(), PATIENTS, PARTS)
    return path


def test_counts_that_were_saved_are_read(path: Path) -> None:
    counts, stored = random_counts(), load_counts(path)
    assert len(stored.counts) == len(counts)
    np.testing.assert_array_equal(np.stack(stored.counts.pixels()), np.stack(counts.pixels()))
    np.testing.assert_array_equal(stored.counts.presence, counts.presence)
    np.testing.assert_array_equal(stored.patients, [1, 0, 1, 2, 0, 3])  # who is who, and no name
    np.testing.assert_array_equal(stored.parts, PARTS)
    thresholds = Thresholds(0.1, 0.55, 1000, 0.3)
    np.testing.assert_array_equal(stored.counts.dice(thresholds), counts.dice(thresholds))


def test_each_part_is_scored_with_the_thresholds_of_all_others(path: Path) -> None:
    stored = load_counts(path)
    crossed = cross_fitted(stored.counts, stored.parts, lambda others: best_of_all(others).thresholds)
    dices: list[float] = []
    for judged in ([0, 2], [1, 4], [3, 5]):
        others = np.setdiff1d(np.arange(6), judged)
        thresholds = best_of_all(stored.counts.rows(others)).thresholds
        dices += stored.counts.rows(np.array(judged)).dice(thresholds).tolist()
    assert crossed.dice == pytest.approx(np.mean(dices))


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


PIXELS = np.stack(random_counts().pixels(), axis=1).astype(np.int32)
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
    "fewer patients": (changed(patients=np.zeros(5, np.int32)), "not one patient and one part"),
    "a patient in two parts": (changed(parts=np.arange(6, dtype=np.int32)), "a patient in two parts"),
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
    monkeypatch.setattr(counts_file, "MAX_BYTES", 4000)
    assert path.stat().st_size < 4000 < PIXELS.nbytes
    with pytest.raises(UserError, match="more than 4,000 bytes"):
        load_counts(path)
