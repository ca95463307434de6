"""Identity of the scored images, and the tables of their scores: by image, group and probability."""

from __future__ import annotations

import hashlib

from pneumo_experiments import tracking
from pneumo_experiments.dataset.packed import salted
from pneumo_experiments.experiment.subset import Subset
from pneumo_experiments.scoring.figures import calibration_plot
from pneumo_experiments.scoring.scores import ScoredImages
from pneumo_experiments.scoring.subgroups import (
    CALIBRATION_COLUMNS,
    GROUP_COLUMNS,
    UNKNOWN,
    age_band,
    area_terciles,
    by_group,
    calibration,
)
from pneumo_experiments.scoring.thresholds import ThresholdCounts, Thresholds

COLUMNS = ("image_id", "patient", "truth_area_px", "predicted_area_px", "dice", "presence")


def identity(subset: Subset) -> str:
    """Digest, 32 hex digits, of the image ids and the true masks at native size.

    Independent of order, stored image size and pixel format: scores with the same identity are comparable.
    """
    lines = [
        f"{entry.image_id} {entry.rows}x{entry.columns} {subset.dataset.rle(index)}\n"
        for entry, index in zip(subset.entries, subset.indices.tolist(), strict=True)
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:32]


def digests(subset: Subset) -> frozenset[str]:
    """A keyed digest of each image id, stored in a model to recognise images that it was trained on."""
    return frozenset(salted(f"image {entry.image_id}") for entry in subset.entries)


def log_per_image(subset: Subset, counts: ThresholdCounts, thresholds: Thresholds) -> None:
    """Logs a table of all images: ids, true and predicted area, Dice and probability of presence."""
    columns = (
        [entry.image_id for entry in subset.entries],
        [entry.patient for entry in subset.entries],
        counts.truth_area.tolist(),
        counts.predicted_area(thresholds).tolist(),
        counts.dice(thresholds).tolist(),
        counts.presence.tolist(),
    )
    tracking.log_table(COLUMNS, [*zip(*columns, strict=True)], "scores")


def log_groups(subset: Subset, counts: ThresholdCounts, images: ScoredImages) -> None:
    """Logs scores by area, view, sex and age, and the calibration of presence as table and picture."""
    groups = {
        "area": area_terciles(counts.truth_area),
        "view": [entry.view or UNKNOWN for entry in subset.entries],
        "sex": [entry.sex or UNKNOWN for entry in subset.entries],
        "age": [age_band(entry.age) for entry in subset.entries],
    }
    tracking.log_table(GROUP_COLUMNS, by_group(images, groups), "by_group")
    curve = calibration(images)
    tracking.log_table(CALIBRATION_COLUMNS, curve, "calibration")
    presence, positive, low, high = [*zip(*curve, strict=True)][-4:]
    tracking.log_image(calibration_plot(presence, positive, low, high), "calibration.png")
