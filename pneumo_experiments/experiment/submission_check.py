"""Checks a submission before it is sent: rows, ids, run lengths, and how many images have a mask."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SubmissionCheck:
    """What is in a submission, and what is wrong with it: one line for each kind of problem."""

    images: int
    positives: int
    problems: list[str]

    def positives_line(self, training: float | None) -> str:
        """The fraction of images with a mask, beside the ``training`` images' if that is known."""
        fraction = self.positives / max(1, self.images)
        line = f"{self.positives} of {self.images} images have a mask ({fraction:.1%})"
        if training is None:
            return line
        line += f", of the training images {training:.1%}"
        if SIMILAR * fraction < training or fraction > SIMILAR * training:
            line += ": check the thresholds, and that the model suits these images"
        return line


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
    unreadable, unstable, positives = list[str](), list[str](), set[str]()
    for image_id, text in pairs:
        try:
            mask = decode(text, shapes.get(image_id, CHALLENGE_SHAPE), image_id)
        except UserError as error:
            unreadable.append(str(error))
            continue
        if encode(mask) != " ".join(text.split()):
            unstable.append(image_id)
        if mask.any():
            positives.add(image_id)
    problems += unreadable[:EXAMPLES]
    if len(unreadable) > EXAMPLES:
        problems.append(f"{len(unreadable) - EXAMPLES} more images with run lengths that cannot be decoded")
    problems += _kind(unstable, "runs of length 0, runs that touch, or an empty mask not written as -1")
    return SubmissionCheck(len(times), len(positives), problems)


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
