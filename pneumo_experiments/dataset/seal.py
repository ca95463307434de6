"""The seal at the end of a data set file: what the file holds, where it lies, and a checksum of each piece.

It lies behind the HDF5 part, where other readers of HDF5 do not look, and it is all that this project reads a
data set by. A damaged or hostile HDF5 structure (links and external storage that lead to other files,
endless trees, huge shapes) so never reaches the HDF5 library.

UTF-8 text in lines:
- the header: a JSON object with the fields of ``Header``;
- for each image a JSON array: the fields of ``Entry``, then offset, size and CRC-32 of each of its chunks
  (image, and in a labelled set the annotation). In a labelled set its run lengths follow in a line;
- the tail: SHA-256 of all lines before it, how many bytes they are, the format and its version.
"""

# pyright: reportUnknownMemberType=false

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
from isal import isal_zlib

from pneumo_experiments.dataset.packed import Entry
from pneumo_experiments.errors import UserError

SEAL_VERSION = 1
TAIL = re.compile(rb"([0-9a-f]{64}) ([0-9]{16}) pneumo_experiments seal ([0-9]{4})\n")
TAIL_BYTES = 64 + 1 + 16 + len(" pneumo_experiments seal ") + 4 + 1
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
REMEDY = "delete it and run preprocess again"
PIXEL_DTYPES = ("float32", "float16", "uint8")
# What a file may ask of this machine. Nothing that preprocess makes comes near.
MAX_SIDE_PX = 2**13  # pixels
MAX_MASK_PX = 10**9  # native pixels of one mask
MAX_IMAGES = 2**20
MAX_SEAL_BYTES, MAX_LINE_BYTES, MAX_RLE_BYTES = 2**29, 2**20, 2**25  # bytes
ENTRY_TYPES = [str if f.type == "str" else int for f in fields(Entry)]


@dataclass(frozen=True)
class Header:
    """What the file says of itself."""

    image_size: int
    pixel_dtype: str
    labelled: bool
    settings: dict[str, str]
    fingerprint: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is stored of each image."""
        return ("images", "ann") if self.labelled else ("images",)

    @property
    def chunk_bytes(self) -> int:
        """Size of one image once it is inflated."""
        return self.image_size**2 * np.dtype(self.pixel_dtype).itemsize


class Chunk(NamedTuple):
    """Where the deflated pixels of one image lie in the file."""

    offset: int
    size: int
    crc: int


class Row(NamedTuple):
    """One image: its entry, its chunks by kind, and its run lengths (empty in a set without labels)."""

    entry: Entry
    chunks: dict[str, Chunk]
    rle: str


def append_seal(path: Path, header: Header, rows: Sequence[Row]) -> None:
    """Seals a finished HDF5 file. OSError where it cannot be written."""
    if len(rows) > MAX_IMAGES:
        raise UserError(f"{path}: {len(rows):,} images; a data set holds at most {MAX_IMAGES:,}")
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
    """Header and rows of an open data set file; UserError unless every byte of them is as it was written."""
    end = file.seek(0, 2) - TAIL_BYTES
    file.seek(0)
    if file.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
        raise UserError(f"{path}: not an HDF5 file; {REMEDY}, or name another dataset")
    file.seek(max(0, end))
    tail = TAIL.fullmatch(file.read())
    if tail is None:
        raise UserError(
            f"{path}: cut short, changed by another program, made by an older version, or no data set of"
            f" pneumo_experiments; {REMEDY}, or name another dataset"
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
        raise UserError(f"{path}: damaged, or not made by this project; {REMEDY}") from None
    return header, rows


def read_deflated(file: BinaryIO, chunk: Chunk) -> bytes:
    """A chunk as it lies in the file; ValueError where its checksum is wrong. Any thread may call it."""
    deflated = os.pread(file.fileno(), chunk.size, chunk.offset)
    if isal_zlib.crc32(deflated) != chunk.crc:
        raise ValueError("wrong checksum")
    return deflated


def read_chunk(file: BinaryIO, chunk: Chunk, size: int) -> bytes:
    """The ``size`` bytes of a chunk; ValueError unless they are what was written. Any thread may call it."""
    deflated = read_deflated(file, chunk)
    inflater = isal_zlib.decompressobj()
    try:
        # One byte more than is due: only so is the stream's end, with its own checksum, read and checked.
        content = inflater.decompress(deflated, size + 1)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues]  # its stub calls the class a value
        raise ValueError("not deflated") from None
    if len(content) != size or not inflater.eof:
        raise ValueError("wrong size")
    return content


def _lines(header: Header, rows: Iterable[Row]) -> Iterator[bytes]:
    yield json.dumps(asdict(header), sort_keys=True).encode() + b"\n"
    for entry, chunks, rle in rows:
        places = [chunks[kind] for kind in header.kinds]
        yield json.dumps([*vars(entry).values(), *places]).encode() + b"\n"
        if header.labelled:
            yield rle.encode() + b"\n"


def _digest(file: BinaryIO, start: int, length: int) -> str:
    digest, rest = hashlib.sha256(), length
    file.seek(start)
    while block := file.read(min(rest, 2**20)):
        digest.update(block)
        rest -= len(block)
    return digest.hexdigest()


# The digest tells damage, not malice: whoever makes a file can seal it. So every value is checked, too.


def _header(values: dict[str, Any]) -> Header:
    header = Header(**values)
    if [type(value) for value in vars(header).values()] != [int, str, bool, dict, str]:
        raise ValueError("types of the header")
    if not 0 < header.image_size <= MAX_SIDE_PX or header.pixel_dtype not in PIXEL_DTYPES:
        raise ValueError("pixels")
    _require_text(header.fingerprint, *header.settings, *header.settings.values())
    return header


def _rows(file: BinaryIO, header: Header, start: int, end: int) -> Iterator[Row]:
    """Rows from the lines between the header, behind which the file stands, and ``end``."""
    largest_chunk = header.chunk_bytes + header.chunk_bytes // 64 + 1024  # deflate never adds more
    for _ in range(MAX_IMAGES):
        values = json.loads(file.readline(MAX_LINE_BYTES))
        entry = _entry(values[: len(ENTRY_TYPES)])
        chunks = dict(zip(header.kinds, (Chunk(*place) for place in values[len(ENTRY_TYPES) :]), strict=True))
        for chunk in chunks.values():
            if {type(number) for number in chunk} != {int}:
                raise ValueError("place of a picture")
            if min(chunk) < 0 or chunk.size > largest_chunk or chunk.offset + chunk.size > start:
                raise ValueError("place of a picture")
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
        raise ValueError("size of a picture")
    if not 0 <= entry.annotations < 2**31 or not 0 <= entry.area_px <= pixels or abs(entry.age) > 2**31:
        raise ValueError("numbers of an entry")
    return entry


def _require_text(*values: Any) -> None:
    for value in values:
        str.encode(value)  # TypeError for what is no text, ValueError for half a character
