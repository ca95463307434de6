"""What the networks of all folds say of images that they did not train on."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.data.store import Dataset
from pneumo_experiments.scoring.scores import Scores, score_answers
from pneumo_experiments.scoring.thresholds import Tally
from pneumo_experiments.settings import Train
from pneumo_experiments.stages.search import refine_thresholds

COLUMNS = ("image_id", "fold", "presence", "predicted_area_px", "truth_area_px", "dice")


def log_out_of_fold(
    dataset: Dataset, folds: Sequence[tuple[NDArray[np.int64], Tally]], settings: Train
) -> Scores:
    """Logs each image's out-of-fold answer as ``out_of_fold.csv`` and the scores of all as metrics.

    A fold is given by the indices and the tally of its validation images. Its masks are drawn at thresholds
    that the other folds chose, so that no image takes part in the choice that judges it.
    """
    rows: list[tuple[str, int, float, int, int, float]] = []
    for number, (indices, tally) in enumerate(folds):
        others = Tally.joined(other for k, (_, other) in enumerate(folds) if k != number)
        thresholds = refine_thresholds(others, settings.threshold_trials, settings.seed)
        rows += zip(
            [dataset.entries[int(index)].image_id for index in indices],
            [number] * len(indices),
            tally.presence.tolist(),
            tally.predicted_area(thresholds).tolist(),
            tally.truth_area.tolist(),
            tally.dice(thresholds).tolist(),
            strict=True,
        )
    _, _, presence, found, truth, dices = (np.array(column) for column in zip(*rows, strict=True))
    patients = [dataset.entries[int(index)].patient for indices, _ in folds for index in indices]
    scores = score_answers(dices, found > 0, truth > 0, presence.astype(np.float32), patients)
    tracking.log_metrics(scores.as_metrics())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out_of_fold.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        tracking.log_file(path)
    return scores
