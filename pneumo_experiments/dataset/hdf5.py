"""The data set file: one HDF5 that plain h5py reads, with a seal at its end. ``Dataset`` reads it.

- ``images_<k>`` (n, S, S): 8-bit pixels / 255, 512 images per block, fewer in the last; one image per chunk.
- ``ann_<k>``, same shape: annotated fraction of each pixel, in [0, 1]. Exact as float32, rounded to 1/255 as
  float16 and uint8.
- Stored as uint8, both are 0-255 and have the attribute ``scale`` = 1/255.
- ``index``: one row per image with the fields of ``Entry``. ``rle``: its mask at native size.
- Attributes of the file: format, format_version, image_size, labelled, settings (JSON), fingerprint.

A set without labels has neither ``ann_<k>`` nor ``rle``.

The seal after the HDF5 part (see ``seal``) repeats index, run lengths and attributes, and has position and
checksum of every chunk. ``Dataset`` reads by the seal, in several threads, and never uses the HDF5 library.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.packed import Entry, to_uint8
from pneumo_experiments.dataset.seal import REMEDY, read_chunk, read_deflated, read_seal
from pneumo_experiments.dicom.workers import available_cores
from pneumo_experiments.errors import UserError

BLOCK = 512  # images
MAX_THREADS = 8  # that decompress images; more wait for memory


class Dataset:
    """An open data set file; an image is addressed by its row in the index."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._header, self._rows = read_seal(path, file)
        self._pool = ThreadPoolExecutor(min(available_cores(), MAX_THREADS), "images")
        self.image_size, self.labelled = self._header.image_size, self._header.labelled
        self.settings, self.fingerprint = self._header.settings, self._header.fingerprint
        self.entries: list[Entry] = [row.entry for row in self._rows]

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Opens a data set for reading; use it in ``with``, or close it.

        Raises UserError if the file is missing, cannot be read, or its seal is damaged.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such data set; run preprocess to write it")
        try:
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
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
        """8-bit images (n, S, S); raises UserError if one is damaged."""
        return self._read("images", indices)

    def targets(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Target masks (n, S, S): annotated fraction of each pixel times 255; UserError if one is damaged."""
        self.require_labels()
        return self._read("ann", indices)

    def rle(self, index: int) -> str:
        """Run lengths of the union of one image's annotations, at native size."""
        self.require_labels()
        return self._rows[index].rle

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Union of one image's annotations (rows, columns), at native size."""
        entry = self.entries[index]
        return rle.decode(self.rle(index), (entry.rows, entry.columns), entry.image_id)

    def verify(self) -> None:
        """Checks all checksums; raises UserError for a damaged image. Decompresses nothing."""

        def check(row: int) -> None:
            for kind, chunk in self._rows[row].chunks.items():
                try:
                    read_deflated(self._file, chunk)
                except (OSError, ValueError):
                    raise self._damaged(kind, row) from None

        for _ in self._pool.map(check, range(len(self))):
            pass

    def require_labels(self) -> None:
        """Raises UserError for a set without labels."""
        if not self.labelled:
            raise UserError(f"{self.path}: has no annotations; run preprocess with rle_csv")

    def _read(self, kind: str, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        rows = [range(len(self))[index] for index in indices]
        images = np.empty((len(rows), self.image_size, self.image_size), np.uint8)

        def fill(position: int) -> None:
            images[position] = self._read_one(kind, rows[position])

        # Handing over to a thread takes longer than reading one image.
        for _ in self._pool.map(fill, range(len(rows))) if len(rows) > 1 else map(fill, range(len(rows))):
            pass
        return images

    def _read_one(self, kind: str, row: int) -> NDArray[np.uint8]:
        try:
            content = read_chunk(self._file, self._rows[row].chunks[kind], self._header.chunk_bytes)
        except (OSError, ValueError):
            raise self._damaged(kind, row) from None
        stored = np.frombuffer(content, self._header.pixel_dtype)
        return to_uint8(stored).reshape(self.image_size, self.image_size)

    def _damaged(self, kind: str, row: int) -> UserError:
        block, row = divmod(row, BLOCK)
        return UserError(f"{self.path}: damaged at {kind}_{block}, row {row}; {REMEDY}")
