"""The report as one HTML page, from the template ``page.html.j2``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from pneumo_experiments.data_report.html import address, template
from pneumo_experiments.data_report.statistics import (
    MAX_PLAUSIBLE_AGE,
    Ages,
    AnnotationStatistics,
    IdenticalImages,
    Statistics,
)
from pneumo_experiments.words import plural

MAX_LISTED = 1000  # names in a list
MAX_BARS = 12  # in a chart; ages have 12 decades
MAX_LABEL_LENGTH = 16  # characters; charts with longer labels show them above their bars
QUANTILES = {
    "min": "Smallest",
    "p10": "10% are below",
    "p25": "25% are below",
    "p50": "Median",
    "p75": "75% are below",
    "p90": "90% are below",
    "max": "Largest",
}
# Legend of the outcomes; the names are also CSS classes.
OUTCOMES = {
    "used": "used",
    "rejected": "rejected: cannot be used",
    "without_annotation": "without annotation: not in the table",
    "not_read": "not read: the run stopped early",
}
SEXES = {"F": "F (female)", "M": "M (male)", "O": "O (other)"}  # DICOM PS3.3 C.7.1.1

Items = Sequence[tuple[str, str]]  # names and remarks


@dataclass(frozen=True)
class Finding:
    """A line that unfolds to a list of names and remarks."""

    title: str
    note: str
    items: Items
    count: int


@dataclass(frozen=True)
class Chart:
    """A bar chart; ``stacked`` shows the labels above the bars."""

    title: str
    bars: list[tuple[str, str, int, str]]  # name, CSS length (empty for no bar), count, percent
    note: str
    stacked: bool


def page(statistics: Statistics, title: str, figures: Sequence[tuple[str, str]] = ()) -> str:
    """The report as HTML in UTF-8; ``figures`` are (caption, data URI of an image or relative file name)."""
    annotated, used = statistics.annotated, statistics.outcome.used
    numbers = {
        "files found": statistics.files,
        "images used": used,
        "images left out": statistics.images - used,
    }
    if used:
        numbers["patients"] = statistics.patients.count
        if annotated is not None:
            numbers["with pneumothorax"] = annotated.positives
    outcomes = [(name, count, OUTCOMES[name]) for name, count in asdict(statistics.outcome).items() if count]
    return template("data_report", "page.html.j2").render(
        title=title,
        used=used,
        numbers=numbers,
        outcomes=outcomes,
        left_out=_left_out(statistics),
        noteworthy=_noteworthy(statistics),
        image_charts=_image_charts(statistics),
        annotated=annotated,
        area_rows=_area_rows(annotated),
        annotations_chart=annotated
        and _chart("Annotations per image with pneumothorax", annotated.annotations_per_positive),
        figures=[(caption, address(source)) for caption, source in figures],
        max_listed=MAX_LISTED,
    )


def _left_out(statistics: Statistics) -> list[Finding]:
    rejected = [
        (
            f"Rejected: {kind.heading}",
            "Each n stands for a number." if kind.varies else "These files cannot be used.",
            [(file.image_id, file.reason if kind.varies else "") for file in kind.files],
        )
        for kind in statistics.rejected
    ]
    findings = _findings(
        *rejected,
        (
            "Of these, rejected because of their run lengths",
            "Their rows in the annotation table are wrong, or belong to another image.",
            _ids(statistics.invalid_run_lengths),
        ),
        (
            "File found, but not in the annotation table",
            "Whether these images show a pneumothorax is unknown, so they are left out.",
            _ids(statistics.files_without_annotation),
        ),
        (
            "Annotated, but no file found",
            "The annotation table names these images, but the folder does not contain them.",
            _ids(statistics.annotated_without_file),
        ),
    )
    if statistics.skipped:
        kinds = [(kind, f"{n:,}") for kind, n in statistics.skipped.items()]
        total = sum(statistics.skipped.values())
        findings.append(Finding("Skipped files", "None of these was read.", kinds, total))
    return findings


def _noteworthy(statistics: Statistics) -> list[Finding]:
    return _findings(
        (
            "Several files with the same id",
            f"The id of an image is {statistics.identified_by or 'the name of its file'}."
            " Of several files with one id at most one is used.",
            [
                (image_id, f"{same.files} files, {'one is used' if same.used else 'none is used'}")
                for image_id, same in statistics.duplicates.items()
            ],
        ),
        (
            "The same image under several ids",
            "Their pixels are equal. If they belong to different patients, the same image can be in both"
            " training and test data.",
            [
                (" = ".join(s.image_ids), _describe(s, statistics.annotated))
                for s in statistics.identical_images
            ],
        ),
        (
            "Images whose annotations overlap",
            "The annotations of an image are united, so that each pixel counts once.",
            _ids(statistics.annotated.overlapping if statistics.annotated else []),
        ),
        *(
            (
                note,
                "Headers or annotations that are empty, damaged or contradictory there. The images are used;"
                " the pixels and the rest of the header decide how they look.",
                _ids(image_ids),
            )
            for note, image_ids in statistics.notes.items()
        ),
        (
            f"Ages above {MAX_PLAUSIBLE_AGE} years",
            "The images are used; their ages are not counted below.",
            [(image_id, plural(age, "year")) for image_id, age in statistics.ages.implausible.items()],
        ),
    )


def _findings(*rows: tuple[str, str, Items]) -> list[Finding]:
    return [Finding(title, note, items, len(items)) for title, note, items in rows if items]


def _ids(image_ids: Iterable[str]) -> Items:
    return [(image_id, "") for image_id in image_ids]


def _describe(same: IdenticalImages, annotated: AnnotationStatistics | None) -> str:
    areas = f"; annotated {', '.join(f'{area:,}' for area in same.areas_px)} px" if annotated else ""
    return plural(same.patients, "patient") + areas


def _image_charts(statistics: Statistics) -> list[Chart]:
    patients = statistics.patients
    return [
        _chart("View", statistics.views, "PA: the rays pass from back to front. AP: from front to back."),
        _chart("Sex", {SEXES.get(sex, sex): count for sex, count in statistics.sexes.items()}),
        _chart("Age in years", statistics.ages.decades, _describe_ages(statistics.ages)),
        _chart(
            "Images per patient",
            patients.images_per_patient,
            f"The bars count patients; one has at most {plural(patients.most_images, 'image')}."
            " An image of an unknown patient counts as a separate patient.",
        ),
        _chart("Source of the patients", patients.sources, "The bars count images."),
        _chart("Size in pixels, rows x columns", statistics.sizes),
        _chart("Format of the files", statistics.formats),
    ]


def _describe_ages(ages: Ages) -> str:
    known = ages.quantiles
    half = f"Median {known['p50']:.0f}; half are {known['p25']:.0f} to {known['p75']:.0f}. " if known else ""
    return half + (f"The age is unknown for {plural(ages.unknown, 'image')}." if ages.unknown else "")


def _area_rows(annotated: AnnotationStatistics | None) -> list[tuple[str, str, str]]:
    """Title, pixels and fraction of the image of each quantile."""
    if annotated is None or not annotated.area_px or not annotated.area_share:
        return []
    areas, fractions = annotated.area_px, annotated.area_share
    return [(title, f"{areas[name]:,.0f}", f"{fractions[name]:.2%}") for name, title in QUANTILES.items()]


def _chart(title: str, counts: Mapping[str, int], note: str = "") -> Chart:
    """A chart with one bar per name, and the sum of those that are too many."""
    total, longest = sum(counts.values()), max(counts.values(), default=0)
    shown = dict(islice(counts.items(), MAX_BARS))
    bars = [
        (name, f"max(2px, {count / longest:.1%})" if count else "0%", count, _percent(count, total))
        for name, count in shown.items()
    ]
    if others := len(counts) - len(shown):
        rest = total - sum(shown.values())
        bars.append((plural(others, "other"), "", rest, _percent(rest, total)))
    return Chart(title, bars, note, max(map(len, shown), default=0) > MAX_LABEL_LENGTH)


def _percent(count: int, total: int) -> str:
    return f"{count / total:.1%}" if count == 0 or count / total >= 0.001 else "<0.1%"
