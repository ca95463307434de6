"""Reads the CSV tables of annotations and of patients.

Kaggle's ``train-rle.csv`` has the header ``ImageId, EncodedPixels``; copies of it have other separators,
encodings, line ends, names, or no header. One image may have several rows, anywhere in the table. Patient
tables are the NIH mapping ``Kaggle_ID,NIH_ID`` or have the columns ``id,patient``. What could be read in
two ways is refused.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pneumo_experiments.dataset import rle
from pneumo_experiments.errors import UserError

NIH_FILE = re.compile(r"(\d+)_\d+\.png")  # 00028864_007.png: image 7 of patient 00028864
GZIP_MAGIC = b"\x1f\x8b"
MAX_FIELD_LENGTH = 2**26  # characters; csv's default of 131,072 is too low for masks with many runs
MAX_TABLE_BYTES, MAX_ROWS = 10**8, 2**20  # uncompressed; the contest's table has 7 million bytes, 12,954 rows


# One of them after -1 stands for no mask; a table that also has -1 leaves open what they mean.
BLANKS = ("", "nan", "none", "null", "na", "n/a", "<na>", "[]")
MINUS_ONE = re.compile(r"[-\u2212\u2013]\s?1(\.0)?")  # also with the dashes of word processors
NUMBER = r"[0-9]++(?:\.0)?+"
# Of whole numbers with one separator throughout: "387,620 23" and "1.000" may mean thousands.
LISTS = re.compile(
    "|".join(rf"{NUMBER}(?:{part}{NUMBER})*+" for part in (r"\s++", r"\s*+,\s*+", r"\s*+;\s*+"))
)
SUFFIXES = re.compile(r"\.(dcm|dicom|png|jpe?g|bmp|tiff?)$", re.IGNORECASE)
SEP_LINE = re.compile(r"\"?sep=(.)\"?[,;\t ]*(?=[\r\n])", re.IGNORECASE)  # for Excel
Value = TypeVar("Value")
MIN_PAIRS = 5  # so many ascending gaps have no mask of relative ones but by chance


@dataclass(frozen=True)
class TableFormat:
    """Two columns of a table: their possible names, and a pattern for values in tables without a header."""

    id_names: tuple[str, ...]  # without case, blanks and underscores
    value_names: tuple[str, ...]
    value: re.Pattern[str]
    expected: str

    def error(self, path: Path, problem: str, line: int = 0) -> UserError:
        """The error of a table that is not of this format."""
        where = f"{path}, line {line}" if line else str(path)
        return UserError(f"{where}: {problem}; expected {self.expected}")


class Table(NamedTuple):
    """A table with at least one row below its header."""

    rows: list[tuple[int, list[str]]]  # number of the line, and stripped fields
    id_column: int
    value_column: int
    width: int  # fields of a row
    header: str  # as it is written, without quotes; empty if there is none
    dialect: list[str]  # how it is not plain CSV in UTF-8, in words


ANNOTATIONS = TableFormat(
    id_names=("imageid", "id", "image", "imagename", "filename", "img"),
    value_names=("encodedpixels", "rlemask", "rle", "mask", "runlengths"),
    value=re.compile(r"[-\u2212\u2013]\s?1(\.0)?|nan|none|null|\[?\d+(\.\d+)?([\s,;]+\d+(\.\d+)?)+\]?", re.I),
    expected="the columns ImageId and EncodedPixels, or these two without a header",
)
PATIENTS = TableFormat(
    id_names=("kaggleid", "id", "imageid"),
    value_names=("nihid", "patient", "patientid"),
    value=NIH_FILE,
    expected="the columns id and patient, or Kaggle_ID and NIH_ID",
)
# Copies of the challenge's data as pictures come with a table of new_filename, ImageId and has_pneumo.
FILE_NAMES = TableFormat(
    id_names=("newfilename", "filename"),
    value_names=("imageid",),
    value=re.compile("(?!)"),
    expected="the columns new_filename, ImageId and has_pneumo; for run lengths leave out masks_dir",
)
PRESENCES = replace(FILE_NAMES, value_names=("haspneumo", "haspneumothorax"))


def read_annotations(path: Path, content: bytes | None = None) -> dict[str, list[str]]:
    """Run-length texts by image id, in the table's order; an empty list for images with only -1.

    The texts of an image with masks and -1 end with -1.

    ``content`` is the result of ``read_table``, if the caller has read the file already. Raises UserError,
    also for absolute starts, which other contests have, and for blank cells in a table that has -1.
    """
    annotations: dict[str, list[str]] = {}
    spellings: dict[str, str] = {}
    blank, absolute, empty, has_relative = "", list[str](), set[str](), False
    for line, spelling, value in _read_pairs(path, ANNOTATIONS, content):
        image_id, text, where = plain_id(spelling), plain_run_lengths(value), f"{path}, line {line}"
        if image_id != spelling and spellings.setdefault(image_id, spelling) != spelling:
            raise UserError(
                f"{where}: {spelling} and {spellings[image_id]} differ only in their suffixes; omit those"
            )
        texts = annotations.setdefault(image_id, [])
        if text == rle.EMPTY:
            empty.add(image_id)
        elif not text:
            blank = blank or f"{where}: no run lengths for {image_id}, and other images have {rle.EMPTY}"
        else:
            texts.append(text)
            if text.count(" ") >= 2 * MIN_PAIRS - 1 and rle.PAIRS.fullmatch(text):
                absolute += [where] if (is_absolute := rle.are_absolute(rle.to_lengths(text))) else []
                has_relative = has_relative or not is_absolute
    if blank and empty:
        raise UserError(f"{blank}; write run lengths or {rle.EMPTY} into this row, or remove it")
    if absolute and not has_relative:
        raise UserError(f"{absolute[0]}: {rle.ABSOLUTE}")
    for image_id in empty:
        annotations[image_id] += [rle.EMPTY] if annotations[image_id] else []
    return annotations


def plain_id(spelling: str) -> str:
    """An image id without the suffixes of image files, such as .dcm or .png."""
    return SUFFIXES.sub("", spelling) or spelling


def plain_run_lengths(text: str) -> str:
    """Run lengths as the challenge writes them, -1 for a minus one, empty for marks of missing values.

    Reads whole numbers written as ``3.0``, with commas or semicolons, in brackets. Other texts are unchanged.
    """
    if text.replace(" ", "").isdigit():  # as almost all are
        return text
    if text.lower() in BLANKS:
        return ""
    if MINUS_ONE.fullmatch(text):
        return rle.EMPTY
    numbers = text[1:-1].strip() if text[0] + text[-1] in ("[]", "()") else text
    if not LISTS.fullmatch(numbers):
        return text
    return " ".join(number.removesuffix(".0") for number in re.split(r"[\s,;]+", numbers))


def match_ids(table: Mapping[str, Value], known: Collection[str]) -> dict[str, Value]:
    """The table with the ids of known images. If it has none, ids match without their folders and suffixes.

    Raises UserError if several ids of the table then match one image.
    """
    if any(name in known for name in table):
        return dict(table)
    names = [(short_id(name), name) for name in known]
    counts = Counter(short for short, _ in names)
    unique = {short: name for short, name in names if counts[short] == 1}
    matched: dict[str, str] = {}
    for name in table:
        image_id = unique.get(short_id(name), name)
        if matched.setdefault(image_id, name) != name:
            raise UserError(
                f"{name} and {matched[image_id]}: both match the image {image_id}; name each image once"
            )
    return {image_id: table[name] for image_id, name in matched.items()}


def short_id(path: str) -> str:
    """An image id without folders before it and suffixes of image files after it."""
    return plain_id(path.replace("\\", "/").rpartition("/")[2])


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
    for line, spelling, value in _read_pairs(path, PATIENTS, content):
        nih_file, image_id = NIH_FILE.fullmatch(value), plain_id(spelling)
        patient = nih_file[1] if nih_file else value
        if patient.lower() not in BLANKS and patients.setdefault(image_id, patient) != patient:
            raise UserError(f"{path}, line {line}: a second patient for {image_id}; keep one row per image")
    return patients


def read_file_names(path: Path, content: bytes) -> dict[str, tuple[str, bool]]:
    """Image id, and whether it has a pneumothorax, by file name. ``content`` as in ``read_annotations``."""
    named: dict[str, tuple[str, bool]] = {}
    ids = set[str]()
    pairs = zip(_read_pairs(path, FILE_NAMES, content), _read_pairs(path, PRESENCES, content), strict=True)
    for (line, name, image_id), (_, _, presence) in pairs:
        if presence.removesuffix(".0") not in ("0", "1"):
            raise UserError(f"{path}, line {line}: has_pneumo is neither 0 nor 1")
        stem, image_id = short_id(name), plain_id(image_id)
        if not image_id:
            raise UserError(f"{path}, line {line}: no ImageId for {name}")
        if stem in named or image_id in ids:
            raise UserError(
                f"{path}, line {line}: a second row for {stem} or for {image_id}; keep one of them"
            )
        ids.add(image_id)
        named[stem] = image_id, presence.startswith("1")
    return named


def read_table(path: Path, table_format: TableFormat) -> bytes:
    """The bytes of a table file. A pipe can be read only once: compute digest and rows from these bytes."""
    try:
        with path.open("rb") as file:
            return _read_limited(file, path, "contains")
    except OSError as error:
        problems: dict[type[OSError], str] = {
            FileNotFoundError: "no such file; expected a CSV table with ",
            IsADirectoryError: "is a folder; expected a CSV table with ",
        }
        problem = problems.get(type(error), f"cannot be read ({error.strerror}); expected ")
        raise UserError(f"{path}: {problem}{table_format.expected}") from None


def parse_table(path: Path, table_format: TableFormat, content: bytes | None = None) -> Table:
    """The rows below the header, at least one. Raises UserError for what is not a table of this format."""
    content = read_table(path, table_format) if content is None else content
    text, dialect = _decode(path, table_format, content)
    if sep_line := SEP_LINE.match(text):
        dialect.append("the first line is sep=, which only Excel knows")
        text = text[sep_line.end() :]  # the line stays, empty, for the numbers of the others
    start = text.lstrip("\r\n ")
    first_lines = re.match(r"[^\r\n]*+[\r\n]*+[^\r\n]*+", start)
    delimiter = _delimiter(first_lines[0] if first_lines else "", table_format)
    if delimiter != ",":
        dialect.append(f"its columns are separated by {delimiter!r}, not by a comma")
    try:
        rows = _parse(text, delimiter)
    except csv.Error:
        raise table_format.error(path, "not a CSV table") from None
    if len(rows) > MAX_ROWS:
        raise UserError(f"{path}: more than {MAX_ROWS:,} rows; check that it is the right table")
    if not rows:
        raise table_format.error(path, "the table is empty")
    columns, first = _columns(rows, table_format), rows[0][1]
    if columns is None:
        raise table_format.error(path, f"found {_describe_row(first)}")
    id_column, value_column, has_header = columns
    header = re.split(r"[\r\n]", start, maxsplit=1)[0].replace('"', "") if has_header else ""
    if has_header and len(rows) == 1:
        raise UserError(f"{path}: has a header but no rows; expected one row per annotation or image")
    return Table(rows[has_header:], id_column, value_column, len(first), header, dialect)


def _read_pairs(
    path: Path, table_format: TableFormat, content: bytes | None
) -> Iterator[tuple[int, str, str]]:
    """Line number, image id and value of each row."""
    table = parse_table(path, table_format, content)
    for line, row in table.rows:
        if len(row) <= max(table.id_column, table.value_column) or not row[table.id_column]:
            raise table_format.error(path, "an image id or value is missing", line)
        value, more = row[table.value_column], [field for field in row[table.width :] if field]
        if more:  # run lengths with commas, without quotes
            if table.value_column != table.width - 1 or not all(map(str.isdecimal, [value, *more])):
                raise UserError(
                    f"{path}, line {line}: {len(row)} fields, and {table.width} in the first line; put fields"
                    " with separators in them into quotes"
                )
            value = " ".join([value, *more])
        yield line, row[table.id_column], value


def _decode(path: Path, table_format: TableFormat, content: bytes) -> tuple[str, list[str]]:
    """The text of a table, unpacked if it is .gz; and its encoding in words, if it is not UTF-8."""
    try:
        if content.startswith(GZIP_MAGIC):  # a few kB can unpack to many GB
            with gzip.open(io.BytesIO(content)) as file:
                content = _read_limited(file, path, "unpacks to")
        if content.startswith(b"PK\3\4"):
            raise table_format.error(path, "a zip or Excel file, no CSV table; unpack it, or save it as CSV")
        encoding, even, odd = "utf-8", content[:200:2], content[1:200:2]
        if content.startswith(codecs.BOM_UTF8):
            encoding = "utf-8-sig"
        elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        elif max(even.count(0), odd.count(0)) > len(even) / 2:  # as in ASCII, without a byte order mark
            encoding = "utf-16-le" if odd.count(0) > even.count(0) else "utf-16-be"
        text = content.decode(encoding)
        if "\0" in text:
            raise UnicodeDecodeError(encoding, content, content.find(b"\0"), len(content), "not text")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise table_format.error(path, "not a CSV table in UTF-8", line) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise table_format.error(path, "cannot be read (damaged or truncated)") from None
    names = {"utf-8": [], "utf-8-sig": ["it starts with a byte order mark"]}
    return text, names.get(encoding, ["it is UTF-16, not UTF-8"])


def _delimiter(first_lines: str, table_format: TableFormat) -> str:
    """The first character that makes columns of the first two lines, else a comma."""
    others = [c for c in first_lines if c.isprintable() and not c.isalnum() and c not in " _-.'\"/\\"]
    for delimiter in dict.fromkeys((",", ";", "\t", "|", *others)):
        try:
            if (rows := _parse(first_lines, delimiter)) and _columns(rows, table_format):
                return delimiter
        except (csv.Error, ValueError):  # a quote that is not closed; a character that cannot separate
            continue
    return ","


def _parse(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Line number and stripped fields of each row that is not blank, up to one more than allowed."""
    csv.field_size_limit(MAX_FIELD_LENGTH)
    quote = "'" if text.lstrip().startswith("'") else '"'
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quotechar=quote, skipinitialspace=True)
    rows = list[tuple[int, list[str]]]()
    for row in reader:
        fields = [field.strip() for field in row]
        if any(fields):
            rows.append((reader.line_num, fields))
        if len(rows) > MAX_ROWS:
            break
    return rows


def _columns(rows: list[tuple[int, list[str]]], table_format: TableFormat) -> tuple[int, int, bool] | None:
    """Columns of ids and values, and whether the first row names them; None if that is unclear."""
    first = rows[0][1]
    names = [re.sub(r"[\W_]", "", name).lower() for name in first]
    id_column = next((names.index(name) for name in table_format.id_names if name in names), None)
    value_column = next((names.index(name) for name in table_format.value_names if name in names), None)
    if id_column is not None and value_column is not None:
        return id_column, value_column, True
    values = [i for i, field in enumerate(first) if table_format.value.fullmatch(field)]
    ids = [i for i, field in enumerate(first) if field and i not in values]
    if len(ids) == 2 and [row[ids[0] : ids[0] + 1] for _, row in rows[:2]] in (
        [["0"], ["1"]],
        [["1"], ["2"]],
    ):
        del ids[0]  # numbers of the rows
    if not values and ids == [0] and len(first) == 2 and len(rows) > 1:  # an empty cell
        values = [1] if table_format.value.fullmatch("".join(rows[1][1][1:2])) else []
    return (ids[0], values[0], False) if len(ids) == len(values) == 1 else None


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
    if len(row) == 1:
        return f"the one column {row[0]}; separate columns by commas"
    return "the columns " + ", ".join(row)
