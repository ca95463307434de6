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
from typing import Any, cast

import h5py  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

from pneumo_experiments.dataset.deflate import crc32
from pneumo_experiments.dataset.hdf5 import BLOCK
from pneumo_experiments.dataset.packed import Entry, Packed
from pneumo_experiments.dataset.seal import MAX_SIDE_PX, Chunk, Header, Row, append_seal
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically

FORMAT = "pneumo_experiments"
FORMAT_VERSION = 1
ERRNO = re.compile(r"errno = (\d+)")

hdf5 = cast("Any", h5py)  # it has no type stubs
TEXT: Any = hdf5.string_dtype()
INDEX = np.dtype([(f.name, TEXT if f.type == "str" else np.int64) for f in fields(Entry)])


class DatasetWriter:
    """A data set file that is being written: ``append`` its images, then ``finish`` it."""

    def __init__(self, path: Path, file: Any, image_size: int, pixel_dtype: str, labelled: bool) -> None:
        self.path, self._file, self._finished = path, file, False
        self._image_size, self._pixel_dtype, self._labelled = image_size, pixel_dtype, labelled
        self._rows = list[Row]()
        content = {"format_version": FORMAT_VERSION, "image_size": image_size, "pixel_dtype": pixel_dtype}
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
        if image_size > MAX_SIDE_PX:
            raise UserError(f"image_size={image_size}: a data set can hold at most {MAX_SIDE_PX} pixels")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path, work) as temporary:
                with hdf5.File(temporary, "x") as file:
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
        block, row = divmod(len(self._rows), BLOCK)
        chunks = {"images": image.image_chunk}
        if self._labelled:
            assert image.rle is not None and image.target_chunk is not None
            chunks["ann"] = image.target_chunk
        positions: dict[str, Chunk] = {}
        for kind, chunk in chunks.items():
            if row == 0:
                self._create_block(f"{kind}_{block}")
            stored = self._file[f"{kind}_{block}"].id
            stored.write_direct_chunk((row, 0, 0), chunk)
            offset = stored.get_chunk_info_by_coord((row, 0, 0)).byte_offset
            positions[kind] = Chunk(offset, len(chunk), crc32(chunk))
        self._rows.append(Row(image.entry, positions, image.rle or ""))
        self._digest.update(image.digest.encode())

    def finish(self, settings: Mapping[str, str]) -> str:
        """Writes index, run lengths, attributes and seal; returns the fingerprint.

        The fingerprint depends on pixels, targets, index and pixel format, not on the compression or the
        settings. Raises UserError if there are no images.
        """
        file, rows, fingerprint = self._file, self._rows, self._digest.hexdigest()
        if not rows:
            raise UserError(f"{self.path}: no images to write; see why the input was rejected")
        for kind in ("images", "ann") if self._labelled else ("images",):
            block, row = divmod(len(rows) - 1, BLOCK)
            file[f"{kind}_{block}"].resize(row + 1, axis=0)
        file["index"] = np.array([tuple(vars(row.entry).values()) for row in rows], INDEX)
        if self._labelled:
            file.create_dataset("rle", data=[row.rle for row in rows], dtype=TEXT)
        file.attrs.update(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "image_size": self._image_size,
                "labelled": self._labelled,
                "settings": json.dumps(dict(settings), sort_keys=True),
                "fingerprint": fingerprint,
            }
        )
        temporary = Path(file.filename)
        file.close()  # the seal follows the complete HDF5 part
        header = Header(self._image_size, self._pixel_dtype, self._labelled, dict(settings), fingerprint)
        append_seal(temporary, header, rows)
        self._finished = True
        return fingerprint

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


def _system_reason(error: OSError | RuntimeError) -> str:
    """The system's reason for a failed write, which h5py hides in a long text; empty if there is none."""
    match = ERRNO.search(str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(match[1]) if match else 0
    return os.strerror(number) if number else ""
