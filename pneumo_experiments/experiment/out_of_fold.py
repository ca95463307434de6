"""What the networks of all folds say of images that they did not train on."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pneumo_experiments import tracking
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.experiment.subset import Subset
from pneumo_experiments.experiment.threshold_search import refine_thresholds
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.scoring.metrics import dice
from pneumo_experiments.scoring.scores import Scores, score_answers
from pneumo_experiments.scoring.thresholds import ThresholdCounts, apply_thresholds
from pneumo_experiments.settings import Train

COLUMNS = ("image_id", "fold", "presence", "truth_area_px", "dice", "predicted_area_px", "rle")


def log_out_of_fold(folds: Sequence[tuple[Subset, ThresholdCounts, Predictor]], settings: Train) -> Scores:
    """Logs each image's out-of-fold answer as ``out_of_fold.csv`` and the scores of all as metrics.

    A fold is given by its validation images, their tally and the network that never trained on them. Its
    masks, at native size in ``rle``, are drawn at thresholds that the other folds chose. The network's epoch
    was chosen on these very images, so the scores are validation scores, named ``oof_dice`` and so on.
    """
    patients = [entry.patient for subset, _, _ in folds for entry in subset.entries]
    dices, areas = np.empty(len(patients)), np.empty(len(patients), np.int64)
    whole, done = ThresholdCounts.joined(counts for _, counts, _ in folds), 0
    truths = whole.truth_area
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out_of_fold.csv"
        with (
            path.open("w", newline="", encoding="utf-8") as file,
            tqdm(total=len(patients), desc="out of fold", unit="image", disable=None, leave=False) as bar,
        ):
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for number, (subset, _, predictor) in enumerate(folds):
                others = ThresholdCounts.joined(
                    counts for k, (_, counts, _) in enumerate(folds) if k != number
                )
                thresholds = refine_thresholds(others, settings.threshold_trials, settings.seed)
                for index, answer in subset.predictions(predictor):
                    truth = subset.dataset.mask(index)
                    mask = apply_thresholds(to_native(answer.mask, truth.shape), answer.presence, thresholds)
                    dices[done], areas[done] = dice(truth, mask), np.count_nonzero(mask)
                    image_id, area = subset.dataset.entries[index].image_id, truths[done]
                    table.writerow(
                        [image_id, number, answer.presence, area, dices[done], areas[done], encode(mask)]
                    )
                    done += 1
                    bar.update()
        tracking.log_file(path)
    scores = score_answers(dices, areas > 0, truths > 0, whole.presence, patients)
    tracking.log_metrics(scores.as_metrics("oof_"))
    tracking.log_params(scores.as_facts("oof_"))
    return scores
