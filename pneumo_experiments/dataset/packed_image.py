"""One image of a data set: its index row, its resized pixels, and its compressed HDF5 chunks.

Deflate and CRC-32 are those of ISA-L, several times as fast as zlib.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

DEFAULT_SALT = "pneumo_experiments"
COMPRESSION_LEVEL = 1  # zlib-compatible output in a sixth of zlib's time


@dataclass(frozen=True)
class Entry:
    """One row of the data set's index; the fields are the columns."""

    image_id: str
    patient: str  # salted hash, 16 hex digits
    view: str
    sex: str
    age: int  # years, -1 unknown
    rows: int
    columns: int
    annotations: int
    area_px: int  # of the united annotations, in native pixels


@dataclass(frozen=True)
class ResizedImage:
    """One image and its target mask at network size; ``target`` and ``rle`` are None without labels."""

    entry: Entry
    image: NDArray[np.uint8]  # (S, S)
    target: NDArray[np.float32] | None  # (S, S), annotated fraction of each pixel
    rle: str | None  # union of the annotations at native size


@dataclass(frozen=True)
class Packed:
    """One image as the file stores it; the chunks are compressed like HDF5's gzip filter does."""

    entry: Entry
    rle: str | None
    image_sha256: str  # SHA-256 of the 8-bit pixels
    digest: str  # SHA-256 of pixels, target and index row
    image_chunk: bytes = field(repr=False)
    target_chunk: bytes | None = field(repr=False)


def pack(resized: ResizedImage, pixel_dtype: str) -> Packed:
    """An image as float32, float16 or uint8 chunks; its digests are the same for all three."""
    pixels = np.ascontiguousarray(resized.image)
    image_sha256 = hashlib.sha256(pixels.data).hexdigest()
    content = hashlib.sha256(json.dumps([vars(resized.entry), resized.rle, image_sha256]).encode())
    if resized.target is not None and resized.target.any():
        content.update(to_uint8(resized.target).data)
    target = resized.target
    if target is not None and pixel_dtype != "float32":  # which holds it exactly
        target = _stored_levels(pixel_dtype)[to_uint8(target)]
    return Packed(
        entry=resized.entry,
        rle=resized.rle,
        image_sha256=image_sha256,
        digest=content.hexdigest(),
        image_chunk=_chunk(_stored_levels(pixel_dtype)[pixels]),
        target_chunk=None if target is None else _chunk(target),
    )


def to_uint8(stored: NDArray[Any]) -> NDArray[np.uint8]:
    """8-bit intensities from stored values in [0, 1] or uint8."""
    if stored.dtype == np.uint8:
        return stored
    return np.rint(stored.astype(np.float32) * 255).astype(np.uint8)


def hash_patient(patient: str, image_id: str = "") -> str:
    """Salted hash of a patient, 16 hex digits; of the image if the patient is unknown."""
    if not patient.strip() and not image_id:
        raise ValueError("patient and image id are both empty")
    return salted(f"patient {patient.strip()}" if patient.strip() else f"image {image_id}")


def salted(text: str) -> str:
    """Keyed hash of a text, 16 hex digits; the key is the environment's PNEUMO_PATIENT_SALT."""
    salt = os.environ.get("PNEUMO_PATIENT_SALT") or DEFAULT_SALT
    return hmac.new(salt.encode(), text.encode(), "sha256").hexdigest()[:16]


@lru_cache(maxsize=4)
def _stored_levels(pixel_dtype: str) -> NDArray[Any]:
    """The stored value of each of the 256 intensities."""
    levels = np.arange(256, dtype=np.uint8)
    return levels if pixel_dtype == "uint8" else (levels / np.float32(255)).astype(pixel_dtype)


def _chunk(values: NDArray[Any]) -> bytes:
    """Values compressed by deflate, without HDF5's shuffle filter.

    Unshuffled, each intensity is one byte string that deflate can match: half the size of shuffled float32.
    """
    return compress(np.ascontiguousarray(values).data)


def compress(content: bytes | memoryview) -> bytes:
    """A zlib stream, as HDF5's gzip filter stores it.

    The same content can give other bytes in another process: ISA-L 2.32.1 sometimes misses the first match.
    """
    return isal_zlib.compress(content, COMPRESSION_LEVEL)  # pyright: ignore[reportUnknownMemberType]


def decompress(stream: bytes, size: int) -> bytes:
    """The ``size`` bytes of a zlib stream; raises ValueError for a damaged stream or another size."""
    inflater = isal_zlib.decompressobj()  # pyright: ignore[reportUnknownMemberType]
    try:
        # Asking for one byte more makes it read the end of the stream and check the stream's checksum.
        content = inflater.decompress(stream, size + 1)  # pyright: ignore[reportUnknownMemberType]
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues]  # its stub declares a value
        raise ValueError("not a deflate stream") from None
    if len(content) != size or not inflater.eof:
        raise ValueError("wrong size")
    return content


def crc32(content: bytes | memoryview, start: int = 0) -> int:
    """CRC-32 of the content, continued from the checksum ``start``."""
    return isal_zlib.crc32(content, start)  # pyright: ignore[reportUnknownMemberType]
