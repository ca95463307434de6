"""The data set file: one HDF5 that plain h5py reads.

- ``images_<k>`` (n, S, S): greys / 255, 512 images per block, the last one fewer; one image per chunk.
- ``ann_<k>``, same shape: share of each pixel that is annotated, in [0, 1]. As float32 it is exact, as
  float16 and uint8 it is rounded to 1/255.
- Stored as uint8, both hold 0-255 and have the attribute ``scale`` = 1/255.
- ``index``: one row per image with the fields of ``Entry``. ``rle``: its mask at native size.
- Attributes of the file: format, format_version, image_size, labelled, settings (JSON), fingerprint.

A set without labels has neither ``ann_<k>`` nor ``rle``.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.data import rle
from pneumo_experiments.data.packed import Entry, Packed, to_bytes
from pneumo_experiments.errors import UserError

FORMAT = "pneumo_experiments"
FORMAT_VERSION = 1
BLOCK = 512  # images
MEND = "run preprocess to write it"
ERRNO = re.compile(r"errno = (\d+)")

INDEX = np.dtype([(f.name, h5py.string_dtype() if f.type == "str" else np.int64) for f in fields(Entry)])


def write_dataset(
    path: Path,
    images: Iterable[Packed],
    *,
    image_size: int,
    pixel_dtype: str,
    settings: Mapping[str, str],
    labelled: bool,
) -> str:
    """Write a data set, one image in memory at a time; returns its fingerprint.

    The fingerprint is that of greys, annotations, index and pixel format, whatever the compression.
    ``settings`` are read after the last image, so that drawing the images may add to them.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, such as {path / 'dataset.h5'}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file: Any = h5py.File(part, "w")
    except OSError as error:
        raise UserError(f"{path}: cannot be written; make room or choose another place") from error
    try:
        with file:
            essence = {"format_version": FORMAT_VERSION, "image_size": image_size, "pixel_dtype": pixel_dtype}
            digest = hashlib.sha256(json.dumps(essence | {"labelled": labelled}).encode())
            index: list[tuple[Any, ...]] = []
            runs: list[str] = []
            for image in images:
                block, row = divmod(len(index), BLOCK)
                chunks = {"images": image.image_chunk}
                if labelled:
                    assert image.rle is not None and image.share_chunk is not None
                    chunks["ann"] = image.share_chunk
                    runs.append(image.rle)
                for kind, chunk in chunks.items():
                    if row == 0:
                        _create_block(file, f"{kind}_{block}", image_size, pixel_dtype)
                    file[f"{kind}_{block}"].id.write_direct_chunk((row, 0, 0), chunk)
                index.append(tuple(vars(image.entry).values()))
                digest.update(image.digest.encode())
            if not index:
                raise UserError(f"{path}: no images to write; see why the input was rejected")
            for kind in ("images", "ann") if labelled else ("images",):
                block, row = divmod(len(index) - 1, BLOCK)
                file[f"{kind}_{block}"].resize(row + 1, axis=0)
            file["index"] = np.array(index, INDEX)
            if labelled:
                file.create_dataset("rle", data=runs, dtype=h5py.string_dtype())
            file.attrs.update(
                {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    "image_size": image_size,
                    "labelled": labelled,
                    "settings": json.dumps(dict(settings), sort_keys=True),
                    "fingerprint": digest.hexdigest(),
                }
            )
        part.replace(path)
    except (OSError, RuntimeError) as error:
        reason = _refusal(error)
        if not reason and isinstance(error, RuntimeError):
            raise
        reason = reason or "the disk may be full"
        raise UserError(f"{path}: cannot be written ({reason}); make room or choose another place") from error
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()


class Dataset:
    """An open data set file; images are addressed by their row in the index."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        self.image_size = int(file.attrs["image_size"])
        self.labelled = bool(file.attrs["labelled"])
        self.settings: dict[str, str] = json.loads(file.attrs["settings"])
        self.fingerprint = str(file.attrs["fingerprint"])
        text = [f.name for f in fields(Entry) if f.type == "str"]
        rows = [dict(zip(INDEX.names or (), row, strict=True)) for row in file["index"][()].tolist()]
        self.entries: list[Entry] = [
            Entry(**(row | {name: row[name].decode() for name in text})) for row in rows
        ]

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a data set to read; close it, or use it in ``with``."""
        if not path.is_file():
            raise UserError(f"{path}: no such data set; {MEND}")
        if not h5py.is_hdf5(path):
            raise UserError(f"{path}: not an HDF5 file; {MEND}, or name another dataset")
        try:
            file: Any = h5py.File(path, "r")
        except OSError:
            raise UserError(f"{path}: damaged or cut short; {MEND} anew") from None
        try:
            if file.attrs.get("format") != FORMAT:
                raise UserError(f"{path}: not a data set of {FORMAT}; {MEND}, or name another dataset")
            if (version := file.attrs.get("format_version")) != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version} instead of {FORMAT_VERSION}; {MEND} anew")
            return cls(path, file)
        except UserError:
            file.close()
            raise
        except (OSError, LookupError, RuntimeError, TypeError, ValueError):
            file.close()
            raise UserError(f"{path}: damaged or incomplete; {MEND} anew") from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Greys (n, S, S)."""
        return self._read("images", indices)

    def shares(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Annotated share of each pixel (n, S, S), 255 is all of it."""
        self.require_labels()
        return self._read("ann", indices)

    def rle(self, index: int) -> str:
        """Run lengths of one image's united annotations, at native size."""
        self.require_labels()
        return self._file["rle"].asstr()[range(len(self))[index]]

    def mask(self, index: int) -> NDArray[np.bool_]:
        """One image's united annotations (rows, columns), at native size."""
        entry = self.entries[index]
        return rle.decode(self.rle(index), (entry.rows, entry.columns), entry.image_id)

    def require_labels(self) -> None:
        """UserError for a set without annotations."""
        if not self.labelled:
            raise UserError(f"{self.path}: has no annotations; run preprocess with rle_csv")

    def _read(self, kind: str, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        pictures = np.empty((len(indices), self.image_size, self.image_size), np.uint8)
        for picture, index in zip(pictures, indices, strict=True):
            block, row = divmod(range(len(self))[index], BLOCK)
            try:
                picture[:] = to_bytes(self._file[f"{kind}_{block}"][row])
            except (OSError, KeyError):
                raise UserError(f"{self.path}: damaged at {kind}_{block}, row {row}; {MEND} anew") from None
        return pictures


def _refusal(error: OSError | RuntimeError) -> str:
    """Why the system did not write, which h5py hides in a long text (RuntimeError on closing a file)."""
    found = ERRNO.search(str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(found[1]) if found else 0
    return os.strerror(number) if number else ""


def _create_block(file: Any, name: str, image_size: int, pixel_dtype: str) -> None:
    """Room for a whole block, by HDF5's own gzip, so that any reader can undo it."""
    block = file.create_dataset(
        name,
        shape=(BLOCK, image_size, image_size),
        maxshape=(BLOCK, image_size, image_size),
        chunks=(1, image_size, image_size),
        dtype=pixel_dtype,
        compression="gzip",
        compression_opts=1,
    )
    if pixel_dtype == "uint8":
        block.attrs["scale"] = 1 / 255
