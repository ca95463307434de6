"""The patient of each image: from a table, from the file's PatientID, or unknown.

The contest's files have a random PatientID each, which groups nothing. ``siim_patients.bin`` groups them: for
each of the 12,047 annotated images it holds the first 8 bytes of the SHA-256 of its id and a patient number
from 1 to 6,171, sorted by hash. ``tools/siim_patients.py`` writes it. The probability that another image id
matches by chance is 12,047 / 2**64, less than 1e-15.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pneumo_experiments.dataset.annotations import PATIENTS, match_ids, read_patients, read_table
from pneumo_experiments.dataset.packed_image import Entry, hash_patient, salted
from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import AUTO, is_none

if TYPE_CHECKING:  # the processes that read files need no h5py
    from pneumo_experiments.dataset.hdf5 import Dataset

SHIPPED = Path(__file__).with_name("siim_patients.bin")
ROW = np.dtype([("image", "<u8"), ("patient", "<u2")])

# Sources of the patients, as named in reports and runs.
GIVEN_TABLE, SHIPPED_TABLE, PATIENT_ID, UNKNOWN = "patients_csv", "shipped table", "PatientID", "unknown"
SOURCES = "patient_sources"  # in a data set's settings: number of images by source of their patient
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grouping:
    """Salted patient hashes by image id, from a table; images that are not in it are grouped by PatientID."""

    source: str = PATIENT_ID
    digest: str = "none"  # changes when the table does
    hashes: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


def shipped_grouping(image_ids: Collection[str]) -> Grouping:
    """Grouping of these images by the table shipped with the package; by PatientID if it has none of them."""
    content = SHIPPED.read_bytes()
    table = np.frombuffer(content, ROW)
    image_numbers = np.array([image_number(image_id) for image_id in image_ids], np.uint64)
    rows = np.searchsorted(table["image"], image_numbers).clip(max=len(table) - 1)
    known = table["image"][rows] == image_numbers
    numbers: list[int] = table["patient"][rows].tolist()
    # The prefix keeps patient number 17 apart from the patient whose PatientID is 17.
    hashes = {
        image_id: salted(f"SIIM-ACR patient {number}")
        for image_id, number, is_known in zip(image_ids, numbers, known.tolist(), strict=True)
        if is_known
    }
    if not hashes:
        return Grouping()
    return Grouping(SHIPPED_TABLE, f"auto {hashlib.sha256(content).hexdigest()[:16]}", hashes)


def count_shipped() -> int:
    """Number of images in the shipped table: all that the challenge has labelled."""
    return SHIPPED.stat().st_size // ROW.itemsize


def image_number(image_id: str) -> int:
    """The number of an image in the shipped table: the first 64 bits of the SHA-256 of its id."""
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little")


def source_of(digest: str) -> str:
    """Source of the patients of a data set whose grouping has this digest."""
    if digest == "none":
        return PATIENT_ID
    return SHIPPED_TABLE if digest.startswith("auto ") else GIVEN_TABLE


def count_sources(entries: Sequence[Entry], grouping: Grouping) -> dict[str, int]:
    """Number of images by source of their patient."""
    counts = dict.fromkeys((grouping.source, PATIENT_ID, UNKNOWN), 0)
    for entry in entries:
        if entry.image_id in grouping.hashes:
            counts[grouping.source] += 1
        else:
            counts[UNKNOWN if entry.patient == hash_patient("", entry.image_id) else PATIENT_ID] += 1
    return {source: n for source, n in counts.items() if n}


def describe_sources(sources: Mapping[str, int]) -> str:
    """Counts as text, such as 'shipped table: 12,040, PatientID: 7'."""
    return ", ".join(f"{source}: {n:,}" for source, n in sources.items())


def grouping_problem(entries: Sequence[Entry], sources: str) -> str:
    """Why a split by these patients may be wrong, for a warning; empty if nothing is suspicious.

    ``sources`` is the text of ``describe_sources``; empty if unknown.
    """
    images_per_patient = Counter(entry.patient for entry in entries)
    max_images = max(images_per_patient.values(), default=0)
    if max_images > 1 and max_images > len(entries) / 2:
        return (
            f"{max_images:,} of {len(entries):,} images have the same patient, so all of them fall on one"
            " side of the split; if that patient is a placeholder, name the patients in patients_csv"
        )
    all_from_table = sources in (describe_sources({t: len(entries)}) for t in (GIVEN_TABLE, SHIPPED_TABLE))
    if len(entries) > 1 and max_images == 1 and not all_from_table:
        return (
            f"each of the {len(entries):,} images counts as a separate patient, so images of one patient may"
            " fall on both sides of the split; if patients have several images, name them in patients_csv"
        )
    return ""


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
    hashes = {image_id: hash_patient(table[image_id]) for image_id in image_ids if image_id in table}
    images, known = len(image_ids), len(hashes)
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
    return Grouping(GIVEN_TABLE, hashlib.sha256(content).hexdigest(), hashes)


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
