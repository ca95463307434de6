"""Converts DICOM files to packed images in worker processes, in shards that are stored on disk.

The name of a shard file is a hash of all its inputs, and the file is written atomically. So an interrupted
run continues with the shards that it had finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pneumo_experiments.dataset.decoder_pool import decode_all
from pneumo_experiments.dataset.deflate import crc32
from pneumo_experiments.dataset.labels import InvalidRunLengths, Label, LabelMask, read_label
from pneumo_experiments.dataset.packed import Entry, Packed, ResizedImage, hash_patient, pack, salted
from pneumo_experiments.dataset.resize import area_resize, resize_image
from pneumo_experiments.dataset.rle import EMPTY, encode
from pneumo_experiments.dicom.archive import Member, read_member
from pneumo_experiments.dicom.limits import limit_time, max_seconds, memory_limit_message
from pneumo_experiments.dicom.radiograph import Radiograph, read_radiograph
from pneumo_experiments.dicom.workers import worker_pool
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.files import write_atomically

FILES_PER_SHARD = 32
VERSION = 3  # increase it when the content of shard files changes


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
    members: tuple[Member, ...]
    labels: tuple[Label, ...] | None  # None for a set without labels
    patients: tuple[str, ...]  # hashes; empty: use the file's PatientID
    fatal: Mapping[str, str] = field(default_factory=dict[str, str])  # image id: how it killed its worker

    @property
    def name(self) -> str:
        """File name: a hash of all inputs except the root."""
        members = [(m.image_id, m.name, m.size, m.stamp) for m in self.members]
        labels = None if self.labels is None else [label.key for label in self.labels]
        content = [VERSION, asdict(self.settings), members, labels, self.patients, salted("batch")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class FileResult:
    """The packed image of one file, or the reason for its rejection."""

    image_id: str
    content: str  # SHA-256 of the file; empty if it could not be read
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


def make_jobs(
    root: Path,
    settings: ShardSettings,
    members: Sequence[Member],
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

    Reads finished shards from the ``work`` folder and writes the others there. Rejects a file that kills its
    worker (its decoder crashes or exceeds the time limit), and continues with the rest.
    """
    jobs = list(jobs)
    done = 0
    while done < len(jobs):
        missing = [job for job in jobs[done:] if not is_finished(job, work)]
        try:
            with worker_pool(max(1, min(workers, len(missing))), jobs[0].settings.max_pixels) as pool:
                futures: dict[str, Future[None]] = {
                    j.name: pool.submit(_write_shard, j, work) for j in missing
                }
                while done < len(jobs):
                    job = jobs[done]
                    if job.name in futures:
                        futures.pop(job.name).result()
                    yield from _read_shard(job, work)
                    done += 1
        except BrokenProcessPool:
            fatal = _find_fatal(jobs[done:], work)
            jobs[done:] = [replace(job, fatal={**job.fatal, **fatal}) for job in jobs[done:]]


def _find_fatal(jobs: Sequence[Job], work: Path) -> dict[str, str]:
    """Of the files that were being read when a worker died, those that cannot be read, and the reasons."""
    fatal = dict[str, str]()
    by_name = {job.name: job for job in jobs}
    for marker in list(work.glob("*.now")):
        job = by_name[marker.stem]
        member = job.members[int(marker.read_text() or 0)]
        marker.unlink()
        try:
            file = (member.image_id, read_member(job.root, member, job.settings.max_pixels))
        except Rejected:
            continue
        for image_id, outcome in decode_all([file], job.settings.image_size, job.settings.max_pixels):
            if isinstance(outcome, Rejected):
                fatal[image_id] = str(outcome)
    if not fatal:
        raise UserError(
            "workers: a worker process was killed, perhaps for lack of memory; set fewer workers and run the"
            " same command again: it continues where this run stopped"
        )
    return fatal


def _write_shard(job: Job, work: Path) -> None:
    """Writes one shard; meanwhile a marker file holds the number of the file that is being read."""
    marker = work / f"{job.name}.now"
    shard = list[FileResult]()
    with marker.open("w", buffering=1) as current:
        for index in range(len(job.members)):
            current.seek(0)
            current.write(f"{index:4}\n")
            shard.append(_result(job, index))
    packed = [result.packed for result in shard if result.packed]
    chunks = [chunk for image in packed for chunk in (image.image_chunk, image.target_chunk) if chunk]
    rows = json.dumps([_row(result) for result in shard]).encode()
    checksum = crc32(rows)
    for chunk in chunks:
        checksum = crc32(chunk, checksum)
    with write_atomically(work / job.name) as temporary, temporary.open("wb") as file:
        file.write(b"%d %d\n" % (checksum, len(rows)))
        file.writelines([rows, *chunks])
    marker.unlink(missing_ok=True)


def _read_shard(job: Job, work: Path) -> list[FileResult]:
    """A finished shard; rewrites it if it is damaged, for example after a power cut."""
    content = memoryview((work / job.name).read_bytes())
    head, _, _ = bytes(content[:64]).partition(b"\n")
    body = content[len(head) + 1 :]
    try:
        checksum, length = map(int, head.split())
        if crc32(body) != checksum:
            raise ValueError
    except ValueError:
        (work / job.name).unlink()
        _write_shard(job, work)
        return _read_shard(job, work)
    shard, offset = list[FileResult](), length
    for row in json.loads(bytes(body[:length])):
        packed = row.pop("packed")
        if packed is not None:
            for name in ("image_chunk", "target_chunk"):
                if packed[name] is not None:
                    size = packed[name]
                    packed[name] = bytes(body[offset : offset + size])
                    offset += size
            packed = Packed(**(packed | {"entry": Entry(**packed["entry"])}))
        shard.append(FileResult(**row, packed=packed))
    return shard


def _row(result: FileResult) -> dict[str, Any]:
    """A result for JSON, with the lengths of the chunks instead of their bytes."""
    packed = result.packed
    if packed is None:
        return asdict(result)
    target = packed.target_chunk
    lengths = {
        "image_chunk": len(packed.image_chunk),
        "target_chunk": None if target is None else len(target),
    }
    return asdict(replace(result, packed=None)) | {
        "packed": asdict(replace(packed, image_chunk=b"", target_chunk=None)) | lengths
    }


def _result(job: Job, index: int) -> FileResult:
    member, max_pixels = job.members[index], job.settings.max_pixels
    result = FileResult(member.image_id, content="")
    try:
        content = read_member(job.root, member, max_pixels)
        result = replace(result, content=hashlib.sha256(content).hexdigest())
        if member.image_id in job.fatal:
            raise Rejected(job.fatal[member.image_id])
        with limit_time(max_seconds(len(content))):
            radiograph = read_radiograph(content, member.image_id, max_pixels)
        label = Label() if job.labels is None else job.labels[index]
        mask = read_label(label, radiograph.shape, member.image_id, max_pixels)
        return _packed(job, index, replace(result, content=result.content + mask.content), radiograph, mask)
    except InvalidRunLengths as reason:
        return replace(result, reason=str(reason), invalid_run_lengths=True)
    except Rejected as reason:
        return replace(result, reason=str(reason))
    except MemoryError:
        return replace(result, reason=f"{member.image_id}: {memory_limit_message(max_pixels)}")


def _packed(job: Job, index: int, result: FileResult, radiograph: Radiograph, label: LabelMask) -> FileResult:
    member, settings, mask = job.members[index], job.settings, label.mask
    size, labelled = settings.image_size, job.labels is not None
    entry = Entry(
        image_id=member.image_id,
        patient=job.patients[index] or hash_patient(radiograph.patient, member.image_id),
        view=radiograph.view,
        sex=radiograph.sex,
        age=radiograph.age,
        rows=radiograph.shape[0],
        columns=radiograph.shape[1],
        annotations=label.annotations,
        area_px=0 if mask is None else int(np.count_nonzero(mask.T)),  # transposed: memory order
    )
    annotated = label.annotated
    target = np.zeros((size, size), np.float32) if annotated is None else area_resize(annotated, size)
    resized = ResizedImage(
        entry,
        resize_image(radiograph.pixels, size),
        target if labelled else None,
        (EMPTY if mask is None else encode(mask)) if labelled else None,
    )
    return replace(
        result,
        format=radiograph.format,
        notes=(*radiograph.notes, *label.notes),
        overlapping=label.overlapping,
        packed=pack(resized, settings.pixel_dtype),
    )
