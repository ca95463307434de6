"""Prints a report in a few lines, and formats names and counts for terminal and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pneumo_experiments.data_report.statistics import MAX_PLAUSIBLE_AGE, Rejection, Report

MAX_LINES = 12
EXAMPLES = 3  # names per line
MAX_ID_LENGTH = 24  # of longer ids the end is shown, where DICOM UIDs differ


def summary(report: Report) -> list[str]:
    """One to 12 lines; empty findings are left out, lists of ids show three."""
    skipped = [f"{kind} ({n:,})" for kind, n in report.skipped.items()]
    notes = [f"{note} ({len(ids):,})" for note, ids in report.notes.items()]
    identical = [" = ".join(_shorten(group.image_ids[:2])) for group in report.identical_images]
    lines = [
        *([f"skipped: {_join(skipped)}"] if skipped else []),
        *([f"the id of an image is {report.identified_by}"] if report.identified_by else []),
        *_finding("annotated, but no file found", _shorten(report.annotated_without_file)),
        *_finding("file found, but not in the annotation table", _shorten(report.files_without_annotation)),
        *_finding("several files with the same id", _shorten(list(report.duplicates))),
        *_finding("same image under several ids", identical),
        *([f"read with notes: {_join(notes)}"] if notes else []),
        *(_images(report) if report.outcome.used else []),
    ]
    return [
        printable(line) for line in (_files(report), *_rejected(report, MAX_LINES - 1 - len(lines)), *lines)
    ]


def printable(text: str) -> str:
    """The text with characters that cannot be printed replaced: file names may contain any bytes."""
    if text.isprintable():  # as almost all are, and the pictures of a page are long
        return text
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def plural(count: int, noun: str) -> str:
    """A count with its noun: '1 file', '2 files'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _files(report: Report) -> str:
    outcome = report.outcome
    counts = {
        "rejected": outcome.rejected,
        "without annotation": outcome.without_annotation,
        "not read": outcome.not_read,
    }
    ids = "" if report.images == report.files else f" with {plural(report.images, 'image id')}"
    rest = "".join(f", {n:,} {name}" for name, n in counts.items() if n)
    return f"{plural(report.files, 'file')} found{ids}: {outcome.used:,} used{rest}"


def _rejected(report: Report, max_lines: int) -> list[str]:
    """One line per reason, the last one for all remaining reasons; max_lines is at least 1."""
    kinds = report.rejected
    listed = len(kinds) if len(kinds) <= max_lines else max_lines - 1
    lines = [
        line
        for kind in kinds[:listed]
        for line in _finding(f"rejected, {_cause(kind)}", _shorten([file.image_id for file in kind.files]))
    ]
    if others := kinds[listed:]:
        reasons = plural(len(others), "other reason" if listed else "reason")
        files = sum(len(kind.files) for kind in others)
        lines.append(f"rejected for {reasons} ({files:,}): {_join([_cause(kind) for kind in others])}")
    return lines


def _cause(kind: Rejection) -> str:
    return kind.heading.split("; ")[0]  # without the remedy


def _images(report: Report) -> list[str]:
    used, patients, ages = report.outcome.used, report.patients, report.ages
    most = f", at most {patients.most_images:,} per patient" if patients.most_images > 1 else ""
    age = [f"median {ages.quantiles['p50']:.0f} years"] if ages.quantiles else []
    age += [f"{ages.unknown:,} unknown"] if ages.unknown else []
    age += [f"{len(ages.implausible):,} above {MAX_PLAUSIBLE_AGE}"] if ages.implausible else []
    lines = [
        f"{plural(used, 'image')} of {plural(patients.count, 'patient')}{most}",
        f"view {_format_counts(report.views)}; sex {_format_counts(report.sexes)}; age {', '.join(age)}",
    ]
    if (annotated := report.annotated) is not None:
        line = f"{annotated.positives:,} with pneumothorax"
        line += f", median area {annotated.area_px['p50']:,.0f} px" if annotated.area_px else ""
        if annotated.overlapping:
            line += f", {len(annotated.overlapping):,} with overlapping annotations"
        lines.append(f"{line}; all-empty predictions score Dice {annotated.dice_all_empty:.4f}")
    return lines


def _finding(title: str, names: Sequence[str]) -> list[str]:
    return [f"{title} ({len(names):,}): {_join(names)}"] if names else []


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - EXAMPLES:,} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def _format_counts(counts: Mapping[str, int]) -> str:
    return _join([f"{name} {n:,}" for name, n in counts.items()])


def _shorten(image_ids: Sequence[str]) -> list[str]:
    return [name if len(name) <= MAX_ID_LENGTH else "…" + name[1 - MAX_ID_LENGTH :] for name in image_ids]
