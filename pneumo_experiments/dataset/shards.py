"""Converts the files of an archive to packed images, in shards that are stored on disk.

The name of a shard file is a hash of all its inputs, and the file is written atomically. So an interrupted
run continues with the shards that it had finished. Each file is read and converted in a process that may die.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pneumo_experiments.dataset.decoder_pool import Crashed, Message, Request, call_all, close_idle
from pneumo_experiments.dataset.labels import InvalidRunLengths, Label, read_label
from pneumo_experiments.dataset.packed_image import (
    Entry,
    Packed,
    ResizedImage,
    crc32,
    hash_patient,
    pack,
    salted,
)
from pneumo_experiments.dataset.resize import area_resize, resize_image
from pneumo_experiments.dataset.rle import EMPTY, encode
from pneumo_experiments.dicom.containers import DicomFile, read_file
from pneumo_experiments.dicom.radiograph import read_radiograph
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.files import write_atomically

FILES_PER_SHARD = 32
# Signals that no decoder ends by.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
VERSION = 6  # increase it when the content of shard files changes


@dataclass(frozen=True)
class ShardSettings:
    """The settings that determine a packed image."""

    image_size: int
    pixel_dtype: str
    max_pixels: int


@dataclass(frozen=True)
class Job:
    """A shard to write; labels and patients are in the order of the members."""

    root: Path
    settings: ShardSettings
    members: tuple[DicomFile, ...]
    labels: tuple[Label, ...] | None  # None for a set without labels
    patients: tuple[str, ...]  # hashes; empty: use the file's PatientID

    @property
    def name(self) -> str:
        """File name: a hash of all inputs except the root."""
        members = [(m.image_id, m.name, m.size, m.stamp) for m in self.members]
        labels = None if self.labels is None else [label.key for label in self.labels]
        content = [VERSION, asdict(self.settings), members, labels, self.patients, salted("batch")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def requests(self) -> Iterator[Request]:
        """What the processes have to do."""
        labels = self.labels or [None] * len(self.members)
        for member, label, patient in zip(self.members, labels, self.patients, strict=True):
            size = member.size + (label.file.size if label and label.file else 0)
            file = LabelledFile(self.root, member, label, patient)
            yield Request(member.image_id, self.settings.max_pixels, size, convert, (file, self.settings))


class LabelledFile(NamedTuple):
    """A file to convert."""

    root: Path
    member: DicomFile
    label: Label | None
    patient: str

    def read(self, max_pixels: int) -> tuple[bytes, bytes, str]:
        """Its bytes, those of its mask's file, and SHA-256 of both; errors as ``read_file`` raises them."""
        contents = (
            read_file(self.root, self.member, max_pixels),
            self.label.read_file(max_pixels) if self.label else b"",
        )
        return *contents, "".join(hashlib.sha256(content).hexdigest() for content in contents if content)


@dataclass(frozen=True)
class FileResult:
    """The packed image of one file, or the reason for its rejection."""

    image_id: str
    content: str = ""  # SHA-256 of the file, and of its mask's file; empty if it could not be read
    format: str = ""
    notes: Sequence[str] = ()  # what its header says and was not used
    overlapping: bool = False  # whether annotations overlap
    reason: str = ""  # without the id
    invalid_run_lengths: bool = False
    packed: Packed | None = None

    def without_chunks(self) -> FileResult:
        """The same without pixels, small enough to hold in memory for every file."""
        if self.packed is None:
            return self
        return replace(self, packed=replace(self.packed, image_chunk=b"", target_chunk=None))


def make_jobs(
    root: Path,
    settings: ShardSettings,
    members: Sequence[DicomFile],
    labels: Mapping[str, Label] | None,
    patients: Mapping[str, str],
) -> list[Job]:
    """The members in shards, in order; ``patients`` are hashes by image id, for images in a patient table."""
    groups = [tuple(members[i : i + FILES_PER_SHARD]) for i in range(0, len(members), FILES_PER_SHARD)]
    return [
        Job(
            root,
            settings,
            group,
            None if labels is None else tuple(labels[m.image_id] for m in group),
            tuple(patients.get(m.image_id, "") for m in group),
        )
        for group in groups
    ]


def is_finished(job: Job, work: Path) -> bool:
    """Whether the work folder holds the finished shard."""
    return (work / job.name).exists()


def results(jobs: Sequence[Job], work: Path, workers: int) -> Iterator[FileResult]:
    """The result for each file, in order, whatever the number of workers.

    Reads finished shards from the ``work`` folder and writes the others there. Rejects a file that ends its
    process (its decoder crashes, or exceeds the limit of time or memory), and continues with the rest.
    """
    missing = [job for job in jobs if not is_finished(job, work)]
    names = {job.name for job in missing}
    try:
        with closing(_converted(missing, workers)) as converted:
            for job in jobs:
                path = work / job.name
                shard = None if job.name in names else _read_shard(path)
                if shard is None:
                    again = converted if job.name in names else _converted([job], workers)
                    shard = list(islice(again, len(job.members)))
                    _write_shard(path, shard)
                yield from shard
    finally:
        close_idle()


def convert(image_id: str, max_pixels: int, file: LabelledFile, settings: ShardSettings) -> Message:
    """Reads and packs one file, in a process of its own; the result as a message."""
    digest, size, is_labelled = "", settings.image_size, file.label is not None
    try:
        content, mask_file, digest = file.read(max_pixels)
        radiograph = read_radiograph(content, image_id, max_pixels)
        found = read_label(file.label or Label(), mask_file, radiograph.shape, image_id, max_pixels)
    except Rejected as reason:
        is_invalid = isinstance(reason, InvalidRunLengths)
        return _as_message(FileResult(image_id, digest, reason=reason.reason, invalid_run_lengths=is_invalid))
    mask, annotated = found.mask, found.annotated
    entry = Entry(
        image_id=image_id,
        patient=file.patient or hash_patient(radiograph.patient, image_id),
        view=radiograph.view,
        sex=radiograph.sex,
        age=radiograph.age,
        rows=radiograph.shape[0],
        columns=radiograph.shape[1],
        annotations=found.annotations,
        area_px=0 if mask is None else int(np.count_nonzero(mask.T)),  # transposed: memory order
    )
    target = np.zeros((size, size), np.float32) if annotated is None else area_resize(annotated, size)
    resized = ResizedImage(
        entry,
        resize_image(radiograph.pixels, size),
        target if is_labelled else None,
        (EMPTY if mask is None else encode(mask)) if is_labelled else None,
    )
    return _as_message(
        FileResult(
            image_id,
            digest,
            radiograph.format,
            notes=(*radiograph.notes, *found.notes),
            overlapping=found.overlapping,
            packed=pack(resized, settings.pixel_dtype),
        )
    )


def _converted(jobs: Sequence[Job], workers: int) -> Generator[FileResult]:
    """The result for each file of these shards."""
    requests = [request for job in jobs for request in job.requests()]
    with closing(call_all(requests, max(1, min(workers, len(requests))))) as replies:
        for request, reply in replies:
            if not isinstance(reply, Rejected):
                yield _from_message(reply[0], memoryview(reply[1]))[0]
                continue
            if isinstance(reply, Crashed) and -reply.returncode in FROM_OUTSIDE:
                raise UserError(
                    "workers: a worker process was killed, perhaps for lack of memory; set fewer workers and"
                    " run the same command again: it continues where this run stopped"
                )
            digest = ""
            with suppress(Rejected):
                *_, digest = request.arguments[0].read(request.max_pixels)
            yield FileResult(request.image_id, digest, reason=reply.reason)


def _as_message(result: FileResult) -> Message:
    """A result for JSON, with the lengths of the chunks, and their bytes."""
    fields, chunks = asdict(result), list[bytes]()
    if packed := fields["packed"]:
        chunks = [packed.pop("image_chunk"), packed.pop("target_chunk") or b""]
    return fields | {"chunks": [*map(len, chunks)]}, b"".join(chunks)


def _from_message(fields: dict[str, Any], content: memoryview) -> tuple[FileResult, memoryview]:
    """The result, and the bytes that follow its own."""
    chunks = list[bytes]()
    for size in fields.pop("chunks"):
        chunks.append(bytes(content[:size]))
        content = content[size:]
    if packed := fields.pop("packed"):
        packed["entry"] = Entry(**packed["entry"])
        packed["image_chunk"], packed["target_chunk"] = chunks[0], chunks[1] or None
        packed = Packed(**packed)
    return FileResult(**fields, packed=packed), content


def _write_shard(path: Path, shard: Sequence[FileResult]) -> None:
    messages = [_as_message(result) for result in shard]
    rows, chunks = json.dumps([fields for fields, _ in messages]).encode(), [chunk for _, chunk in messages]
    checksum = crc32(rows)
    for chunk in chunks:
        checksum = crc32(chunk, checksum)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(b"%d %d\n" % (checksum, len(rows)))
        file.writelines([rows, *chunks])


def _read_shard(path: Path) -> list[FileResult] | None:
    """A finished shard; None if it is damaged, for example after a power cut."""
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        checksum, length = map(int, head.split())
    except ValueError:
        return None
    if crc32(body) != checksum:
        return None
    shard, chunks = list[FileResult](), memoryview(body)[length:]
    for fields in json.loads(body[:length]):
        result, chunks = _from_message(fields, chunks)
        shard.append(result)
    return shard
