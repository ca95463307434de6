"""Masks that a file holds, whoever predicted them, in place of a model's predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.annotations import ANNOTATIONS, match_ids, read_annotations, read_table
from pneumo_experiments.dataset.labels import Label, read_label, run_length_labels
from pneumo_experiments.dataset.packed_image import Entry
from pneumo_experiments.dataset.rle import EMPTY
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.evaluation.subset import LabelledImages
from pneumo_experiments.metrics.thresholds import ThresholdCounts
from pneumo_experiments.progress_bar import ProgressBar
from pneumo_experiments.words import plural, some_of


@dataclass(frozen=True)
class GivenMasks:
    """A table of image ids and run lengths in the challenge's form: several rows of an image are united.

    ``setting`` and the path are what errors call it.
    """

    name: str
    labels: Mapping[str, Label]
    sha256: str

    @classmethod
    def read(cls, setting: str, path: Path, images: LabelledImages, side: int = 0) -> GivenMasks:
        """Reads the masks of these images; a file may have others of the same data set, too.

        ``side`` as in ``run_length_labels``. Raises UserError for a file that is no table of run lengths, for
        images that are missing, and for ids that no image of the data set has.
        """
        name, dataset = f"{setting}={path}", images.dataset
        content = read_table(path, ANNOTATIONS)
        known = {entry.image_id for entry in dataset.entries}
        texts = match_ids(read_annotations(path, content), known)
        if foreign := [image_id for image_id in texts if image_id not in known]:
            raise UserError(
                f"{name}: {plural(len(foreign), 'id')} of no image of {dataset.path}: {some_of(foreign)};"
                " name the labels of these images, or leave those rows out"
            )
        if missing := [entry.image_id for entry in images.entries if entry.image_id not in texts]:
            raise UserError(
                f"{name}: {len(missing):,} of {plural(len(images), 'image')} are missing: {some_of(missing)};"
                f" write {EMPTY} for an image without a finding, or score another subset"
            )
        return cls(name, run_length_labels(texts, side), hashlib.sha256(content).hexdigest())

    def mask(self, entry: Entry) -> NDArray[np.bool_] | None:
        """The mask of an image (rows, columns), resized if it was made for a copy; None if it is empty.

        Raises UserError for run lengths that do not fit, for overlapping rows, and for a mask beside -1.
        """
        label = self.labels[entry.image_id]
        try:
            found = read_label(label, b"", (entry.rows, entry.columns), entry.image_id, 0)
        except Rejected as error:
            raise UserError(f"{self.name}: {error}") from None
        if found.overlapping:
            raise UserError(f"{self.name}: {entry.image_id}: rows overlap; write each pixel once")
        if found.annotations and EMPTY in label.texts:
            raise UserError(f"{self.name}: {entry.image_id}: has a mask and {EMPTY}; keep one of them")
        return found.mask

    def resized(self, entries: Sequence[Entry]) -> str:
        """How many masks were made for images of another size, in words; empty if none."""
        sides = [(self.labels[entry.image_id].side, entry.rows, entry.columns) for entry in entries]
        count = sum(side not in (0, rows) for side, rows, columns in sides if rows == columns)
        return f"{plural(count, 'mask')} resized to the size of the images" if count else ""

    def count(self, images: LabelledImages, desc: str = "") -> ThresholdCounts:
        """Counts in which all pixels of a mask, and the presence of an image with one, have probability 1."""
        pixels = np.zeros((len(images), 2, 101), np.int32)
        with ProgressBar(desc, len(images), is_shown=bool(desc), is_kept=True) as bar:
            for of_image, entry, index in zip(pixels, images.entries, images.indices.tolist(), strict=True):
                of_image[:, 0] = entry.rows * entry.columns, entry.area_px
                if (mask := self.mask(entry)) is not None:
                    of_image[0, 1:] = np.count_nonzero(mask)
                    if entry.area_px:
                        of_image[1, 1:] = np.count_nonzero(mask & images.dataset.mask(index))
                bar.update()
        presence = (pixels[:, 0, 1] > 0).astype(np.float32)
        return ThresholdCounts(pixels, presence, images.patients, np.zeros(len(images), np.int64))
