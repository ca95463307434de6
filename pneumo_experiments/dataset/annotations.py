"""The tables of annotations and of patients, in the forms in which they circulate.

Kaggle's ``train-rle.csv`` has the header ``ImageId, EncodedPixels``; copies of it have a BOM, CRLF,
quotes or no header. One image may have several rows, anywhere in the table. Patients come as the NIH
mapping ``Kaggle_ID,NIH_ID`` or as ``id,patient``.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.errors import UserError

NIH_FILE = re.compile(r"(\d+)_\d+\.png")  # 00028864_007.png: image 7 of patient 00028864
GZIP_MAGIC = b"\x1f\x8b"
LONGEST_FIELD = 2**26  # characters; csv's own limit of 131,072 is less than a ragged mask can need
LARGEST_TABLE, MOST_ROWS = 10**8, 2**20  # bytes once unpacked; the contest's has 7 million, in 12,954 rows


@dataclass(frozen=True)
class Form:
    """Two columns of a table: the names they go by, and how a value looks where there is no header."""

    id_names: tuple[str, ...]
    value_names: tuple[str, ...]
    value: re.Pattern[str]
    expected: str


ANNOTATIONS = Form(
    id_names=("imageid", "image_id"),
    value_names=("encodedpixels", "encoded_pixels"),
    value=re.compile(r"-1|\d+(\s+\d+)*"),
    expected="the columns ImageId and EncodedPixels, or these two without a header",
)
PATIENTS = Form(
    id_names=("kaggle_id", "id", "imageid", "image_id"),
    value_names=("nih_id", "patient", "patient_id"),
    value=NIH_FILE,
    expected="the columns id and patient, or Kaggle_ID and NIH_ID",
)


def read_annotations(path: Path, content: bytes | None = None) -> dict[str, list[str]]:
    """Run-length texts of each image, in the table's order; an empty list where it has only -1.

    ``content`` is what ``read_table`` gave of the path, where the caller needs the bytes, too.
    """
    annotations: dict[str, list[str]] = {}
    for line, image_id, text in _pairs(path, ANNOTATIONS, content):
        if not text:
            raise UserError(
                f"{path}, line {line}: no run lengths for {image_id}; an empty mask is written {rle.EMPTY}"
            )
        texts = annotations.setdefault(image_id, [])
        if text != rle.EMPTY:
            texts.append(text)
    return annotations


def unite(texts: Sequence[str], shape: tuple[int, int], image_id: str) -> tuple[NDArray[np.bool_], bool]:
    """All annotations of one image in one mask (H, W), all False for no texts; and whether any overlap."""
    mask, overlapping = rle.decode(texts[0] if texts else rle.EMPTY, shape, image_id), False
    for text in texts[1:]:
        other = rle.decode(text, shape, image_id)
        overlapping = overlapping or bool((mask & other).any())
        mask |= other
    return mask, overlapping


def read_patients(path: Path, content: bytes | None = None) -> dict[str, str]:
    """Patient of each image; images without one are left out. ``content`` as in ``read_annotations``."""
    patients: dict[str, str] = {}
    for line, image_id, value in _pairs(path, PATIENTS, content):
        nih_file = NIH_FILE.fullmatch(value)
        patient = nih_file[1] if nih_file else value
        if patient and patients.setdefault(image_id, patient) != patient:
            raise UserError(f"{path}, line {line}: a second patient for {image_id}; keep one row per image")
    return patients


def read_table(path: Path, form: Form) -> bytes:
    """A table's bytes as they are. A pipe gives them only once: take digest and rows from the same ones."""
    try:
        with path.open("rb") as file:
            return _limited(file, path, "holds")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a CSV table with {form.expected}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; expected a CSV table with {form.expected}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {form.expected}") from None


def _pairs(path: Path, form: Form, content: bytes | None) -> Iterator[tuple[int, str, str]]:
    """Line number, image id and value of each row."""
    rows = _rows(path, form, read_table(path, form) if content is None else content)
    if not rows:
        raise UserError(f"{path}: the table is empty; expected {form.expected}")
    first = rows[0][1]
    names = [name.lower() for name in first]
    id_column = next((names.index(name) for name in form.id_names if name in names), None)
    value_column = next((names.index(name) for name in form.value_names if name in names), None)
    if id_column is not None and value_column is not None:
        del rows[0]
    elif len(first) == 2 and form.value.fullmatch(first[1]):
        id_column, value_column = 0, 1
    else:
        raise UserError(f"{path}: found {_described(first)}; expected {form.expected}")
    if not rows:
        raise UserError(f"{path}: a header without rows; expected one row per annotation or image")
    for line, row in rows:
        if len(row) <= max(id_column, value_column) or not row[id_column]:
            raise UserError(f"{path}, line {line}: an image id or value is missing; expected {form.expected}")
        yield line, row[id_column].removesuffix(".dcm"), row[value_column]


def _rows(path: Path, form: Form, content: bytes) -> list[tuple[int, list[str]]]:
    """Line number and stripped fields of each row of a CSV file that is not blank; .gz is unpacked."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        if content.startswith(GZIP_MAGIC):
            content = _decompressed(content, path)
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), skipinitialspace=True)
        rows = list[tuple[int, list[str]]]()
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                rows.append((reader.line_num, fields))
            if len(rows) > MOST_ROWS:
                raise UserError(f"{path}: more than {MOST_ROWS:,} rows; name the table of these images alone")
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: not a CSV table in UTF-8; expected {form.expected}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path}: cannot be read (damaged or cut short); expected {form.expected}") from None
    return rows


def _decompressed(content: bytes, path: Path) -> bytes:
    """What gzip holds. A few kB can unpack to many GB, so no more than a table can need is unpacked."""
    with gzip.open(io.BytesIO(content)) as file:
        return _limited(file, path, "unpacks to")


def _limited(file: IO[bytes] | gzip.GzipFile, path: Path, verb: str) -> bytes:
    """All that a file gives; a device has no end, so no more than a table can need is read."""
    content = file.read(LARGEST_TABLE + 1)
    if len(content) > LARGEST_TABLE:
        raise UserError(f"{path}: {verb} more than {LARGEST_TABLE:,} bytes; check that it is the table")
    return content


def _described(row: list[str]) -> str:
    # A row with digits is data rather than names, and data may name a patient: it is not shown.
    if any(character.isdigit() for field in row for character in field):
        return f"a first row of {len(row)} fields without these names"
    return "the columns " + ", ".join(row)
