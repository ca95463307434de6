"""Threshold counts as files of a run, and the search for thresholds in such a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.splits import assign_folds
from pneumo_experiments.evaluation.counts_file import StoredCounts, load_counts, save_counts
from pneumo_experiments.evaluation.threshold_search import log_threshold_study, search_thresholds
from pneumo_experiments.metrics.cross_fit import cross_fitted
from pneumo_experiments.metrics.exact import best_of_all
from pneumo_experiments.metrics.scores import ScoredImages, Scores, score_images
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds

FILE = "threshold_counts.npz"
PARTS = 5


def log_counts(
    counts: ThresholdCounts, patients: Sequence[str], parts: NDArray[np.int64] | None = None
) -> None:
    """Logs the counts of n images as a file, with the patient of each and the part that judges it.

    Without ``parts`` (n,) the patients are divided into 5, stratified by area.
    """
    if parts is None:
        count = min(PARTS, len(set(patients)))
        few = np.zeros(len(patients), np.int64)
        parts = assign_folds(patients, counts.truth_area, count, seed=0) if count > 1 else few
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        save_counts(path, counts, patients, parts)
        tracking.log_file(path)


def search_counts(path: Path, trials: int, given: Mapping[str, float]) -> Scores:
    """Searches thresholds in a file of counts, with an Optuna study of so many trials beside it.

    Prints and logs the exact optimum, its cross-fitted value, the study, and the Dice of the ``given``
    thresholds, if any; the others are the optimum's then. Returns the scores of the optimum.
    """
    stored = load_counts(path)
    counts, search = stored.counts, search_thresholds(stored.counts, trials, seed=0)
    best, scores = search.thresholds, _scores(stored, search.thresholds)
    crossed = cross_fitted(counts, stored.parts, lambda others: best_of_all(others).thresholds)
    values = search.as_metrics() | {"threshold_dice_cross_fitted": crossed.dice}
    lines = [
        f"{scores.images} images of {scores.patients} patients, {scores.positives} with pneumothorax,"
        f" all-empty baseline {scores.dice_baseline:.4f}",
        f"best of {search.optimum.combinations:,} combinations: Dice {search.optimum.dice:.4f}"
        f" ({scores.interval}), on positives {scores.on_positives}, with {_text(best)}",
        f"cross-fitted, thresholds from other patients: Dice {crossed.dice:.4f}",
    ]
    if search.study is not None:
        optuna, distance = values["threshold_dice_optuna"], values["threshold_dice_distance"]
        lines.append(f"Optuna, {trials} trials: Dice {optuna:.4f}, below the best by {distance:.4f}")
    if given:
        thresholds = replace(best, **given)
        values["threshold_dice_given"] = _scores(stored, thresholds).dice
        lines.append(f"as given: Dice {values['threshold_dice_given']:.4f} with {_text(thresholds)}")
    tracking.log_metrics(values)
    tracking.log_params({f"{name}_best": value for name, value in asdict(best).items()} | scores.as_facts())
    log_threshold_study(search)
    tracking.describe("\n".join([f"Thresholds searched in {path}.", *lines]))
    for line in lines:
        print(f"score: {line}")
    return scores


def _scores(stored: StoredCounts, thresholds: Thresholds) -> Scores:
    patients = [str(number) for number in stored.patients.tolist()]
    return score_images(ScoredImages.of(stored.counts, thresholds, patients))


def _text(thresholds: Thresholds) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(thresholds).items())
