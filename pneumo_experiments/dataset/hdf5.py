"""The data set file: one HDF5 that plain h5py reads, with a seal at its end.

- ``images_<k>`` (n, S, S): greys / 255, 512 images per block, the last one fewer; one image per chunk.
- ``ann_<k>``, same shape: share of each pixel that is annotated, in [0, 1]. As float32 it is exact, as
  float16 and uint8 it is rounded to 1/255.
- Stored as uint8, both hold 0-255 and have the attribute ``scale`` = 1/255.
- ``index``: one row per image with the fields of ``Entry``. ``rle``: its mask at native size.
- Attributes of the file: format, format_version, image_size, labelled, settings (JSON), fingerprint.

A set without labels has neither ``ann_<k>`` nor ``rle``.

Behind the HDF5 part lies a seal (see ``seal``): index, run lengths and attributes once more, and place and
checksum of every picture. ``Dataset`` reads by it, with several threads, and never by HDF5.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.packed import Entry, Packed, to_bytes
from pneumo_experiments.dataset.seal import (
    MAX_SIDE_PX,
    REMEDY,
    Chunk,
    Header,
    Row,
    append_seal,
    read_chunk,
    read_deflated,
    read_seal,
)
from pneumo_experiments.dicom.workers import available_cores
from pneumo_experiments.errors import UserError

FORMAT = "pneumo_experiments"
FORMAT_VERSION = 1
BLOCK = 512  # images
THREADS = 8  # that inflate pictures, at most: more only wait for memory
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
    work: Path | None = None,
) -> str:
    """Write a data set, one image in memory at a time; returns its fingerprint.

    Until it is complete it is a file that ends in ``.part``, in the folder ``work`` or else beside ``path``.
    The fingerprint is that of greys, annotations, index and pixel format, whatever the compression.
    ``settings`` are read after the last image, so that drawing the images may add to them.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, such as {path / 'dataset.h5'}")
    if image_size > MAX_SIDE_PX:
        raise UserError(
            f"image_size={image_size}: more than the {MAX_SIDE_PX} pixels that a data set can hold"
        )
    part = (work or path.parent) / f"{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file: Any = h5py.File(part, "x")
    except OSError as error:
        raise UserError(f"{path}: cannot be written; make room or choose another place") from error
    try:
        with file:
            essence = {"format_version": FORMAT_VERSION, "image_size": image_size, "pixel_dtype": pixel_dtype}
            digest = hashlib.sha256(json.dumps(essence | {"labelled": labelled}).encode())
            rows: list[Row] = []
            for image in images:
                block, row = divmod(len(rows), BLOCK)
                chunks = {"images": image.image_chunk}
                if labelled:
                    assert image.rle is not None and image.target_chunk is not None
                    chunks["ann"] = image.target_chunk
                places: dict[str, Chunk] = {}
                for kind, chunk in chunks.items():
                    if row == 0:
                        _create_block(file, f"{kind}_{block}", image_size, pixel_dtype)
                    pictures = file[f"{kind}_{block}"].id
                    pictures.write_direct_chunk((row, 0, 0), chunk)
                    offset = pictures.get_chunk_info_by_coord((row, 0, 0)).byte_offset
                    places[kind] = Chunk(offset, len(chunk), isal_zlib.crc32(chunk))
                rows.append(Row(image.entry, places, image.rle or ""))
                digest.update(image.digest.encode())
            if not rows:
                raise UserError(f"{path}: no images to write; see why the input was rejected")
            for kind in ("images", "ann") if labelled else ("images",):
                block, row = divmod(len(rows) - 1, BLOCK)
                file[f"{kind}_{block}"].resize(row + 1, axis=0)
            file["index"] = np.array([tuple(vars(row.entry).values()) for row in rows], INDEX)
            if labelled:
                file.create_dataset("rle", data=[row.rle for row in rows], dtype=h5py.string_dtype())
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
        header = Header(image_size, pixel_dtype, labelled, dict(settings), digest.hexdigest())
        append_seal(part, header, rows)
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

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._header, self._rows = read_seal(path, file)
        self._pool = ThreadPoolExecutor(min(available_cores(), THREADS), "pictures")
        self.image_size, self.labelled = self._header.image_size, self._header.labelled
        self.settings, self.fingerprint = self._header.settings, self._header.fingerprint
        self.entries: list[Entry] = [row.entry for row in self._rows]

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a data set to read; close it, or use it in ``with``. UserError unless its seal is whole."""
        if not path.is_file():
            raise UserError(f"{path}: no such data set; run preprocess to write it")
        try:
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); see who may read it") from None
        try:
            return cls(path, file)
        except OSError as error:
            file.close()
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Greys (n, S, S); UserError where one is damaged."""
        return self._read("images", indices)

    def targets(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Annotated share of each pixel (n, S, S), 255 is all of it; UserError where one is damaged."""
        self.require_labels()
        return self._read("ann", indices)

    def rle(self, index: int) -> str:
        """Run lengths of one image's united annotations, at native size."""
        self.require_labels()
        return self._rows[index].rle

    def mask(self, index: int) -> NDArray[np.bool_]:
        """One image's united annotations (rows, columns), at native size."""
        entry = self.entries[index]
        return rle.decode(self.rle(index), (entry.rows, entry.columns), entry.image_id)

    def verify(self) -> None:
        """UserError where a picture is damaged; reads the whole file, but inflates nothing."""

        def check(row: int) -> None:
            for kind, chunk in self._rows[row].chunks.items():
                try:
                    read_deflated(self._file, chunk)
                except (OSError, ValueError):
                    raise self._damaged(kind, row) from None

        for _ in self._pool.map(check, range(len(self))):
            pass

    def require_labels(self) -> None:
        """UserError for a set without annotations."""
        if not self.labelled:
            raise UserError(f"{self.path}: has no annotations; run preprocess with rle_csv")

    def _read(self, kind: str, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        rows = [range(len(self))[index] for index in indices]
        pictures = np.empty((len(rows), self.image_size, self.image_size), np.uint8)

        def fill(place: int) -> None:
            pictures[place] = self._picture(kind, rows[place])

        # A thread needs longer to start than one picture takes.
        for _ in self._pool.map(fill, range(len(rows))) if len(rows) > 1 else map(fill, range(len(rows))):
            pass
        return pictures

    def _picture(self, kind: str, row: int) -> NDArray[np.uint8]:
        try:
            content = read_chunk(self._file, self._rows[row].chunks[kind], self._header.chunk_bytes)
        except (OSError, ValueError):
            raise self._damaged(kind, row) from None
        stored = np.frombuffer(content, self._header.pixel_dtype)
        return to_bytes(stored).reshape(self.image_size, self.image_size)

    def _damaged(self, kind: str, row: int) -> UserError:
        block, row = divmod(row, BLOCK)
        return UserError(f"{self.path}: damaged at {kind}_{block}, row {row}; {REMEDY}")


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
