"""Where DICOM files lie: a folder with all its subfolders, or a zip file, read in place."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pneumo_experiments.dicom.limits import LARGEST_HEADER, LARGEST_PIXEL
from pneumo_experiments.dicom.radiograph import MAX_PIXELS
from pneumo_experiments.errors import Rejected, UserError

SUFFIXES = (".dcm", ".dicom")
ZIPS = (".zip",)
SEVERAL = "several files have this id, and they differ"
PREAMBLE_BYTES, MAGIC = 128, b"DICM"  # DICOM PS3.10 7.1
# What damage in a zip file raises; ValueError where it is in a name or place.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError)
FEED = 2**12  # bytes of LZMA to inflate at once: they give 30 MB at most


@dataclass(frozen=True)
class Member:
    """One DICOM file of an archive."""

    image_id: str
    name: str  # below the folder, or within the zip file
    size: int  # bytes
    stamp: int  # changes when the file does: time of its last change in ns, or its checksum in the zip file
    number: int = 0  # in the zip file's list, since several of its files can have one name


@dataclass(frozen=True)
class Archive:
    """The DICOM files below ``root``, one per image id, in the order of their ids."""

    root: Path
    files: int  # that were found
    members: tuple[Member, ...]
    skipped: dict[str, int]  # other files by kind
    duplicates: dict[str, int]  # image id -> files, where several have one id
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
        found = _scan(_walk(root, skipped), lambda member: _head(root / member.name), skipped)
    elif root.is_file() and zipfile.is_zipfile(root):
        found = _scan(_list(root), lambda member: _unzipped(root, member, PREAMBLE_BYTES + 4), skipped)
    elif root.exists():
        raise UserError(f"{root}: neither a folder nor a zip file; name the one that holds the DICOM files")
    else:
        raise UserError(f"{root}: no such folder; name the one that holds the .dcm files")
    if not found:
        raise UserError(f"{root}: no .dcm files in it; name the folder that holds them")
    return _without_duplicates(root, found, skipped)


def read_member(root: Path, member: Member, max_pixels: int) -> bytes:
    """The bytes of one file; Rejected where it cannot be read, or is larger than ``max_pixels`` can need.

    UserError where it is gone: the archive is not what it was.
    """
    if member.size > LARGEST_PIXEL * max_pixels + LARGEST_HEADER:
        raise Rejected(
            f"{member.image_id}: {member.size:,} bytes, more than a picture of max_pixels can need"
        )
    try:
        if root.is_dir():
            return (root / member.name).read_bytes()
        content = _unzipped(root, member, member.size)
    except UserError:
        raise  # the whole zip file does not open
    except (FileNotFoundError, LookupError):
        # Its path may hold a patient's name.
        raise UserError(
            f"{member.image_id}: its file was there and is gone; run the same command again when it is back"
        ) from None
    except OSError as error:
        raise Rejected(f"{member.image_id}: cannot be read ({error.strerror or 'damaged'})") from None
    except RuntimeError:  # zipfile's word for encryption; NotImplementedError for an unknown compression
        raise Rejected(f"{member.image_id}: encrypted or compressed in an unknown way in the zip") from None
    except DAMAGE:
        content = b""
    if len(content) != member.size or zlib.crc32(content) != member.stamp:
        raise Rejected(f"{member.image_id}: damaged in the zip file")
    return content


def _scan(files: Iterator[Member], head: Callable[[Member], bytes], skipped: Counter[str]) -> list[Member]:
    """Members with their ids; counts the other files by kind. ``head`` gives the first bytes of a file."""
    members = list[Member]()
    for file in files:
        path = PurePosixPath(file.name)
        known = path.suffix.lower() in SUFFIXES
        if "__MACOSX" in path.parts or path.name.startswith("._"):
            skipped["__MACOSX and ._ files"] += 1
        elif path.name == ".DS_Store":
            skipped[".DS_Store"] += 1
        elif path.suffix.lower() in ZIPS:
            skipped["zip files"] += 1
        elif path.name == "DICOMDIR":
            skipped["DICOMDIR"] += 1
        elif path.name and (known or _begins_like_dicom(head, file)):
            image_id = path.stem if known else path.name
            # Bytes that are no UTF-8 would stop whatever writes the id.
            image_id = image_id.encode("utf-8", "backslashreplace").decode()
            members.append(replace(file, image_id=image_id))
        else:
            skipped["other files"] += 1
    return members


def _begins_like_dicom(head: Callable[[Member], bytes], file: Member) -> bool:
    try:
        return head(file)[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == MAGIC
    except (OSError, RuntimeError, *DAMAGE):
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(PREAMBLE_BYTES + 4)


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Member]:
    """Every file below a folder, through links, too, each folder once; counts what may not be opened."""
    walked = set[tuple[int, int]]()

    def status(path: Path, kind: str) -> os.stat_result | None:
        try:
            return path.stat()
        except PermissionError:
            skipped[f"{kind} without permission"] += 1
        except OSError:  # a broken link, or gone by now
            pass
        return None

    def is_new(path: Path) -> bool:
        found = status(path, "folders")
        if found is None or (found.st_dev, found.st_ino) in walked:
            return False
        walked.add((found.st_dev, found.st_ino))
        return True

    def closed(_: OSError) -> None:
        skipped["folders without permission"] += 1

    is_new(folder)
    for parent, folders, names in os.walk(folder, onerror=closed, followlinks=True):
        # Links last: a file is best known by its own place.
        folders.sort(key=lambda name: (Path(parent, name).is_symlink(), name))
        folders[:] = [name for name in folders if is_new(Path(parent, name))]
        for path in (Path(parent, name) for name in names):
            found = status(path, "files")
            if found is not None and stat.S_ISREG(found.st_mode):  # no socket or the like
                yield Member("", path.relative_to(folder).as_posix(), found.st_size, found.st_mtime_ns)


def _list(path: Path) -> Iterator[Member]:
    """Every file in a zip file."""
    for number, info in enumerate(_zip(path).infolist()):
        if not info.filename.endswith("/"):  # a folder
            yield Member("", info.filename, info.file_size, info.CRC, number)


def _unzipped(path: Path, member: Member, most: int) -> bytes:
    """The first ``most`` bytes of a file in a zip file; no more is inflated, whatever size it tells."""
    archive = _zip(path)
    info = archive.infolist()[member.number]
    if (info.filename, info.file_size, info.CRC) != (member.name, member.size, member.stamp):
        raise LookupError(member.number)
    if info.compress_type == zipfile.ZIP_BZIP2:  # zipfile would inflate whatever it has read
        stored = copy(info)
        stored.compress_type, stored.file_size = zipfile.ZIP_STORED, info.compress_size
        del stored.CRC  # it is that of the inflated bytes
        with archive.open(stored) as raw, bz2.open(raw) as file:
            return file.read(most)
    with archive.open(info) as file:
        if info.compress_type != zipfile.ZIP_LZMA:
            return file.read(most)
        content = bytearray()
        try:
            while len(content) < most and (part := file.read(min(FEED, most - len(content)))):
                content += part
        except MemoryError:  # the room that it asks for before it gives a byte, up to 4 GB
            raise lzma.LZMAError from None
        return bytes(content)


@lru_cache(maxsize=2)
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except NotImplementedError:
        raise UserError(
            f"{path}: made in a newer way than this Python reads; unpack it and name the folder"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: names in it are not UTF-8; unpack it and name the folder") from None
    except (OSError, *DAMAGE):
        raise UserError(f"{path}: damaged or cut short zip file; fetch it again") from None


def _without_duplicates(root: Path, found: list[Member], skipped: Counter[str]) -> Archive:
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
        duplicates={image_id: len(same) for image_id, same in several.items()},
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
