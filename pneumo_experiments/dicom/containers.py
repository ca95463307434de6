"""Reads files where they lie: in a folder, or in place in a zip file or a tar file that is not compressed."""

from __future__ import annotations

import bz2
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

from pneumo_experiments.dicom.header import GZIP
from pneumo_experiments.dicom.limits import check_file_size
from pneumo_experiments.errors import Rejected, UserError

TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
MAX_TAR_HEADER_BYTES = 2**20  # of a long name or other attributes
# What zipfile raises for a damaged file; ValueError when a name or an offset is damaged.
DAMAGE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError)
STEP_BYTES = 2**12  # of LZMA: compressed bytes per step, which expand to 90 MB at most
HEAD_BYTES = 1024  # of a file: its file meta information takes a few hundred


@dataclass(frozen=True)
class DicomFile:
    """One file of an archive."""

    image_id: str
    name: str  # below the folder, or within the zip or tar file
    size: int  # bytes
    stamp: int  # changes with the file: modification time in ns (of the whole tar file), or CRC-32 in a zip
    number: int = 0  # position in the zip directory, where names may repeat, or of its bytes in a tar file
    sop_instance: str = ""  # SOP Instance UID, empty if unknown


def is_packed(path: Path) -> bool:
    """Whether a file is a zip file, or a tar file that is not compressed."""
    return _is_tar(path) or zipfile.is_zipfile(path)


def list_packed(path: Path) -> Iterator[DicomFile]:
    """Every file in a zip or tar file; UserError if it is damaged."""
    return _list_tar(path) if _is_tar(path) else _list_zip(path)


def read_start(root: Path, file: DicomFile) -> bytes:
    """The first bytes of a file, unpacked; none if they cannot be read."""
    try:
        if root.is_dir():
            start = first_bytes(root / file.name)
        else:
            start = (_read_tar_entry if _is_tar(root) else _read_zip_entry)(root, file, HEAD_BYTES)
        if start.startswith(GZIP):
            start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, HEAD_BYTES)
    except (OSError, RuntimeError, *DAMAGE_ERRORS):
        return b""
    return start


def read_file(root: Path, member: DicomFile, max_pixels: int) -> bytes:
    """The bytes of one file.

    Raises Rejected if it cannot be read or is larger than an image of ``max_pixels`` can be, and UserError
    if the file or the whole archive has disappeared or changed.
    """
    check_file_size(member.size, max_pixels, member.image_id)
    try:
        if root.is_dir():
            return (root / member.name).read_bytes()
        if is_tar := _is_tar(root):
            content = _read_tar_entry(root, member, member.size)
        else:
            content = _read_zip_entry(root, member, member.size)
    except UserError:
        raise  # the whole zip file does not open
    except (FileNotFoundError, LookupError):
        # Its path may hold a patient's name.
        raise UserError(
            f"{member.image_id}: the file disappeared during the run; restore it and run the command again"
        ) from None
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror or 'damaged'})", member.image_id) from None
    except RuntimeError:  # encrypted; NotImplementedError for an unknown compression method
        raise Rejected(
            "encrypted, or an unsupported compression method in the zip file", member.image_id
        ) from None
    except DAMAGE_ERRORS:
        content, is_tar = b"", False
    if is_tar and len(content) != member.size:
        raise Rejected("truncated in the tar file", member.image_id)
    if not is_tar and (len(content) != member.size or zlib.crc32(content) != member.stamp):
        raise Rejected("damaged in the zip file", member.image_id)
    return content


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _is_tar(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(TAR_MAGIC_AT)
        return file.read(len(TAR_MAGIC)) == TAR_MAGIC


class _TarInfo(tarfile.TarInfo):
    """A header of a tar file, whose size is checked: a negative one would be read forever."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (not info.isreg() and info.size > MAX_TAR_HEADER_BYTES):
            raise ValueError(info.size)
        return info


def _list_tar(path: Path) -> Iterator[DicomFile]:
    """Every file in a tar file that is not compressed."""
    written = path.stat().st_mtime_ns
    try:
        with tarfile.open(path, "r:", tarinfo=_TarInfo) as archive:
            for info in archive:
                if info.size < 0:  # by an extended header
                    raise ValueError(info.size)
                if info.isreg() and not info.issparse():
                    yield DicomFile("", info.name, info.size, written, info.offset_data)
    except (tarfile.TarError, OSError, *DAMAGE_ERRORS):
        raise UserError(f"{path}: damaged or truncated tar file; download it again") from None


def _read_tar_entry(path: Path, member: DicomFile, max_bytes: int) -> bytes:
    """The first ``max_bytes`` bytes of a file in a tar file, fewer if it is truncated."""
    with path.open("rb") as file:
        file.seek(member.number)
        return file.read(min(max_bytes, member.size))


def _list_zip(path: Path) -> Iterator[DicomFile]:
    """Every file in a zip file."""
    for number, info in enumerate(_open_zip(path).infolist()):
        if not info.filename.endswith("/"):  # a folder
            yield DicomFile("", info.filename, info.file_size, info.CRC, number)


def _read_zip_entry(path: Path, member: DicomFile, max_bytes: int) -> bytes:
    """The first ``max_bytes`` bytes of a file in a zip file; never inflates more, whatever its header says.

    Raises LookupError if the zip file has changed since it was listed.
    """
    archive = _open_zip(path)
    info = archive.infolist()[member.number]
    if (info.filename, info.file_size, info.CRC) != (member.name, member.size, member.stamp):
        raise LookupError(member.number)
    # zipfile limits what deflate gives, but inflates all of what it reads of bzip2 and LZMA.
    if info.compress_type == zipfile.ZIP_BZIP2:  # 40 bytes of it can hold 46 MB
        stored = copy(info)
        stored.compress_type, stored.file_size = zipfile.ZIP_STORED, info.compress_size
        del stored.CRC  # refers to the inflated bytes
        with archive.open(stored) as raw, bz2.open(raw) as file:
            return file.read(max_bytes)
    with archive.open(info) as file:
        if info.compress_type != zipfile.ZIP_LZMA:
            return file.read(max_bytes)
        content = bytearray()
        try:
            while len(content) < max_bytes:
                block = file.read(min(STEP_BYTES, max_bytes - len(content)))
                if not block:
                    break
                content += block
        except MemoryError:  # a damaged header can request a dictionary of up to 4 GB
            raise lzma.LZMAError from None
        return bytes(content)


@lru_cache(maxsize=2)
def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except NotImplementedError:
        raise UserError(
            f"{path}: this Python does not support its zip version; unpack it and name the folder"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: file names in it are not UTF-8; unpack it and name the folder") from None
    except (OSError, *DAMAGE_ERRORS):
        raise UserError(f"{path}: damaged or truncated zip file; download it again") from None
