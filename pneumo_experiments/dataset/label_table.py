"""The labels of an annotation table alone, where there are no radiographs to make a data set of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.annotations import ANNOTATIONS, read_annotations, read_table
from pneumo_experiments.dataset.labels import CHALLENGE_SIDE, Label, read_label
from pneumo_experiments.dataset.packed_image import Entry, hash_patient
from pneumo_experiments.dataset.patients import make_grouping, warn
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.settings import AUTO


@dataclass(frozen=True)
class LabelTable:
    """What a ``Dataset`` knows of n images but their pixels; an image is addressed by its place in it."""

    path: Path
    fingerprint: str
    entries: list[Entry]
    run_lengths: list[str]
    """of the union of each image's annotations, in ``rle.encode``'s form"""
    labelled: bool = True

    @classmethod
    def read(cls, path: Path, side: int = 0, patients_csv: str = AUTO) -> LabelTable:
        """The table of square images of ``side`` pixels; 0 takes the challenge's 1024.

        Raises UserError for a table that cannot be read, and for run lengths that do not fit.
        """
        content = read_table(path, ANNOTATIONS)
        annotations = read_annotations(path, content)
        patients = make_grouping(patients_csv, [*annotations]).hashes
        if unknown := len(annotations) - len(patients):
            warn(
                f"rle_csv={path}: the patients of {unknown:,} of {len(annotations):,} images are unknown, so"
                " each image counts as a patient; if patients have several, name them in patients_csv"
            )
        side = side or CHALLENGE_SIDE
        entries, run_lengths = list[Entry](), list[str]()
        for image_id, texts in annotations.items():
            try:
                label = read_label(Label(tuple(texts)), b"", (side, side), image_id, 0)
            except Rejected as error:
                raise UserError(f"rle_csv={path}: {error}") from None
            area_px = 0 if label.mask is None else int(np.count_nonzero(label.mask))
            patient = patients.get(image_id) or hash_patient("", image_id)
            entries.append(Entry(image_id, patient, "", "", -1, side, side, label.annotations, area_px))
            run_lengths.append(rle.EMPTY if label.mask is None else rle.encode(label.mask))
        digest = hashlib.sha256(content + f" {side}".encode()).hexdigest()
        return cls(path, digest, entries, run_lengths)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def profile(self) -> dict[str, int]:
        """What it holds, in numbers: images, patients, positives."""
        patients = len({entry.patient for entry in self.entries})
        positives = sum(entry.area_px > 0 for entry in self.entries)
        return {"images": len(self), "patients": patients, "positives": positives}

    def rle(self, index: int) -> str:
        """Run lengths of the union of one image's annotations."""
        return self.run_lengths[index]

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Union of one image's annotations (rows, columns)."""
        entry = self.entries[index]
        return rle.decode(self.run_lengths[index], (entry.rows, entry.columns), entry.image_id)
