"""The answer to a request: one row for each radiograph, as a table of which MLflow makes valid JSON."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.figures import outlined
from pneumo_experiments.serving.detector import Finding

OVERLAY, MASK = PICTURES = "overlay", "mask"  # columns that a request asks for
OVERLAY_PX = 512  # longer side


class Row(TypedDict):
    """The answer for one radiograph; ``error`` is empty on success.

    Pictures are PNG in base64: ``overlay`` the radiograph with the outlined mask, ``mask`` black and white at
    native size. All but id and error are None where the file could not be used: that is no healthy answer.
    """

    image_id: str
    presence: float | None
    area_px: int | None
    rle: str | None
    error: str
    overlay: NotRequired[str | None]
    mask: NotRequired[str | None]


COLUMNS = ("image_id", "presence", "area_px", "rle", "error")


def row_of(finding: Finding, pictures: Sequence[str] = ()) -> Row:
    """The answer for a finding, with the pictures that are named."""
    area_px, rle = None, None
    drawn: dict[str, str | None] = dict.fromkeys(pictures)
    if finding.mask is not None:
        area_px, rle = int(np.count_nonzero(finding.mask)), encode(finding.mask)
    if finding.mask is not None and finding.pixels is not None:
        if OVERLAY in drawn:
            drawn[OVERLAY] = _png(outlined(finding.pixels, finding.mask, OVERLAY_PX))
        if MASK in drawn:
            drawn[MASK] = _png(finding.mask)
    row = Row(
        image_id=finding.image_id,
        presence=finding.presence,
        area_px=area_px,
        rle=rle,
        error=finding.error,
    )
    row.update(drawn)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return row


def table_of(rows: Sequence[Row], pictures: Sequence[str] = ()) -> pd.DataFrame:
    """The rows as a table with one column for each of their names.

    What is absent is None, never NaN, which JSON does not have. So a column that lacks something holds
    Python objects.
    """
    columns: dict[str, Any] = {}
    for name in (*COLUMNS, *pictures):
        values: list[object] = [row.get(name) for row in rows]
        numeric = {"area_px": np.int64, "presence": np.float64} if None not in values else {}
        columns[name] = pd.Series(values, dtype=numeric.get(name, object))  # pyright: ignore[reportUnknownMemberType]
    return pd.DataFrame(columns)


def _png(picture: NDArray[np.uint8] | NDArray[np.bool_]) -> str:
    """A picture (H, W) or (H, W, 3) as PNG in base64; a boolean one has one bit for each pixel."""
    content = BytesIO()
    Image.fromarray(picture).save(content, "PNG", compress_level=1)
    return b64encode(content.getvalue()).decode()
