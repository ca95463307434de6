"""What preprocess found, used and left out, in numbers.

A report holds image ids and counts; a patient's hash goes in to be counted and does not come out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pneumo_experiments.dataset.packed import Entry

QUANTILES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
OLDEST = 110  # years; the contest's data has ages of up to 413
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Outcome:
    """What became of each image id that was found: it counts once, in the first of these that holds."""

    used: int
    rejected: int
    without_annotation: int
    not_read: int  # the run stopped before it came to them


@dataclass(frozen=True)
class RejectedFile:
    """A file that cannot be used, and why."""

    image_id: str
    reason: str


@dataclass(frozen=True)
class Rejection:
    """Files rejected for one kind of reason; each number in it is written n."""

    reason: str
    files: list[RejectedFile]

    @property
    def varies(self) -> bool:
        """Whether the reasons differ in their numbers."""
        return len({file.reason for file in self.files}) > 1

    @property
    def heading(self) -> str:
        """The reason as it is where all files share it, otherwise with n for numbers."""
        return self.reason if self.varies else self.files[0].reason


@dataclass(frozen=True)
class DuplicateFiles:
    """Files that have one image id between them."""

    files: int
    used: bool  # one of them


@dataclass(frozen=True)
class IdenticalImages:
    """Used images whose pixels are equal."""

    image_ids: list[str]
    patients: int  # more than one: folds grouped by patient do not keep them together
    areas_px: list[int]  # one per image


@dataclass(frozen=True)
class Ages:
    """Years of the used images; quantiles and decades are of the ages from 0 to 110."""

    unknown: int
    implausible: dict[str, int]  # image id: years, above 110
    quantiles: dict[str, float] | None
    decades: dict[str, int]  # "40-49": images, without gaps


@dataclass(frozen=True)
class Patients:
    """A patient who is unknown counts as one for each image."""

    count: int
    most_images: int  # of one patient
    images_per_patient: dict[str, int]  # number of images: patients who have so many
    sources: dict[str, int]  # who tells the patients: images


@dataclass(frozen=True)
class Annotated:
    """The annotations of the used images; a positive has an annotated area."""

    positives: int
    annotations_per_positive: dict[str, int]
    area_px: dict[str, float] | None  # quantiles over positives, in native pixels
    area_share: dict[str, float] | None  # the same as share of the picture
    overlapping: list[str]
    dice_all_empty: float | None  # the share of images without annotated area


@dataclass(frozen=True)
class Report:
    """What was found, used and left out; a field that lists ids lists all of them, sorted."""

    files: int
    images: int  # distinct ids
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
    patients: Patients
    annotated: Annotated | None  # None for a set without labels

    def as_json(self) -> dict[str, object]:
        """The fields in their order, of types that JSON has."""
        return json.loads(json.dumps(asdict(self)))


def make_report(
    *,
    files: int,
    skipped: Mapping[str, int],
    duplicates: Mapping[str, int],
    rejected: Sequence[tuple[str, str]],
    entries: Sequence[Entry],
    patient_sources: Mapping[str, int],
    pictures: Sequence[str],
    formats: Sequence[str],
    annotated: Collection[str] | None,
    file_ids: Collection[str],
    overlapping: Sequence[str],
    invalid_run_lengths: Sequence[str],
) -> Report:
    """The report on n used images (entries, pictures, formats: n >= 0 each) and on what was left out.

    ``pictures`` are hashes of pixels; ``annotated`` are the ids in the table, None for a set without labels.
    """
    if not len(entries) == len(pictures) == len(formats):
        raise ValueError(f"{len(entries)} entries, {len(pictures)} pictures, {len(formats)} formats")
    found, used = set(file_ids), {entry.image_id for entry in entries}
    unusable = {image_id for image_id, _ in rejected} - used
    unannotated = set[str]() if annotated is None else found - set(annotated) - used - unusable
    return Report(
        files=files,
        images=len(found),
        outcome=Outcome(
            used=len(entries),
            rejected=len(unusable),
            without_annotation=len(unannotated),
            not_read=len(found - used - unusable - unannotated),
        ),
        skipped={kind: n for kind, n in skipped.items() if n},
        rejected=_by_reason(rejected),
        invalid_run_lengths=sorted(set(invalid_run_lengths)),
        annotated_without_file=sorted(set(annotated or ()) - found),
        files_without_annotation=sorted(unannotated),
        duplicates={name: DuplicateFiles(duplicates[name], name in used) for name in sorted(duplicates)},
        identical_images=_identical_images(entries, pictures),
        views=_counts(entry.view for entry in entries),
        sexes=_counts(entry.sex for entry in entries),
        ages=_ages(entries),
        sizes=_counts(f"{entry.rows} x {entry.columns}" for entry in entries),
        formats=_counts(formats),
        patients=_patients(entries, patient_sources),
        annotated=None if annotated is None else _annotated(entries, overlapping),
    )


def _counts(names: Iterable[str]) -> dict[str, int]:
    """The most frequent first, equals by name."""
    counts = Counter(name or "unknown" for name in names)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _numbers(values: Iterable[int]) -> dict[str, int]:
    """How often each number occurs, the smallest first."""
    return {str(value): n for value, n in sorted(Counter(values).items())}


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Linear between neighbours; None of nothing."""
    return {name: float(np.quantile(values, at)) for name, at in QUANTILES.items()} if values else None


def _by_reason(rejected: Sequence[tuple[str, str]]) -> list[Rejection]:
    kinds: dict[str, list[RejectedFile]] = {}
    for image_id, text in sorted(rejected):
        reason = text.removeprefix(f"{image_id}: ")  # so begins the message of Rejected
        kinds.setdefault(NUMBER.sub("n", reason), []).append(RejectedFile(image_id, reason))
    return [Rejection(*kind) for kind in sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0]))]


def _identical_images(entries: Sequence[Entry], pictures: Sequence[str]) -> list[IdenticalImages]:
    groups: dict[str, list[Entry]] = {}
    for entry, picture in sorted(zip(entries, pictures, strict=True), key=lambda pair: pair[0].image_id):
        groups.setdefault(picture, []).append(entry)
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
    known = [entry.age for entry in entries if 0 <= entry.age <= OLDEST]
    decades = Counter(age // 10 for age in known)
    spanned = range(min(decades), max(decades) + 1) if decades else ()
    return Ages(
        unknown=sum(entry.age < 0 for entry in entries),
        implausible=dict(sorted((entry.image_id, entry.age) for entry in entries if entry.age > OLDEST)),
        quantiles=_quantiles(known),
        decades={f"{i * 10}-{i * 10 + 9}": decades[i] for i in spanned},
    )


def _patients(entries: Sequence[Entry], sources: Mapping[str, int]) -> Patients:
    images = Counter(entry.patient for entry in entries).values()
    return Patients(len(images), max(images, default=0), _numbers(images), dict(sources))


def _annotated(entries: Sequence[Entry], overlapping: Sequence[str]) -> Annotated:
    positives = [entry for entry in entries if entry.area_px > 0]
    return Annotated(
        positives=len(positives),
        annotations_per_positive=_numbers(entry.annotations for entry in positives),
        area_px=_quantiles([entry.area_px for entry in positives]),
        area_share=_quantiles([entry.area_px / (entry.rows * entry.columns) for entry in positives]),
        overlapping=sorted(set(overlapping)),
        dice_all_empty=(len(entries) - len(positives)) / len(entries) if entries else None,
    )
