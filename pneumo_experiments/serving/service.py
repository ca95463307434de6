"""A model as MLflow calls it: a table of DICOM files in, a table of presence and run lengths out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

from pneumo_experiments.errors import UserError
from pneumo_experiments.serving.answer import PICTURES, Row, row_of, table_of
from pneumo_experiments.serving.detector import Detector, Finding
from pneumo_experiments.serving.request import files_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A detector behind MLflow's interface of Python models; any number of threads may call it."""

    detector: Detector

    def __post_init__(self) -> None:
        _use_in_turns(self.detector)

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Called by MLflow: columns ``image_id`` and ``dicom`` (bytes or base64) in, those of Row out.

        ``params`` are thresholds and prevalence for this request, and which pictures to draw. Raises nothing,
        since MLflow would send the traceback to the client: each row that has no finding says why.
        """
        given = dict(params or {})
        pictures = [name for name in PICTURES if given.pop(name, None)]
        files, rows = list(files_of(frame)), list[Row]()
        reason = ""
        try:
            detector = self.detector.at_prevalence(given.pop("prevalence", None))
            for finding in detector.with_thresholds(given).detect(files):
                rows.append(row_of(finding, pictures))
        except UserError as error:
            reason = str(error)
        except Exception as error:
            log.exception("a request failed")
            reason = f"the model failed ({type(error).__name__}); the server's log has the details"
        for image_id, _ in files[len(rows) :]:
            rows.append(row_of(Finding(image_id, error=f"{image_id}: {reason}"), pictures))
        return table_of(rows, pictures)


def _use_in_turns(detector: Detector) -> None:
    """Makes threads that use the networks wait for each other.

    One pass uses all cores. Passes at the same time would have more threads than cores, which wait for each
    other, and take longer together than one after the other.
    """
    turn = Lock()

    def begin(*_: object) -> None:
        turn.acquire()

    def end(*_: object) -> None:
        turn.release()

    for network in dict.fromkeys(member.predictor.network for member in detector.members):
        network.register_forward_pre_hook(begin)
        network.register_forward_hook(end, always_call=True)
