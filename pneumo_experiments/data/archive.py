"""Where DICOM files lie: a folder with all its subfolders, or a zip file, read in place."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pneumo_experiments.data.dicom import MAX_PIXELS
from pneumo_experiments.errors import Rejected, UserError

SUFFIXES = (".dcm", ".dicom")
ZIPS = (".zip",)
LARGEST_PIXEL, LARGEST_HEADER = 4, 2**24  # bytes: a file larger than its pixels can be is not read
SEVERAL = "several files have this id, and they differ"
PREAMBLE_BYTES, MAGIC = 128, b"DICM"  # DICOM PS3.10 7.1


@dataclass(frozen=True)
class Member:
    """One DICOM file of an archive."""

    image_id: str
    name: str  # below the folder, or within the zip file
    size: int  # bytes
    stamp: int  # changes when the file does: time of its last change in ns, or its checksum in the zip file


@dataclass(frozen=True)
class Archive:
    """The DICOM files below ``root``, one per image id, in the order of their ids."""

    root: Path
    files: int  # that were found
    members: tuple[Member, ...]
    skipped: dict[str, int]  # other files by kind
    doubles: dict[str, int]  # image id -> files, where several have one id
    differing: tuple[str, ...]  # ids whose files differ: which one is meant is unknown, so none is a member

    @property
    def image_ids(self) -> set[str]:
        """Ids of all files that were found."""
        return {member.image_id for member in self.members} | set(self.differing)


def open_archive(root: Path) -> Archive:
    """Finds the DICOM files: those named .dcm or .dicom, and whatever else begins like one.

    UserError where there is no folder or zip file, or no DICOM file in it.
    """
    skipped = Counter[str]()
    if root.is_dir():
        found = _scan(_walk(root, skipped), lambda name: _head(root / name), skipped)
    elif root.is_file() and zipfile.is_zipfile(root):
        found = _scan(_list(root), lambda name: _zip(root).open(name).read(PREAMBLE_BYTES + 4), skipped)
    elif root.exists():
        raise UserError(f"{root}: neither a folder nor a zip file; name the one that holds the DICOM files")
    else:
        raise UserError(f"{root}: no such folder; name the one that holds the .dcm files")
    if not found:
        raise UserError(f"{root}: no .dcm files in it; name the folder that holds them")
    return _without_doubles(root, found, skipped)


def read_member(root: Path, member: Member, max_pixels: int) -> bytes:
    """The bytes of one file; Rejected where it cannot be read, or is larger than ``max_pixels`` can need.

    UserError where it is gone: the archive is not what it was.
    """
    if member.size > LARGEST_PIXEL * max_pixels + LARGEST_HEADER:
        raise Rejected(
            f"{member.image_id}: {member.size:,} bytes, more than a picture of max_pixels can need"
        )
    try:
        return _zip(root).read(member.name) if root.is_file() else (root / member.name).read_bytes()
    except (FileNotFoundError, KeyError):
        # Its path may hold a patient's name.
        raise UserError(
            f"{member.image_id}: its file was there and is gone; run the same command again when it is back"
        ) from None
    except OSError as error:
        raise Rejected(f"{member.image_id}: cannot be read ({error.strerror})") from None
    except RuntimeError:  # zipfile's word for encryption; NotImplementedError for an unknown compression
        raise Rejected(f"{member.image_id}: encrypted or compressed in an unknown way in the zip") from None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise Rejected(f"{member.image_id}: damaged in the zip file") from None


def _scan(
    files: Iterator[tuple[PurePosixPath, int, int]], head: Callable[[str], bytes], skipped: Counter[str]
) -> list[Member]:
    """Members; counts the other files by kind. ``head`` gives the first bytes of a file."""
    members = list[Member]()
    for path, size, stamp in files:
        known = path.suffix.lower() in SUFFIXES
        if "__MACOSX" in path.parts or path.name.startswith("._"):
            skipped["__MACOSX and ._ files"] += 1
        elif path.name == ".DS_Store":
            skipped[".DS_Store"] += 1
        elif path.suffix.lower() in ZIPS:
            skipped["zip files"] += 1
        elif path.name == "DICOMDIR":
            skipped["DICOMDIR"] += 1
        elif known or _begins_like_dicom(head, path):
            image_id = path.stem if known else path.name
            # Bytes that are no UTF-8 would stop whatever writes the id.
            image_id = image_id.encode("utf-8", "backslashreplace").decode()
            members.append(Member(image_id, str(path), size, stamp))
        else:
            skipped["other files"] += 1
    return members


def _begins_like_dicom(head: Callable[[str], bytes], path: PurePosixPath) -> bool:
    try:
        return head(str(path))[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == MAGIC
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError):
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(PREAMBLE_BYTES + 4)


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[tuple[PurePosixPath, int, int]]:
    """Name, size and stamp of every file below a folder; counts the folders that cannot be opened."""

    def closed(_: OSError) -> None:
        skipped["folders without permission"] += 1

    for parent, _, names in os.walk(folder, onerror=closed):
        for name in names:
            path = Path(parent, name)
            if path.is_file():  # no broken link, socket or the like
                status = path.stat()
                yield (
                    PurePosixPath(path.relative_to(folder).as_posix()),
                    status.st_size,
                    status.st_mtime_ns,
                )


def _list(path: Path) -> Iterator[tuple[PurePosixPath, int, int]]:
    """Name, size and stamp of every file in a zip file."""
    for info in _zip(path).infolist():
        if not info.is_dir():
            yield PurePosixPath(info.filename), info.file_size, info.CRC


@lru_cache(maxsize=2)
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged or cut short zip file; fetch it again") from None


def _without_doubles(root: Path, found: list[Member], skipped: Counter[str]) -> Archive:
    """Of equal files with one id the first is kept, of differing ones none."""
    by_id: dict[str, list[Member]] = {}
    for member in sorted(found, key=lambda member: (member.image_id, member.name)):
        by_id.setdefault(member.image_id, []).append(member)
    several = {image_id: same for image_id, same in by_id.items() if len(same) > 1}
    differing = tuple(image_id for image_id, same in several.items() if not _are_equal(root, same))
    return Archive(
        root=root,
        files=len(found),
        members=tuple(same[0] for image_id, same in by_id.items() if image_id not in differing),
        skipped=dict(sorted(skipped.items())),
        doubles={image_id: len(same) for image_id, same in several.items()},
        differing=differing,
    )


def _are_equal(root: Path, members: list[Member]) -> bool:
    if len({member.size for member in members}) > 1:
        return False
    try:
        contents = {hashlib.sha256(read_member(root, member, MAX_PIXELS)).digest() for member in members}
    except Rejected:
        return False
    return len(contents) == 1
