"""Scores of a set of images, and of its groups: the official metric and the numbers reported with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.dice import (
    BINS,
    Measure,
    auroc,
    average_precision,
    bins,
    calibration_error,
    effective_patients,
    intervals,
    mean,
)
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds
from pneumo_experiments.words import plural

MIN_PATIENTS = 5  # that bear on a score; with fewer its interval may not hold: see docs/training.md
# Of all patients; the others are of those with a finding.
OF_ALL_PATIENTS = {"specificity": MIN_PATIENTS, "false_alarms": MIN_PATIENTS, "calibration_error": 250}
COUNTS = ("images", "positives", "patients", "positive_patients")
PRESENCE_SCORES = ("auroc", "average_precision", "calibration_error")
CONSTANTS = (*COUNTS, "dice_baseline")  # properties of the images, whatever is predicted

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


@dataclass(frozen=True)
class Scores:
    """Segmentation and detection scores of a set of images; NaN where a score is undefined."""

    dice: float
    """the official metric"""
    dice_low: float
    dice_high: float
    """95% interval of dice, by patient"""
    dice_baseline: float
    """dice of predicting every image empty: the fraction of images with empty truth"""
    dice_positive: float
    """mean Dice over the images with truth"""
    sensitivity: float
    """fraction of the images with truth whose prediction is not empty"""
    specificity: float
    """fraction of the images without truth whose prediction is empty"""
    precision: float
    """fraction of the images with a predicted mask that have truth"""
    false_alarms: float
    """fraction of all images that have a predicted mask but no truth"""
    misses: float
    """fraction of all images that have truth but no predicted mask"""
    auroc: float
    """of the probability of presence, before any threshold"""
    average_precision: float
    """of the probability of presence, before any threshold"""
    calibration_error: float
    """expected calibration error of the probability of presence"""
    images: int
    positives: int
    """images with truth"""
    patients: int
    positive_patients: int
    """patients with an image with truth"""

    @property
    def interval_reliable(self) -> bool:
        """Whether there are enough patients for dice_low and dice_high to be valid."""
        return self.positive_patients >= MIN_PATIENTS

    @property
    def interval(self) -> str:
        """dice_low and dice_high as text, with a warning when they are unreliable."""
        few = f", unreliable with {plural(self.positive_patients, 'patient')} with a finding"
        return f"95% {self.dice_low:.3f} to {self.dice_high:.3f}{'' if self.interval_reliable else few}"

    @property
    def on_positives(self) -> str:
        """dice_positive as text."""
        return f"{self.dice_positive:.4f}" if self.positives else "undefined"

    @property
    def line(self) -> str:
        """Dice with its interval and what it is to be compared with, in words."""
        masks = round(self.positives - self.misses * self.images)
        found = f", masks on {masks:,} of {self.positives:,}" if self.positives else ""
        return (
            f"Dice {self.dice:.4f} ({self.interval}), all-empty baseline {self.dice_baseline:.4f},"
            f" Dice on positives {self.on_positives}, {plural(self.images, 'image')},"
            f" {self.positives:,} with pneumothorax{found}"
        )

    def as_metrics(self, prefix: str = "") -> dict[str, float]:
        """Every defined score by name, without the constants."""
        measured = {name: value for name, value in asdict(self).items() if name not in CONSTANTS}
        return {prefix + name: float(value) for name, value in measured.items() if not isnan(value)}

    def as_facts(self, prefix: str = "") -> dict[str, object]:
        """The constants, which depend on the images alone, and whether the interval is reliable, by name."""
        facts = {name: getattr(self, name) for name in (*CONSTANTS, "interval_reliable")}
        return {prefix + name: value for name, value in facts.items()}


@dataclass(frozen=True)
class ScoredImages:
    """What the scores of n images are made of; all (n,)."""

    dices: NDArray[np.float64]
    predicted: NDArray[np.bool_]  # whether the prediction has pixels
    truth: NDArray[np.bool_]  # whether the truth has pixels
    presence: NDArray[np.float32] | None  # None: only masks are known, no probabilities
    patients: NDArray[np.str_]

    @classmethod
    def of(cls, counts: ThresholdCounts, thresholds: Thresholds) -> ScoredImages:
        """Counted images at these thresholds."""
        predicted, truth = counts.predicted_area(thresholds) > 0, counts.truth_area > 0
        return cls(counts.dice(thresholds), predicted, truth, counts.presence, counts.patient)

    def select(self, chosen: NDArray[np.bool_]) -> ScoredImages:
        """Those of the images (n,) that are chosen."""
        return ScoredImages(
            self.dices[chosen],
            self.predicted[chosen],
            self.truth[chosen],
            None if self.presence is None else self.presence[chosen],
            self.patients[chosen],
        )

    def counts(self) -> dict[str, int]:
        """COUNTS of the images."""
        patients, positive = self.patients, self.patients[self.truth]
        numbers = (len(patients), len(positive), len(np.unique(patients)), len(np.unique(positive)))
        return dict(zip(COUNTS, numbers, strict=True))

    def measures(self) -> dict[str, Measure]:
        """How each score is computed from the weights of the images; those of presence if it is known."""
        dices, predicted, truth, presence = self.dices, self.predicted, self.truth, self.presence
        measures: dict[str, Measure] = {
            "dice": lambda weights: mean(dices, weights),
            "dice_positive": lambda weights: mean(dices, weights, truth),
            "sensitivity": lambda weights: mean(predicted, weights, truth),
            "specificity": lambda weights: mean(~predicted, weights, ~truth),
            "precision": lambda weights: mean(truth, weights, predicted),
            "false_alarms": lambda weights: mean(predicted & ~truth, weights),
            "misses": lambda weights: mean(~predicted & truth, weights),
        }
        if presence is not None:
            measures["auroc"] = lambda weights: auroc(truth, presence, weights)
            measures["average_precision"] = lambda weights: average_precision(truth, presence, weights)
            measures["calibration_error"] = lambda weights: calibration_error(truth, presence, weights)
        return measures

    def intervals(self, names: Collection[str] = ()) -> dict[str, float]:
        """95% intervals of these scores, or of all: ``<name>_low`` and ``<name>_high``; NaN if undefined."""
        chosen = {name: measure for name, measure in self.measures().items() if not names or name in names}
        truth, patient = self.truth, self.patients
        rarer = min(truth, ~truth, key=lambda side: effective_patients(patient[side]))
        among = dict.fromkeys(("dice_positive", "sensitivity", "average_precision"), truth)
        among |= {"specificity": ~truth, "precision": self.predicted, "auroc": rarer}
        return {
            f"{name}_{end}": value
            for name, (low, high) in intervals(chosen, among, self.patients).items()
            for end, value in (("low", low), ("high", high))
        }


def notes(row: Mapping[str, Any]) -> dict[str, str]:
    """``<name>_note`` of each score with an interval in a row with counts: ``14 of 14``, ``unreliable``.

    Without ``positive_patients``, as in older tables, the positives take their place.
    """
    images, positives, patients, with_finding = (int(row.get(name, row["positives"])) for name in COUNTS)
    of = {"sensitivity": positives, "specificity": images - positives}
    if "precision" in row:
        predicted = round(positives + images * (row["false_alarms"] - row["misses"]))
        of |= {"precision": predicted, "false_alarms": images, "misses": images}
    texts, names = dict[str, str](), [end.removesuffix("_low") for end in row if end.endswith("_low")]
    for name in names:
        if row[name] is not None and not isnan(row[name]):
            count = [f"{round(row[name] * of[name])} of {of[name]}"] if name in of else []
            is_few = patients < least if (least := OF_ALL_PATIENTS.get(name)) else with_finding < MIN_PATIENTS
            texts[f"{name}_note"] = ", ".join(count + ["unreliable"] * is_few)
    return texts


def score_images(images: ScoredImages) -> Scores:
    """Scores of n >= 1 images; raises UserError without any."""
    if len(images.dices) == 0:
        raise UserError("no images to score: choose a subset that has some")
    itself = np.ones((1, len(images.dices)))
    undefined = dict.fromkeys(PRESENCE_SCORES, float("nan")) if images.presence is None else {}
    return Scores(
        **undefined,
        **{name: float(measure(itself)[0]) for name, measure in images.measures().items()},
        **images.intervals(["dice"]),
        dice_baseline=float(np.mean(~images.truth)),
        **images.counts(),
    )


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
        for value in sorted({*values} - {""}, key=_order):
            rows.append(_row(group, value, images.select(np.array(values) == value)))
    return rows


def calibration(images: ScoredImages) -> list[Row]:
    """Rows of CALIBRATION_COLUMNS: mean presence and fraction of positives of each bin that has images.

    None without presence.
    """
    rows = list[Row]()
    if images.presence is None:
        return rows
    for number, here in enumerate(bins(images.presence)):
        if not here.any():
            continue
        inside = images.select(here)
        ends = intervals(
            {"positive": lambda weights, truth=inside.truth: mean(truth, weights)}, {}, inside.patients
        )
        itself = np.ones((1, len(inside.dices)))
        means = (float(mean(values, itself)[0]) for values in (images.presence[here], inside.truth))
        rows.append([number / BINS, (number + 1) / BINS, len(inside.dices), *means, *ends["positive"]])
    return rows


def _row(group: str, value: str, images: ScoredImages) -> Row:
    itself = np.ones((1, len(images.dices)))
    measures, ends = images.measures(), images.intervals(BY_GROUP)
    numbers = [
        number
        for name in BY_GROUP
        for number in (float(measures[name](itself)[0]), ends[f"{name}_low"], ends[f"{name}_high"])
    ]
    return [group, value, *images.counts().values(), *(None if isnan(each) else each for each in numbers)]


def _order(value: str) -> tuple[int, str]:
    """Age bands by age, other values by name; unknown last."""
    names = [*(name for _, name in AGES), UNKNOWN]
    return (names.index(value) if value in names else -1), value
