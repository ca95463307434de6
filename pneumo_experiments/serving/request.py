"""The files of a request: a table as MLflow hands it over, whatever format it arrived in."""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.dataset.decoder_pool import MAX_FILE_BYTES, File
from pneumo_experiments.errors import Rejected

IMAGE_ID, DICOM = "image_id", "dicom"


def files_of(frame: pd.DataFrame) -> Iterator[File]:
    """Image id and DICOM bytes of each row (n, any columns), in order, or the reason why it has none.

    A file is bytes or base64 text; a text is never taken for a path. A row without an id has its number. A
    table without the column dicom has a reason in each row, and in one row if it has no column: MLflow drops
    files that come without the names of columns. MLflow makes one row of lists of a dictionary of lists: that
    is a row for each of their elements.
    """
    table: Any = frame  # pandas has no type stubs
    if len(table) == 1 and all(isinstance(cell, list | np.ndarray) for cell in table.iloc[0]):
        table = pd.DataFrame(
            {name: pd.Series(list(table[name].iloc[0]), dtype=object) for name in table.columns}
        )
    names, rows = list(table.columns), len(table)
    ids = table[IMAGE_ID].tolist() if IMAGE_ID in names else [None] * max(rows, not names)
    cells: Sequence[object] = table[DICOM].tolist() if DICOM in names else [None] * len(ids)
    for row, (cell_of_id, cell) in enumerate(zip(ids, cells, strict=True)):
        image_id = str(row) if _is_missing(cell_of_id) else str(cell_of_id)
        if DICOM in names:
            yield image_id, _content(image_id, cell)
        else:
            reason = "the request has no column dicom; give columns image_id (optional) and dicom"
            yield image_id, Rejected(f"{image_id}: {reason}")


def _content(image_id: str, cell: object) -> bytes | Rejected:
    """The bytes of a cell, or the reason why it has none."""
    if isinstance(cell, bytes | bytearray | memoryview):
        content = bytes(cell)  # pyright: ignore[reportUnknownArgumentType]
    elif _is_missing(cell):
        content = b""
    elif not isinstance(cell, str):
        return Rejected(f"{image_id}: dicom is a {type(cell).__name__}; give bytes or their base64 text")
    elif len(cell) > MAX_FILE_BYTES * 3 // 2:  # base64 has 4 characters for 3 bytes, and line ends
        return Rejected(f"{image_id}: rejected because a file may have {MAX_FILE_BYTES:,} bytes at most")
    else:
        try:
            content = a2b_base64("".join(cell.split()), strict_mode=True)
        except ValueError:
            return Rejected(f"{image_id}: dicom is not base64 text")
    return content or Rejected(f"{image_id}: no file: dicom is empty")


def _is_missing(cell: object) -> bool:
    """Whether a cell holds nothing: null arrives as None, NaN or, in the format ``inputs``, as a text."""
    if isinstance(cell, str):
        return cell in ("", "None")
    return bool(pd.api.types.is_scalar(cell) and pd.isna(cell))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
