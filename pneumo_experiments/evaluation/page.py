"""The report of a score as one HTML page, from the template ``score_page.html.j2``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pneumo_experiments.data_report.html import address, template

MAX_ID_LENGTH = 128  # of longer ids the end is cut; a DICOM UID has at most 64 characters
# Each score with its meaning, in the order of the page.
SCORES = {
    "dice": "the challenge's metric: mean over all images, 1 where truth and prediction are empty",
    "dice_baseline": "the Dice of predicting every image empty; a model has to beat it",
    "dice_positive": "mean Dice over the images with pneumothorax",
    "sensitivity": "of the images with pneumothorax, the fraction with a predicted mask",
    "specificity": "of the images without, the fraction with an empty prediction",
    "precision": "of the images with a predicted mask, the fraction with pneumothorax",
    "false_alarms": "of all images, the fraction with a predicted mask but no pneumothorax",
    "misses": "of all images, the fraction with pneumothorax but no predicted mask",
    "auroc": "of the probability of presence, before any threshold",
    "average_precision": "of the probability of presence, before any threshold",
    "calibration_error": "expected calibration error of the probability of presence, ten bins",
}
GROUPS = {"area": "Area of the finding (thirds)", "view": "View", "sex": "Sex", "age": "Age in years"}
BY_GROUP = ("dice", "dice_positive", "sensitivity", "specificity")
UNDEFINED = "–"

Row = Mapping[str, str | float | None]  # by name of column


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows; ``source`` is a data: URI."""

    title: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """The overlay of an image; ``source`` is a data: URI."""

    image_id: str
    note: str
    source: str


@dataclass(frozen=True)
class Gallery:
    """Overlays of one kind."""

    title: str
    note: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class BaselineModel:
    """Another model on the same images; ``changed`` holds id, difference, Dice and the other's Dice."""

    name: str
    line: str
    dice: float
    changed: Sequence[tuple[str, float, float, float]]
    figure: Figure


@dataclass(frozen=True)
class ScorePage:
    """What the page shows; a score that is undefined is None or NaN."""

    title: str
    facts: Mapping[str, str]
    """what was scored, and with what"""
    numbers: Row
    """the scores by name, their ``_low``, ``_high`` and ``_note``, and images, positives, patients"""
    warning: str
    groups: Sequence[Row]
    """the rows of the table by_group: group, value, images, positives, patients and scores, as above"""
    figures: Sequence[Figure]
    galleries: Sequence[Gallery]
    omitted: int
    """overlays that had no room on the page"""
    baseline: BaselineModel | None


def score_page(page: ScorePage) -> str:
    """The page as HTML in UTF-8; every text is escaped."""
    return template("evaluation", "score_page.html.j2").render(
        page=page,
        counts={name: page.numbers[name] for name in ("images", "positives", "patients")},
        headline={name: _number(page.numbers[name]) for name in ("dice", "dice_baseline", "dice_positive")},
        scores=[
            (name.replace("_", " "), _number(page.numbers[name]), _interval(page.numbers, name), meaning)
            for name, meaning in SCORES.items()
        ],
        by_group=[name.replace("_", " ") for name in BY_GROUP],
        groups=[(title, _group_rows(page.groups, name)) for name, title in GROUPS.items()],
        address=address,
        max_id_length=MAX_ID_LENGTH,
    )


def _group_rows(rows: Sequence[Row], group: str) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Value and counts of each row, and its scores with their intervals."""
    return [
        (
            [str(row[name]) for name in ("value", "images", "positives", "patients")],
            [(_number(row[name], 3), _interval(row, name, 2)) for name in BY_GROUP],
        )
        for row in rows
        if row["group"] == group
    ]


def _number(value: str | float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (float, int)) and value == value else UNDEFINED


def _interval(row: Row, name: str, digits: int = 3) -> str:
    """``low to high``, and the note; empty where there is none."""
    low, high = (_number(row.get(f"{name}_{end}"), digits) for end in ("low", "high"))
    note = f"; {note}" if (note := row.get(f"{name}_note")) else ""
    return "" if UNDEFINED in (low, high) else f"{low} to {high}{note}"
