"""The folds of one training together: out-of-fold predictions, and their networks as one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.evaluation.threshold_search import ThresholdSearch, search_thresholds
from pneumo_experiments.learning.predict import to_native
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.dice import dice
from pneumo_experiments.metrics.scores import ScoredImages, Scores, score_images
from pneumo_experiments.metrics.thresholds import ThresholdCounts, apply_thresholds
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.serving import Detector, make_ensemble
from pneumo_experiments.training.fold import FoldResult

COMPARED_IMAGES = 64  # enough for a mean over images
MUCH_DISAGREEMENT = 0.15  # the standard deviation of presence; it is at most 0.5
COLUMNS = ("image_id", "fold", "presence", "truth_area_px", "dice", "predicted_area_px", "rle")


@dataclass(frozen=True)
class OutOfFold:
    """Each image predicted by the network of its fold, which never trained on it.

    The masks, at native size in ``rle``, use thresholds chosen on the other folds. The network's epoch was
    chosen on these very images, so the scores are validation scores.
    """

    rows: list[tuple[object, ...]]  # COLUMNS
    scores: Scores


def predict_out_of_fold(folds: Sequence[FoldResult]) -> OutOfFold:
    """Predictions and scores of the validation images of all folds."""
    counts, rows = _joined(folds), list[tuple[object, ...]]()
    dices, areas = np.empty(len(counts)), np.empty(len(counts), np.int64)
    truths = counts.truth_area
    with ProgressBar("out of fold", len(counts)) as bar:
        for number, fold in enumerate(folds):
            subset = fold.evaluation.subset
            thresholds = best_of_all(counts.rows(counts.fold != number)).thresholds
            for index, prediction in subset.predictions(fold.detector.predictor):
                truth, place = subset.dataset.mask(index), len(rows)
                native = to_native(prediction.mask, truth.shape)
                mask = apply_thresholds(native, prediction.presence, thresholds)
                dices[place], areas[place] = dice(truth, mask), np.count_nonzero(mask)
                scored = (prediction.presence, truths[place], dices[place], areas[place])
                rows.append((subset.dataset.entries[index].image_id, number, *scored, encode(mask)))
                bar.update()
    images = ScoredImages(dices, areas > 0, truths > 0, counts.presence, counts.patient)
    return OutOfFold(rows, score_images(images))


@dataclass(frozen=True, eq=False)
class FoldsModel:
    """The networks of all folds as one model, with the best thresholds for all out-of-fold predictions."""

    detector: Detector
    counts: ThresholdCounts
    search: ThresholdSearch
    disagreement: float
    """of the networks: see ``disagreement``"""

    def as_metrics(self) -> dict[str, float]:
        """How the thresholds were found; their Dice on the very images that chose them is optimistic."""
        chosen = {
            "thresholds/dice_optimistic": self.search.optimum.dice,
            "oof/members_disagreement": self.disagreement,
        }
        return self.search.as_metrics() | chosen


def join_folds(folds: Sequence[FoldResult], threshold_trials: int, seed: int) -> FoldsModel:
    """The networks of all folds as one model."""
    counts = _joined(folds)
    search = search_thresholds(counts, threshold_trials, seed)
    detector = replace(make_ensemble([fold.detector for fold in folds]), thresholds=search.thresholds)
    return FoldsModel(detector, counts, search, disagreement(detector, folds[0].evaluation.subset))


def disagreement(detector: Detector, validation: Subset) -> float:
    """How far the networks disagree: the standard deviation of their probabilities of presence.

    A mean over up to 64 images of the hold-out, which trained none of them and choose nothing here; without a
    hold-out, of the validation images given.
    """
    dataset, split = validation.dataset, detector.members[0].split
    indices = make_split(dataset, split).holdout if split.holdout > 0 else validation.indices
    images = dataset.images(indices[:COMPARED_IMAGES])
    presence = [[one.presence for one in member.predictor.predict(images)] for member in detector.members]
    return float(np.std(presence, axis=0).mean())


def _joined(folds: Sequence[FoldResult]) -> ThresholdCounts:
    return ThresholdCounts.joined([fold.evaluation.counts for fold in folds])
