"""A model as MLflow calls it: a table of DICOM bytes in, a table of presence and run lengths out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any, TypedDict

import numpy as np
import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.dataset.rle import EMPTY, encode
from pneumo_experiments.serving.detector import Detector, Finding


class Row(TypedDict):
    """The answer for one radiograph; ``error`` is empty on success."""

    image_id: str
    presence: float
    area_px: int
    rle: str
    error: str


@dataclass(frozen=True)
class ServedModel:
    """A detector behind MLflow's interface of Python models."""

    detector: Detector

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Called by MLflow: columns ``image_id`` and ``dicom`` (bytes) in, the columns of Row out.

        ``params`` are thresholds for this request. Raises UserError for values out of range.
        """
        detector = self.detector.with_thresholds(params or {})
        columns: Any = frame  # pandas has no type stubs
        image_ids, files = columns["image_id"].tolist(), columns["dicom"].tolist()
        pairs = ((str(i), bytes(f)) for i, f in zip(image_ids, files, strict=True))
        rows = [_row(finding) for finding in detector.detect(pairs)]
        return pd.DataFrame(rows, columns=list(Row.__annotations__))


def _row(finding: Finding) -> Row:
    presence = nan if finding.presence is None else finding.presence
    area_px, rle = 0, EMPTY
    if finding.mask is not None:
        area_px, rle = int(np.count_nonzero(finding.mask)), encode(finding.mask)
    return Row(image_id=finding.image_id, presence=presence, area_px=area_px, rle=rle, error=finding.error)
