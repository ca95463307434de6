"""One image on its way into the data set file: what is known of it, and its finished HDF5 chunks."""
# pyright: reportUnknownMemberType=false

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

COMPRESSION_LEVEL = 1  # of ISA-L's deflate: a stream like zlib's in a sixth of its time
DEFAULT_SALT = "pneumo_experiments"


@dataclass(frozen=True)
class Entry:
    """One row of the index; its fields are the columns."""

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
class Example:
    """One image before it is packed; ``target`` and ``rle`` are None in a set without labels."""

    entry: Entry
    image: NDArray[np.uint8]  # (S, S)
    target: NDArray[np.float32] | None  # (S, S), annotated share of each pixel
    rle: str | None  # the united annotations at native size


@dataclass(frozen=True)
class Packed:
    """One image as the file keeps it: its chunks are deflated, as HDF5's own filter would."""

    entry: Entry
    rle: str | None
    picture: str  # SHA-256 of the greys
    digest: str  # SHA-256 of greys, annotation and index row
    image_chunk: bytes = field(repr=False)
    target_chunk: bytes | None = field(repr=False)


def pack(example: Example, pixel_dtype: str) -> Packed:
    """An example as float32, float16 or uint8 chunks; its digests are the same for all three."""
    greys = np.ascontiguousarray(example.image)
    picture = hashlib.sha256(greys.data).hexdigest()
    content = hashlib.sha256(json.dumps([vars(example.entry), example.rle, picture]).encode())
    if example.target is not None and example.target.any():
        content.update(to_bytes(example.target).data)
    return Packed(
        entry=example.entry,
        rle=example.rle,
        picture=picture,
        digest=content.hexdigest(),
        image_chunk=_chunk(_levels(pixel_dtype)[greys]),
        target_chunk=None if example.target is None else _chunk(_as_stored(example.target, pixel_dtype)),
    )


def to_bytes(stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Whole numbers of 1/255 from stored values."""
    if stored.dtype == np.uint8:
        return stored
    return np.rint(stored.astype(np.float32) * 255).astype(np.uint8)


def hash_patient(patient: str, image_id: str = "") -> str:
    """Salted hash of a patient, 16 hex digits; without one, of the image: strangers are no group."""
    if not patient.strip() and not image_id:
        raise ValueError("neither a patient nor an image id to hash")
    return salted(f"patient {patient.strip()}" if patient.strip() else f"image {image_id}")


def salted(text: str) -> str:
    """Keyed hash of a text, 16 hex digits; the key is the environment's PNEUMO_PATIENT_SALT."""
    salt = os.environ.get("PNEUMO_PATIENT_SALT") or DEFAULT_SALT
    return hmac.new(salt.encode(), text.encode(), "sha256").hexdigest()[:16]


def _as_stored(target: NDArray[np.float32], pixel_dtype: str) -> NDArray[Any]:
    """Exact as float32; of less than 32 bits, whole numbers of 1/255."""
    return target if pixel_dtype == "float32" else _levels(pixel_dtype)[to_bytes(target)]


@lru_cache(maxsize=4)
def _levels(pixel_dtype: str) -> NDArray[Any]:
    """How each of the 256 greys is stored."""
    greys = np.arange(256, dtype=np.uint8)
    return greys if pixel_dtype == "uint8" else (greys / np.float32(255)).astype(pixel_dtype)


def _chunk(values: NDArray[Any]) -> bytes:
    """Values through deflate alone.

    Without HDF5's shuffle a grey is one string of bytes and so one match: half the size of shuffled float32.
    """
    return isal_zlib.compress(np.ascontiguousarray(values).data, COMPRESSION_LEVEL)
