"""A trained network with its thresholds, from DICOM bytes to run lengths."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch

from pneumo_experiments.dataset.decoder_pool import DecodedImage, File, decode_all
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import FORMATS, choose_compute_for
from pneumo_experiments.learning.network import NETWORKS, PneumothoraxNet
from pneumo_experiments.learning.predict import Prediction, Predictor, to_native
from pneumo_experiments.scoring.thresholds import Thresholds, apply_thresholds
from pneumo_experiments.settings import Device

WEIGHTS, DESCRIPTION = "weights.pt", "model.json"
BATCH = 16  # radiographs
LARGEST_PX = 16_384  # side of a network's input: a damaged number must not fill the memory


class Row(TypedDict):
    """The model's answer to one radiograph; ``error`` is empty where all went well."""

    image_id: str
    presence: float
    area_px: int
    rle: str
    error: str


@dataclass(frozen=True)
class Detector:
    """A predictor, the size of its input, its thresholds and the settings that trained it.

    ``seen`` are digests of the images that trained it or chose its epoch and thresholds.
    """

    predictor: Predictor
    image_size: int
    thresholds: Thresholds
    settings: Mapping[str, Any]
    data_fingerprint: str
    seen: frozenset[str] = frozenset()

    def detect(self, files: Iterable[File]) -> Generator[Row]:
        """Presence and outline of each radiograph, in order; what cannot be used gives a row with its error.

        Files (image id, DICOM bytes) are drawn a little ahead, decoded side by side and predicted in batches.
        """
        with closing(decode_all(files, self.image_size)) as found:
            while batch := list(islice(found, BATCH)):
                small = [one.pixels for _, one in batch if isinstance(one, DecodedImage)]
                predictions = self.predictor.predict(np.stack(small), BATCH) if small else iter(())
                for image_id, one in batch:
                    if isinstance(one, DecodedImage):
                        yield self._row(image_id, (one.rows, one.columns), next(predictions))
                    else:
                        yield Row(image_id=image_id, presence=nan, area_px=0, rle="-1", error=str(one))

    def _row(self, image_id: str, shape: tuple[int, int], prediction: Prediction) -> Row:
        mask = apply_thresholds(to_native(prediction.mask, shape), prediction.presence, self.thresholds)
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
        pairs = ((str(i), bytes(f)) for i, f in zip(image_ids, files, strict=True))
        return pd.DataFrame(list(self.detect(pairs)), columns=list(Row.__annotations__))


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
        "precision": detector.predictor.compute.precision,
        "seen": sorted(detector.seen),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def load(folder: Path) -> Detector:
    """The detector that save wrote, on the best device that is there.

    Raises UserError where something of it is missing or damaged.
    """
    for path in (folder / DESCRIPTION, folder / WEIGHTS):
        if path.exists() and not path.is_file():  # a device has no end, a pipe no beginning
            raise _damaged(path, FileNotFoundError("no file"))
    try:
        made = _described(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise _damaged(folder / DESCRIPTION, error) from error
    settings, path = made["settings"], folder / WEIGHTS
    network = PneumothoraxNet(settings["network"])
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever damaged bytes make the reader raise
        raise _damaged(path, error) from error
    # Not timed anew: the thresholds suit the answers in this format.
    compute = choose_compute_for(made.pop("precision"), Device())
    return Detector(predictor=Predictor(network, compute, settings["tta_flip"]), **made)


def _described(found: Any) -> dict[str, Any]:
    """What a description holds, by the names of Detector's fields; raises many errors where it is damaged."""
    settings = dict(_checked(found["settings"], dict))
    if settings["network"] not in NETWORKS:
        raise ValueError(f"unknown network {str(settings['network'])[:40]}")
    for name in ("fold", "holdout", "folds", "split_seed"):  # score makes the model's split from these
        _checked(settings[name], str if name == "fold" else (int, float))
    if not isinstance(settings["tta_flip"], bool):
        raise TypeError("tta_flip is neither true nor false")
    thresholds = {
        name: _checked(value, int if name == "min_area_px" else (int, float))
        for name, value in _checked(found["thresholds"], dict).items()
    }
    image_size = _checked(found["image_size"], int)
    if not 1 <= image_size <= LARGEST_PX:
        raise ValueError("image_size is no number of pixels")
    precision = found.get("precision", "auto")
    if precision not in ("auto", "fp32", *FORMATS):
        raise ValueError("unknown precision")
    return {
        "image_size": image_size,
        "thresholds": Thresholds(**thresholds),
        "settings": settings,
        "data_fingerprint": _checked(found["data_fingerprint"], str),
        "precision": precision,
        "seen": frozenset(_checked(text, str) for text in _checked(found.get("seen", []), list)),
    }


def _checked(value: Any, kind: type | tuple[type, ...]) -> Any:
    """The value itself; raises TypeError where it is of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} in a wrong place")
    return value


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n")[0][:200]
    return UserError(
        f"{path}: missing or damaged ({type(error).__name__}: {reason}); log the model anew with `train`"
    )
