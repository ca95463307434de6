"""A model or given masks on labelled images: scores, their tables, and the comparison with another model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.evaluation.given_masks import GivenMasks
from pneumo_experiments.evaluation.subset import LabelledImages, Subset, image_set_id, seen_by
from pneumo_experiments.metrics.comparison import Comparison, compare
from pneumo_experiments.metrics.scores import (
    UNKNOWN,
    Row,
    ScoredImages,
    Scores,
    age_band,
    area_terciles,
    by_group,
    calibration,
    score_images,
)
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds
from pneumo_experiments.serving import Detector

IMAGE_COLUMNS = ("image_id", "patient", "truth_area_px", "predicted_area_px", "dice", "presence", "seen")
CHANGE_COLUMNS = ("image_id", "difference", "dice", "baseline_dice")
MAX_CHANGED = 100  # images in the table

Change = tuple[str, float, float, float]  # CHANGE_COLUMNS


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions of a subset, counted, with thresholds; what follows from them is computed once."""

    labelled: LabelledImages
    counts: ThresholdCounts
    thresholds: Thresholds
    masks_only: bool = False
    """whether the counts are of given masks: then no probability is known, and any threshold fits"""

    @property
    def subset(self) -> Subset:
        """The images with their pixels; those of a table alone have none."""
        assert isinstance(self.labelled, Subset)
        return self.labelled

    @cached_property
    def images(self) -> ScoredImages:
        """What the scores are made of."""
        images = ScoredImages.of(self.counts, self.thresholds)
        return replace(images, presence=None) if self.masks_only else images

    @cached_property
    def predicted_area(self) -> NDArray[np.int64]:
        """Pixels of each image's mask (n,) at native size."""
        return self.counts.predicted_area(self.thresholds)

    @cached_property
    def scores(self) -> Scores:
        """The scores of all images; raises UserError without any."""
        return score_images(self.images)

    @cached_property
    def intervals(self) -> dict[str, float]:
        """95% intervals of all scores: ``<name>_low`` and ``<name>_high``."""
        return self.images.intervals()

    @cached_property
    def image_set_id(self) -> str:
        """See ``image_set_id``."""
        return image_set_id(self.labelled)

    @cached_property
    def groups(self) -> list[Row]:
        """Rows of GROUP_COLUMNS: scores by area, view, sex and age."""
        entries = self.labelled.entries
        groups = {
            "area": area_terciles(self.counts.truth_area),
            "view": [entry.view or UNKNOWN for entry in entries],
            "sex": [entry.sex or UNKNOWN for entry in entries],
            "age": [age_band(entry.age) for entry in entries],
        }
        return by_group(self.images, groups)

    @cached_property
    def calibration(self) -> list[Row]:
        """Rows of CALIBRATION_COLUMNS; none of given masks."""
        return calibration(self.images)

    def image_rows(self, seen: frozenset[str] | None) -> list[tuple[object, ...]]:
        """Rows of IMAGE_COLUMNS; ``seen`` are the hashed ids of what the model knows, None if nobody can say.

        Given masks have no presence.
        """
        nothing = [None] * len(self.counts)
        columns = (
            [entry.image_id for entry in self.labelled.entries],
            self.counts.patient.tolist(),
            self.counts.truth_area.tolist(),
            self.predicted_area.tolist(),
            self.images.dices.tolist(),
            nothing if self.masks_only else self.counts.presence.tolist(),
            [UNKNOWN] * len(nothing) if seen is None else seen_by(self.labelled, seen),
        )
        return [*zip(*columns, strict=True)]

    def captions(self) -> list[str]:
        """Dice, true and predicted area of each image in words."""
        columns = (self.images.dices, self.counts.truth_area, self.predicted_area)
        return [
            f"Dice {dice:.2f}, truth {truth:,} px, predicted {predicted:,} px"
            for dice, truth, predicted in zip(*columns, strict=True)
        ]


def evaluate(subset: LabelledImages, model: Detector | GivenMasks, desc: str) -> Evaluation:
    """What a model predicts, or a file holds, scored; shows a progress bar named ``desc``.

    A model needs a ``Subset``: images with pixels.
    """
    if isinstance(model, GivenMasks):
        return Evaluation(subset, model.count(subset, desc), Thresholds(), masks_only=True)
    assert isinstance(subset, Subset)
    return Evaluation(subset, subset.count(model.predictor, desc), model.thresholds)


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """A model and the baseline, a model at an address or a file of masks, on the same images."""

    address: str
    model: Evaluation
    baseline: Evaluation

    @cached_property
    def comparison(self) -> Comparison:
        """How the mean Dice differs, and how sure that is."""
        images = self.model.images
        return compare(images.dices, self.baseline.images.dices, images.patients)

    @cached_property
    def differences(self) -> NDArray[np.float64]:
        """Dice minus the baseline's of each image (n,)."""
        return self.model.images.dices - self.baseline.images.dices

    @property
    def baseline_dice(self) -> float:
        """The baseline model's mean Dice."""
        return float(self.baseline.images.dices.mean())

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Difference, its interval and certainty, and the baseline's Dice."""
        values = {
            "dice_difference": self.comparison.difference,
            "dice_difference_low": self.comparison.low,
            "dice_difference_high": self.comparison.high,
            "probability_better": self.comparison.probability_better,
            "baseline_model_dice": self.baseline_dice,
        }
        return {prefix + name: value for name, value in values.items()}

    @cached_property
    def changed(self) -> list[Change]:
        """The images that changed most, in falling order."""
        ids = [entry.image_id for entry in self.model.labelled.entries]
        columns = (self.differences, self.model.images.dices, self.baseline.images.dices)
        rows: list[Change] = [*zip(ids, *(column.tolist() for column in columns), strict=True)]
        return sorted((row for row in rows if row[1]), key=lambda row: -abs(row[1]))[:MAX_CHANGED]
