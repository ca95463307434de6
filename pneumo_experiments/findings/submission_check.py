"""Checks a submission before it is sent: rows, ids, run lengths, and likely mistakes in its masks.

Mistakes in masks show in how their runs repeat, and in where they lie compared with usual ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import (
    ANNOTATIONS,
    MIN_PAIRS,
    Table,
    parse_table,
    plain_id,
    plain_run_lengths,
    read_annotations,
    short_id,
)
from pneumo_experiments.dataset.decoder_pool import DecodedImage, decode_all, read_files
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.labels import Label
from pneumo_experiments.dataset.packed_image import Entry
from pneumo_experiments.dicom.archive import Archive
from pneumo_experiments.errors import UserError
from pneumo_experiments.findings.submission import HEADER
from pneumo_experiments.words import EXAMPLES, plural, some_of

CHALLENGE_SHAPE = (1024, 1024)  # rows and columns of every radiograph of the challenge
SIMILAR = 2  # a fraction of positives further from the training's, in either direction, is suspicious
LARGE = 0.5  # a mask of more than this fraction of its image is; the largest real finding has 0.15
MIN_IMAGES, STANDARD_ERRORS = 20, 3  # fewer images, or a smaller excess of positives, may be chance
ADVICE = "check the thresholds, and that the model suits these images"
GRID = 4  # cells of an image in each direction
MIN_POSITIVES = 50  # of a data set, to know from it where masks lie
MIN_MASKS, MIN_STEPS = 2, 20  # to name their size
MIN_AREAS, AREA_FACTOR = 5, 8  # masks, and how far their median area may be from the usual one
TOLERANCE = 0.02  # of a step
MAX_RIGHT, MIN_WRONG = 0.05, 0.1  # fractions of steps of the right and a wrong size
DOUBT, CERTAIN = 5.0, 10.0  # natural logarithm of how much better a mistake explains where the masks lie
MIN_GAIN = 0.5  # of it per mask; masks made row by row have 1.06 on average
TURNED: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "made row by row: run lengths go down columns, so encode each mask transposed": lambda cells: cells.T,
    "upside down": lambda cells: cells[::-1],
    "turned by a quarter": lambda cells: cells[::-1].T,
}


@dataclass(frozen=True)
class UsualMasks:
    """Masks of labelled images: the fraction of images with one, where they lie, and their median area."""

    positives: float | None
    cells: NDArray[np.float64]  # (4, 4): fraction of a mask's pixels in each cell of its image
    median_area: float  # as a fraction of the image


# Means over the 2,669 images with a finding among the challenge's 12,047 labelled ones; both halves alike.
LEFT_HALF = np.array([[2.4, 29.2], [4.0, 5.1], [4.5, 2.8], [1.4, 0.7]]) / 100
CHALLENGE = UsualMasks(None, np.hstack([LEFT_HALF, LEFT_HALF[:, ::-1]]), 8630 / 1024**2)


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
        line = f"{self.positives:,} of {plural(self.images, 'image')} have a mask ({fraction:.1%})"
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
    problems, pairs = _check_rows(table, None if expected is None else dict.fromkeys(expected))
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
    certain, doubts = likely_mistakes([*masks.values()], usual)
    if large := large_masks(mask.covered for mask in masks.values()):
        doubts.insert(0, f"{large}: look at them")
    positives = sum(mask.covered > 0 for mask in masks.values())
    return SubmissionCheck(len({name for name, _ in pairs}), positives, problems + certain, doubts)


def _check_rows(table: Table, wanted: Collection[str] | None) -> tuple[list[str], list[tuple[str, str]]]:
    """What is wrong with header, rows and ids; and image id and run lengths of each row that has both."""
    header = ",".join(HEADER)
    problems = [*table.dialect, *([] if table.header == header else [f"the first line is not {header}"])]
    pairs, short, misspelled = list[tuple[str, str]](), list[str](), dict[str, None]()
    for line, row in table.rows:
        if len(row) != table.width or not (name := row[table.id_column]):
            short.append(f"line {line}")
            continue
        plain = plain_id(name) if wanted is None else short_id(name)
        image_id = plain if wanted is None or (name not in wanted and plain in wanted) else name
        if image_id != name:
            misspelled[name] = None
        pairs.append((image_id, row[table.value_column]))
    times = Counter(image_id for image_id, _ in pairs)
    problems += _kind(short, "not an image id and run lengths")
    problems += _kind(
        [*misspelled], "a suffix or folder that the ids of the test set do not have: leave it out"
    )
    problems += _kind([name for name, count in times.items() if count > 1], "more than one row")
    if wanted is not None:
        problems += _kind([name for name in wanted if name not in times], "missing")
        problems += _kind([name for name in times if name not in wanted], "no image of the test set")
    return problems, pairs


def _kind(names: Sequence[str], what: str) -> list[str]:
    """One line for all names with this problem, or none; such as ``a, b, c and 4 more: missing``."""
    return [f"{some_of(names)}: {what}"] if names else []


def sample_images(sample_submission: Path | None) -> list[str] | None:
    """The images of the sample submission, in its order; None without one."""
    # A sample may name an image more than once.
    return None if sample_submission is None else list(read_annotations(sample_submission))


def native_shapes(archive: Archive) -> dict[str, tuple[int, int]]:
    """Rows and columns of each radiograph that can be read."""
    with closing(decode_all(read_files(archive.root, archive.members), image_size=1)) as images:
        return {name: (each.rows, each.columns) for name, each in images if isinstance(each, DecodedImage)}


@dataclass(frozen=True)
class MaskTraits:
    """What tells of mistakes in one mask."""

    shape: tuple[int, int]  # rows and columns of the image
    steps: NDArray[np.int64]  # pixels from the start of a run to the start of the next
    covered: float = 0.0  # fraction of the image; 0 also for what is no mask of this image
    cells: NDArray[np.float64] = field(default_factory=lambda: np.zeros((GRID, GRID)))  # as in UsualMasks
    is_absolute: bool = False  # whether starts count from the first pixel
    is_canonical: bool = True  # whether its text is the only one in the challenge's form
    fault: str = ""  # why it cannot be decoded


def traits_of(text: str, shape: tuple[int, int], image_id: str) -> MaskTraits:
    """The traits of a mask of an image of ``shape`` (H, W); UserError for anything but pairs of integers."""
    lengths = rle.to_lengths(text, image_id)
    is_beyond = sum(lengths.tolist()) > shape[0] * shape[1]
    if rle.are_absolute(lengths) and (is_beyond or lengths.size >= 2 * MIN_PAIRS):
        return MaskTraits(shape, np.diff(lengths[::2]), is_absolute=True)
    steps = np.diff(np.cumsum(lengths)[::2])
    try:
        mask = rle.decode(text, shape, image_id)
    except UserError as error:
        return MaskTraits(shape, steps, fault=str(error))
    is_canonical = rle.encode(mask) == " ".join(text.split())
    return MaskTraits(shape, steps, float(mask.mean()), cells_of(mask), is_canonical=is_canonical)


def cells_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The fraction of a mask's pixels (H, W) in each cell (4, 4) of its image; zeros for an empty mask."""
    bands = [np.array_split(band, GRID, axis=1) for band in np.array_split(mask, GRID)]
    counts = np.array([[np.count_nonzero(part.T) for part in band] for band in bands])
    return counts / max(1, counts.sum())


def usual_masks(dataset: Path) -> UsualMasks:
    """Those of a data set file; of the challenge where it has no labels or fewer than 50 masks."""
    if not dataset.is_file():
        return CHALLENGE
    with Dataset.open(dataset) as opened:
        entries = opened.entries
        if not opened.labelled or not entries:
            return CHALLENGE
        positives = [index for index, entry in enumerate(entries) if entry.area_px > 0]
        fraction = len(positives) / len(entries)
        if len(positives) < MIN_POSITIVES:
            return UsualMasks(fraction, CHALLENGE.cells, CHALLENGE.median_area)
        cells = np.mean([cells_of(opened.mask(index)) for index in positives], axis=0)
        areas = [entries[index].area_px / entries[index].rows / entries[index].columns for index in positives]
        return UsualMasks(fraction, (cells + cells[:, ::-1]) / 2 + 1e-3, float(np.median(areas)))


def likely_mistakes(masks: Sequence[MaskTraits], usual: UsualMasks) -> tuple[list[str], list[str]]:
    """Mistakes in these masks, one line each: those that are certain, and doubts."""
    if wrong_size := _wrong_size(masks):
        return [wrong_size], []
    covered = [mask.covered for mask in masks if mask.covered]
    certain, doubts = list[str](), list[str]()
    cells = np.sum([mask.cells for mask in masks], axis=0)
    gains = {
        name: float((cells * np.log(turned(usual.cells) / usual.cells)).sum())
        for name, turned in TURNED.items()
    }
    name = max(gains, key=lambda name: gains[name])
    if gains[name] > max(DOUBT, MIN_GAIN * len(covered)):
        (certain if gains[name] > CERTAIN else doubts).append(f"the masks look {name}")
    median = float(np.median(covered or [usual.median_area]))
    ratio = median / usual.median_area
    if len(covered) >= MIN_AREAS and not 1 / AREA_FACTOR <= ratio <= AREA_FACTOR:
        doubts.append(
            f"the median mask covers {median:.2%} of its image, usual ones {usual.median_area:.2%}:"
            f" {'are masks and background swapped?' if median > 0.5 else 'look at the masks'}"
        )
    return certain, doubts


def mask_doubts(labels: Mapping[str, Label], entries: Sequence[Entry], usual: UsualMasks) -> list[str]:
    """Likely mistakes in the masks that a table has for these images, one line each."""
    masks = list[MaskTraits]()
    for entry in entries:
        label = labels[entry.image_id]
        shape = (label.side, label.side) if label.side else (entry.rows, entry.columns)
        masks += [traits_of(text, shape, entry.image_id) for text in label.texts if text != rle.EMPTY]
    certain, doubts = likely_mistakes(masks, usual)
    return certain + doubts


def _wrong_size(masks: Sequence[MaskTraits]) -> str:
    """That the masks were made at another size, or row by row where that is certain; else empty.

    The runs of a mask in two neighbouring columns start about as far apart as a column is high.
    """
    shapes = Counter(mask.shape for mask in masks if mask.steps.size)
    if not shapes:
        return ""
    rows, columns = max(shapes, key=lambda shape: shapes[shape])
    steps = np.concatenate([mask.steps for mask in masks if mask.shape == (rows, columns)])
    if shapes[rows, columns] < MIN_MASKS or steps.size < MIN_STEPS:
        return ""
    values, counts = np.unique(steps, return_counts=True)
    step = int(values[counts.argmax()])

    def fraction_near(length: int) -> float:
        return float((np.abs(steps - length) <= max(2, TOLERANCE * length)).mean())

    if fraction_near(rows) > MAX_RIGHT or fraction_near(step) < MIN_WRONG or step <= GRID:
        return ""
    if rows != columns and abs(step - columns) <= max(2, TOLERANCE * columns):
        return f"the masks were {next(iter(TURNED))}"
    return (
        f"the runs repeat every {step} pixels, and columns of the images have {rows}: were the masks made at"
        f" {step} x {step}? scale them to {columns} x {rows} before you encode them"
    )


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
