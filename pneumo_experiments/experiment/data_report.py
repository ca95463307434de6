"""The report of preprocess: beside the data set, in the run, and in short on the terminal."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import Grouping, count_sources
from pneumo_experiments.dataset.shards import Result
from pneumo_experiments.dicom.archive import SEVERAL, Archive
from pneumo_experiments.report.page import page
from pneumo_experiments.report.statistics import Report, make_report
from pneumo_experiments.report.summary import summary
from pneumo_experiments.scoring.figures import contact_sheet, jpeg_uri, overlay

POSITIVES = 12  # on the contact sheet
PANEL_PX = 256


def build_report(
    archive: Archive, annotated: Collection[str] | None, grouping: Grouping, found: Sequence[Result]
) -> Report:
    """The report on what became of an archive's files; ``annotated`` is None for a set without labels."""
    used = [result for result in found if result.packed is not None]
    packed = [result.packed for result in found if result.packed is not None]
    entries = [image.entry for image in packed]
    rejected = [(result.image_id, result.reason) for result in found if result.reason]
    rejected += [
        (image_id, SEVERAL) for image_id in archive.differing if annotated is None or image_id in annotated
    ]
    return make_report(
        files=archive.files,
        skipped=archive.skipped,
        duplicates=archive.duplicates,
        rejected=rejected,
        entries=entries,
        patient_sources=count_sources(entries, grouping),
        pictures=[image.picture for image in packed],
        formats=[result.format for result in used],
        annotated=annotated,
        file_ids=archive.image_ids,
        overlapping=[result.image_id for result in used if result.overlapping],
        invalid_run_lengths=[result.image_id for result in found if result.invalid_run_lengths],
    )


def write_report(path: Path, report: Report, dataset: Dataset | None) -> Path:
    """Writes and logs the report beside ``path``; ``dataset`` is None where none was made.

    Returns where its page lies.
    """
    as_json, as_page = _places(path)
    title = f"Data report: {path.name}" if dataset else f"Data report: {path.name} was not written"
    pictures = list[tuple[str, str]]()
    if dataset is not None and dataset.labelled and (sheet := _sheet_of_positives(dataset)) is not None:
        tracking.log_image(sheet, "positives.png")
        caption = "Images with pneumothorax, from the smallest annotated area to the largest"
        pictures.append((caption, jpeg_uri(sheet)))
    as_json.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    as_page.write_text(page(report, title, pictures), encoding="utf-8")
    log_existing_report(path)
    for line in summary(report):
        print(f"preprocess: {line}")
    return as_page


def log_existing_report(path: Path) -> None:
    """Logs the report that lies beside the data set, if there is one."""
    for place in _places(path):
        if place.is_file():
            tracking.log_file(place)


def _places(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".report.json"), path.with_suffix(".report.html")


def _sheet_of_positives(dataset: Dataset) -> NDArray[np.uint8] | None:
    """Radiographs and outlines of positives, evenly chosen by area; None where there are none."""
    positives = [index for index, entry in enumerate(dataset.entries) if entry.area_px > 0]
    positives.sort(key=lambda index: dataset.entries[index].area_px)
    if not positives:
        return None
    places: list[int] = np.unique(np.linspace(0, len(positives) - 1, POSITIVES).round().astype(int)).tolist()
    return contact_sheet([_picture(dataset, positives[place]) for place in places], columns=2)


def _picture(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    entry = dataset.entries[index]
    caption = f"{entry.area_px:,} px in {entry.annotations} annotation{'s' * (entry.annotations != 1)}"
    return overlay(dataset.images([index])[0], dataset.mask(index), None, caption, PANEL_PX)
