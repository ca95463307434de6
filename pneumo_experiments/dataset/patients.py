"""Whose radiograph an image is: told by a table, or by the file's PatientID, or unknown.

The contest's files have a random PatientID each, which groups nothing. ``siim_patients.bin`` groups them: for
each of the 12,047 annotated images the first 8 bytes of the SHA-256 of its id, and a number from 1 to 6,171
that only the images of one patient share; in the order of the hashes, written by ``tools/siim_patients.py``.
A foreign id is taken for one of them with a probability of 12,047 / 2**64, less than 1e-15.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pneumo_experiments.dataset.packed import Entry, hash_patient, salted

SHIPPED = Path(__file__).with_name("siim_patients.bin")
ROW = np.dtype([("image", "<u8"), ("patient", "<u2")])

# Who tells the patients, as reports and runs call it.
GIVEN_TABLE, SHIPPED_TABLE, PATIENT_ID, UNKNOWN = "patients_csv", "shipped table", "PatientID", "unknown"
TABLES = (GIVEN_TABLE, SHIPPED_TABLE)


@dataclass(frozen=True)
class Grouping:
    """What a table tells: the salted hash of the patient by image id. Other images go by PatientID."""

    source: str = PATIENT_ID
    digest: str = "none"  # changes when the table does
    hashes: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


def given_grouping(table: Mapping[str, str], digest: str, image_ids: Collection[str]) -> Grouping:
    """What a table of image id and patient tells of these images."""
    hashes = {image_id: hash_patient(table[image_id]) for image_id in image_ids if image_id in table}
    return Grouping(GIVEN_TABLE, digest, hashes)


def shipped_grouping(image_ids: Collection[str]) -> Grouping:
    """What the table that ships with the package tells of these images; of foreign images it is no table."""
    content = SHIPPED.read_bytes()
    table = np.frombuffer(content, ROW)
    wanted = np.array([image_number(image_id) for image_id in image_ids], np.uint64)
    places = np.searchsorted(table["image"], wanted).clip(max=len(table) - 1)
    known = table["image"][places] == wanted
    numbers: list[int] = table["patient"][places].tolist()
    # Its own first words: number 17 is not the patient whose PatientID is 17.
    hashes = {
        image_id: salted(f"SIIM-ACR patient {number}")
        for image_id, number, is_known in zip(image_ids, numbers, known.tolist(), strict=True)
        if is_known
    }
    if not hashes:
        return Grouping()
    return Grouping(SHIPPED_TABLE, f"auto {hashlib.sha256(content).hexdigest()[:16]}", hashes)


def image_number(image_id: str) -> int:
    """How the shipped table names an image: 64 bits of the SHA-256 of its id."""
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little")


def source_of(digest: str) -> str:
    """What told the patients of a data set whose grouping had this digest."""
    if digest == "none":
        return PATIENT_ID
    return SHIPPED_TABLE if digest.startswith("auto ") else GIVEN_TABLE


def count_sources(entries: Sequence[Entry], grouping: Grouping) -> dict[str, int]:
    """How many images have their patient from where; an unknown patient is one of its own."""
    counts = dict.fromkeys((grouping.source, PATIENT_ID, UNKNOWN), 0)
    for entry in entries:
        if entry.image_id in grouping.hashes:
            counts[grouping.source] += 1
        else:
            counts[UNKNOWN if entry.patient == hash_patient("", entry.image_id) else PATIENT_ID] += 1
    return {source: n for source, n in counts.items() if n}


def describe_sources(sources: Mapping[str, int]) -> str:
    """'shipped table: 12,040, PatientID: 7'."""
    return ", ".join(f"{source}: {n:,}" for source, n in sources.items())


def grouping_problem(entries: Sequence[Entry], sources: str) -> str:
    """Why a split by these patients may not be what is meant; empty where nothing speaks against it.

    ``sources`` are those of the images, described as above; empty where that is unknown.
    """
    images = Counter(entry.patient for entry in entries)
    most = max(images.values(), default=0)
    if most > 1 and most > len(entries) / 2:
        return (
            f"{most:,} of {len(entries):,} images share one patient, and one part of the split gets them all;"
            " if that is a placeholder, name the patients in patients_csv"
        )
    all_told = any(sources == describe_sources({table: len(entries)}) for table in TABLES)
    if len(entries) > 1 and most == 1 and not all_told:
        return (
            f"each of the {len(entries):,} images counts as a patient of its own, so images of one patient"
            " may lie on both sides of a split; if a patient has several, name the patients in patients_csv"
        )
    return ""
