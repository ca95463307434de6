"""Which image a DICOM file is, and whether it is one: by its name and its file meta information."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from pydicom.uid import UID

from pneumo_experiments.dicom import picture

ImageId = Literal["auto", "stem", "path", "sop_instance_uid"]

PREAMBLE_BYTES, MAGIC = 128, b"DICM"  # PS3.10 7.1
HEAD_BYTES = 1024  # of a file: its file meta information takes a few hundred
SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (*SUFFIXES, *picture.SUFFIXES)
LONG_VRS = (b"OB", b"OW", b"SQ", b"UN", b"UT")  # whose length has 4 bytes, PS3.5 7.1.2
CLASS, INSTANCE = 2, 3  # elements of group 2: Media Storage SOP Class and SOP Instance UID
FILE_NAME = "the file's name"
NAMES = {"stem": FILE_NAME, "path": "the file's path", "sop_instance_uid": "the SOP Instance UID"}


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
