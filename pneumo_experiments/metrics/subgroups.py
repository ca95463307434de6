"""Scores by group of images: by size of the finding, view, sex, age, and by the probability of presence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.metrics.dice import BINS, bins, intervals, mean
from pneumo_experiments.metrics.scores import ScoredImages

BY_GROUP = ("dice", "dice_positive", "sensitivity", "specificity")
GROUP_COLUMNS = (
    *("group", "value", "images", "positives", "patients", "positive_patients"),
    *(f"{name}{end}" for name in BY_GROUP for end in ("", "_low", "_high")),
)
CALIBRATION_COLUMNS = (
    *("presence_from", "presence_to", "images", "mean_presence"),
    *("fraction_positive", "fraction_positive_low", "fraction_positive_high"),
)
UNKNOWN = "unknown"
AGES = ((18, "under 18"), (40, "18 to 39"), (60, "40 to 59"), (80, "60 to 79"), (1000, "80 and over"))

Row = list[str | int | float | None]


def age_band(age: int) -> str:
    """The band of an age in years; unknown for -1."""
    return UNKNOWN if age < 0 else next(name for below, name in AGES if age < below)


def area_terciles(truth_area: NDArray[np.int64]) -> list[str]:
    """The third of the findings that each image's area (n,) is in, with its limits; "" without finding."""
    positive = truth_area[truth_area > 0]
    if not positive.size:
        return [""] * len(truth_area)
    third = np.searchsorted(np.quantile(positive, [1 / 3, 2 / 3]), truth_area)  # equal areas stay together
    names = dict[int, str]()
    for number in range(3):
        areas = truth_area[(truth_area > 0) & (third == number)]
        if areas.size:
            names[number] = f"{number + 1}: {areas.min()} to {areas.max()} px"
    return [names[int(t)] if area > 0 else "" for t, area in zip(third, truth_area, strict=True)]


def by_group(images: ScoredImages, groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows of GROUP_COLUMNS: scores with 95% intervals of all images and of each value of each group.

    ``groups`` has each image's value; "" leaves the image out. An undefined score is None.
    """
    rows = [_row("all", "", images)]
    for group, values in groups.items():
        of_image = np.array(values)
        for value in sorted({*values} - {""}, key=lambda value: (value == UNKNOWN, _order(value))):
            rows.append(_row(group, value, images.select(of_image == value)))
    return rows


def calibration(images: ScoredImages) -> list[Row]:
    """Rows of CALIBRATION_COLUMNS: mean presence and fraction of positives of each bin that has images."""
    everything, rows = np.ones((1, len(images.dices))), list[Row]()
    for number, here in enumerate(bins(images.presence)):
        if not here.any():
            continue
        inside = images.select(here)
        ends = intervals(
            {"positive": lambda weights, truth=inside.truth: mean(truth, weights)}, {}, inside.patients
        )
        presence, positive = (
            float(mean(values, everything, here)[0]) for values in (images.presence, images.truth)
        )
        rows.append(
            [number / BINS, (number + 1) / BINS, len(inside.dices), presence, positive, *ends["positive"]]
        )
    return rows


def _row(group: str, value: str, images: ScoredImages) -> Row:
    itself = np.ones((1, len(images.dices)))
    measures, ends = images.measures(), images.intervals(BY_GROUP)
    numbers = [
        number
        for name in BY_GROUP
        for number in (float(measures[name](itself)[0]), ends[f"{name}_low"], ends[f"{name}_high"])
    ]
    return [
        group,
        value,
        *images.counts().values(),
        *(None if isnan(number) else number for number in numbers),
    ]


def _order(value: str) -> tuple[int, str]:
    """Age bands by age, other values by name."""
    names = [name for _, name in AGES]
    return (names.index(value) if value in names else -1), value
