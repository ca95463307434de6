"""A detector as files: a description, and the weights of each member."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import torch

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.calibration import Calibration
from pneumo_experiments.learning.device import FORMATS, choose_compute
from pneumo_experiments.learning.network import NETWORKS, PneumothoraxNet
from pneumo_experiments.learning.predict import VIEWS, Predictor
from pneumo_experiments.metrics.thresholds import NativeThresholds, Thresholds
from pneumo_experiments.serving.detector import Detector, TrainedNetwork
from pneumo_experiments.settings import Device
from pneumo_experiments.settings.networks import is_network, libraries_of

FOLDER = "detector"  # its name in the folder `data` of a logged model
WEIGHTS, DESCRIPTION = "weights.pt", "model.json"
MAX_IMAGE_SIZE_PX = 16_384  # a damaged number must not exhaust the memory
MAX_MEMBERS = 1000
THRESHOLDS = {kind.min_area_of: kind for kind in (Thresholds, NativeThresholds)}


@contextmanager
def new_folder() -> Generator[Path]:
    """A new folder for ``save``, with the name that it has in a logged model; removed after the block."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / FOLDER
        folder.mkdir()
        yield folder


def save(folder: Path, detector: Detector) -> None:
    """Writes weights and description into an existing folder; raises UserError when the disk is full."""
    members: list[dict[str, Any]] = []
    for member, path in zip(detector.members, _weights(folder, len(detector.members)), strict=True):
        predictor = member.predictor
        try:
            torch.save(predictor.network.state_dict(), path)
        except RuntimeError as error:  # torch raises it when the disk is full
            raise UserError(
                f"{folder}: has no room for the model; free some, or name another folder in TMPDIR"
            ) from error
        numbers = {"precision": predictor.compute.precision, "calibration": asdict(predictor.calibration)}
        members.append({"settings": dict(member.settings)} | numbers)
    description = {
        "image_size": detector.image_size,
        "thresholds": asdict(detector.thresholds),
        "min_area_of": detector.thresholds.min_area_of,
        "data_fingerprint": detector.data_fingerprint,
        "seen": sorted(detector.training_images),
        "prevalence": detector.prevalence,
        # Beyond the package's own dependencies: for who serves it.
        "libraries": sorted(
            {name for each in detector.members for name in libraries_of(each.settings["network"])}
        ),
        **(members[0] if len(members) == 1 else {"members": members}),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def load(folder: Path) -> Detector:
    """The detector that ``save`` wrote, on the best available device.

    Raises UserError when a file is missing or damaged.
    """
    _require_file(folder / DESCRIPTION)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        fields, members = _parse(description)
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise _damaged(folder / DESCRIPTION, error) from error
    paths = _weights(folder, len(members))
    loaded = tuple(_load_member(path, member) for path, member in zip(paths, members, strict=True))
    return Detector(members=loaded, **fields)


def _weights(folder: Path, members: int) -> Sequence[Path]:
    """The file of each member's weights."""
    if members == 1:
        return [folder / WEIGHTS]
    return [folder / f"{Path(WEIGHTS).stem}-{number}.pt" for number in range(members)]


def _load_member(path: Path, member: tuple[dict[str, Any], str, Calibration]) -> TrainedNetwork:
    settings, precision, calibration = member
    _require_file(path)
    try:
        with torch.device("meta"):  # its random weights are replaced
            network = PneumothoraxNet(settings["network"])
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from error
    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        own = network.state_dict()
        for name, tensor in state.items():
            if name in own and tensor.dtype != own[name].dtype:
                raise TypeError(f"{name} holds {tensor.dtype}")
        network.load_state_dict(state, assign=True)
    except Exception as error:  # damaged bytes raise errors of many types
        raise _damaged(path, error) from error
    # The recorded format, not the fastest: the thresholds were chosen on predictions in it.
    compute = choose_compute(Device(), precision)
    return TrainedNetwork(Predictor(network, compute, settings["tta"], calibration), settings)


def _parse(description: Any) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str, Calibration]]]:
    """Detector's fields from a description, and settings, number format and calibration of each member.

    Raises errors of several types when it is damaged.
    """
    thresholds = {
        name: _require(value, int if name == "min_area_px" else (int, float))
        for name, value in _require(description["thresholds"], dict).items()
    }
    prevalence = description.get("prevalence")
    fields = {
        "image_size": _require(description["image_size"], int, 1, MAX_IMAGE_SIZE_PX),
        "thresholds": THRESHOLDS[description.get("min_area_of")](**thresholds),
        "data_fingerprint": _require(description["data_fingerprint"], str),
        "training_images": frozenset(_require(t, str) for t in _require(description.get("seen", []), list)),
        "prevalence": None if prevalence is None else _require(prevalence, (int, float), 0, 1),
    }
    members = _require(description.get("members", [description]), list)
    _require(len(members), int, 1, MAX_MEMBERS)
    return fields, [_parse_member(member) for member in members]


def _parse_member(description: Any) -> tuple[dict[str, Any], str, Calibration]:
    settings, precision = dict(_require(description["settings"], dict)), description.get("precision", "auto")
    for name in ("fold", "holdout", "folds", "split_seed"):  # score recreates the model's split from these
        _require(settings[name], str if name == "fold" else (int, float))
    if _require(settings["network"], str) not in NETWORKS and not is_network(settings["network"]):
        raise ValueError(f"unknown {settings['network'][:40]}")
    for value, known in ((settings["tta"], VIEWS), (precision, ("auto", "fp32", *FORMATS))):
        if value not in known:
            raise ValueError(f"unknown {str(value)[:40]}")
    return settings, precision, Calibration(**description.get("calibration", {}))


def _require(value: Any, expected: Any, low: float = -inf, high: float = inf) -> Any:
    """The value itself; raises TypeError when it has another type, ValueError for one out of range."""
    if not isinstance(value, expected) or isinstance(value, bool):
        raise TypeError(f"unexpected {type(value).__name__}")
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"{value} is not from {low} to {high}")
    return value


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # reading a device or pipe would never end
        raise _damaged(path, FileNotFoundError("not a regular file"))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n")[0][:200]
    return UserError(f"{path}: missing or damaged ({type(error).__name__}: {reason}); train again")
