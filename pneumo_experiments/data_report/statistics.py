"""Statistics of the files that preprocess read, used and rejected.

A report holds image ids and counts; patient hashes are counted, but not part of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pneumo_experiments.dataset.packed_image import Entry, Packed
from pneumo_experiments.dataset.patients import Grouping, count_sources
from pneumo_experiments.dataset.shards import FileResult
from pneumo_experiments.dicom.archive import DIFFERING_FILES, FILE_NAME, Archive

QUANTILES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
MAX_PLAUSIBLE_AGE = 110  # years; the contest's data has ages up to 413
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Outcome:
    """Number of image ids by outcome; an id counts once, under the first that applies."""

    used: int
    rejected: int
    without_annotation: int
    not_read: int  # the run stopped early


@dataclass(frozen=True)
class RejectedFile:
    """A file that cannot be used, and why."""

    image_id: str
    reason: str


@dataclass(frozen=True)
class Rejection:
    """Files rejected for the same reason; numbers in the reason are replaced by n."""

    reason: str
    files: list[RejectedFile]

    @property
    def varies(self) -> bool:
        """Whether the reasons differ in their numbers."""
        return len({file.reason for file in self.files}) > 1

    @property
    def heading(self) -> str:
        """The exact reason if all files share it, otherwise the reason with n for numbers."""
        return self.reason if self.varies else self.files[0].reason


@dataclass(frozen=True)
class DuplicateFiles:
    """Several files with the same image id."""

    files: int
    used: bool  # whether one of them is used


@dataclass(frozen=True)
class IdenticalImages:
    """Used images with equal pixels."""

    image_ids: list[str]
    patients: int  # if more than one, grouping by patient does not keep the images in one fold
    areas_px: list[int]  # one per image


@dataclass(frozen=True)
class Ages:
    """Ages of the used images in years; quantiles and decades cover ages from 0 to 110."""

    unknown: int
    implausible: dict[str, int]  # image id: years, above 110
    quantiles: dict[str, float] | None
    decades: dict[str, int]  # "40-49": number of images; no decade in between is missing


@dataclass(frozen=True)
class Patients:
    """Patients of the used images; an unknown patient counts as one patient per image."""

    count: int
    most_images: int  # of one patient
    images_per_patient: dict[str, int]  # number of images: number of patients with that many
    sources: dict[str, int]  # source of the patient: number of images


@dataclass(frozen=True)
class AnnotationStatistics:
    """Annotations of the used images; a positive is an image with an annotated area."""

    positives: int
    annotations_per_positive: dict[str, int]
    area_px: dict[str, float] | None  # quantiles over positives, in native pixels
    area_share: dict[str, float] | None  # the same as a fraction of the image
    overlapping: list[str]
    dice_all_empty: float | None  # fraction of images without annotated area


@dataclass(frozen=True)
class Statistics:
    """The numbers of the report; lists of ids are complete and sorted."""

    files: int
    images: int  # distinct ids
    identified_by: str  # what the ids are; empty for the names of the files
    outcome: Outcome
    skipped: dict[str, int]
    rejected: list[Rejection]  # the most frequent first
    invalid_run_lengths: list[str]
    annotated_without_file: list[str]
    files_without_annotation: list[str]
    duplicates: dict[str, DuplicateFiles]
    identical_images: list[IdenticalImages]
    views: dict[str, int]
    sexes: dict[str, int]
    ages: Ages
    sizes: dict[str, int]  # "rows x columns"
    formats: dict[str, int]
    notes: dict[str, list[str]]  # what headers say and was not used: image ids, the most frequent first
    patients: Patients
    annotated: AnnotationStatistics | None  # None for a set without labels


def make_statistics(
    archive: Archive, annotated: Collection[str] | None, grouping: Grouping, results: Sequence[FileResult]
) -> Statistics:
    """The numbers of an archive's files; ``annotated`` are image ids, None for a set without labels."""
    images = {result.image_id: result.packed for result in results if result.packed is not None}
    used = [result for result in results if result.packed is not None]
    entries = [image.entry for image in images.values()]
    rejected = [(result.image_id, result.reason) for result in results if result.reason]
    rejected += [
        (name, DIFFERING_FILES) for name in archive.differing if annotated is None or name in annotated
    ]
    all_ids, unusable = archive.image_ids, {name for name, _ in rejected} - images.keys()
    unannotated = set[str]() if annotated is None else all_ids - {*annotated} - images.keys() - unusable
    notes = [(note, result.image_id) for result in used for note in result.notes]
    return Statistics(
        files=archive.files,
        images=len(all_ids),
        identified_by="" if archive.identified_by == FILE_NAME else archive.identified_by,
        outcome=Outcome(
            used=len(images),
            rejected=len(unusable),
            without_annotation=len(unannotated),
            not_read=len(all_ids - images.keys() - unusable - unannotated),
        ),
        skipped={kind: count for kind, count in archive.skipped.items() if count},
        rejected=_by_reason(rejected),
        invalid_run_lengths=sorted(result.image_id for result in results if result.invalid_run_lengths),
        annotated_without_file=sorted({*(annotated or ())} - all_ids),
        files_without_annotation=sorted(unannotated),
        duplicates={
            name: DuplicateFiles(count, name in images) for name, count in sorted(archive.duplicates.items())
        },
        identical_images=_identical_images(images),
        views=_counts(entry.view for entry in entries),
        sexes=_counts(entry.sex for entry in entries),
        ages=_ages(entries),
        sizes=_counts(f"{entry.rows} x {entry.columns}" for entry in entries),
        formats=_counts(result.format for result in used),
        notes={
            note: sorted(image_id for each, image_id in notes if each == note)
            for note in _counts(note for note, _ in notes)
        },
        patients=_patients(entries, grouping),
        annotated=None
        if annotated is None
        else _annotated(entries, sorted(result.image_id for result in used if result.overlapping)),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Number of occurrences by name, most frequent first, ties by name."""
    counts = Counter(name or "unknown" for name in names)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _number_counts(values: Iterable[int]) -> dict[str, int]:
    """Number of occurrences by number, ascending."""
    return {str(value): n for value, n in sorted(Counter(values).items())}


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Quantiles with linear interpolation; None if there are no values."""
    if not values:
        return None
    return {name: float(np.quantile(values, quantile)) for name, quantile in QUANTILES.items()}


def _by_reason(rejected: Sequence[tuple[str, str]]) -> list[Rejection]:
    kinds: dict[str, list[RejectedFile]] = {}
    for image_id, reason in sorted(rejected):
        kinds.setdefault(NUMBER.sub("n", reason), []).append(RejectedFile(image_id, reason))
    return [Rejection(*kind) for kind in sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0]))]


def _identical_images(images: Mapping[str, Packed]) -> list[IdenticalImages]:
    groups: dict[str, list[Entry]] = {}
    for _, image in sorted(images.items()):
        groups.setdefault(image.image_sha256, []).append(image.entry)
    return [
        IdenticalImages(
            image_ids=[entry.image_id for entry in group],
            patients=len({entry.patient for entry in group}),
            areas_px=[entry.area_px for entry in group],
        )
        for group in groups.values()
        if len(group) > 1
    ]


def _ages(entries: Sequence[Entry]) -> Ages:
    known = [entry.age for entry in entries if 0 <= entry.age <= MAX_PLAUSIBLE_AGE]
    decades = Counter(age // 10 for age in known)
    spanned = range(min(decades), max(decades) + 1) if decades else ()
    return Ages(
        unknown=sum(entry.age < 0 for entry in entries),
        implausible=dict(
            sorted((entry.image_id, entry.age) for entry in entries if entry.age > MAX_PLAUSIBLE_AGE)
        ),
        quantiles=_quantiles(known),
        decades={f"{i * 10}-{i * 10 + 9}": decades[i] for i in spanned},
    )


def _patients(entries: Sequence[Entry], grouping: Grouping) -> Patients:
    images, sources = Counter(entry.patient for entry in entries).values(), count_sources(entries, grouping)
    return Patients(len(images), max(images, default=0), _number_counts(images), sources)


def _annotated(entries: Sequence[Entry], overlapping: list[str]) -> AnnotationStatistics:
    positives = [entry for entry in entries if entry.area_px > 0]
    return AnnotationStatistics(
        positives=len(positives),
        annotations_per_positive=_number_counts(entry.annotations for entry in positives),
        area_px=_quantiles([entry.area_px for entry in positives]),
        area_share=_quantiles([entry.area_px / (entry.rows * entry.columns) for entry in positives]),
        overlapping=overlapping,
        dice_all_empty=(len(entries) - len(positives)) / len(entries) if entries else None,
    )
