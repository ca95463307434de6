"""Logs metrics, params, tags and artifacts of the active run; does nothing in a helper process."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

import mlflow
import numpy as np
import yaml
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import (
    LocalArtifactDatasetSource,  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
)
from mlflow.store.artifact.artifact_repo import verify_artifact_path  # pyright: ignore[reportUnknownVariableType]
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.validation import (
    _validate_metric,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    _validate_param,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import as_config, as_text
from pneumo_experiments.tracking.addresses import escape_surrogates
from pneumo_experiments.tracking.buffered_client import StoreUnreachable
from pneumo_experiments.tracking.context import active_client, is_enabled
from pneumo_experiments.tracking.models import model_id_of


def _send(call: str, **arguments: Any) -> None:
    """Sends a call of tracking.calls about the active run."""
    if is_enabled():
        active_client().send_or_buffer(call, run_id=_run_id(), **arguments)


def _run_id() -> str:
    active = mlflow.active_run()
    assert active is not None
    return active.info.run_id


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def describe(text: str) -> None:
    """Sets the description that the UI shows for the active run; nothing for an empty text."""
    if text:
        _send("tags", values={"mlflow.note.content": text})


def rename(name: str) -> None:
    """Gives the active run another name."""
    _send("tags", values={"mlflow.runName": name})


def log_metrics(values: Mapping[str, float], step: int | None = None) -> None:
    """Logs metrics of the active run; raises MlflowException for an invalid name."""
    numbers, now = {name: float(value) for name, value in values.items()}, now_ms()
    for name, value in numbers.items():
        _validate_metric(name, value, now, step or 0)  # here: a buffered call is refused too late
    _send("metrics", values=numbers, step=step, timestamp=now, model_id=None)


def log_scores(
    values: Mapping[str, float], model: str | None, path: Path, identity: str, facts: Mapping[str, object]
) -> None:
    """Logs metrics of the active run, and of the model at an address if given, linked to the scored images.

    ``identity`` (at most 36 characters) identifies images of the data set at ``path`` and their true masks.
    ``facts`` about them, among them the subset, become a tag of the model.
    """
    images = _data_set(path, f"{path.stem} {facts['subset']}", identity)
    texts = {name: as_text(value) for name, value in facts.items()}
    model_id = None if model is None else model_id_of(model)
    _send("scores", values=dict(values), timestamp=now_ms(), model_id=model_id, images=images, facts=texts)


def log_params(values: Mapping[str, object]) -> None:
    """Logs params that the step computed; a param that the run has already keeps its value.

    Raises MlflowException for an invalid name.
    """
    texts = {name: as_text(value) for name, value in values.items()}
    for name, text in texts.items():
        _validate_param(name, text)
    _send("params", values=texts)


def log_image(pixels: NDArray[np.uint8], name: str) -> None:
    """Logs RGB pixels (H, W, 3) as an image file, artifact ``name`` of the active run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(name).name)
        Image.fromarray(pixels).save(path)
        _log_artifact(path, name)


def log_json(value: Mapping[str, Any], name: str) -> None:
    """Logs a JSON file as artifact ``name`` of the active run."""
    _log_text(json.dumps(value, indent=2), name)


def log_config(settings: object) -> None:
    """Logs all settings as ``config.yaml``, which repeats the step: ``-P config=…``. Passwords are hidden."""
    values = {
        name: hide_passwords(value) if isinstance(value, str) else value
        for name, value in as_config(settings).items()
    }
    log_yaml(values, "config.yaml")


def log_yaml(values: Mapping[str, Any], name: str) -> None:
    """Logs a YAML file as artifact ``name`` of the active run."""
    _log_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), name)


def log_page(html: str, name: str) -> None:
    """Logs an HTML page as artifact ``name`` of the active run."""
    _log_text(html, name)


def _log_text(text: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(name).name)
        path.write_text(text, encoding="utf-8")
        _log_artifact(path, name)


def log_table(columns: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> None:
    """Logs a table as artifacts ``name``.csv and ``name``.json, the latter in the format of mlflow.log_table.

    mlflow.log_table itself would append the rows a second time when it is retried after a lost response.
    """
    with tempfile.TemporaryDirectory() as folder:
        as_csv, as_json = Path(folder, f"{name}.csv"), Path(folder, f"{name}.json")
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        as_json.write_text(json.dumps({"columns": [*columns], "data": [*rows]}), encoding="utf-8")
        log_file(as_csv)
        log_file(as_json)
    _send("tags", values={MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": f"{name}.json", "type": "table"}])})


def log_file(path: Path) -> None:
    """Logs a file as artifact of the active run."""
    _log_artifact(path, path.name)


def _log_artifact(path: Path, name: str) -> None:
    verify_artifact_path(name)  # the store would answer with a server error
    if not is_enabled():
        return
    client, run_id = active_client(), _run_id()
    folder = str(PurePosixPath(escape_surrogates(name)).parent).removeprefix(".")
    with tempfile.TemporaryDirectory() as temporary:
        file_name = escape_surrogates(path.name)
        if path.name != file_name:  # no store accepts it
            path = Path(shutil.copy(path, Path(temporary, file_name)))
        try:
            client.send("artifact", run_id=run_id, path=str(path), folder=folder)
        except StoreUnreachable:
            client.buffer("artifact", run_id=run_id, path=client.copy(path), folder=folder)


def log_dataset(path: Path, fingerprint: str, context: str) -> None:
    """Logs the data set as an input of the active run; its digest is the start of the fingerprint."""
    _send("dataset", description=_data_set(path, path.stem, fingerprint[:16]), context=context)


def _data_set(path: Path, name: str, digest: str) -> dict[str, Any]:
    source = cast("Any", LocalArtifactDatasetSource(str(path.resolve())))
    return MetaDataset(source, name=name, digest=digest).to_dict()
