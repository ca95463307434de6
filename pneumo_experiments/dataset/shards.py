"""Converts the files of an archive to packed images, in shards that are stored on disk.

The name of a shard file is a hash of all its inputs, and the file is written atomically. So an interrupted
run continues with the shards that it had finished.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from pneumo_experiments.dataset.convert import Conversion, FileResult, as_message, from_message
from pneumo_experiments.dataset.decoder_pool import Crashed, Request, close_idle, run_all
from pneumo_experiments.dataset.deflate import crc32
from pneumo_experiments.dataset.labels import Label
from pneumo_experiments.dataset.packed import salted
from pneumo_experiments.dicom.archive import Member, read_member
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.files import write_atomically

FILES_PER_SHARD = 32
# Signals that no decoder ends by.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
VERSION = 4  # increase it when the content of shard files changes


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

    @property
    def name(self) -> str:
        """File name: a hash of all inputs except the root."""
        members = [(m.image_id, m.name, m.size, m.stamp) for m in self.members]
        labels = None if self.labels is None else [label.key for label in self.labels]
        content = [VERSION, asdict(self.settings), members, labels, self.patients, salted("batch")]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


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


def _converted(jobs: Sequence[Job], workers: int) -> Generator[FileResult]:
    """The result for each file of these shards."""
    files = [_File(job, index) for job in jobs for index in range(len(job.members))]
    with closing(run_all(files, _File.request, max(1, min(workers, len(files))))) as replies:
        for file, reply in replies:
            if isinstance(reply, Crashed) and -reply.returncode in FROM_OUTSIDE:
                raise UserError(
                    "workers: a worker process was killed, perhaps for lack of memory; set fewer workers and"
                    " run the same command again: it continues where this run stopped"
                )
            if isinstance(reply, Rejected):
                result = FileResult(file.image_id, reason=str(reply))
            else:
                result, _ = from_message(reply[0], memoryview(reply[1]))
            yield replace(result, content=file.digest)


class _File:
    """One file of a shard, and the digest of its content once it has been read."""

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index, self.digest = job, index, ""
        self.image_id = job.members[index].image_id

    def request(self) -> Request | Rejected:
        """What a process has to do with it, or why it cannot be read."""
        job, label = self.job, Label() if self.job.labels is None else self.job.labels[self.index]
        settings = job.settings
        try:
            content = read_member(job.root, job.members[self.index], settings.max_pixels)
            mask = label.read_file(settings.max_pixels)
        except Rejected as reason:
            return reason
        self.digest = "".join(hashlib.sha256(each).hexdigest() for each in (content, mask) if each)
        conversion = Conversion(
            settings.image_size,
            settings.pixel_dtype,
            labelled=job.labels is not None,
            texts=label.texts,
            side=label.side,
            presence=label.presence,
            patient=job.patients[self.index],
            mask_bytes=len(mask),
        )
        arguments = {"conversion": asdict(conversion)}
        return Request("convert", self.image_id, content + mask, settings.max_pixels, arguments)


def _write_shard(path: Path, shard: Sequence[FileResult]) -> None:
    messages = [as_message(result) for result in shard]
    rows, chunks = json.dumps([fields for fields, _ in messages]).encode(), [chunk for _, chunk in messages]
    checksum = crc32(rows)
    for chunk in chunks:
        checksum = crc32(chunk, checksum)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(b"%d %d\n" % (checksum, len(rows)))
        file.writelines([rows, *chunks])


def _read_shard(path: Path) -> list[FileResult] | None:
    """A finished shard; None if it is damaged, for example after a power cut."""
    content = memoryview(path.read_bytes())
    head, _, _ = bytes(content[:64]).partition(b"\n")
    body = content[len(head) + 1 :]
    try:
        checksum, length = map(int, head.split())
    except ValueError:
        return None
    if crc32(body) != checksum:
        return None
    shard, chunks = list[FileResult](), body[length:]
    for fields in json.loads(bytes(body[:length])):
        result, chunks = from_message(fields, chunks)
        shard.append(result)
    return shard
