"""The data set file: one HDF5 that plain h5py reads. ``Dataset`` reads it, ``DatasetWriter`` writes it.

- ``images_<k>`` (n, S, S): 8-bit pixels / 255, 512 images per block, fewer in the last; one image per chunk.
- ``ann_<k>``, same shape: annotated fraction of each pixel, in [0, 1]. Exact as float32, rounded to 1/255 as
  float16 and uint8.
- Stored as uint8, both are 0-255 and have the attribute ``scale`` = 1/255.
- ``rle`` (n,): the run lengths of each mask at native size, one per chunk.
- ``index`` (n,): one row per image with the fields of ``Entry``, and ``images_crc``, ``ann_crc`` and
  ``rle_crc``, the CRC-32 of its compressed chunks.
- Attributes of the file: format, format_version, image_size, labelled, settings (JSON), fingerprint, and
  ``checksum``: a SHA-256 of the index and all attributes but format and format_version.

A set without labels has neither ``ann_<k>`` nor ``rle``. All texts are UTF-8 of fixed length, which h5py
gives as bytes: HDF5 has no checksum of texts of variable length, and a flipped bit can keep it busy forever.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import h5py  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.packed_image import Entry, Packed, compress, crc32, decompress, to_uint8
from pneumo_experiments.dicom.limits import available_cores
from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically

BLOCK = 512  # images
FORMAT, FORMAT_VERSION = "pneumo_experiments", 2
KINDS = ("images", "ann", "rle")
MAX_THREADS = 8  # that decompress images; more wait for memory
REMEDY = "delete it and run preprocess again"
OTHER_FILE = "name the file that preprocess wrote, or run preprocess"  # not ours to have deleted

hdf5 = cast("Any", h5py)  # it has no type stubs
ERRNO = re.compile(r"errno = (\d+)")


def checksum(attributes: Mapping[str, Any], index: NDArray[np.void]) -> bytes:
    """SHA-256 of the index and of these attributes, in hexadecimal."""
    values = {name: _text(value) for name, value in attributes.items()}
    digest = hashlib.sha256(json.dumps([values, index.dtype.descr], sort_keys=True).encode())
    digest.update(index.tobytes())
    return digest.hexdigest().encode()


class Dataset:
    """An open data set file of n images of S x S pixels; an image is addressed by its row in the index.

    Its chunks are read past the HDF5 library, which lets one thread read at a time. ``entries`` (n,) are the
    rows of the index, ``settings`` those of preprocess, as texts.

    >>> with Dataset.open("dataset.h5") as dataset:
    ...     first, images, targets = dataset.entries[0], dataset.images([0, 1]), dataset.targets([0, 1])
    ...     mask, run_lengths = dataset.mask(1), dataset.rle(1)
    >>> len(dataset), images.shape, targets.shape, images.dtype
    (24, (2, 16, 16), (2, 16, 16), dtype('uint8'))
    >>> first.image_id, mask.shape == (first.rows, first.columns), rle.encode(mask) == run_lengths
    ('image-0', True, True)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with hdf5.File(path, "r", locking=False) as file:
            attributes = {name: np.asarray(value).item() for name, value in file.attrs.items()}
            if attributes.pop("format", None) not in (FORMAT.encode(), FORMAT):  # the latter in version 1
                raise UserError(f"{path}: not a data set of {FORMAT}; {OTHER_FILE}")
            version = attributes.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version} instead of {FORMAT_VERSION}; {REMEDY}")
            index = file["index"][()]
            if attributes.pop("checksum") != checksum(attributes, index):
                raise UserError(f"{path}: damaged, or changed by another program; {REMEDY}")
            self.image_size, self.labelled = attributes["image_size"], attributes["labelled"]
            blocks = range(-(-len(index) // BLOCK))
            self._chunks = {
                kind: [c for k in blocks for c in _chunks(file[f"{kind}_{k}"])]
                for kind in KINDS[: 1 + self.labelled]
            }
            self._pixels: np.dtype[Any] = file["images_0"].dtype
            if self.labelled:
                self._chunks["rle"], self._rle_bytes = _chunks(file["rle"]), file["rle"].dtype.itemsize
        self._crcs = {kind: index[f"{kind}_crc"].tolist() for kind in self._chunks}
        if {len(chunks) for chunks in self._chunks.values()} != {len(index)}:
            raise ValueError("number of images")
        self.settings: dict[str, str] = json.loads(attributes["settings"])
        self.fingerprint: str = attributes["fingerprint"].decode()
        columns = [[_text(value) for value in index[f.name].tolist()] for f in fields(Entry)]
        self.entries = [Entry(*values) for values in zip(*columns, strict=True)]
        self._file = path.open("rb")
        self._pool = ThreadPoolExecutor(min(available_cores(), MAX_THREADS), "images")

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Opens a data set for reading; use it in ``with``, or close it.

        Raises UserError if the file is missing, cannot be read, or is damaged beside its images.

        >>> Dataset.open("other.h5")
        Traceback (most recent call last):
        pneumo_experiments.errors.UserError: other.h5: no such data set; run preprocess to write it
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such data set; run preprocess to write it")
        try:
            with path.open("rb"):
                pass
            if not hdf5.is_hdf5(path):
                raise UserError(f"{path}: not an HDF5 file; {OTHER_FILE}")
            return cls(path)
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        except UserError:
            raise
        except Exception as error:  # h5py has many types for a damaged structure
            raise UserError(f"{path}: truncated or damaged ({type(error).__name__}); {REMEDY}") from None

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.open, (self.path.absolute(),)  # another process opens the file itself

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def profile(self) -> dict[str, int]:
        """What it holds, in numbers: images, patients, positives if it has labels, and the images' side."""
        positives = {"positives": sum(entry.area_px > 0 for entry in self.entries)} if self.labelled else {}
        patients = len({entry.patient for entry in self.entries})
        return {"images": len(self), "patients": patients, **positives, "image_size": self.image_size}

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
        row = range(len(self))[index]
        return decompress(self._compressed("rle", row), self._rle_bytes).rstrip(b"\0").decode()

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Union of one image's annotations (rows, columns), at native size."""
        entry = self.entries[index]
        return rle.decode(self.rle(index), (entry.rows, entry.columns), entry.image_id)

    def verify(self) -> None:
        """Checks all checksums; raises UserError for a damaged image. Decompresses nothing."""

        def check(row: int) -> None:
            for kind in self._chunks:
                self._compressed(kind, row)

        for _ in self._pool.map(check, range(len(self))):
            pass

    def require_labels(self) -> None:
        """Raises UserError for a set without labels."""
        if not self.labelled:
            raise UserError(f"{self.path}: has no annotations; run preprocess with rle_csv")

    def _read(self, kind: str, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        rows = [range(len(self))[index] for index in indices]
        images = np.empty((len(rows), self.image_size, self.image_size), np.uint8)
        size = images[0].size * self._pixels.itemsize if rows else 0

        def fill(position: int) -> None:
            stored = np.frombuffer(decompress(self._compressed(kind, rows[position]), size), self._pixels)
            images[position] = to_uint8(stored).reshape(images[0].shape)

        # Handing over to a thread takes longer than reading one image.
        for _ in self._pool.map(fill, range(len(rows))) if len(rows) > 1 else map(fill, range(len(rows))):
            pass
        return images

    def _compressed(self, kind: str, row: int) -> bytes:
        offset, size = self._chunks[kind][row]
        try:
            compressed = os.pread(self._file.fileno(), size, offset)
        except OSError:
            compressed = b""
        if crc32(compressed) != self._crcs[kind][row]:
            place = f"rle, row {row}" if kind == "rle" else f"{kind}_{row // BLOCK}, row {row % BLOCK}"
            raise UserError(f"{self.path}: damaged at {place}; {REMEDY}")
        return compressed


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _chunks(stored: Any) -> list[tuple[int, int]]:
    """Offset and size in bytes of each row's chunk in the file, in order."""
    found: dict[int, tuple[int, int]] = {}

    def note(chunk: Any) -> None:
        found[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size

    stored.id.chunk_iter(note)
    return [found[row] for row in range(len(stored))]


class DatasetWriter:
    """A data set file that is being written: ``append`` its images, then ``finish`` it."""

    def __init__(self, path: Path, file: Any, image_size: int, pixel_dtype: str, labelled: bool) -> None:
        self.path, self._file, self._finished = path, file, False
        self._image_size, self._pixel_dtype, self._labelled = image_size, pixel_dtype, labelled
        self._entries, self._rle = list[Entry](), list[str]()
        self._crcs = {kind: list[int]() for kind in (KINDS if labelled else KINDS[:1])}
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
