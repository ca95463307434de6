"""A report as a few lines for a terminal, and how its names are written there and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pneumo_experiments.report.statistics import OLDEST, Rejection, Report

LINES = 10
EXAMPLES = 3  # names on a line
LONGEST_ID = 24  # characters; of a longer one its end is shown: DICOM's ids differ there


def summary(report: Report) -> list[str]:
    """One to 10 lines; a finding that is not there takes none, and a list of ids is cut to three."""
    skipped = [f"{kind} ({n:,})" for kind, n in report.skipped.items()]
    same = [" = ".join(_brief(group.image_ids[:2])) for group in report.identical_images]
    lines = [
        *([f"passed over: {_joined(skipped)}"] if skipped else []),
        *_finding("annotated, but no file found", _brief(report.annotated_without_file)),
        *_finding("file found, but not in the annotation table", _brief(report.files_without_annotation)),
        *_finding("several files with the same id", _brief(list(report.duplicates))),
        *_finding("same picture under several ids", same),
        *(_images(report) if report.outcome.used else []),
    ]
    return [printable(line) for line in (_files(report), *_rejected(report, LINES - 1 - len(lines)), *lines)]


def printable(text: str) -> str:
    """The text, without what a screen or UTF-8 cannot show: names of files hold anything."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def many(count: int, noun: str) -> str:
    """'1 file', '2 files'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _files(report: Report) -> str:
    outcome = report.outcome
    counts = {
        "rejected": outcome.rejected,
        "without annotation": outcome.without_annotation,
        "not read": outcome.not_read,
    }
    ids = "" if report.images == report.files else f" with {many(report.images, 'image id')}"
    rest = "".join(f", {n:,} {name}" for name, n in counts.items() if n)
    return f"{many(report.files, 'file')} found{ids}: {outcome.used:,} used{rest}"


def _rejected(report: Report, room: int) -> list[str]:
    """One line for each reason, the last one for all that find no room; room is at least 1."""
    kinds = report.rejected
    whole = len(kinds) if len(kinds) <= room else room - 1
    lines = [
        line
        for kind in kinds[:whole]
        for line in _finding(f"rejected, {_fault(kind)}", _brief([file.image_id for file in kind.files]))
    ]
    if others := kinds[whole:]:
        reasons = many(len(others), "other reason" if whole else "reason")
        files = sum(len(kind.files) for kind in others)
        lines.append(f"rejected for {reasons} ({files:,}): {_joined([_fault(kind) for kind in others])}")
    return lines


def _fault(kind: Rejection) -> str:
    return kind.heading.split("; ")[0]  # what follows is the mend


def _images(report: Report) -> list[str]:
    used, patients, ages = report.outcome.used, report.patients, report.ages
    most = f", at most {patients.most_images:,} of one" if patients.most_images > 1 else ""
    age = [f"median {ages.quantiles['p50']:.0f} years"] if ages.quantiles else []
    age += [f"{ages.unknown:,} unknown"] if ages.unknown else []
    age += [f"{len(ages.implausible):,} above {OLDEST}"] if ages.implausible else []
    lines = [
        f"{many(used, 'image')} of {many(patients.count, 'patient')}{most}",
        f"view {_counted(report.views)}; sex {_counted(report.sexes)}; age {', '.join(age)}",
    ]
    if (found := report.annotated) is not None:
        line = f"{found.positives:,} with pneumothorax"
        line += f", median area {found.area_px['p50']:,.0f} px" if found.area_px else ""
        line += f", {len(found.overlapping):,} with overlapping annotations" if found.overlapping else ""
        lines.append(f"{line}; to call all empty scores Dice {found.dice_all_empty:.4f}")
    return lines


def _finding(title: str, names: Sequence[str]) -> list[str]:
    return [f"{title} ({len(names):,}): {_joined(names)}"] if names else []


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - EXAMPLES:,} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def _counted(counts: Mapping[str, int]) -> str:
    return _joined([f"{name} {n:,}" for name, n in counts.items()])


def _brief(image_ids: Sequence[str]) -> list[str]:
    return [name if len(name) <= LONGEST_ID else "…" + name[1 - LONGEST_ID :] for name in image_ids]
