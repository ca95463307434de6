"""Out-of-fold predictions: each image is predicted by the network that did not train on it."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pneumo_experiments import tracking
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.experiment.fold_training import TrainedFold
from pneumo_experiments.learning.predict import to_native
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.scoring.exact import best_of_all
from pneumo_experiments.scoring.metrics import dice
from pneumo_experiments.scoring.scores import ScoredImages, Scores, score_images
from pneumo_experiments.scoring.thresholds import ThresholdCounts, apply_thresholds

COLUMNS = ("image_id", "fold", "presence", "truth_area_px", "dice", "predicted_area_px", "rle")


def log_out_of_fold(folds: Sequence[TrainedFold]) -> Scores:
    """Logs each image's out-of-fold prediction as ``out_of_fold.csv`` and the scores of all as metrics.

    Each fold's network predicts its validation images, which it never trained on. The masks, at native size
    in ``rle``, use thresholds chosen on the other folds. The network's epoch was chosen on these very images,
    so the scores are validation scores, named ``oof_dice`` and so on.
    """
    patients = [entry.patient for fold in folds for entry in fold.validation.entries]
    dices, areas = np.empty(len(patients)), np.empty(len(patients), np.int64)
    all_counts, done = ThresholdCounts.joined(fold.counts for fold in folds), 0
    truths = all_counts.truth_area
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out_of_fold.csv"
        with (
            path.open("w", newline="", encoding="utf-8") as file,
            ProgressBar("out of fold", len(patients)) as bar,
        ):
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for number, fold in enumerate(folds):
                subset = fold.validation
                others = ThresholdCounts.joined(other.counts for other in folds if other is not fold)
                thresholds = best_of_all(others).thresholds
                for index, prediction in subset.predictions(fold.detector.predictor):
                    truth = subset.dataset.mask(index)
                    mask = apply_thresholds(
                        to_native(prediction.mask, truth.shape), prediction.presence, thresholds
                    )
                    dices[done], areas[done] = dice(truth, mask), np.count_nonzero(mask)
                    image_id, area = subset.dataset.entries[index].image_id, truths[done]
                    writer.writerow(
                        [image_id, number, prediction.presence, area, dices[done], areas[done], encode(mask)]
                    )
                    done += 1
                    bar.update()
        tracking.log_file(path)
    scores = score_images(ScoredImages(dices, areas > 0, truths > 0, all_counts.presence, patients))
    tracking.log_metrics(scores.as_metrics("oof_"))
    tracking.log_params(scores.as_facts("oof_"))
    return scores
