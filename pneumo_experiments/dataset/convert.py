"""Converts one file to one packed image, in a process that may die, and hands the result on as a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pneumo_experiments.dataset.labels import InvalidRunLengths, Label, LabelMask, read_label
from pneumo_experiments.dataset.packed import Entry, Packed, ResizedImage, hash_patient, pack
from pneumo_experiments.dataset.resize import area_resize, resize_image
from pneumo_experiments.dataset.rle import EMPTY, encode
from pneumo_experiments.dicom.radiograph import Radiograph, read_radiograph
from pneumo_experiments.errors import Rejected

CHUNKS = ("image_chunk", "target_chunk")


@dataclass(frozen=True)
class FileResult:
    """The packed image of one file, or the reason for its rejection."""

    image_id: str
    content: str = ""  # SHA-256 of the file, and of its mask's file; empty if it could not be read
    format: str = ""
    notes: Sequence[str] = ()  # what its header says and was not used
    overlapping: bool = False  # whether annotations overlap
    reason: str = ""
    invalid_run_lengths: bool = False
    packed: Packed | None = None

    def without_chunks(self) -> FileResult:
        """The same without pixels, small enough to hold in memory for every file."""
        if self.packed is None:
            return self
        return replace(self, packed=replace(self.packed, image_chunk=b"", target_chunk=None))


@dataclass(frozen=True)
class Conversion:
    """What a packed image depends on beside its file, of types that JSON has."""

    image_size: int
    pixel_dtype: str
    labelled: bool
    texts: Sequence[str]  # run lengths, see ``Label``
    side: int
    presence: bool | None
    patient: str  # hash; empty: use the file's PatientID
    mask_bytes: int  # of the mask's file, which follows the image's file


def convert(
    content: bytes, image_id: str, max_pixels: int, conversion: Mapping[str, Any]
) -> tuple[dict[str, Any], bytes]:
    """The result of a ``Conversion`` as a message: its fields, and the bytes of its chunks."""
    wanted = Conversion(**conversion)
    end = len(content) - wanted.mask_bytes
    try:
        radiograph = read_radiograph(content[:end], image_id, max_pixels)
        given = Label(tuple(wanted.texts), wanted.side, presence=wanted.presence)
        label = read_label(given, content[end:], radiograph.shape, image_id, max_pixels)
        result = _packed(radiograph, label, wanted)
    except Rejected as reason:
        is_invalid = isinstance(reason, InvalidRunLengths)
        result = FileResult(image_id, reason=str(reason), invalid_run_lengths=is_invalid)
    return as_message(result)


def as_message(result: FileResult) -> tuple[dict[str, Any], bytes]:
    """A result for JSON, with the lengths of the chunks instead of their bytes, and these."""
    fields, packed = asdict(result.without_chunks()), result.packed
    if packed is None:
        return {"result": fields}, b""
    chunks = [getattr(packed, name) for name in CHUNKS]
    fields["packed"] |= {name: chunk and len(chunk) for name, chunk in zip(CHUNKS, chunks, strict=True)}
    return {"result": fields}, b"".join(chunk for chunk in chunks if chunk)


def from_message(message: Mapping[str, Any], chunks: memoryview) -> tuple[FileResult, memoryview]:
    """The result, and the chunks that follow its own."""
    fields = dict(message["result"])
    packed = fields.pop("packed")
    if packed is not None:
        for name in CHUNKS:
            if packed[name] is not None:
                size = packed[name]
                packed[name], chunks = bytes(chunks[:size]), chunks[size:]
        packed = Packed(**(packed | {"entry": Entry(**packed["entry"])}))
    return FileResult(**fields, packed=packed), chunks


def _packed(radiograph: Radiograph, label: LabelMask, wanted: Conversion) -> FileResult:
    mask, annotated, size = label.mask, label.annotated, wanted.image_size
    entry = Entry(
        image_id=radiograph.image_id,
        patient=wanted.patient or hash_patient(radiograph.patient, radiograph.image_id),
        view=radiograph.view,
        sex=radiograph.sex,
        age=radiograph.age,
        rows=radiograph.shape[0],
        columns=radiograph.shape[1],
        annotations=label.annotations,
        area_px=0 if mask is None else int(np.count_nonzero(mask.T)),  # transposed: memory order
    )
    target = np.zeros((size, size), np.float32) if annotated is None else area_resize(annotated, size)
    resized = ResizedImage(
        entry,
        resize_image(radiograph.pixels, size),
        target if wanted.labelled else None,
        (EMPTY if mask is None else encode(mask)) if wanted.labelled else None,
    )
    return FileResult(
        radiograph.image_id,
        format=radiograph.format,
        notes=(*radiograph.notes, *label.notes),
        overlapping=label.overlapping,
        packed=pack(resized, wanted.pixel_dtype),
    )
