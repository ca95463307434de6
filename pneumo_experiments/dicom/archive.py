"""Lists and reads radiographs: a folder with all its subfolders, a zip or tar file in place, or one file."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from pydicom.uid import UID

from pneumo_experiments.dicom import picture
from pneumo_experiments.dicom.containers import (
    DicomFile,
    first_bytes,
    is_packed,
    list_packed,
    read_file,
    read_start,
)
from pneumo_experiments.dicom.header import GZIP
from pneumo_experiments.dicom.radiograph import MAX_PIXELS
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.words import escape

UNREAD = {  # by suffix: what people have in folders, named when nothing else is there
    ".zip": "zip files",
    ".tar": "tar files",
    ".tgz": "tar files",
    ".rar": "RAR files",
    ".7z": "7-Zip files",
    ".tif": "TIFF pictures",
    ".tiff": "TIFF pictures",
    ".bmp": "BMP pictures",
    ".webp": "WebP pictures",
    ".jp2": "JPEG 2000 pictures",
    ".nii": "NIfTI files",
    ".npy": "NumPy files",
    ".npz": "NumPy files",
}
COMPRESSED = {
    GZIP: "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"Rar!": "RAR",
    b"7z\xbc\xaf": "7-Zip",
}
DIFFERING_FILES = "several files have this id, and their contents differ"
ImageId = Literal["auto", "stem", "path", "sop_instance_uid"]
PREAMBLE_BYTES, MAGIC = 128, b"DICM"  # PS3.10 7.1
SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (*SUFFIXES, *picture.SUFFIXES)
LONG_VRS = (b"OB", b"OW", b"SQ", b"UN", b"UT")  # whose length has 4 bytes, PS3.5 7.1.2
CLASS, INSTANCE = 2, 3  # elements of group 2: Media Storage SOP Class and SOP Instance UID
FILE_NAME = "the file's name"
NAMES = {"stem": FILE_NAME, "path": "the file's path", "sop_instance_uid": "the SOP Instance UID"}


@dataclass(frozen=True)
class Archive:
    """The radiographs below ``root``, one per image id, in the order of their ids."""

    root: Path  # a folder, or a zip or tar file
    files: int  # number of radiographs, duplicates included
    members: tuple[DicomFile, ...]
    skipped: dict[str, int]  # number of other files by kind
    duplicates: dict[str, int]  # image id -> number of files, where more than one has the id
    differing: tuple[str, ...]  # ids whose files have different contents; none of these files is a member
    identified_by: str = ""  # in words, what the ids are

    @property
    def image_ids(self) -> set[str]:
        """Ids of all radiographs, those with differing duplicates included."""
        return {member.image_id for member in self.members} | set(self.differing)


def open_archive(
    root: Path,
    image_id: ImageId = "auto",
    wanted: Collection[str] = (),
    other: Path | None = None,
    names: Mapping[str, str] | None = None,
) -> Archive:
    """The radiographs below ``root``: a folder, a zip or tar file, or a single file.

    DICOM files are named .dcm or .dicom, or start with the DICOM preamble, and may be compressed by gzip.
    Where there is none, PNG and JPEG pictures are read. ``image_id`` is what identifies an image, ``wanted``
    the ids in a table, if there is one. With ``auto`` files of one name that differ have their paths as ids,
    unless the table has that name. ``other`` is a folder below ``root`` that is not read, ``names`` what a
    table calls an image of that id. Raises UserError if there is no radiograph.
    """
    skipped = Counter[str]()
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; name the folder that holds the .dcm files")
    if root.is_dir():
        files = _scan(root, _walk(root, skipped, other), skipped)
    elif root.is_file() and is_packed(root):
        files = _scan(root, list_packed(root), skipped)
    else:
        return _single(root)
    if not files:
        others = ", ".join(f"{kind} ({count})" for kind, count in skipped.items())
        only = f", only {others}" if others else ""
        raise UserError(
            f"{root}: contains no .dcm, .png or .jpg files{only}; name the folder that holds them"
        )
    return _identified(root, files, skipped, image_id, wanted, names or {})


def _single(path: Path) -> Archive:
    """The archive of one file."""
    info = path.stat()
    file = DicomFile("", path.name, info.st_size, info.st_mtime_ns)
    files = _scan(path.parent, iter([file]), Counter())
    if not files:
        start = first_bytes(path) if stat.S_ISREG(info.st_mode) else b""
        problem = (
            "neither a folder, nor a zip or tar file, nor a DICOM file, nor a PNG or JPEG picture;"
            " name the folder that holds the DICOM files"
        )
        for magic, name in COMPRESSED.items():
            if start.startswith(magic):
                problem = f"compressed by {name}; unpack it, and name the folder with the DICOM files"
        raise UserError(f"{path}: {problem}")
    return _identified(path.parent, files, Counter(), "auto", (), {})


def _identified(
    root: Path,
    files: list[DicomFile],
    skipped: Counter[str],
    image_id: ImageId,
    wanted: Collection[str],
    names: Mapping[str, str],
) -> Archive:
    """The archive of these files, with their ids."""
    paths, instances = [file.name for file in files], [file.sop_instance for file in files]
    ids, what = image_ids(paths, instances, image_id, wanted)
    ids = [names.get(id, id) for id in ids]
    archive = _without_duplicates(root, files, ids, skipped, what)
    # Names that no table has, and that several images share, such as IM-0001 of each patient.
    unclear = set(archive.differing) - set(wanted) - set(names.values())
    if image_id != "auto" or not unclear:
        return archive
    others, path = image_ids(paths, instances, "path", ())
    ids = [other if id in unclear else id for id, other in zip(ids, others, strict=True)]
    what += f", or {path} for {sum(archive.duplicates[id] for id in unclear)} files of one name that differ"
    return _without_duplicates(root, files, ids, skipped, what)


def _scan(root: Path, files: Iterator[DicomFile], skipped: Counter[str]) -> list[DicomFile]:
    """The DICOM images, or the pictures if there are none; counts the other files by kind in ``skipped``."""
    members, pictures = list[DicomFile](), list[DicomFile]()
    for file in files:
        path, suffix = PurePosixPath(file.name), suffix_of(file.name)
        start = read_start(root, file)
        head = read_head(start)
        if "__MACOSX" in path.parts or path.name.startswith("._"):
            skipped["__MACOSX and ._ files"] += 1
        elif path.name in (".DS_Store", "DICOMDIR"):
            skipped[path.name] += 1
        elif suffix in UNREAD:
            skipped[UNREAD[suffix]] += 1
        elif head is not None and head.other_class:
            skipped[head.other_class] += 1
        elif path.name and (head is not None or suffix in SUFFIXES):
            members.append(replace(file, sop_instance=head.sop_instance if head else ""))
        elif path.name and (picture.is_picture(start) or suffix in IMAGE_SUFFIXES):
            pictures.append(file)
        else:
            skipped["other files"] += 1
    if members and pictures:  # previews, or masks
        skipped["PNG and JPEG pictures"] += len(pictures)
    return members or pictures


def _walk(folder: Path, skipped: Counter[str], other: Path | None) -> Iterator[DicomFile]:
    """Every file below a folder but ``other``, symbolic links followed, each folder once.

    Counts permission errors.
    """
    visited = set[tuple[int, int]]()

    def status(path: Path, kind: str) -> os.stat_result | None:
        try:
            return path.stat()
        except PermissionError:
            skipped[f"{kind} without permission"] += 1
        except OSError:  # a broken link, or removed since
            pass
        return None

    def is_new(path: Path) -> bool:
        info = status(path, "folders")
        if info is None or (info.st_dev, info.st_ino) in visited:
            return False
        visited.add((info.st_dev, info.st_ino))
        return True

    def count_unreadable(_: OSError) -> None:
        skipped["folders without permission"] += 1

    is_new(folder)
    if other is not None:
        is_new(other)
    for parent, folders, names in os.walk(folder, onerror=count_unreadable, followlinks=True):
        # Links last, so that a file is listed under its real path.
        folders.sort(key=lambda name: (Path(parent, name).is_symlink(), name))
        folders[:] = [name for name in folders if is_new(Path(parent, name))]
        for path in (Path(parent, name) for name in names):
            info = status(path, "files")
            if info is not None and stat.S_ISREG(info.st_mode):  # not a socket or device
                yield DicomFile("", path.relative_to(folder).as_posix(), info.st_size, info.st_mtime_ns)


def _without_duplicates(
    root: Path, files: list[DicomFile], ids: list[str], skipped: Counter[str], identified_by: str
) -> Archive:
    """Of identical files with the same id keeps the first; drops all files of an id whose contents differ."""
    by_id: dict[str, list[DicomFile]] = {}
    members = [replace(file, image_id=escape(id)) for file, id in zip(files, ids, strict=True)]
    for member in sorted(members, key=lambda member: (member.image_id, member.name)):
        by_id.setdefault(member.image_id, []).append(member)
    duplicates = {image_id: same for image_id, same in by_id.items() if len(same) > 1}
    differing = tuple(image_id for image_id, same in duplicates.items() if not _are_equal(root, same))
    return Archive(
        root=root,
        files=len(files),
        members=tuple(same[0] for image_id, same in by_id.items() if image_id not in differing),
        skipped=dict(sorted(skipped.items())),
        duplicates={image_id: len(same) for image_id, same in duplicates.items()},
        differing=differing,
        identified_by=identified_by,
    )


def _are_equal(root: Path, members: list[DicomFile]) -> bool:
    if len({member.size for member in members}) > 1:
        return False
    try:
        contents = {hashlib.sha256(read_file(root, member, MAX_PIXELS)).digest() for member in members}
    except Rejected:
        return False
    return len(contents) == 1


class Head(NamedTuple):
    """What the start of a DICOM file says: SOP Class and SOP Instance, empty where unknown."""

    sop_class: str = ""
    sop_instance: str = ""

    @property
    def other_class(self) -> str:
        """The name of a standard class that has no pictures, such as a structured report; else empty."""
        uid = UID(self.sop_class)
        is_standard = uid.name != uid and not uid.is_private
        return uid.name if is_standard and "Image Storage" not in uid.name else ""


def read_head(start: bytes) -> Head | None:
    """What the first bytes of a file say; None without DICOM's preamble."""
    if start[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] != MAGIC:
        return None
    position, found = PREAMBLE_BYTES + 4, dict[int, str]()
    while start[position : position + 2] == b"\2\0":  # group 2, explicit VR, little endian: PS3.10 7.1
        element = int.from_bytes(start[position + 2 : position + 4], "little")
        is_long = start[position + 4 : position + 6] in LONG_VRS
        at, size = (8, 4) if is_long else (6, 2)
        length = int.from_bytes(start[position + at : position + at + size], "little")
        position += at + size
        text = start[position : position + length].decode("ascii", "replace").strip("\0 ")
        found[element] = text if text.replace(".", "").isdigit() else ""
        position += length
    return Head(found.get(CLASS, ""), found.get(INSTANCE, ""))


def image_ids(
    names: Sequence[str], instances: Sequence[str], kind: ImageId, wanted: Collection[str]
) -> tuple[list[str], str]:
    """The id of each file, and in words what it is.

    ``names`` are paths below the folder, ``instances`` SOP Instance UIDs, ``wanted`` the ids in a table, if
    there is one. ``auto`` takes what most of those ids are, without a table the name. A file without SOP
    Instance UID has its name. Ids may repeat.
    """
    choices = {
        "stem": [stem_of(name) for name in names],
        "path": [_path(PurePosixPath(name)) for name in names],
    }
    stems = choices["stem"]
    choices["sop_instance_uid"] = [uid or stem for uid, stem in zip(instances, stems, strict=True)]
    chosen = kind
    if kind == "auto":
        known = set(wanted)
        chosen = max(choices, key=lambda name: len(known & set(choices[name])))  # the first of equals
    return choices[chosen], NAMES[chosen]


def _path(path: PurePosixPath) -> str:
    """Path without suffix; within a zip file it may have other parts than names of folders."""
    return "/".join([*(part for part in path.parent.parts if part not in ("/", "..")), stem_of(path.name)])


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, below .gz if it has one."""
    return PurePosixPath(_unpacked_name(name)).suffix.lower()


def stem_of(name: str) -> str:
    """The name of a file without folders and without the suffixes of images."""
    path = PurePosixPath(_unpacked_name(name))
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def _unpacked_name(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name
