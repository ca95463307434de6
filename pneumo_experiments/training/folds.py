"""The folds of one training together: out-of-fold predictions, and their networks as one model."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from pneumo_experiments import tracking
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.evaluation.counts_search import log_counts
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.evaluation.threshold_search import log_threshold_study, search_thresholds
from pneumo_experiments.learning.predict import to_native
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.exact import best_of_all
from pneumo_experiments.metrics.scores import ScoredImages, Scores, score_images
from pneumo_experiments.metrics.thresholds import ThresholdCounts, apply_thresholds
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import Detector, make_ensemble, new_folder, save
from pneumo_experiments.training.fold import TrainedFold

COMPARED_IMAGES = 64  # enough for a mean over images
MUCH_DISAGREEMENT = 0.15  # the standard deviation of presence; it is at most 0.5
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


def log_ensemble(folds: Sequence[TrainedFold], threshold_trials: int, seed: int) -> str:
    """Logs the networks of all folds as one model of the active run; returns its address.

    Its thresholds are the best for all out-of-fold predictions. Their mean Dice on these very predictions is
    logged as ``val_dice_optimistic``; ``oof_dice`` beside it is that of thresholds from other folds.
    """
    counts = ThresholdCounts.joined(fold.counts for fold in folds)
    patients = [entry.patient for fold in folds for entry in fold.validation.entries]
    log_counts(counts, patients, np.repeat(np.arange(len(folds)), [len(fold.counts) for fold in folds]))
    search = search_thresholds(counts, threshold_trials, seed)
    tracking.log_metrics(search.as_metrics() | {"val_dice_optimistic": search.optimum.dice})
    tracking.log_params(asdict(search.thresholds))
    log_threshold_study(search)
    detector = replace(make_ensemble([fold.detector for fold in folds]), thresholds=search.thresholds)
    log_disagreement(detector, folds[0].validation)
    with new_folder() as folder:
        save(folder, detector)
        return tracking.log_model(folder)


def log_disagreement(detector: Detector, validation: Subset) -> None:
    """Logs how far the networks disagree, as ``members_disagreement``; warns if that is far.

    The standard deviation of their probabilities of presence, a mean over up to 64 images of the hold-out,
    which trained none of them and choose nothing here; without a hold-out, of the validation images given.
    """
    dataset, split = validation.dataset, detector.members[0].split
    indices = make_split(dataset, split).holdout if split.holdout > 0 else validation.indices
    images = dataset.images(indices[:COMPARED_IMAGES])
    presence = [[one.presence for one in member.predictor.predict(images)] for member in detector.members]
    disagreement = float(np.std(presence, axis=0).mean())
    tracking.log_metrics({"members_disagreement": disagreement})
    if disagreement > MUCH_DISAGREEMENT:
        print(
            f"train: warning: the networks' probabilities of presence differ by {disagreement:.2f} (standard"
            " deviation): their mean, and common thresholds, suit none of them; look at the folds' own scores"
        )
