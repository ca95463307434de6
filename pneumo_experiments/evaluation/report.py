"""What ``score`` leaves of labelled images: tables, pictures and a page with all of it, logged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.data_report.summary import plural
from pneumo_experiments.evaluation.model_comparison import ModelComparison
from pneumo_experiments.evaluation.page import (
    MAX_ID_LENGTH,
    BaselineModel,
    Figure,
    Gallery,
    Picture,
    ScorePage,
    score_page,
)
from pneumo_experiments.evaluation.plots import dice_by_area_plot, presence_curves, threshold_surface
from pneumo_experiments.evaluation.scored_images import log_calibration, log_groups, log_per_image
from pneumo_experiments.evaluation.subset import Subset, describe_images, draw_overlays
from pneumo_experiments.figures import jpeg_uri
from pneumo_experiments.metrics.exact import best_of_all
from pneumo_experiments.metrics.scores import ScoredImages, Scores, notes
from pneumo_experiments.metrics.subgroups import GROUP_COLUMNS
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.serving import Detector
from pneumo_experiments.settings import Score

PAGE = "report.html"
MAX_PICTURE_BYTES = 9_500_000  # on the page, for a page below 10 MB; other overlays are artifacts alone
PANEL_PX = 256
MAX_CHANGED = 20  # images in the page's table
KINDS = {
    "best": "Findings with the highest Dice.",
    "median": "Findings in the middle of the order by Dice, missed ones included.",
    "worst": "Findings whose predicted mask has the lowest Dice.",
    "false alarm": "A predicted mask, but no pneumothorax; the largest masks first.",
    "miss": "A pneumothorax, but no predicted mask; the largest findings first.",
}
TITLES = {
    "best": "Best",
    "median": "Median",
    "worst": "Worst",
    "false alarm": "False alarms",
    "miss": "Misses",
}


def log_report(
    settings: Score,
    name: str,
    subset: Subset,
    counts: ThresholdCounts,
    detector: Detector,
    images: ScoredImages,
    scores: Scores,
    intervals: Mapping[str, float],
    comparison: ModelComparison | None,
    warnings: Sequence[str] = (),
) -> str:
    """Logs tables, pictures and ``report.html`` of the images called ``name``; returns the page's address."""
    thresholds = detector.thresholds
    figures = _log_figures(counts, thresholds, images, scores)
    baseline = None if comparison is None else _baseline_model(comparison)
    pictures = figures if baseline is None else [*figures, baseline.figure]
    room = MAX_PICTURE_BYTES - sum(len(figure.source) for figure in pictures)
    galleries, omitted = _log_galleries(subset, counts, detector, settings.overlays, room)
    few = "" if scores.interval_reliable else (
        f"Intervals are unreliable: the findings are of {plural(scores.positive_patients, 'patient')}."
    )  # fmt: skip
    numbers = asdict(scores) | dict(intervals)
    rows = [dict(zip(GROUP_COLUMNS, row, strict=True)) for row in log_groups(subset, counts, images)]
    page = ScorePage(
        title=f"Score: {name} images of {settings.dataset.name}",
        facts={
            "model": hide_passwords(settings.model),
            "images": f"{name} of {settings.dataset.name}",
        }
        | {each: f"{value:g}" for each, value in asdict(thresholds).items()},
        numbers=numbers | notes(numbers),
        warning=" ".join([few, *(f"{line[0].upper()}{line[1:]}." for line in warnings)]).strip(),
        groups=[row | notes(row) for row in rows],
        figures=figures,
        galleries=galleries,
        omitted=omitted,
        baseline=baseline,
    )
    tracking.log_page(score_page(page), PAGE)
    # Last: the table that the evaluation view opens.
    log_per_image(subset, counts, thresholds, detector.training_images)
    return f"{tracking.artifacts_of_active_run()}/{PAGE}"


def _log_figures(
    counts: ThresholdCounts, thresholds: Thresholds, images: ScoredImages, scores: Scores
) -> list[Figure]:
    figures = list[Figure]()

    def add(title: str, picture: NDArray[np.uint8], note: str) -> None:
        figures.append(Figure(title, jpeg_uri(picture), note))

    if 0 < scores.positives < scores.images:
        curves = presence_curves(images, scores.sensitivity, scores.specificity)
        tracking.log_image(curves, "presence_curves.png")
        add(
            "Presence: ROC, and precision and recall",
            curves,
            "The curves are those of the probability of presence alone. The dot marks the masks, which also"
            " depend on the scores of the pixels.",
        )
    add(
        "Calibration of presence",
        log_calibration(images),
        "The fraction of images with pneumothorax in each tenth of the probability of presence.",
    )
    if scores.positives:
        truth = images.truth
        by_area = dice_by_area_plot(counts.truth_area[truth], images.dices[truth], images.predicted[truth])
        tracking.log_image(by_area, "dice_by_area.png")
        add("Dice by area", by_area, "Each mark is an image with pneumothorax.")
    best = best_of_all(counts)
    surface = threshold_surface(best.surface, thresholds, scores.dice, best.thresholds)
    tracking.log_image(surface, "threshold_surface.png")
    add(
        "Dice over thresholds",
        surface,
        f"The highest Dice of all thresholds is {best.dice:.4f} on these images, those used have"
        f" {scores.dice:.4f}. Thresholds chosen by these images would make their score too high.",
    )
    return figures


def choose_images(counts: ThresholdCounts, thresholds: Thresholds, number: int) -> dict[int, str]:
    """At most ``number`` images by position, and their kind: of each of KINDS in turn one more."""
    dices, predicted = counts.dice(thresholds), counts.predicted_area(thresholds)
    truth = counts.truth_area
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


def _log_galleries(
    subset: Subset, counts: ThresholdCounts, detector: Detector, number: int, room: int
) -> tuple[list[Gallery], int]:
    """Logs overlays with ids in their names; returns those that fit in ``room`` bytes, and how many not."""
    chosen = choose_images(counts, detector.thresholds, number)
    texts = describe_images(counts, detector.thresholds)
    ids = {position: subset.entries[position].image_id for position in chosen}
    captions = {
        position: f"{kind}: {ids[position][:MAX_ID_LENGTH]}, {texts[position]}"
        for position, kind in chosen.items()
    }
    pictures, omitted = {kind: list[Picture]() for kind in KINDS}, 0
    drawn = draw_overlays(subset, detector.predictor, detector.thresholds, captions, PANEL_PX)
    for place, (picture, (position, kind)) in enumerate(zip(drawn, chosen.items(), strict=True), start=1):
        tracking.log_image(picture, f"overlays/{place:02}-{file_name(f'{kind}-{ids[position]}')}.png")
        source = jpeg_uri(picture)
        room -= len(source)
        if room < 0:
            omitted += 1
        else:
            pictures[kind].append(Picture(ids[position], texts[position], source))
    return [
        Gallery(TITLES[kind], note, pictures[kind]) for kind, note in KINDS.items() if pictures[kind]
    ], omitted


def file_name(name: str) -> str:
    """The name as part of a file name on any system, at most 100 characters."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]


def _baseline_model(found: ModelComparison) -> BaselineModel:
    figure = Figure(
        "Difference of Dice",
        jpeg_uri(found.picture),
        "Left, of each image; right, of the mean in resamples of the patients.",
    )
    return BaselineModel(found.address, found.line, found.baseline_dice, found.changed[:MAX_CHANGED], figure)
