"""Checks a submission before it is sent: rows, ids, run lengths; and any masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import (
    ANNOTATIONS,
    parse_table,
    plain_id,
    plain_run_lengths,
    read_annotations,
    short_id,
)
from pneumo_experiments.dataset.decoder_pool import DecodedImage, decode_all, read_files
from pneumo_experiments.dicom.archive import Archive
from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.mask_mistakes import (
    CHALLENGE,
    MaskTraits,
    UsualMasks,
    likely_mistakes,
    traits_of,
)
from pneumo_experiments.findings.submission import HEADER

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
    doubts: list[str] = field(default_factory=list[str])  # what may be wrong about its masks

    def positives_line(self, training: float | None) -> str:
        """The fraction of images with a mask, beside the ``training`` images' if that is known."""
        fraction = self.positives / max(1, self.images)
        line = f"{self.positives} of {self.images} images have a mask ({fraction:.1%})"
        is_odd = are_too_many(self.positives or self.images, self.images, None)  # none is as odd as all
        if training is not None:
            line += f", of the training images {training:.1%}"
            is_odd = SIMILAR * fraction < training or fraction > SIMILAR * training
        return f"{line}: {ADVICE}" if is_odd else line


def check_submission(
    path: Path,
    expected: Iterable[str] | None,
    shapes: Mapping[str, tuple[int, int]],
    usual: UsualMasks = CHALLENGE,
) -> SubmissionCheck:
    """Checks a submission file; raises UserError if it is no table at all.

    ``expected`` are the image ids that it must have, once each; None accepts any. ``shapes`` are the rows and
    columns of images; others are taken to be 1024 x 1024, as in the challenge. ``usual`` are masks to compare
    with.
    """
    table = parse_table(path, ANNOTATIONS)
    problems = [*table.dialect]
    if table.header != ",".join(HEADER):
        problems.append(f"the first line is not {','.join(HEADER)}")
    whole = [(line, row) for line, row in table.rows if len(row) == table.width and row[table.id_column]]
    lines = {line for line, _ in whole}
    short = [f"line {line}" for line, _ in table.rows if line not in lines]
    problems += _kind(short, "not an image id and run lengths")
    wanted = None if expected is None else dict.fromkeys(expected)
    ids = {row[table.id_column]: row[table.id_column] for _, row in whole}
    for name in ids:
        plain = plain_id(name) if wanted is None else short_id(name)
        ids[name] = plain if wanted is None or (name not in wanted and plain in wanted) else name
    misspelled = [name for name, image_id in ids.items() if name != image_id]
    problems += _kind(misspelled, "a suffix or folder that the ids of the test set do not have: leave it out")
    pairs = [(ids[row[table.id_column]], row[table.value_column]) for _, row in whole]
    times = Counter(image_id for image_id, _ in pairs)
    problems += _kind([name for name, count in times.items() if count > 1], "more than one row")
    if wanted is not None:
        problems += _kind([name for name in wanted if name not in times], "missing")
        problems += _kind([name for name in times if name not in wanted], "no image of the test set")
    unreadable, unusual, masks = list[str](), list[str](), dict[str, MaskTraits]()
    for image_id, value in pairs:
        text = plain_run_lengths(value)
        if text and text != " ".join(value.split()):
            unusual.append(image_id)
        try:
            masks[image_id] = traits_of(text, shapes.get(image_id, CHALLENGE_SHAPE), image_id)
        except UserError as error:
            unreadable.append(str(error))
    problems += _kind([name for name, mask in masks.items() if mask.is_absolute], rle.ABSOLUTE)
    unreadable += [mask.fault for mask in masks.values() if mask.fault]
    problems += unreadable[:EXAMPLES]
    if len(unreadable) > EXAMPLES:
        problems.append(f"{len(unreadable) - EXAMPLES} more images with run lengths that cannot be decoded")
    problems += _kind(unusual, "not written as whole numbers separated by blanks, or as -1 for no mask")
    unstable = [name for name, mask in masks.items() if not mask.is_canonical]
    problems += _kind(unstable, "runs of length 0, runs that touch, or an empty mask not written as -1")
    certain, doubts = likely_mistakes(list(masks.values()), usual)
    if large := large_masks(mask.covered for mask in masks.values()):
        doubts.insert(0, f"{large}: look at them")
    positives = sum(mask.covered > 0 for mask in masks.values())
    return SubmissionCheck(len(times), positives, problems + certain, doubts)


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


def _kind(names: list[str], what: str) -> list[str]:
    """One line for all names with this problem, or none; such as ``a, b, c and 4 more: missing``."""
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return [f"{', '.join(names[:EXAMPLES])}{more}: {what}"] if names else []
