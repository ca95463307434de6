"""The report of a model on labelled images: tables, pictures, and one HTML page with all of it.

The page is made from the template ``score_page.html.j2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property

import numpy as np

from pneumo_experiments import tracking
from pneumo_experiments.data_report.html import address, template
from pneumo_experiments.evaluation.evaluate import CHANGE_COLUMNS, IMAGE_COLUMNS, Evaluation, ModelComparison
from pneumo_experiments.evaluation.given_masks import GivenMasks
from pneumo_experiments.evaluation.pictures import (
    Picture,
    calibration_plot,
    comparison_plot,
    dice_by_area_plot,
    draw_overlays,
    presence_curves,
    threshold_surface,
)
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.figures import jpeg_uri
from pneumo_experiments.files import file_name
from pneumo_experiments.learning.predict import AnyPredictor
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.scores import (
    BY_GROUP,
    CALIBRATION_COLUMNS,
    GROUP_COLUMNS,
    PRESENCE_SCORES,
    notes,
)
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.serving import Detector
from pneumo_experiments.settings import Score
from pneumo_experiments.words import plural

PAGE = "report.html"
MAX_PICTURE_BYTES = 9_500_000  # on the page, for a page below 10 MB; other overlays are artifacts alone
PANEL_PX = 256
MAX_CHANGED = 20  # images in the page's table
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
HEADLINE = {"dice": "Dice", "dice_baseline": "all-empty baseline", "dice_positive": "Dice on positives"}
UNDEFINED = "–"
# Of each kind of overlay its title and what it shows.
KINDS = {
    "best": ("Best", "Findings with the highest Dice."),
    "median": ("Median", "Findings in the middle of the order by Dice, missed ones included."),
    "worst": ("Worst", "Findings whose predicted mask has the lowest Dice."),
    "false alarm": ("False alarms", "A predicted mask, but no pneumothorax; the largest masks first."),
    "miss": ("Misses", "A pneumothorax, but no predicted mask; the largest findings first."),
}

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # columns and rows
Numbers = Mapping[str, str | float | None]  # by name; a score that is undefined is None or NaN


@dataclass(frozen=True)
class Context:
    """What a report is about, beside the evaluation."""

    settings: Score
    subset: str
    """name of the images"""
    training_runs: Sequence[str] = ()
    """ids of the runs that logged the model or its members"""
    warnings: Sequence[str] = ()

    def facts(self, evaluation: Evaluation, model: Detector | GivenMasks) -> dict[str, str]:
        """Name and value of what is known of the model, of the images and of this score."""
        dataset, run = evaluation.labelled.dataset, tracking.active_run()
        thresholds = asdict(evaluation.thresholds).items()
        if isinstance(model, GivenMasks):
            own = {"masks": f"as given, SHA-256 {model.sha256[:16]}"}
        else:
            own = {
                "network": f"{model.networks}, {model.image_size} px",
                **({"training run": ", ".join(self.training_runs)} if self.training_runs else {}),
                "trained on data set": model.data_fingerprint[:16],
                "thresholds": ", ".join(f"{name} {value:g}" for name, value in thresholds),
            }
        return {
            "model": hide_passwords(self.settings.model),
            **own,
            "images": f"{self.subset} of {dataset.path.name}, data set {dataset.fingerprint[:16]}",
            "scored": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC{f', run {run}' if run else ''}",
            "code": tracking.code_version(),
        }


@dataclass(frozen=True)
class Report:
    """Tables by name, pictures by file name, and the page that shows them."""

    tables: Mapping[str, Table]
    pictures: Mapping[str, Picture]
    page: str
    gallery: Sequence[tuple[str, Picture]]
    """the overlays among the pictures, with their kind, such as worst"""


@dataclass(frozen=True, eq=False)
class Figure:
    """A chart, and what it shows; one that is not wide takes half of the page's width."""

    title: str
    file_name: str
    picture: Picture
    note: str
    is_wide: bool = True

    @cached_property
    def source(self) -> str:
        """The picture as a data: URI."""
        return jpeg_uri(self.picture)


def make_report(
    context: Context,
    evaluation: Evaluation,
    model: Detector | GivenMasks,
    comparison: ModelComparison | None = None,
) -> Report:
    """The report of a model's evaluation on some images; what takes probabilities is none of given masks'."""
    scores, figures = evaluation.scores, _figures(evaluation)
    tables: dict[str, Table] = {"by_group": (GROUP_COLUMNS, evaluation.groups)}
    if not evaluation.masks_only:
        tables["calibration"] = (CALIBRATION_COLUMNS, evaluation.calibration)
    changes: list[Figure] = []
    if comparison is not None:
        tables["changed_images"] = (CHANGE_COLUMNS, comparison.changed)
        note = "Left, of each image; right, of the mean in resamples of the patients."
        picture = comparison_plot(comparison)
        changes.append(Figure("Difference of Dice", "comparison.png", picture, note))
    seen, predictor = (
        (None, model) if isinstance(model, GivenMasks) else (model.training_images, model.predictor)
    )
    tables["scores"] = (IMAGE_COLUMNS, evaluation.image_rows(seen))
    room = MAX_PICTURE_BYTES - sum(len(figure.source) for figure in [*figures, *changes])
    overlays, galleries, omitted = _galleries(evaluation, predictor, context.settings.overlays, room)
    few = "" if scores.interval_reliable else (
        f"Intervals are unreliable: the findings are of {plural(scores.positive_patients, 'patient')}."
    )  # fmt: skip
    numbers = asdict(scores) | evaluation.intervals
    numbers |= notes(numbers)
    rows = [dict(zip(GROUP_COLUMNS, row, strict=True)) for row in evaluation.groups]
    groups = [row | notes(row) for row in rows]
    page = template("evaluation", "score_page.html.j2").render(
        title=f"Score: {context.subset} images of {evaluation.labelled.dataset.path.name}",
        facts=context.facts(evaluation, model),
        warning=" ".join([few, *(f"{line[0].upper()}{line[1:]}." for line in context.warnings)]).strip(),
        counts={each: numbers[each] for each in ("images", "positives", "patients")},
        headline={label: _number(numbers[each]) for each, label in HEADLINE.items()},
        scores=[
            (each.replace("_", " "), _number(numbers[each]), _interval(numbers, each), meaning)
            for each, meaning in SCORES.items()
            if not (evaluation.masks_only and each in PRESENCE_SCORES)
        ],
        comparison=comparison,
        changed=comparison.changed[:MAX_CHANGED] if comparison else [],
        changes=changes,
        figures=figures,
        by_group=[each.replace("_", " ") for each in BY_GROUP],
        groups=[(title, _group_rows(groups, group)) for group, title in GROUPS.items()],
        galleries=galleries,
        omitted=omitted,
        address=address,
        max_id_length=MAX_ID_LENGTH,
    )
    charts = {figure.file_name: figure.picture for figure in [*figures, *changes]}
    kinds = choose_images(evaluation, len(overlays)).values()
    return Report(tables, charts | overlays, page, [*zip(kinds, overlays.values(), strict=True)])


def _figures(evaluation: Evaluation) -> list[Figure]:
    scores, figures = evaluation.scores, list[Figure]()
    if 0 < scores.positives < scores.images and not evaluation.masks_only:
        note = (
            "The curves are those of the probability of presence alone. The dot marks the masks, which also"
            " depend on the scores of the pixels."
        )
        picture = presence_curves(evaluation)
        figures.append(
            Figure("Presence: ROC, and precision and recall", "presence_curves.png", picture, note)
        )
    if scores.positives:
        picture, note = dice_by_area_plot(evaluation), "Each mark is an image with pneumothorax."
        figures.append(Figure("Dice by area", "dice_by_area.png", picture, note))
    if evaluation.masks_only:
        return figures
    note = "The fraction of images with pneumothorax in each tenth of the probability of presence."
    picture = calibration_plot(evaluation.calibration)
    figures.append(Figure("Calibration of presence", "calibration.png", picture, note, is_wide=False))
    best = best_of_all(evaluation.counts)
    note = (
        f"The highest Dice of all thresholds is {best.dice:.4f} on these images, those used have"
        f" {scores.dice:.4f}. Thresholds chosen by these images would make their score too high."
    )
    picture = threshold_surface(evaluation, best)
    surface = Figure("Dice over thresholds", "threshold_surface.png", picture, note, is_wide=False)
    return [*figures, surface]


def choose_images(evaluation: Evaluation, number: int) -> dict[int, str]:
    """At most ``number`` images by position, and their kind: of each of KINDS in turn one more."""
    dices, predicted = evaluation.images.dices, evaluation.predicted_area
    truth = evaluation.counts.truth_area
    ranked = [i for i in np.argsort(-dices, kind="stable").tolist() if truth[i] > 0]
    middle = (len(ranked) - 1) / 2
    by_rank = sorted(range(len(ranked)), key=lambda rank: abs(rank - middle))
    alarms, misses = (truth == 0) & (predicted > 0), (truth > 0) & (predicted == 0)
    orders = {
        "best": [i for i in ranked if predicted[i] > 0],
        "median": [ranked[rank] for rank in by_rank],
        "worst": [i for i in ranked[::-1] if predicted[i] > 0],
        "false alarm": [i for i in np.argsort(-predicted, kind="stable").tolist() if alarms[i]],
        "miss": [i for i in np.argsort(-truth, kind="stable").tolist() if misses[i]],
    }
    chosen, waiting = dict[int, str](), {kind: iter(order) for kind, order in orders.items()}
    while waiting and len(chosen) < number:
        for kind, candidates in list(waiting.items()):
            position = next((i for i in candidates if i not in chosen), None)
            if position is None:
                del waiting[kind]
            elif len(chosen) < number:
                chosen[position] = kind
    return chosen


def _galleries(
    evaluation: Evaluation, predictor: AnyPredictor | GivenMasks, number: int, room: int
) -> tuple[dict[str, Picture], list[tuple[str, str, list[tuple[str, str, str]]]], int]:
    """Overlays by file name, with ids in it; galleries of those that fit in ``room`` bytes; how many do not.

    A gallery has a title, a note, and for each overlay the image's id, a note and the data: URI.
    """
    if not isinstance(evaluation.labelled, Subset):
        return {}, [], 0  # a table has no pixels
    chosen, texts = choose_images(evaluation, number), evaluation.captions()
    ids = {position: evaluation.subset.entries[position].image_id for position in chosen}
    captions = {
        # The id last: one too long for the picture is cut, and the page has it as well.
        position: f"{kind}: {texts[position]}: {ids[position][:MAX_ID_LENGTH]}"
        for position, kind in chosen.items()
    }
    overlays, omitted = dict[str, Picture](), 0
    shown = {kind: list[tuple[str, str, str]]() for kind in KINDS}
    drawn = draw_overlays(evaluation, predictor, captions, PANEL_PX)
    for place, (picture, (position, kind)) in enumerate(zip(drawn, chosen.items(), strict=True), start=1):
        overlays[f"overlays/{place:02}-{file_name(f'{kind}-{ids[position]}')}.png"] = picture
        source = jpeg_uri(picture)
        room -= len(source)
        if room < 0:
            omitted += 1
        else:
            shown[kind].append((ids[position], texts[position], source))
    return overlays, [(*KINDS[kind], pictures) for kind, pictures in shown.items() if pictures], omitted


def _group_rows(rows: Sequence[Numbers], group: str) -> list[tuple[list[str], list[tuple[str, str]]]]:
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


def _interval(row: Numbers, name: str, digits: int = 3) -> str:
    """``low to high``, and the note; empty where there is none."""
    low, high = (_number(row.get(f"{name}_{end}"), digits) for end in ("low", "high"))
    note = f"; {note}" if (note := row.get(f"{name}_note")) else ""
    return "" if UNDEFINED in (low, high) else f"{low} to {high}{note}"
