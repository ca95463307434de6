"""A trained network with its thresholds, from DICOM bytes to run lengths."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch

from pneumo_experiments.data.dicom import read_radiograph
from pneumo_experiments.data.resample import shrink_image
from pneumo_experiments.data.rle import encode
from pneumo_experiments.errors import Rejected, UserError
from pneumo_experiments.learning.device import choose_machine
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.scoring.thresholds import Thresholds, outline
from pneumo_experiments.settings import Device

WEIGHTS, DESCRIPTION = "weights.pt", "model.json"


class Row(TypedDict):
    """The model's answer to one radiograph; ``error`` is empty where all went well."""

    image_id: str
    presence: float
    area_px: int
    rle: str
    error: str


@dataclass(frozen=True)
class Detector:
    """A predictor, the size of its input, its thresholds and the settings that trained it."""

    predictor: Predictor
    image_size: int
    thresholds: Thresholds
    settings: Mapping[str, Any]
    data_fingerprint: str

    def detect(self, dicom: bytes, image_id: str) -> Row:
        """Presence and outline of one radiograph; a file that cannot be used gives a row with its error."""
        try:
            radiograph = read_radiograph(dicom, image_id)
        except Rejected as error:
            return Row(image_id=image_id, presence=float("nan"), area_px=0, rle="-1", error=str(error))
        small = shrink_image(radiograph.pixels, self.image_size)
        prediction = next(self.predictor.predict(small[None]))
        rows, columns = radiograph.pixels.shape
        mask = outline(to_native(prediction.mask, (rows, columns)), prediction.presence, self.thresholds)
        return Row(
            image_id=image_id,
            presence=prediction.presence,
            area_px=int(np.count_nonzero(mask)),
            rle=encode(mask),
            error="",
        )

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """MLflow's call: columns ``image_id`` and ``dicom`` (bytes) in, the columns of Row out."""
        image_ids, files = frame["image_id"].tolist(), frame["dicom"].tolist()
        rows = [self.detect(bytes(f), str(i)) for i, f in zip(image_ids, files, strict=True)]
        return pd.DataFrame(rows, columns=list(Row.__annotations__))

    def get_raw_model(self) -> Detector:
        """MLflow's call for the object behind its wrapper."""
        return self


def save(folder: Path, detector: Detector) -> None:
    """Writes weights and description into an existing folder; raises UserError where it has no room."""
    try:
        torch.save(detector.predictor.network.state_dict(), folder / WEIGHTS)
    except RuntimeError as error:  # torch's, where the disk is full
        raise UserError(
            f"{folder}: has no room for the model; make some, or name another place in TMPDIR"
        ) from error
    description = {
        "image_size": detector.image_size,
        "thresholds": asdict(detector.thresholds),
        "settings": dict(detector.settings),
        "data_fingerprint": detector.data_fingerprint,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def load(folder: Path) -> Detector:
    """The detector that save wrote, on the best device that is there."""
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    settings = description["settings"]
    network = PneumothoraxNet(settings["network"])
    try:
        network.load_state_dict(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise UserError(
            f"{folder}: the weights do not fit {settings['network']}; log the model anew with `train`"
        ) from error
    return Detector(
        predictor=Predictor(network, choose_machine(Device()), settings["mirror"] == "true"),
        image_size=int(description["image_size"]),
        thresholds=Thresholds(**description["thresholds"]),
        settings=settings,
        data_fingerprint=description["data_fingerprint"],
    )
