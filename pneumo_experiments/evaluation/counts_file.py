"""Threshold counts as a small file, so that thresholds can be searched again without model or images."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.thresholds import ThresholdCounts

MAX_BYTES = 2**31  # uncompressed: the counts of 2.6 million images
DTYPES = {"counts": np.int32, "presence": np.float32, "patients": np.int32, "parts": np.int32}


@dataclass(frozen=True)
class StoredCounts:
    """Counts of n >= 1 images, with what a judgement by other patients needs; no id is stored."""

    counts: ThresholdCounts
    patients: NDArray[np.int64]
    """(n,): the patient of each image, as a number that means nothing elsewhere"""
    parts: NDArray[np.int64]
    """(n,): the part of each image; thresholds from the other parts judge it. A patient is in one part."""


def save_counts(
    path: Path, counts: ThresholdCounts, patients: Sequence[str], parts: NDArray[np.int64]
) -> None:
    """Writes the counts of n images, the patient and the part of each, as ``.npz``: below 1 kB an image."""
    arrays: dict[str, Any] = {
        "counts": np.stack(counts.pixels(), axis=1),
        "presence": counts.presence,
        "patients": np.unique(np.asarray(patients, np.str_), return_inverse=True)[1],
        "parts": parts,
    }
    np.savez_compressed(path, **{name: arrays[name].astype(dtype) for name, dtype in DTYPES.items()})


def load_counts(path: Path) -> StoredCounts:
    """What ``save_counts`` wrote; nothing in the file is executed.

    Raises UserError for a file that cannot be read or holds impossible values.
    """
    try:
        if not path.is_file():  # reading a device or pipe would never end
            raise FileNotFoundError("no such file")
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            counts, presence, patients, parts = (
                _array(arrays, name, dtype) for name, dtype in DTYPES.items()
            )
        images = ThresholdCounts()
        images.append(counts, presence)
        if not len(images):
            raise ValueError("no images")
        if not patients.shape == parts.shape == presence.shape:
            raise ValueError("not one patient and one part for each image")
        if len(np.unique(np.stack((patients, parts)), axis=1).T) > len(np.unique(patients)):
            raise ValueError("a patient in two parts")
    except Exception as error:  # damaged bytes raise errors of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"counts={path}: not threshold counts ({reason}); `train` and `score` log them as"
            " threshold_counts.npz"
        ) from error
    return StoredCounts(images, patients.astype(np.int64), parts.astype(np.int64))


def _array(arrays: Any, name: str, dtype: type) -> NDArray[Any]:
    array: Any = arrays[name]
    if not isinstance(array, np.ndarray) or array.dtype != dtype:  # pyright: ignore[reportUnknownMemberType]
        raise TypeError(f"{name} is not of type {np.dtype(dtype).name}")
    return array  # pyright: ignore[reportUnknownVariableType]
