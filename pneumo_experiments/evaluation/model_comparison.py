"""A model against a baseline model on the same images: numbers, table and picture in the active run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.plots import comparison_plot
from pneumo_experiments.evaluation.scored_images import describe_seen
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.metrics.comparison import Comparison, compare
from pneumo_experiments.metrics.scores import ScoredImages
from pneumo_experiments.serving import Detector

Change = tuple[str, float, float, float]  # the columns

COLUMNS = ("image_id", "difference", "dice", "baseline_dice")
MAX_CHANGED = 100  # images in the table


@dataclass(frozen=True)
class ModelComparison:
    """How a model and the baseline model at an address differ on the same images."""

    address: str
    comparison: Comparison
    baseline_dice: float
    changed: Sequence[Change]
    """the images that changed most, in falling order"""
    picture: NDArray[np.uint8]

    @property
    def line(self) -> str:
        """The comparison in words."""
        return self.comparison.line


def refuse_seen(address: str, baseline: Detector, subset: Subset) -> None:
    """Raises UserError if the baseline model has seen some of the images or patients, or another size."""
    size = subset.dataset.image_size
    if baseline.image_size != size:
        raise UserError(
            f"baseline={address}: was trained on {baseline.image_size} px, the data set has {size} px; score"
            " both models on data sets of their own and compare their dice"
        )
    if seen := describe_seen(subset, baseline.training_images, "it"):
        raise UserError(
            f"baseline={address}: {seen}; compare models whose split has the same hold-out (holdout and"
            " split_seed), or on external images"
        )


def log_comparison(
    address: str, subset: Subset, images: ScoredImages, baseline: Detector, prefix: str
) -> ModelComparison:
    """Scores the baseline model on the images of a scored model, and logs how the two differ."""
    counts = subset.count(baseline.predictor, desc="baseline")
    other = subset.scored(counts, baseline.thresholds)
    comparison = compare(images.dices, other.dices, images.patients)
    metrics = {
        "dice_difference": comparison.difference,
        "dice_difference_low": comparison.low,
        "dice_difference_high": comparison.high,
        "probability_better": comparison.probability_better,
        "baseline_model_dice": float(other.dices.mean()),
    }
    tracking.log_metrics({prefix + name: value for name, value in metrics.items()})
    differences = images.dices - other.dices
    most = [int(i) for i in np.argsort(-np.abs(differences), kind="stable")[:MAX_CHANGED]]
    entries = subset.entries
    rows = [
        (entries[i].image_id, float(differences[i]), float(images.dices[i]), float(other.dices[i]))
        for i in most
        if differences[i] != 0
    ]
    tracking.log_table(COLUMNS, rows, "changed_images")
    picture = comparison_plot(differences, comparison)
    tracking.log_image(picture, "comparison.png")
    print(f"score: against {address}: {comparison.line}")
    for image_id, difference, dice, before in rows[:3]:
        print(f"score:   {image_id}: Dice {dice:.3f} instead of {before:.3f} ({difference:+.3f})")
    return ModelComparison(address, comparison, metrics["baseline_model_dice"], rows, picture)
