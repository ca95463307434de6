"""The data report of preprocess: written beside the data set, logged in the run, printed as a summary."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments import tracking
from pneumo_experiments.data_report.page import page
from pneumo_experiments.data_report.statistics import Report, make_report
from pneumo_experiments.data_report.summary import summary
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import Grouping, count_sources
from pneumo_experiments.dataset.shards import FileResult
from pneumo_experiments.dicom.archive import DIFFERING_FILES, FILE_NAME, Archive
from pneumo_experiments.figures import contact_sheet, jpeg_uri, overlay
from pneumo_experiments.files import write_atomically

POSITIVES = 12  # on the contact sheet
PANEL_PX = 256


def build_report(
    archive: Archive, annotated: Collection[str] | None, grouping: Grouping, results: Sequence[FileResult]
) -> Report:
    """The report on an archive's files; ``annotated`` are image ids, None for a set without labels."""
    used = [result for result in results if result.packed is not None]
    packed = [result.packed for result in results if result.packed is not None]
    entries = [image.entry for image in packed]
    rejected = [(result.image_id, result.reason) for result in results if result.reason]
    rejected += [
        (image_id, DIFFERING_FILES)
        for image_id in archive.differing
        if annotated is None or image_id in annotated
    ]
    return make_report(
        files=archive.files,
        identified_by="" if archive.identified_by == FILE_NAME else archive.identified_by,
        skipped=archive.skipped,
        duplicates=archive.duplicates,
        rejected=rejected,
        entries=entries,
        patient_sources=count_sources(entries, grouping),
        pixel_hashes=[image.image_sha256 for image in packed],
        formats=[result.format for result in used],
        notes=[(note, result.image_id) for result in used for note in result.notes],
        annotated=annotated,
        file_ids=archive.image_ids,
        overlapping=[result.image_id for result in used if result.overlapping],
        invalid_run_lengths=[result.image_id for result in results if result.invalid_run_lengths],
    )


def write_report(path: Path, report: Report, dataset: Dataset | None) -> Path:
    """Writes and logs the report beside ``path``; ``dataset`` is None if none was written.

    Returns the path of the HTML page.
    """
    as_json, as_page = _report_paths(path)
    title = f"Data report: {path.name}" if dataset else f"Data report: {path.name} was not written"
    figures = list[tuple[str, str]]()
    if dataset is not None and dataset.labelled and (sheet := _sheet_of_positives(dataset)) is not None:
        tracking.log_image(sheet, "positives.png")
        caption = "Images with pneumothorax, from the smallest annotated area to the largest"
        figures.append((caption, jpeg_uri(sheet)))
    for target, text in (
        (as_json, json.dumps(report.as_json(), indent=2) + "\n"),
        (as_page, page(report, title, figures)),
    ):
        with write_atomically(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    log_existing_report(path)
    for line in summary(report):
        print(f"preprocess: {line}")
    return as_page


def log_existing_report(path: Path) -> None:
    """Logs the report beside the data set, if it exists."""
    for file in _report_paths(path):
        if file.is_file():
            tracking.log_file(file)


def _report_paths(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".report.json"), path.with_suffix(".report.html")


def _sheet_of_positives(dataset: Dataset) -> NDArray[np.uint8] | None:
    """Positives with their mask outlines, evenly spaced by rank of area; None if there are none."""
    positives = [index for index, entry in enumerate(dataset.entries) if entry.area_px > 0]
    positives.sort(key=lambda index: dataset.entries[index].area_px)
    if not positives:
        return None
    ranks: list[int] = np.unique(np.linspace(0, len(positives) - 1, POSITIVES).round().astype(int)).tolist()
    return contact_sheet([_panel(dataset, positives[rank]) for rank in ranks], columns=2)


def _panel(dataset: Dataset, index: int) -> NDArray[np.uint8]:
    entry = dataset.entries[index]
    caption = f"{entry.area_px:,} px in {entry.annotations} annotation{'s' * (entry.annotations != 1)}"
    return overlay(dataset.images([index])[0], dataset.mask(index), None, caption, PANEL_PX)
