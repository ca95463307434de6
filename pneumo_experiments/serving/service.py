"""A model as MLflow calls it: a table of DICOM files in, a table of presence and run lengths out.

The table comes as MLflow hands it over, whatever format it arrived in; of the answer MLflow makes valid JSON.
"""

from __future__ import annotations

import logging
from base64 import b64encode
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments.dataset.decoder_pool import MAX_FILE_BYTES, File
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.figures import outlined
from pneumo_experiments.serving.detector import Detector, Finding

IMAGE_ID, DICOM = "image_id", "dicom"
OVERLAY, MASK = PICTURES = "overlay", "mask"  # columns that a request asks for
OVERLAY_PX = 512  # longer side
COLUMNS = (IMAGE_ID, "presence", "area_px", "rle", "error")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A detector behind MLflow's interface of Python models; any number of threads may call it."""

    detector: Detector

    def __post_init__(self) -> None:
        """Makes threads that use the networks wait for each other.

        One pass uses all cores. Passes at the same time would have more threads than cores, which wait for
        each other, and take longer together than one after the other.
        """
        turn = Lock()

        def begin(*_: object) -> None:
            turn.acquire()

        def end(*_: object) -> None:
            turn.release()

        for network in dict.fromkeys(member.predictor.network for member in self.detector.members):
            network.register_forward_pre_hook(begin)
            network.register_forward_hook(end, always_call=True)

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Called by MLflow: columns ``image_id`` and ``dicom`` (bytes or base64) in, those of ``row_of`` out.

        ``params`` are thresholds and prevalence for this request, and which pictures to draw. Raises nothing,
        since MLflow would send the traceback to the client: each row that has no finding says why.
        """
        given = dict(params or {})
        pictures = [name for name in PICTURES if given.pop(name, None)]
        files, rows = list(files_of(frame)), list[dict[str, Any]]()
        reason = ""
        try:
            detector = self.detector.at_prevalence(given.pop("prevalence", None))
            for finding in detector.with_thresholds(given).detect_each(files):
                rows.append(row_of(finding, pictures))
        except UserError as error:
            reason = str(error)
        except Exception as error:
            log.exception("a request failed")
            reason = f"the model failed ({type(error).__name__}); the server's log has the details"
        for image_id, _ in files[len(rows) :]:
            rows.append(row_of(Finding(image_id, error=f"{image_id}: {reason}"), pictures))
        return table_of(rows, pictures)


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
            yield image_id, Rejected(reason, image_id)


def _content(image_id: str, cell: object) -> bytes | Rejected:
    """The bytes of a cell, or the reason why it has none."""
    if isinstance(cell, bytes | bytearray | memoryview):
        content = bytes(cell)  # pyright: ignore[reportUnknownArgumentType]
    elif _is_missing(cell):
        content = b""
    elif not isinstance(cell, str):
        return Rejected(f"dicom is a {type(cell).__name__}; give bytes or their base64 text", image_id)
    elif len(cell) > MAX_FILE_BYTES * 3 // 2:  # base64 has 4 characters for 3 bytes, and line ends
        return Rejected(f"rejected because a file may have {MAX_FILE_BYTES:,} bytes at most", image_id)
    else:
        try:
            content = a2b_base64("".join(cell.split()), strict_mode=True)
        except ValueError:
            return Rejected("dicom is not base64 text", image_id)
    return content or Rejected("no file: dicom is empty", image_id)


def _is_missing(cell: object) -> bool:
    """Whether a cell holds nothing: null arrives as None, NaN or, in the format ``inputs``, as a text."""
    if isinstance(cell, str):
        return cell in ("", "None")
    return bool(pd.api.types.is_scalar(cell) and pd.isna(cell))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def row_of(finding: Finding, pictures: Sequence[str] = ()) -> dict[str, Any]:
    """The answer for one radiograph, with the pictures that are named; ``error`` is empty on success.

    Pictures are PNG in base64: ``overlay`` the radiograph with the outlined mask, ``mask`` black and white at
    native size. All but id and error are None where the file could not be used: that is no healthy answer.
    """
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, *pictures))
    row |= {"image_id": finding.image_id, "presence": finding.presence, "error": finding.error}
    if finding.mask is not None and finding.pixels is not None:
        row |= {"area_px": int(np.count_nonzero(finding.mask)), "rle": encode(finding.mask)}
        if OVERLAY in row:
            row[OVERLAY] = _png(outlined(finding.pixels, finding.mask, OVERLAY_PX))
        if MASK in row:
            row[MASK] = _png(finding.mask)
    return row


def table_of(rows: Sequence[dict[str, Any]], pictures: Sequence[str] = ()) -> pd.DataFrame:
    """The rows as a table with one column for each of their names.

    What is absent is None, never NaN, which JSON does not have. So a column that lacks something holds
    Python objects.
    """
    columns: dict[str, Any] = {}
    for name in (*COLUMNS, *pictures):
        values = [row[name] for row in rows]
        numeric = {"area_px": np.int64, "presence": np.float64} if None not in values else {}
        columns[name] = pd.Series(values, dtype=numeric.get(name, object))  # pyright: ignore[reportUnknownMemberType]
    return pd.DataFrame(columns)


def _png(picture: NDArray[np.uint8] | NDArray[np.bool_]) -> str:
    """A picture (H, W) or (H, W, 3) as PNG in base64; a boolean one has one bit for each pixel."""
    content = BytesIO()
    Image.fromarray(picture).save(content, "PNG", compress_level=1)
    return b64encode(content.getvalue()).decode()
