"""Who the patients are, and a warning where they may not be who they should: a split is made of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pneumo_experiments.dataset.annotations import PATIENTS, read_patients, read_table
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.patients import Grouping, given_grouping, grouping_problem, shipped_grouping
from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import AUTO, NONE

SOURCES = (
    "patient_sources"  # in the settings of a data set file: how many images have their patient from where
)

log = logging.getLogger(__name__)


def make_grouping(patients_csv: str, image_ids: Sequence[str]) -> Grouping:
    """What the setting tells of these images; warns where a file tells of few, UserError where of none."""
    if patients_csv == AUTO:
        return shipped_grouping(image_ids)
    if patients_csv in ("", NONE):
        return Grouping()
    path = Path(patients_csv).expanduser()
    content = read_table(path, PATIENTS)
    table = read_patients(path, content)
    grouping = given_grouping(table, hashlib.sha256(content).hexdigest(), image_ids)
    images, known = len(image_ids), len(grouping.hashes)
    if images and not known:
        raise UserError(
            f"patients_csv={path}: names none of the {images:,} images; name the table that belongs to them,"
            " or auto"
        )
    if known < images / 2:
        warn(
            f"patients_csv={path}: names only {known:,} of the {images:,} images; each of the others goes by"
            " its PatientID"
        )
    return grouping


def warn_about_grouping(dataset: Dataset) -> None:
    """Warns where the patients of a labelled data set look as if nobody had grouped its images."""
    fault = grouping_problem(dataset.entries, dataset.settings.get(SOURCES, "")) if dataset.labelled else ""
    if fault:
        warn(f"dataset={dataset.path}: {fault}")


@cache
def warn(text: str) -> None:
    """Shows a warning once in a process, though each fold and each step of ``main`` comes by."""
    log.warning("Warning: %s", text)
