"""Groups images by patient for the split, and warns if the grouping looks wrong."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pneumo_experiments.dataset.annotations import PATIENTS, match_ids, read_patients, read_table
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import Grouping, given_grouping, grouping_problem, shipped_grouping
from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import AUTO, is_none

SOURCES = "patient_sources"  # in a data set's settings: number of images by source of their patient

log = logging.getLogger(__name__)


def make_grouping(patients_csv: str, image_ids: Sequence[str]) -> Grouping:
    """The grouping that ``patients_csv`` gives; warns if it names few images, UserError if none."""
    if patients_csv == AUTO:
        return shipped_grouping(image_ids)
    if is_none(patients_csv):
        return Grouping()
    try:
        path = Path(patients_csv).expanduser()
    except RuntimeError:  # no such user
        raise UserError(
            f"patients_csv={patients_csv}: names the home of a user whom this machine does not know"
        ) from None
    content = read_table(path, PATIENTS)
    table = match_ids(read_patients(path, content), set(image_ids))
    grouping = given_grouping(table, hashlib.sha256(content).hexdigest(), image_ids)
    images, known = len(image_ids), len(grouping.hashes)
    if images and not known:
        raise UserError(
            f"patients_csv={path}: names none of the {images:,} images; name the table of these images, or"
            " auto"
        )
    if known < images / 2:
        warn(
            f"patients_csv={path}: names only {known:,} of the {images:,} images; the others are grouped by"
            " PatientID"
        )
    return grouping


def warn_about_grouping(dataset: Dataset) -> None:
    """Warns if the patients of a labelled data set look ungrouped or like one placeholder."""
    if not dataset.labelled:
        return
    if problem := grouping_problem(dataset.entries, dataset.settings.get(SOURCES, "")):
        warn(f"dataset={dataset.path}: {problem}")


@cache
def warn(text: str) -> None:
    """Logs a warning once per process, not again for each fold and each stage of ``main``."""
    log.warning("Warning: %s", text)
