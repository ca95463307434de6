"""DICOM files to packed images, batch by batch in worker processes; each finished batch is kept on disk.

A batch lies in the work folder under a name that follows from everything it was made from, and appears
there whole or not at all. So an interrupted run finds what it had finished, and nothing else.
"""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from pneumo_experiments.dataset.annotations import unite
from pneumo_experiments.dataset.decoder_pool import decode_all
from pneumo_experiments.dataset.packed import Entry, Example, Packed, hash_patient, pack, salted
from pneumo_experiments.dataset.resize import area_resize, resize_image
from pneumo_experiments.dataset.rle import EMPTY, encode
from pneumo_experiments.dicom.archive import Member, read_member
from pneumo_experiments.dicom.limits import limit_time, max_seconds, memory_limit_message
from pneumo_experiments.dicom.radiograph import Radiograph, read_radiograph
from pneumo_experiments.dicom.workers import worker_pool
from pneumo_experiments.errors import Rejected, UserError

BATCH = 32  # files
VERSION = 1  # raise it when the same files and recipe give other batches than before


@dataclass(frozen=True)
class Recipe:
    """The settings that shape a packed image."""

    image_size: int
    pixel_dtype: str
    max_pixels: int


@dataclass(frozen=True)
class Job:
    """A batch to make. Annotations and patients stand in the order of the members."""

    root: Path
    recipe: Recipe
    members: tuple[Member, ...]
    annotations: tuple[tuple[str, ...], ...] | None  # None for a set without labels
    patients: tuple[str, ...]  # hashes; empty: the file's own PatientID
    fatal: Mapping[str, str] = field(default_factory=dict[str, str])  # why a file ended a worker, by its id

    @property
    def name(self) -> str:
        """File name that follows from all but the root."""
        members = [(m.image_id, m.name, m.size, m.stamp) for m in self.members]
        content = [VERSION, asdict(self.recipe), members, self.annotations, self.patients, salted("batch")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """What became of one file: packed, or the reason why not."""

    image_id: str
    content: str  # SHA-256 of the file; empty where it could not be read
    format: str = ""
    overlapping: bool = False  # annotations that share pixels
    reason: str = ""
    invalid_run_lengths: bool = False
    packed: Packed | None = None

    def without_chunks(self) -> Result:
        """The same, small enough to keep for every file of an archive."""
        if self.packed is None:
            return self
        return replace(self, packed=replace(self.packed, image_chunk=b"", target_chunk=None))


def make_jobs(
    root: Path,
    recipe: Recipe,
    members: Sequence[Member],
    annotations: dict[str, list[str]] | None,
    patients: Mapping[str, str],
) -> list[Job]:
    """The members in batches, in order; ``patients`` are hashes by image id, of those that a table tells."""
    parts = [tuple(members[i : i + BATCH]) for i in range(0, len(members), BATCH)]
    return [
        Job(
            root,
            recipe,
            part,
            None if annotations is None else tuple(tuple(annotations[m.image_id]) for m in part),
            tuple(patients.get(m.image_id, "") for m in part),
        )
        for part in parts
    ]


def is_made(job: Job, work: Path) -> bool:
    """Whether the batch lies finished in the work folder."""
    return (work / job.name).exists()


def results(jobs: Sequence[Job], work: Path, workers: int) -> Iterator[Result]:
    """What became of each file, in order, whatever the number of workers.

    Finished batches are taken from the ``work`` folder, the others made there. A file that ends its worker
    (its decoder crashes, or takes too long) is rejected, and the rest goes on.
    """
    jobs = list(jobs)
    done = 0
    while done < len(jobs):
        missing = [job for job in jobs[done:] if not is_made(job, work)]
        try:
            with worker_pool(max(1, min(workers, len(missing))), jobs[0].recipe.max_pixels) as pool:
                futures: dict[str, Future[None]] = {j.name: pool.submit(_make, j, work) for j in missing}
                while done < len(jobs):
                    job = jobs[done]
                    if job.name in futures:
                        futures.pop(job.name).result()
                    yield from _read(job, work)
                    done += 1
        except BrokenProcessPool:
            fatal = _find_fatal(jobs[done:], work)
            jobs[done:] = [replace(job, fatal={**job.fatal, **fatal}) for job in jobs[done:]]


def _find_fatal(jobs: Sequence[Job], work: Path) -> dict[str, str]:
    """Of the files that were being read when a worker ended, those that cannot be read, and why not."""
    fatal = dict[str, str]()
    by_name = {job.name: job for job in jobs}
    for mark in list(work.glob("*.now")):
        job = by_name[mark.stem]
        member = job.members[int(mark.read_text() or 0)]
        mark.unlink()
        try:
            file = (member.image_id, read_member(job.root, member, job.recipe.max_pixels))
        except Rejected:
            continue
        for image_id, outcome in decode_all([file], job.recipe.image_size, job.recipe.max_pixels):
            if isinstance(outcome, Rejected):
                fatal[image_id] = str(outcome)
    if not fatal:
        raise UserError(
            "workers: a process was ended from outside, by lack of memory perhaps; set workers to fewer"
            " and run the same command again: what is finished is kept"
        )
    return fatal


def _make(job: Job, work: Path) -> None:
    """Write one batch. While it is made, a mark names the file in hand."""
    mark, part = work / f"{job.name}.now", work / f"{job.name}.{os.getpid()}.part"
    made = list[Result]()
    with mark.open("w", buffering=1) as hand:
        for index in range(len(job.members)):
            hand.seek(0)
            hand.write(f"{index:4}\n")
            made.append(_result(job, index))
    chunks = [c for o in made if o.packed for c in (o.packed.image_chunk, o.packed.target_chunk) if c]
    rows = json.dumps([_row(result) for result in made]).encode()
    checksum = isal_zlib.crc32(rows)
    for chunk in chunks:
        checksum = isal_zlib.crc32(chunk, checksum)
    with part.open("wb") as file:
        file.write(b"%d %d\n" % (checksum, len(rows)))
        file.writelines([rows, *chunks])
    part.replace(work / job.name)
    mark.unlink(missing_ok=True)


def _read(job: Job, work: Path) -> list[Result]:
    """A finished batch; one that a power cut left damaged is made again."""
    content = memoryview((work / job.name).read_bytes())
    head, _, _ = bytes(content[:64]).partition(b"\n")
    body = content[len(head) + 1 :]
    try:
        checksum, length = map(int, head.split())
        if isal_zlib.crc32(body) != checksum:
            raise ValueError
    except ValueError:
        (work / job.name).unlink()
        _make(job, work)
        return _read(job, work)
    made, place = list[Result](), length
    for row in json.loads(bytes(body[:length])):
        packed = row.pop("packed")
        if packed is not None:
            for name in ("image_chunk", "target_chunk"):
                if packed[name] is not None:
                    size = packed[name]
                    packed[name] = bytes(body[place : place + size])
                    place += size
            packed = Packed(**(packed | {"entry": Entry(**packed["entry"])}))
        made.append(Result(**row, packed=packed))
    return made


def _row(result: Result) -> dict[str, Any]:
    """A result for JSON, with the lengths of the chunks in their place."""
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


def _result(job: Job, index: int) -> Result:
    member, most = job.members[index], job.recipe.max_pixels
    result = Result(member.image_id, content="")
    try:
        content = read_member(job.root, member, most)
        result = replace(result, content=hashlib.sha256(content).hexdigest())
        if member.image_id in job.fatal:
            raise Rejected(job.fatal[member.image_id])
        with limit_time(max_seconds(len(content))):
            radiograph = read_radiograph(content, member.image_id, most)
        return _packed(job, index, result, radiograph)
    except Rejected as reason:
        return replace(result, reason=str(reason))
    except MemoryError:
        return replace(result, reason=f"{member.image_id}: {memory_limit_message(most)}")


def _packed(job: Job, index: int, result: Result, radiograph: Radiograph) -> Result:
    member, recipe = job.members[index], job.recipe
    shape = (radiograph.pixels.shape[0], radiograph.pixels.shape[1])
    texts = job.annotations[index] if job.annotations is not None else ()
    try:
        mask, overlapping = unite(texts, shape, member.image_id) if texts else (None, False)
    except UserError as fault:
        return replace(result, reason=str(fault), invalid_run_lengths=True)
    size, labelled = recipe.image_size, job.annotations is not None
    entry = Entry(
        image_id=member.image_id,
        patient=job.patients[index] or hash_patient(radiograph.patient, member.image_id),
        view=radiograph.view,
        sex=radiograph.sex,
        age=radiograph.age,
        rows=shape[0],
        columns=shape[1],
        annotations=len(texts),
        area_px=0 if mask is None else int(np.count_nonzero(mask.T)),  # in the order in which it lies
    )
    target = np.zeros((size, size), np.float32) if mask is None else area_resize(mask, size)
    example = Example(
        entry,
        resize_image(radiograph.pixels, size),
        target if labelled else None,
        (EMPTY if mask is None else encode(mask)) if labelled else None,
    )
    packed = pack(example, recipe.pixel_dtype)
    return replace(result, format=radiograph.format, overlapping=overlapping, packed=packed)
