"""A report as one HTML page: no scripts, no addresses, light or dark as the reader has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from pneumo_experiments.report.statistics import (
    MAX_PLAUSIBLE_AGE,
    Ages,
    AnnotationStatistics,
    IdenticalImages,
    Report,
)
from pneumo_experiments.report.style import STYLE, bars, finding, picture, text
from pneumo_experiments.report.summary import plural

QUANTILES = {
    "min": "Smallest",
    "p10": "10% are below",
    "p25": "25% are below",
    "p50": "Median",
    "p75": "75% are below",
    "p90": "90% are below",
    "max": "Largest",
}
# What the legend says of each outcome; the name is also its colour's class.
OUTCOMES = {
    "used": "used",
    "rejected": "rejected: cannot be used",
    "without_annotation": "without annotation: not in the table",
    "not_read": "not read: the run stopped before them",
}
SEXES = {"F": "F (female)", "M": "M (male)", "O": "O (other)"}  # DICOM PS3.3 C.7.1.1


def page(report: Report, title: str, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The report as HTML in UTF-8; ``pictures`` are (caption, data URI of an image or relative file name)."""
    parts = [_found(report), _left_out(report), _noteworthy(report)]
    if report.outcome.used:
        parts += [_images(report), _annotations(report.annotated, report.outcome.used)]
    if pictures:
        parts.append("<h2>Pictures</h2>" + "".join(picture(caption, source) for caption, source in pictures))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{text(title)}</h1>
{"".join(parts)}
</body>
</html>
"""


def _found(report: Report) -> str:
    """The strip of numbers, and what became of each image."""
    outcome = asdict(report.outcome)
    numbers = {"files found": report.files}
    numbers |= {"images used": report.outcome.used, "images left out": report.images - report.outcome.used}
    if report.outcome.used:
        numbers["patients"] = report.patients.count
        if report.annotated is not None:
            numbers["with pneumothorax"] = report.annotated.positives
    strip = "".join(f"<div><dt>{name}</dt><dd>{n:,}</dd></div>" for name, n in numbers.items())
    bar = "".join(f'<i class="{name}" style="flex-grow: {n}"></i>' for name, n in outcome.items() if n)
    legend = "".join(
        f'<li><i class="{name}"></i><b>{n:,}</b> {OUTCOMES[name]}</li>' for name, n in outcome.items() if n
    )
    nothing = "" if report.outcome.used else "<h2>No image was used, so there is no data set</h2>"
    return f"""<dl class="strip">{strip}</dl>
<div class="share" aria-hidden="true">{bar}</div>
<ul class="legend">{legend}</ul>
{nothing}"""


def _left_out(report: Report) -> str:
    found = [
        finding(
            f"Rejected: {kind.heading}",
            "Each n stands for a number." if kind.varies else "These files cannot be used.",
            [(file.image_id, file.reason if kind.varies else "") for file in kind.files],
        )
        for kind in report.rejected
    ]
    found += [
        finding(
            "Of these, rejected because of their run lengths",
            "Their rows in the annotation table are wrong, or belong to another image.",
            _ids(report.invalid_run_lengths),
        ),
        finding(
            "File found, but not in the annotation table",
            "Whether these images show a pneumothorax is unknown, so they are left out.",
            _ids(report.files_without_annotation),
        ),
        finding(
            "AnnotationStatistics, but no file found",
            "The annotation table names these images, but the folder does not hold them.",
            _ids(report.annotated_without_file),
        ),
        finding(
            "Also found, and passed over",
            "None of these was read.",
            [(kind, f"{n:,}") for kind, n in report.skipped.items()],
            sum(report.skipped.values()),
        ),
    ]
    return "<h2>What was left out, and why</h2>" + ("".join(found) or "<p>Nothing was left out.</p>")


def _noteworthy(report: Report) -> str:
    found = [
        finding(
            "Several files with the same id",
            "The id of an image is the name of its file; of several files with one id at most one is used.",
            [
                (image_id, f"{double.files} files, {'one is used' if double.used else 'none is used'}")
                for image_id, double in report.duplicates.items()
            ],
        ),
        finding(
            "The same picture under several ids",
            "Their pixels are equal. If they belong to different patients, the same picture can be both"
            " learned from and tested on.",
            [(" = ".join(same.image_ids), _about(same, report)) for same in report.identical_images],
        ),
        finding(
            "Images whose annotations overlap",
            "The annotations of an image are united, so that each pixel counts once.",
            _ids(report.annotated.overlapping if report.annotated else []),
        ),
        finding(
            f"Ages above {MAX_PLAUSIBLE_AGE} years",
            "The images are used; their ages are not counted below.",
            [(image_id, plural(age, "year")) for image_id, age in report.ages.implausible.items()],
        ),
    ]
    return "<h2>What is worth a look</h2>" + "".join(found) if any(found) else ""


def _about(same: IdenticalImages, report: Report) -> str:
    areas = f"; annotated {', '.join(f'{area:,}' for area in same.areas_px)} px" if report.annotated else ""
    return plural(same.patients, "patient") + areas


def _images(report: Report) -> str:
    sexes = {SEXES.get(sex, sex): n for sex, n in report.sexes.items()}
    charts = [
        bars("View", report.views, "PA: the rays pass from back to front. AP: from front to back."),
        bars("Sex", sexes),
        bars("Age in years", report.ages.decades, _about_ages(report.ages)),
        bars(
            "Images per patient",
            report.patients.images_per_patient,
            f"The bars count patients; one has at most {plural(report.patients.most_images, 'image')}."
            " An image of an unknown patient counts as a patient of its own.",
        ),
        bars("Patients told by", report.patients.sources, "The bars count images."),
        bars("Size in pixels, rows x columns", report.sizes),
        bars("Format of the files", report.formats),
    ]
    return f'<h2>Who and how: the images used</h2><div class="cards">{"".join(charts)}</div>'


def _about_ages(ages: Ages) -> str:
    known = ages.quantiles
    half = f"Median {known['p50']:.0f}; half are {known['p25']:.0f} to {known['p75']:.0f}. " if known else ""
    return half + (f"The age is unknown for {plural(ages.unknown, 'image')}." if ages.unknown else "")


def _annotations(found: AnnotationStatistics | None, used: int) -> str:
    if found is None:
        return "<h2>Annotations</h2><p>There is no annotation table: a set without labels.</p>"
    cards = ""
    if found.area_px and found.area_share:
        rows = "".join(
            f"<tr><th scope=row>{title}</th><td>{found.area_px[name]:,.0f}</td>"
            f"<td>{found.area_share[name]:.2%}</td></tr>"
            for name, title in QUANTILES.items()
        )
        cards = f"""<section class="card"><h3>AnnotationStatistics area</h3>
<table><thead><tr><th></th><th scope=col>pixels</th><th scope=col>of the picture</th></tr></thead>
<tbody>{rows}</tbody></table>
<p class="note">Of the images with pneumothorax, at the size of the file.</p></section>"""
        cards += bars("Annotations per image with pneumothorax", found.annotations_per_positive)
    return f"""<h2>Annotations</h2>
<p><b>{found.positives:,}</b> of {plural(used, "image")} ({found.positives / used:.1%}) show a pneumothorax.
To call every image empty scores a Dice of <b>{found.dice_all_empty:.4f}</b>: a model has to beat that.</p>
<div class="cards">{cards}</div>"""


def _ids(image_ids: Sequence[str]) -> list[tuple[str, str]]:
    return [(image_id, "") for image_id in image_ids]
