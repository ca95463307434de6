"""A trained network with its thresholds, from DICOM bytes to run lengths."""

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
import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
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
BATCH_SIZE = 16  # radiographs
MAX_IMAGE_SIZE_PX = 16_384  # a damaged number must not exhaust the memory


class Row(TypedDict):
    """The model's output for one radiograph; ``error`` is empty on success."""

    image_id: str
    presence: float
    area_px: int
    rle: str
    error: str


@dataclass(frozen=True)
class Detector:
    """A predictor, its input size in pixels, its thresholds and the settings that trained it.

    ``seen`` holds digests of the images that trained it or chose its epoch and thresholds.
    """

    predictor: Predictor
    image_size: int
    thresholds: Thresholds
    settings: Mapping[str, Any]
    data_fingerprint: str
    seen: frozenset[str] = frozenset()

    def detect(self, files: Iterable[File]) -> Generator[Row]:
        """Presence and mask of each radiograph, in order; an unusable file has its error in its row.

        Files (image id, DICOM bytes) are read slightly ahead, decoded in parallel and predicted in batches.
        """
        with closing(decode_all(files, self.image_size)) as decoded:
            while batch := list(islice(decoded, BATCH_SIZE)):
                pixels = [image.pixels for _, image in batch if isinstance(image, DecodedImage)]
                predictions = self.predictor.predict(np.stack(pixels), BATCH_SIZE) if pixels else iter(())
                for image_id, image in batch:
                    if isinstance(image, DecodedImage):
                        yield self._row(image_id, (image.rows, image.columns), next(predictions))
                    else:
                        yield Row(image_id=image_id, presence=nan, area_px=0, rle="-1", error=str(image))

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
        """Called by MLflow: columns ``image_id`` and ``dicom`` (bytes) in, the columns of Row out."""
        columns: Any = frame  # pandas has no type stubs
        image_ids, files = columns["image_id"].tolist(), columns["dicom"].tolist()
        pairs = ((str(i), bytes(f)) for i, f in zip(image_ids, files, strict=True))
        return pd.DataFrame(list(self.detect(pairs)), columns=list(Row.__annotations__))


def save(folder: Path, detector: Detector) -> None:
    """Writes weights and description into an existing folder; raises UserError when the disk is full."""
    try:
        torch.save(detector.predictor.network.state_dict(), folder / WEIGHTS)
    except RuntimeError as error:  # torch raises it when the disk is full
        raise UserError(
            f"{folder}: has no room for the model; free some, or name another folder in TMPDIR"
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
    """The detector that ``save`` wrote, on the best available device.

    Raises UserError when a file is missing or damaged.
    """
    for path in (folder / DESCRIPTION, folder / WEIGHTS):
        if path.exists() and not path.is_file():  # reading a device or pipe would never end
            raise _damaged(path, FileNotFoundError("not a regular file"))
    try:
        fields = _parse(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise _damaged(folder / DESCRIPTION, error) from error
    settings, path = fields["settings"], folder / WEIGHTS
    network = PneumothoraxNet(settings["network"])
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged bytes raise errors of many types
        raise _damaged(path, error) from error
    # The recorded format, not the fastest: the thresholds were chosen on predictions in it.
    compute = choose_compute_for(fields.pop("precision"), Device())
    return Detector(predictor=Predictor(network, compute, settings["tta_flip"]), **fields)


def _parse(description: Any) -> dict[str, Any]:
    """Detector's fields from a description; raises errors of several types when it is damaged."""
    settings = dict(_require(description["settings"], dict))
    if settings["network"] not in NETWORKS:
        raise ValueError(f"unknown network {str(settings['network'])[:40]}")
    for name in ("fold", "holdout", "folds", "split_seed"):  # score recreates the model's split from these
        _require(settings[name], str if name == "fold" else (int, float))
    if not isinstance(settings["tta_flip"], bool):
        raise TypeError("tta_flip is neither true nor false")
    thresholds = {
        name: _require(value, int if name == "min_area_px" else (int, float))
        for name, value in _require(description["thresholds"], dict).items()
    }
    image_size = _require(description["image_size"], int)
    if not 1 <= image_size <= MAX_IMAGE_SIZE_PX:
        raise ValueError("image_size is out of range")
    precision = description.get("precision", "auto")
    if precision not in ("auto", "fp32", *FORMATS):
        raise ValueError("unknown precision")
    return {
        "image_size": image_size,
        "thresholds": Thresholds(**thresholds),
        "settings": settings,
        "data_fingerprint": _require(description["data_fingerprint"], str),
        "precision": precision,
        "seen": frozenset(_require(text, str) for text in _require(description.get("seen", []), list)),
    }


def _require(value: Any, expected: type | tuple[type, ...]) -> Any:
    """The value itself; raises TypeError when it has another type."""
    if not isinstance(value, expected) or isinstance(value, bool):
        raise TypeError(f"unexpected {type(value).__name__}")
    return value


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n")[0][:200]
    return UserError(f"{path}: missing or damaged ({type(error).__name__}: {reason}); train again")
