"""Checks a submission before it is sent: rows, ids, run lengths; and any masks: how many, and how large."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from pneumo_experiments.dataset.annotations import ANNOTATIONS, MAX_FIELD_LENGTH, read_annotations, read_table
from pneumo_experiments.dataset.decoder_pool import DecodedImage, decode_all, read_files
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.rle import decode, encode
from pneumo_experiments.dicom.archive import Archive
from pneumo_experiments.errors import UserError
from pneumo_experiments.scoring.submission import HEADER

CHALLENGE_SHAPE = (1024, 1024)  # rows and columns of every radiograph of the challenge
EXAMPLES = 3
SIMILAR = 2  # a fraction of positives further from the training's, in either direction, is suspicious
LARGE = 0.5  # a mask of more than this fraction of its image is; the largest real finding has 0.15
MIN_IMAGES, STANDARD_ERRORS = 20, 3  # fewer images, or a smaller excess of positives, may be chance
ADVICE = "check the thresholds, and that the model suits these images"


def large_masks(covered: Iterable[float]) -> str:
    """How many masks cover too much, in words; empty if none. ``covered`` are fractions of their images."""
    count = sum(fraction > LARGE for fraction in covered)
    words = "mask covers more than half of its" if count == 1 else "masks cover more than half of their"
    return f"{count} {words} image" if count else ""


def are_too_many(positives: int, images: int, usual: float | None) -> bool:
    """Whether far more images have a mask than the ``usual`` fraction; without it, than half of them."""
    if images < MIN_IMAGES:
        return False
    if usual is None:
        return positives > images / 2
    chance = STANDARD_ERRORS * sqrt(usual * (1 - usual) / images)  # of a binomial fraction
    return positives / images > max(SIMILAR * usual, usual + chance)


def mask_warnings(covered: Sequence[float], usual: Mapping[str, float | None]) -> list[str]:
    """What is absurd about the masks of n images, one line each; ``covered`` are fractions of each image.

    ``usual`` has fractions of positives by where they hold, such as ``in training``; None where unknown.
    """
    positives, known = sum(f > 0 for f in covered), {w: f for w, f in usual.items() if f is not None}
    lines = [f"{large}: look at their overlays"] if (large := large_masks(covered)) else []
    if are_too_many(positives, len(covered), max(known.values(), default=None)):
        others = "".join(f", {fraction:.0%} {where}" for where, fraction in known.items())
        lines.append(f"a finding on {positives / len(covered):.0%} of the images{others}: {ADVICE}")
    return lines


@dataclass(frozen=True)
class SubmissionCheck:
    """What is in a submission, and what is wrong with it: one line for each kind of problem."""

    images: int
    positives: int
    problems: list[str]
    large: str = ""  # how many masks cover more than half of their image, in words

    def positives_line(self, training: float | None) -> str:
        """The fraction of images with a mask, beside the ``training`` images' if that is known."""
        fraction = self.positives / max(1, self.images)
        line = f"{self.positives} of {self.images} images have a mask ({fraction:.1%})"
        is_odd = are_too_many(self.positives, self.images, None)
        if training is not None:
            line += f", of the training images {training:.1%}"
            is_odd = SIMILAR * fraction < training or fraction > SIMILAR * training
        return f"{line}: {ADVICE}" if is_odd else line


def check_submission(
    path: Path, expected: Iterable[str] | None, shapes: Mapping[str, tuple[int, int]]
) -> SubmissionCheck:
    """Checks a submission file; raises UserError if it is no table at all.

    ``expected`` are the image ids that it must have, once each; None accepts any. ``shapes`` are the rows and
    columns of images; others are taken to be 1024 x 1024, as in the challenge.
    """
    problems, rows = list[str](), _read_rows(path)
    if rows[0][1] != list(HEADER):
        problems.append(f"the first line is not {','.join(HEADER)}")
    if any(field.lower() in ANNOTATIONS.id_names for field in rows[0][1]) or rows[0][1] == list(HEADER):
        del rows[0]
    short = [f"line {line}" for line, row in rows if len(row) != 2 or not row[0]]
    problems += _kind(short, "not an image id and run lengths")
    pairs = [(row[0], row[1]) for _, row in rows if len(row) == 2 and row[0]]
    times = Counter(image_id for image_id, _ in pairs)
    problems += _kind([name for name, count in times.items() if count > 1], "more than one row")
    if expected is not None:
        wanted = dict.fromkeys(expected)
        problems += _kind([name for name in wanted if name not in times], "missing")
        problems += _kind([name for name in times if name not in wanted], "no image of the test set")
    unreadable, unstable, covered = list[str](), list[str](), dict[str, float]()
    for image_id, text in pairs:
        try:
            mask = decode(text, shapes.get(image_id, CHALLENGE_SHAPE), image_id)
        except UserError as error:
            unreadable.append(str(error))
            continue
        if encode(mask) != " ".join(text.split()):
            unstable.append(image_id)
        if mask.any():
            covered[image_id] = float(mask.mean())
    problems += unreadable[:EXAMPLES]
    if len(unreadable) > EXAMPLES:
        problems.append(f"{len(unreadable) - EXAMPLES} more images with run lengths that cannot be decoded")
    problems += _kind(unstable, "runs of length 0, runs that touch, or an empty mask not written as -1")
    return SubmissionCheck(len(times), len(covered), problems, large_masks(covered.values()))


def expected_images(sample_submission: Path | None, archive: Archive | None) -> list[str] | None:
    """The test images: those of the sample submission, in its order, or of the folder; None without both."""
    if sample_submission is not None:
        return list(read_annotations(sample_submission))  # a sample may name an image more than once
    return None if archive is None else sorted(archive.image_ids)


def native_shapes(archive: Archive) -> dict[str, tuple[int, int]]:
    """Rows and columns of each radiograph that can be read."""
    with closing(decode_all(read_files(archive.root, archive.members), image_size=1)) as images:
        return {
            image_id: (image.rows, image.columns)
            for image_id, image in images
            if isinstance(image, DecodedImage)
        }


def positives_of(dataset: Path) -> float | None:
    """The fraction of images with an annotation of a data set file; None if it has no annotations."""
    if not dataset.is_file():
        return None
    with Dataset.open(dataset) as opened:
        areas = [entry.area_px for entry in opened.entries]
        return sum(area > 0 for area in areas) / len(areas) if opened.labelled and areas else None


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and fields of each row of a CSV file that is not blank."""
    content = read_table(path, ANNOTATIONS)
    csv.field_size_limit(MAX_FIELD_LENGTH)
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
        rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: not a CSV table in UTF-8; expected {ANNOTATIONS.expected}") from None
    if not rows:
        raise UserError(f"{path}: the table is empty; expected {ANNOTATIONS.expected}")
    return rows


def _kind(names: list[str], what: str) -> list[str]:
    """One line for all names with this problem, or none; such as ``a, b, c and 4 more: missing``."""
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return [f"{', '.join(names[:EXAMPLES])}{more}: {what}"] if names else []
