"""The label of an image: run lengths, or a picture of its mask as copies of the challenge's data have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.annotations import unite
from pneumo_experiments.dataset.patients import shipped_grouping
from pneumo_experiments.dataset.resize import resize_mask
from pneumo_experiments.dataset.rle import EMPTY
from pneumo_experiments.dicom.containers import DicomFile, read_file
from pneumo_experiments.dicom.header import unpacked
from pneumo_experiments.dicom.picture import is_picture, read_mask
from pneumo_experiments.errors import Rejected

CHALLENGE_SIDE = 1024  # pixels
MAX_COVERED = 0.6  # of the image; the challenge's largest mask has 0.15


class InvalidRunLengths(Rejected):
    """Run lengths, or a mask, that cannot be this image's."""


@dataclass(frozen=True)
class Label:
    """Where the mask of an image is: in run lengths, or in a file of the folder ``root``."""

    texts: tuple[str, ...] = ()  # of masks, and -1 if a row of the table says so too
    side: int = 0  # of the image that the run lengths belong to, if it is square; 0: they belong to this one
    root: Path | None = None
    file: DicomFile | None = None
    presence: bool | None = None  # what a table says about it

    @property
    def key(self) -> list[object]:
        """What determines the mask, for JSON."""
        file = self.file
        where = file and (str(self.root), file.name, file.size, file.stamp)
        return [self.texts, self.side, where, self.presence]

    def read_file(self, max_pixels: int) -> bytes:
        """The mask's file, empty without one; errors as ``read_file`` raises them."""
        return b"" if self.root is None or self.file is None else read_file(self.root, self.file, max_pixels)


def run_length_labels(annotations: Mapping[str, Sequence[str]], side: int = 0) -> dict[str, Label]:
    """Labels from run lengths by image id, made for square images of ``side`` pixels.

    0 stands for the side of the challenge's images if the id is one of theirs, else for the image's own size.
    """
    known = shipped_grouping(annotations).hashes
    return {
        image_id: Label(tuple(texts), side or (CHALLENGE_SIDE if image_id in known else 0))
        for image_id, texts in annotations.items()
    }


class LabelMask(NamedTuple):
    """The mask of an image (H, W), None if it is empty, and how it was read."""

    mask: NDArray[np.bool_] | None = None
    annotated: NDArray[np.bool_] | None = None  # the same at the size in which it was annotated
    annotations: int = 0
    overlapping: bool = False  # whether annotations overlap
    notes: tuple[str, ...] = ()


def read_label(
    label: Label, file: bytes, shape: tuple[int, int], image_id: str, max_pixels: int
) -> LabelMask:
    """The mask of an image of ``shape`` (H, W) from run lengths, or from a file if it is not empty.

    A mask of another size is resized. Raises InvalidRunLengths, or Rejected if the file cannot be used.
    """
    masks = [text for text in label.texts if text != EMPTY]
    annotations, kind = len(masks), "run lengths"
    if file:
        mask, overlapping, kind = _mask_of(file, image_id, max_pixels), False, "mask"
        annotations = int(mask.any())
        if label.presence is not None and label.presence != bool(annotations):
            state = "empty" if label.presence else "not empty"
            raise InvalidRunLengths(f"has_pneumo is {int(label.presence)}, and its mask is {state}", image_id)
    elif not masks:
        return LabelMask()
    else:
        try:
            is_copy = label.side and shape[0] == shape[1]
            mask, overlapping = unite(masks, (label.side, label.side) if is_copy else shape, image_id)
        except Rejected as error:
            raise InvalidRunLengths(error.reason, image_id) from None
    (rows, columns), (height, width) = mask.shape, shape
    if rows * width != height * columns:
        raise InvalidRunLengths(
            f"{kind} of {columns} x {rows} px for an image of {width} x {height}; use those of it", image_id
        )
    is_resized = mask.shape != shape
    notes = [f"{kind} for {columns} x {rows} px: resized to the image's"] if is_resized else []
    if EMPTY in label.texts:
        notes.append("the table has a mask and -1: the mask is used")
    if not annotations:
        return LabelMask(notes=tuple(notes))
    native = resize_mask(mask, shape) if is_resized else mask
    if not native.any():
        notes.append("the mask is too small for an image of this size: it is empty")
    return LabelMask(native, mask, annotations, overlapping, tuple(notes))


def _mask_of(content: bytes, image_id: str, max_pixels: int) -> NDArray[np.bool_]:
    try:
        content = unpacked(content, max_pixels)
        if not is_picture(content):
            raise Rejected("its mask is no PNG or JPEG picture")
        mask = read_mask(content, max_pixels)
        if (covered := np.count_nonzero(mask) / mask.size) > MAX_COVERED:
            raise Rejected(f"its mask covers {covered:.0%} of the image: are mask and background swapped?")
        return mask
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        reason = error.reason if isinstance(error, Rejected) else "the file of its mask is damaged"
        raise Rejected(reason, image_id) from None
