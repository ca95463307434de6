"""Reads the CSV tables of annotations and of patients.

Kaggle's ``train-rle.csv`` has the header ``ImageId, EncodedPixels``; copies of it have a BOM, CRLF,
quotes or no header. One image may have several rows, anywhere in the table. Patient tables are the NIH
mapping ``Kaggle_ID,NIH_ID`` or have the columns ``id,patient``.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.dicom.identity import stem_of
from pneumo_experiments.errors import UserError

NIH_FILE = re.compile(r"(\d+)_\d+\.png")  # 00028864_007.png: image 7 of patient 00028864
GZIP_MAGIC = b"\x1f\x8b"
MAX_FIELD_LENGTH = 2**26  # characters; csv's default of 131,072 is too low for masks with many runs
MAX_TABLE_BYTES, MAX_ROWS = 10**8, 2**20  # uncompressed; the contest's table has 7 million bytes, 12,954 rows


@dataclass(frozen=True)
class TableFormat:
    """Two columns of a table: their possible names, and a pattern for values in tables without a header."""

    id_names: tuple[str, ...]
    value_names: tuple[str, ...]
    value: re.Pattern[str]
    expected: str


ANNOTATIONS = TableFormat(
    id_names=("imageid", "image_id"),
    value_names=("encodedpixels", "encoded_pixels"),
    value=re.compile(r"-1|\d+(\s+\d+)*"),
    expected="the columns ImageId and EncodedPixels, or these two without a header",
)
PATIENTS = TableFormat(
    id_names=("kaggle_id", "id", "imageid", "image_id"),
    value_names=("nih_id", "patient", "patient_id"),
    value=NIH_FILE,
    expected="the columns id and patient, or Kaggle_ID and NIH_ID",
)
# Copies of the challenge's data as pictures come with a table of new_filename, ImageId and has_pneumo.
FILE_NAMES = TableFormat(
    id_names=("new_filename", "filename", "file_name"),
    value_names=("imageid", "image_id"),
    value=re.compile("(?!)"),
    expected="the columns new_filename, ImageId and has_pneumo",
)
PRESENCES = replace(FILE_NAMES, value_names=("has_pneumo", "has_pneumothorax"))


def read_annotations(path: Path, content: bytes | None = None) -> dict[str, list[str]]:
    """Run-length texts by image id, in the table's order; an empty list for images with only -1.

    ``content`` is the result of ``read_table``, if the caller has read the file already. Raises UserError.
    """
    annotations: dict[str, list[str]] = {}
    for line, image_id, text in _read_pairs(path, ANNOTATIONS, content):
        if not text:
            raise UserError(
                f"{path}, line {line}: no run lengths for {image_id}; an empty mask is written {rle.EMPTY}"
            )
        texts = annotations.setdefault(image_id, [])
        if text != rle.EMPTY:
            texts.append(text)
    return annotations


def unite(texts: Sequence[str], shape: tuple[int, int], image_id: str) -> tuple[NDArray[np.bool_], bool]:
    """Union of one image's annotations as a mask (H, W), all False for no texts; and whether any overlap."""
    mask, overlapping = rle.decode(texts[0] if texts else rle.EMPTY, shape, image_id), False
    for text in texts[1:]:
        other = rle.decode(text, shape, image_id)
        overlapping = overlapping or bool((mask & other).any())
        mask |= other
    return mask, overlapping


def read_patients(path: Path, content: bytes | None = None) -> dict[str, str]:
    """Patient by image id, without images that have none. ``content`` as in ``read_annotations``."""
    patients: dict[str, str] = {}
    for line, image_id, value in _read_pairs(path, PATIENTS, content):
        nih_file = NIH_FILE.fullmatch(value)
        patient = nih_file[1] if nih_file else value
        if patient and patients.setdefault(image_id, patient) != patient:
            raise UserError(f"{path}, line {line}: a second patient for {image_id}; keep one row per image")
    return patients


def read_file_names(path: Path, content: bytes) -> dict[str, tuple[str, bool]]:
    """Image id, and whether it has a pneumothorax, by file name. ``content`` as in ``read_annotations``."""
    named: dict[str, tuple[str, bool]] = {}
    ids = set[str]()
    pairs = zip(_read_pairs(path, FILE_NAMES, content), _read_pairs(path, PRESENCES, content), strict=True)
    for (line, name, image_id), (_, _, presence) in pairs:
        if presence not in ("0", "1"):
            raise UserError(f"{path}, line {line}: has_pneumo is neither 0 nor 1")
        if name in named or image_id in ids:
            raise UserError(
                f"{path}, line {line}: a second row for {name} or its image; keep one row per file"
            )
        ids.add(image_id)
        named[stem_of(name)] = image_id, presence == "1"
    return named


def read_table(path: Path, table_format: TableFormat) -> bytes:
    """The bytes of a table file. A pipe can be read only once: compute digest and rows from these bytes."""
    try:
        with path.open("rb") as file:
            return _read_limited(file, path, "contains")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a CSV table with {table_format.expected}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a CSV table with {table_format.expected}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected {table_format.expected}"
        ) from None


def _read_pairs(
    path: Path, table_format: TableFormat, content: bytes | None
) -> Iterator[tuple[int, str, str]]:
    """Line number, image id and value of each row."""
    rows = _rows(path, table_format, read_table(path, table_format) if content is None else content)
    if not rows:
        raise UserError(f"{path}: the table is empty; expected {table_format.expected}")
    first = rows[0][1]
    names = [name.lower() for name in first]
    id_column = next((names.index(name) for name in table_format.id_names if name in names), None)
    value_column = next((names.index(name) for name in table_format.value_names if name in names), None)
    if id_column is not None and value_column is not None:
        del rows[0]
    elif len(first) == 2 and table_format.value.fullmatch(first[1]):
        id_column, value_column = 0, 1
    else:
        raise UserError(f"{path}: found {_describe_row(first)}; expected {table_format.expected}")
    if not rows:
        raise UserError(f"{path}: has a header but no rows; expected one row per annotation or image")
    for line, row in rows:
        if len(row) <= max(id_column, value_column) or not row[id_column]:
            raise UserError(
                f"{path}, line {line}: an image id or value is missing; expected {table_format.expected}"
            )
        yield line, row[id_column].removesuffix(".dcm"), row[value_column]


def _rows(path: Path, table_format: TableFormat, content: bytes) -> list[tuple[int, list[str]]]:
    """Line number and stripped fields of each row that is not blank; unpacks .gz."""
    csv.field_size_limit(MAX_FIELD_LENGTH)
    try:
        if content.startswith(GZIP_MAGIC):
            content = _decompress(content, path)
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), skipinitialspace=True)
        rows = list[tuple[int, list[str]]]()
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                rows.append((reader.line_num, fields))
            if len(rows) > MAX_ROWS:
                raise UserError(f"{path}: more than {MAX_ROWS:,} rows; check that it is the right table")
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: not a CSV table in UTF-8; expected {table_format.expected}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(
            f"{path}: cannot be read (damaged or truncated); expected {table_format.expected}"
        ) from None
    return rows


def _decompress(content: bytes, path: Path) -> bytes:
    """The content of a gzip file, limited, since a few kB can unpack to many GB."""
    with gzip.open(io.BytesIO(content)) as file:
        return _read_limited(file, path, "unpacks to")


def _read_limited(file: IO[bytes] | gzip.GzipFile, path: Path, verb: str) -> bytes:
    """The content of a file, limited, since a device may never end."""
    content = file.read(MAX_TABLE_BYTES + 1)
    if len(content) > MAX_TABLE_BYTES:
        raise UserError(
            f"{path}: {verb} more than {MAX_TABLE_BYTES:,} bytes; check that it is the right table"
        )
    return content


def _describe_row(row: list[str]) -> str:
    # A row with digits is probably data, which may identify a patient: do not print it.
    if any(character.isdigit() for field in row for character in field):
        return f"a first row of {len(row)} fields without these names"
    return "the columns " + ", ".join(row)
