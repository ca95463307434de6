"""Writes the data set file, image by image; ``hdf5`` describes its layout."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset.hdf5 import BLOCK, FORMAT, FORMAT_VERSION, checksum, hdf5
from pneumo_experiments.dataset.packed import Entry, Packed, compress, crc32
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically

ERRNO = re.compile(r"errno = (\d+)")


class DatasetWriter:
    """A data set file that is being written: ``append`` its images, then ``finish`` it."""

    def __init__(self, path: Path, file: Any, image_size: int, pixel_dtype: str, labelled: bool) -> None:
        self.path, self._file, self._finished = path, file, False
        self._image_size, self._pixel_dtype, self._labelled = image_size, pixel_dtype, labelled
        self._entries, self._rle = list[Entry](), list[str]()
        self._crcs: dict[str, list[int]] = {
            kind: [] for kind in (("images", "ann", "rle") if labelled else ("images",))
        }
        # Always version 1 of the content: data sets keep their fingerprints.
        content = {"format_version": 1, "image_size": image_size, "pixel_dtype": pixel_dtype}
        self._digest = hashlib.sha256(json.dumps(content | {"labelled": labelled}).encode())

    @classmethod
    @contextmanager
    def create(
        cls, path: Path, *, image_size: int, pixel_dtype: str, labelled: bool, work: Path | None = None
    ) -> Generator[DatasetWriter]:
        """A writer whose file replaces ``path`` at the end of the block, if the block has finished it.

        Until then it is a temporary file in the folder ``work``, or else beside ``path``, which is removed if
        the block fails. Raises UserError if the file cannot be written.
        """
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file, such as {path / 'dataset.h5'}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path, work) as temporary:
                # From 1.10 on HDF5 has checksums of its own structure.
                with hdf5.File(temporary, "x", libver=("v110", "v110")) as file:
                    writer = cls(path, file, image_size, pixel_dtype, labelled)
                    yield writer
                if not writer._finished:
                    raise RuntimeError(f"{path}: the block ended without finish()")
        except (OSError, RuntimeError) as error:
            reason = _system_reason(error)
            if not reason and isinstance(error, RuntimeError):
                raise
            reason = reason or "the disk may be full"
            raise UserError(
                f"{path}: cannot be written ({reason}); make room or choose another place"
            ) from error

    def append(self, image: Packed) -> None:
        """Adds an image; its pixels are written now and not kept in memory."""
        block, row = divmod(len(self._entries), BLOCK)
        chunks = {"images": image.image_chunk}
        if self._labelled:
            assert image.rle is not None and image.target_chunk is not None
            chunks["ann"] = image.target_chunk
        for kind, chunk in chunks.items():
            if row == 0:
                self._create_block(f"{kind}_{block}")
            self._file[f"{kind}_{block}"].id.write_direct_chunk((row, 0, 0), chunk)
            self._crcs[kind].append(crc32(chunk))
        self._entries.append(image.entry)
        self._rle.append(image.rle or "")
        self._digest.update(image.digest.encode())

    def finish(self, settings: Mapping[str, str]) -> str:
        """Writes index, run lengths and attributes; returns the fingerprint.

        The fingerprint depends on pixels, targets, index and pixel format, not on the compression or the
        settings. Raises UserError if there are no images.
        """
        file, entries, fingerprint = self._file, self._entries, self._digest.hexdigest()
        if not entries:
            raise UserError(f"{self.path}: no images to write; see why the input was rejected")
        block, row = divmod(len(entries) - 1, BLOCK)
        for kind in ("images", "ann") if self._labelled else ("images",):
            file[f"{kind}_{block}"].resize(row + 1, axis=0)
        if self._labelled:
            self._write_run_lengths()
        columns = {f.name: _column([getattr(entry, f.name) for entry in entries]) for f in fields(Entry)}
        columns |= {f"{kind}_crc": _column(crcs) for kind, crcs in self._crcs.items()}
        index = np.empty(len(entries), [(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            index[name] = column
        file["index"] = index
        attributes = {
            "image_size": self._image_size,
            "labelled": self._labelled,
            "settings": json.dumps(dict(settings), sort_keys=True).encode(),
            "fingerprint": fingerprint.encode(),
        }
        attributes["checksum"] = checksum(attributes, file["index"][()])
        attributes |= {"format": FORMAT.encode(), "format_version": FORMAT_VERSION}
        for name, value in attributes.items():
            file.attrs[name] = np.bytes_(value) if isinstance(value, bytes) else value
        self._finished = True
        return fingerprint

    def _write_run_lengths(self) -> None:
        texts = [text.encode() for text in self._rle]
        size = max(map(len, texts))
        stored = self._file.create_dataset(
            "rle", (len(texts),), hdf5.string_dtype(length=size), chunks=(1,), compression="gzip"
        )
        for row, text in enumerate(texts):
            chunk = compress(text.ljust(size, b"\0"))
            stored.id.write_direct_chunk((row,), chunk)
            self._crcs["rle"].append(crc32(chunk))

    def _create_block(self, name: str) -> None:
        """An empty block with HDF5's own gzip filter, so that any reader can decompress it."""
        shape = (BLOCK, self._image_size, self._image_size)
        block = self._file.create_dataset(
            name,
            shape=shape,
            maxshape=shape,
            chunks=(1, *shape[1:]),
            dtype=self._pixel_dtype,
            compression="gzip",
            compression_opts=1,
        )
        if self._pixel_dtype == "uint8":
            block.attrs["scale"] = 1 / 255


def _column(values: list[Any]) -> NDArray[Any]:
    """Numbers as int64, texts as UTF-8 of one length."""
    if not isinstance(values[0], str):
        return np.array(values, np.int64)
    texts = [text.encode() for text in values]
    return np.array(texts, hdf5.string_dtype(length=max(1, *map(len, texts))))


def _system_reason(error: OSError | RuntimeError) -> str:
    """The system's reason for a failed write, which h5py hides in a long text; empty if there is none."""
    match = ERRNO.search(str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(match[1]) if match else 0
    return os.strerror(number) if number else ""
