"""Identity of the scored images, and the tables of their scores: by image, group and probability."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.packed import Entry, salted
from pneumo_experiments.evaluation.plots import calibration_plot
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.metrics.scores import ScoredImages
from pneumo_experiments.metrics.subgroups import (
    CALIBRATION_COLUMNS,
    GROUP_COLUMNS,
    UNKNOWN,
    Row,
    age_band,
    area_terciles,
    by_group,
    calibration,
)
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds

COLUMNS = ("image_id", "patient", "truth_area_px", "predicted_area_px", "dice", "presence", "seen")


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
    """Keyed digests of images and patients, stored in a model to recognise those that it was trained on."""
    return frozenset(digest for entry in subset.entries for digest in _digests(entry).values())


def _digests(entry: Entry) -> dict[str, str]:
    """The keyed digest of an image and that of its patient; an unknown patient is this image's own."""
    return {"image": salted(f"image {entry.image_id}"), "patient": salted(f"patient {entry.patient}")}


def seen_by(subset: Subset, seen: frozenset[str]) -> list[str]:
    """What of each image is among these digests: ``image``, else ``patient``, else nothing: empty."""
    each = map(_digests, subset.entries)
    return [next((name for name, digest in own.items() if digest in seen), "") for own in each]


def describe_seen(subset: Subset, seen: frozenset[str], model: str) -> str:
    """How many images the model has seen, and of how many others the patients; empty if none."""
    by = Counter(seen_by(subset, seen))
    text = f"{by['image']} of {len(subset)} images trained {model} or chose its thresholds"
    if by["patient"]:
        text += (
            f", the patients of {by['patient']} more did (rename them by patients_csv if others are meant)"
        )
    return text if by["image"] or by["patient"] else ""


def log_per_image(
    subset: Subset, counts: ThresholdCounts, thresholds: Thresholds, seen: frozenset[str]
) -> None:
    """Logs a table of all images: ids, areas, Dice, probability of presence, and what the model has seen."""
    columns = (
        [entry.image_id for entry in subset.entries],
        [entry.patient for entry in subset.entries],
        counts.truth_area.tolist(),
        counts.predicted_area(thresholds).tolist(),
        counts.dice(thresholds).tolist(),
        counts.presence.tolist(),
        seen_by(subset, seen),
    )
    tracking.log_table(COLUMNS, [*zip(*columns, strict=True)], "scores")


def log_groups(subset: Subset, counts: ThresholdCounts, images: ScoredImages) -> list[Row]:
    """Logs scores by area, view, sex and age; returns the rows of GROUP_COLUMNS."""
    groups = {
        "area": area_terciles(counts.truth_area),
        "view": [entry.view or UNKNOWN for entry in subset.entries],
        "sex": [entry.sex or UNKNOWN for entry in subset.entries],
        "age": [age_band(entry.age) for entry in subset.entries],
    }
    rows = by_group(images, groups)
    tracking.log_table(GROUP_COLUMNS, rows, "by_group")
    return rows


def log_calibration(images: ScoredImages) -> NDArray[np.uint8]:
    """Logs the calibration of presence as table and picture; returns the picture."""
    curve = calibration(images)
    tracking.log_table(CALIBRATION_COLUMNS, curve, "calibration")
    presence, positive, low, high = [*zip(*curve, strict=True)][-4:]
    picture = calibration_plot(presence, positive, low, high)
    tracking.log_image(picture, "calibration.png")
    return picture
