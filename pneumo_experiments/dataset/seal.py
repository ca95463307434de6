"""The seal at the end of a data set file: content, offsets and checksums of all parts.

It follows the HDF5 part, where HDF5 readers ignore it. This project reads data sets by the seal alone, so
that damaged or hostile HDF5 structures (links to other files, external storage, endless trees, huge shapes)
never reach the HDF5 library.

UTF-8 text in lines:
- the header: a JSON object with the fields of ``Header``;
- for each image a JSON array: the fields of ``Entry``, then offset, size and CRC-32 of each of its chunks
  (image and, in a labelled set, target); in a labelled set a line with the run lengths follows;
- the tail: SHA-256 and length in bytes of all lines before it, format name and version.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pneumo_experiments.dataset.deflate import crc32, decompress
from pneumo_experiments.dataset.packed import Entry
from pneumo_experiments.errors import UserError

SEAL_VERSION = 1
TAIL = re.compile(rb"([0-9a-f]{64}) ([0-9]{16}) pneumo_experiments seal ([0-9]{4})\n")
TAIL_BYTES = 64 + 1 + 16 + len(" pneumo_experiments seal ") + 4 + 1
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
REMEDY = "delete it and run preprocess again"
PIXEL_DTYPES = ("float32", "float16", "uint8")
# Limits on what a file may demand, far above anything that preprocess writes.
MAX_SIDE_PX = 2**13  # pixels
MAX_MASK_PX = 10**9  # native pixels of one mask
MAX_IMAGES = 2**20
MAX_SEAL_BYTES, MAX_LINE_BYTES, MAX_RLE_BYTES = 2**29, 2**20, 2**25  # bytes
ENTRY_TYPES = [str if f.type == "str" else int for f in fields(Entry)]


@dataclass(frozen=True)
class Header:
    """Properties of the whole data set."""

    image_size: int
    pixel_dtype: str
    labelled: bool
    settings: dict[str, str]
    fingerprint: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of chunks that each image has."""
        return ("images", "ann") if self.labelled else ("images",)

    @property
    def chunk_bytes(self) -> int:
        """Uncompressed size of one chunk."""
        return self.image_size**2 * np.dtype(self.pixel_dtype).itemsize


class Chunk(NamedTuple):
    """Position and CRC-32 of the compressed pixels of one image in the file."""

    offset: int
    size: int
    crc: int


class Row(NamedTuple):
    """One image: its entry, its chunks by kind, and its run lengths (empty in a set without labels)."""

    entry: Entry
    chunks: dict[str, Chunk]
    rle: str


def append_seal(path: Path, header: Header, rows: Sequence[Row]) -> None:
    """Appends the seal to a finished HDF5 file; raises OSError if it cannot be written."""
    if len(rows) > MAX_IMAGES:
        raise UserError(f"{path}: {len(rows):,} images; a data set can hold at most {MAX_IMAGES:,}")
    digest, length = hashlib.sha256(), 0
    with path.open("ab") as file:
        for line in _lines(header, rows):
            file.write(line)
            digest.update(line)
            length += len(line)
        file.write(
            b"%s %016d pneumo_experiments seal %04d\n" % (digest.hexdigest().encode(), length, SEAL_VERSION)
        )


def read_seal(path: Path, file: BinaryIO) -> tuple[Header, list[Row]]:
    """Header and rows of an open data set file; raises UserError if the seal is missing or damaged."""
    end = file.seek(0, 2) - TAIL_BYTES
    file.seek(0)
    if file.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
        raise UserError(f"{path}: not an HDF5 file; {REMEDY}, or name another dataset")
    file.seek(max(0, end))
    tail = TAIL.fullmatch(file.read())
    if tail is None:
        raise UserError(
            f"{path}: truncated, changed by another program, written by an older version, or not a data set"
            f" of pneumo_experiments; {REMEDY}, or name another dataset"
        )
    digest, length, version = tail[1].decode(), int(tail[2]), int(tail[3])
    if version != SEAL_VERSION:
        raise UserError(f"{path}: format version {version} instead of {SEAL_VERSION}; {REMEDY}")
    start = end - length
    if not 0 <= start <= end <= start + MAX_SEAL_BYTES or _digest(file, start, length) != digest:
        raise UserError(f"{path}: damaged; {REMEDY}")
    file.seek(start)
    try:
        header = _header(json.loads(file.readline(MAX_LINE_BYTES)))
        rows = list(_rows(file, header, start, end))
    except (ValueError, TypeError, LookupError, RecursionError):
        raise UserError(f"{path}: damaged, or not written by this project; {REMEDY}") from None
    return header, rows


def read_deflated(file: BinaryIO, chunk: Chunk) -> bytes:
    """A compressed chunk; raises ValueError if its checksum is wrong. Thread-safe."""
    deflated = os.pread(file.fileno(), chunk.size, chunk.offset)
    if crc32(deflated) != chunk.crc:
        raise ValueError("wrong checksum")
    return deflated


def read_chunk(file: BinaryIO, chunk: Chunk, size: int) -> bytes:
    """The ``size`` uncompressed bytes of a chunk; raises ValueError if it is damaged. Thread-safe."""
    return decompress(read_deflated(file, chunk), size)


def _lines(header: Header, rows: Iterable[Row]) -> Iterator[bytes]:
    yield json.dumps(asdict(header), sort_keys=True).encode() + b"\n"
    for entry, chunks, rle in rows:
        positions = [chunks[kind] for kind in header.kinds]
        yield json.dumps([*vars(entry).values(), *positions]).encode() + b"\n"
        if header.labelled:
            yield rle.encode() + b"\n"


def _digest(file: BinaryIO, start: int, length: int) -> str:
    digest, rest = hashlib.sha256(), length
    file.seek(start)
    while block := file.read(min(rest, 2**20)):
        digest.update(block)
        rest -= len(block)
    return digest.hexdigest()


# The digest detects damage, not malice: anyone can write a file with a valid seal. So all values are checked.


def _header(values: dict[str, Any]) -> Header:
    header = Header(**values)
    if [type(value) for value in vars(header).values()] != [int, str, bool, dict, str]:
        raise ValueError("types of the header")
    if not 0 < header.image_size <= MAX_SIDE_PX or header.pixel_dtype not in PIXEL_DTYPES:
        raise ValueError("pixels")
    _require_text(header.fingerprint, *header.settings, *header.settings.values())
    return header


def _rows(file: BinaryIO, header: Header, start: int, end: int) -> Iterator[Row]:
    """Rows from the lines between the current position, after the header, and ``end``."""
    max_chunk_bytes = header.chunk_bytes + header.chunk_bytes // 64 + 1024  # deflate adds less
    for _ in range(MAX_IMAGES):
        values = json.loads(file.readline(MAX_LINE_BYTES))
        entry = _entry(values[: len(ENTRY_TYPES)])
        chunks = dict(
            zip(header.kinds, (Chunk(*position) for position in values[len(ENTRY_TYPES) :]), strict=True)
        )
        for chunk in chunks.values():
            if {type(number) for number in chunk} != {int}:
                raise ValueError("position of a chunk")
            if min(chunk) < 0 or chunk.size > max_chunk_bytes or chunk.offset + chunk.size > start:
                raise ValueError("position of a chunk")
        runs = file.readline(MAX_RLE_BYTES) if header.labelled else b"\n"
        if not runs.endswith(b"\n"):
            raise ValueError("run lengths")
        yield Row(entry, chunks, runs[:-1].decode())
        if file.tell() == end:
            return
        if file.tell() > end:
            raise ValueError("lines beyond the seal")
    raise ValueError("too many images")


def _entry(values: list[Any]) -> Entry:
    if [type(value) for value in values] != ENTRY_TYPES:
        raise ValueError("types of an entry")
    entry = Entry(*values)
    _require_text(entry.image_id, entry.patient, entry.view, entry.sex)
    pixels = entry.rows * entry.columns
    if min(entry.rows, entry.columns) < 1 or pixels > MAX_MASK_PX:
        raise ValueError("size of an image")
    if not 0 <= entry.annotations < 2**31 or not 0 <= entry.area_px <= pixels or abs(entry.age) > 2**31:
        raise ValueError("numbers of an entry")
    return entry


def _require_text(*values: Any) -> None:
    for value in values:
        str.encode(value)  # TypeError if not a str, ValueError for a lone surrogate
