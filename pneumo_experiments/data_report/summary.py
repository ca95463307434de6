"""The report in a few lines, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pneumo_experiments.data_report.statistics import MAX_PLAUSIBLE_AGE, Rejection, Statistics
from pneumo_experiments.words import plural, printable, some_of

MAX_LINES = 12
MAX_ID_LENGTH = 24  # of longer ids the end is shown, where DICOM UIDs differ


def summary(statistics: Statistics) -> list[str]:
    """One to 12 lines; what is empty is left out, lists of ids show three."""
    identical = [" = ".join(_shorten(group.image_ids[:2])) for group in statistics.identical_images]
    identified = [f"the id of an image is {statistics.identified_by}"] if statistics.identified_by else []
    lines = [
        *_list("skipped", _counted(statistics.skipped)),
        *identified,
        *_count("annotated, but no file found", _shorten(statistics.annotated_without_file)),
        *_count("file found, but not in the annotation table", _shorten(statistics.files_without_annotation)),
        *_count("several files with the same id", _shorten([*statistics.duplicates])),
        *_count("same image under several ids", identical),
        *_list("read with notes", _counted({note: len(ids) for note, ids in statistics.notes.items()})),
        *(_images(statistics) if statistics.outcome.used else []),
    ]
    lines = [_files(statistics), *_rejected(statistics.rejected, MAX_LINES - 1 - len(lines)), *lines]
    return [printable(line) for line in lines]


def _files(statistics: Statistics) -> str:
    outcome = statistics.outcome
    counts = {
        "rejected": outcome.rejected,
        "without annotation": outcome.without_annotation,
        "not read": outcome.not_read,
    }
    ids = "" if statistics.images == statistics.files else f" with {plural(statistics.images, 'image id')}"
    rest = "".join(f", {count:,} {name}" for name, count in counts.items() if count)
    return f"{plural(statistics.files, 'file')} found{ids}: {outcome.used:,} used{rest}"


def _rejected(kinds: Sequence[Rejection], max_lines: int) -> list[str]:
    """One line per reason, the last one for all remaining reasons; max_lines is at least 1."""
    listed = len(kinds) if len(kinds) <= max_lines else max_lines - 1
    causes = [kind.heading.split("; ")[0] for kind in kinds]  # without the remedy
    lines = list[str]()
    for kind, cause in zip(kinds[:listed], causes, strict=False):
        lines += _count(f"rejected, {cause}", _shorten([file.image_id for file in kind.files]))
    if others := kinds[listed:]:
        reasons = plural(len(others), "other reason" if listed else "reason")
        files = sum(len(kind.files) for kind in others)
        lines.append(f"rejected for {reasons} ({files:,}): {some_of(causes[listed:])}")
    return lines


def _images(statistics: Statistics) -> list[str]:
    patients, ages, annotated = statistics.patients, statistics.ages, statistics.annotated
    most = f", at most {patients.most_images:,} per patient" if patients.most_images > 1 else ""
    age = [f"median {ages.quantiles['p50']:.0f} years"] if ages.quantiles else []
    age += [f"{ages.unknown:,} unknown"] if ages.unknown else []
    age += [f"{len(ages.implausible):,} above {MAX_PLAUSIBLE_AGE}"] if ages.implausible else []
    view, sex = (
        some_of([f"{name} {n:,}" for name, n in each.items()])
        for each in (statistics.views, statistics.sexes)
    )
    lines = [
        f"{plural(statistics.outcome.used, 'image')} of {plural(patients.count, 'patient')}{most}",
        f"view {view}; sex {sex}; age {', '.join(age)}",
    ]
    if annotated is not None:
        line = f"{annotated.positives:,} with pneumothorax"
        line += f", median area {annotated.area_px['p50']:,.0f} px" if annotated.area_px else ""
        overlapping = len(annotated.overlapping)
        line += f", {overlapping:,} with overlapping annotations" if overlapping else ""
        lines.append(f"{line}; all-empty predictions score Dice {annotated.dice_all_empty:.4f}")
    return lines


def _list(title: str, names: Sequence[str]) -> list[str]:
    return [f"{title}: {some_of(names)}"] if names else []


def _count(title: str, names: Sequence[str]) -> list[str]:
    return _list(f"{title} ({len(names):,})", names)


def _counted(counts: Mapping[str, int]) -> list[str]:
    return [f"{name} ({count:,})" for name, count in counts.items()]


def _shorten(image_ids: Sequence[str]) -> list[str]:
    return [name if len(name) <= MAX_ID_LENGTH else "…" + name[1 - MAX_ID_LENGTH :] for name in image_ids]
