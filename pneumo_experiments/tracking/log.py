"""Logs metrics, params, tags, artifacts and models of the active run; does nothing in a helper process."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import quote

import mlflow
import numpy as np
import yaml
from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import (
    LocalArtifactDatasetSource,  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
)
from mlflow.entities import RunInfo
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import as_text
from pneumo_experiments.tracking.buffered_client import BufferedClient, StoreUnreachable
from pneumo_experiments.tracking.mlflow_calls import SCORE_TAG
from pneumo_experiments.tracking.models import model_info, save_model
from pneumo_experiments.tracking.servers import local_path
from pneumo_experiments.words import command, escape

UI = "http://127.0.0.1:5000"  # of `pneumo ui`, unless that port is taken
MODEL_TRAINING = "workflowType=machine_learning"  # else the UI shows its pages for language models
LONGEST_NAME = 250  # characters, in PostgreSQL
NAME_TAG = "pneumo.name"  # the name that the program gave a run; if it has another, a person gave that
HEADLINE = ("dice", "dice_low", "dice_high", "dice_positive")  # of the hold-out, on the training's run too

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveRun:
    """A run of this process; ``client`` is shared by the runs that are nested in each other."""

    info: RunInfo
    client: BufferedClient
    is_named: bool  # by a person
    tables: list[str] = field(default_factory=list[str])

    @property
    def id(self) -> str:
        """Id of the run."""
        return self.info.run_id


active_runs: list[ActiveRun] = []  # the innermost one last; none in a helper process
_disabled: list[bool] = []


@contextmanager
def disabled() -> Generator[None]:
    """Within it, runs and log functions do nothing: for a process that helps another one, which logs."""
    _disabled.append(True)
    try:
        yield
    finally:
        _disabled.pop()


def is_enabled() -> bool:
    """False within ``disabled``."""
    return not _disabled


def active_run() -> str | None:
    """Id of the active run; None without one."""
    return active_runs[-1].id if active_runs else None


def link_to_active_run(artifact: str = "") -> str:
    """The active run's page in the UI, or that of an artifact, relative to every other page of the UI."""
    return link_to(active_runs[-1].info, artifact)


def link_to(run: RunInfo, artifact: str = "") -> str:
    """A run's page in the UI, or that of an artifact, relative to every other page of the UI."""
    page = f"#/experiments/{run.experiment_id}/runs/{run.run_id}"
    return f"{page}/artifacts/{quote(artifact)}" if artifact else f"{page}?{MODEL_TRAINING}"


def page_of_active_run() -> str:
    """Address of the active run's page in the UI; for a database as `pneumo ui` serves it."""
    uri, page = mlflow.get_tracking_uri(), link_to_active_run()
    return (
        f"{hide_passwords(uri)}/{page}" if uri.startswith("http") else f"{UI}/{page}, after: {command('ui')}"
    )


def artifacts_of_active_run() -> str:
    """Location of the active run's artifacts: a folder if they are local, else an address."""
    address = active_runs[-1].info.artifact_uri or ""
    return str(local_path(address) or address)


def send(call: str, **arguments: Any) -> None:
    """Sends a call of tracking.mlflow_calls, by default about the active run, now or when it is possible."""
    if is_enabled():
        active_runs[-1].client.send_or_buffer(call, **{"run_id": active_runs[-1].id, **arguments})


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def describe(text: str) -> None:
    """Sets the description that the UI shows for the active run."""
    send("tags", values={MLFLOW_RUN_NOTE: text})


def rename(name: str) -> None:
    """Gives the active run another name, unless a person named it."""
    if is_enabled() and not active_runs[-1].is_named:
        send("tags", values={MLFLOW_RUN_NAME: as_name(name), NAME_TAG: as_name(name)})


def as_name(text: str) -> str:
    """The text as the name of a run: without passwords, in UTF-8, and as long as every database takes it."""
    return escape(hide_passwords(text))[:LONGEST_NAME]


def log_thresholds(values: Mapping[str, float]) -> None:
    """Sets the tag ``thresholds`` of the active run: they are results, no params."""
    text = ", ".join(f"{name} {value:g}" for name, value in values.items())
    send("tags", values={"thresholds": text})


def log_metrics(values: Mapping[str, float], step: int | None = None) -> None:
    """Logs metrics of the active run."""
    numbers = {name: float(value) for name, value in values.items()}
    send("metrics", values=numbers, timestamp=now_ms(), step=step)


def logged_steps(name: str) -> set[int]:
    """The steps at which the active run has a metric."""
    if not is_enabled():
        return set()
    return {metric.step for metric in MlflowClient().get_metric_history(active_runs[-1].id, name)}


def log_scores(
    values: Mapping[str, float], model: str | None, path: Path, identity: str, facts: Mapping[str, object]
) -> None:
    """Logs metrics of the active run, and of the model at an address if given, linked to the scored images.

    ``identity`` (at most 36 characters) identifies images of the data set at ``path`` and their true masks.
    ``facts`` about them, among them the subset, become a tag of the model, set before the metrics: no metric
    of the model is without them.
    """
    images = _data_set(path, f"{path.stem} {facts['subset']}", identity)
    model_id = None if model is None else model_info(model).model_id
    if model_id is not None and is_enabled():
        texts = json.dumps({name: as_text(value) for name, value in facts.items()})
        tags = {SCORE_TAG + identity: texts}
        active_runs[-1].client.send_or_buffer("model_tags", model_id=model_id, values=tags)
    send("metrics", values=dict(values), timestamp=now_ms(), model_id=model_id, images=images)
    if facts["subset"] == "holdout" and model_id is not None:  # people compare trainings by it
        headline = {name: value for name, value in values.items() if name in HEADLINE}
        constant = {name: as_text(value) for name, value in facts.items() if name == "dice_baseline"}
        send("training_scores", model_id=model_id, values=headline, constants=constant, timestamp=now_ms())


def log_params(values: Mapping[str, object]) -> None:
    """Logs params of the active run; a param that it has already keeps its value."""
    send("params", values={name: as_text(value) for name, value in values.items()})


def log_image(pixels: NDArray[np.uint8], name: str) -> None:
    """Logs RGB pixels (H, W, 3) as an image file, artifact ``name`` of the active run."""
    with _new_artifact(name) as path:
        Image.fromarray(pixels).save(path)


def log_image_step(pixels: NDArray[np.uint8], key: str, step: int, run_id: str | None = None) -> None:
    """Logs RGB pixels (H, W, 3) for the image grid of the UI, which has a slider over the steps of a ``key``.

    Of the active run, or of the one given.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.png")
        Image.fromarray(pixels).save(path)
        other = {"run_id": run_id} if run_id else {}
        send("image", path=str(path), key=key, step=step, timestamp=now_ms(), **other)


def log_json(value: Mapping[str, Any], name: str) -> None:
    """Logs a JSON file as artifact ``name`` of the active run."""
    log_page(json.dumps(value, indent=2), name)


def log_yaml(values: Mapping[str, Any], name: str) -> None:
    """Logs a YAML file as artifact ``name`` of the active run."""
    log_page(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), name)


def log_page(text: str, name: str) -> None:
    """Logs an HTML page, or any other text, as artifact ``name`` of the active run."""
    with _new_artifact(name) as path:
        path.write_text(text, encoding="utf-8")


def log_csv(columns: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> None:
    """Logs a table as artifact ``name``.csv of the active run."""
    with _new_artifact(f"{name}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def log_table(columns: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> None:
    """Logs a table as artifacts ``name``.csv and ``name``.json, the latter in the format of mlflow.log_table.

    mlflow.load_table(f"{name}.json") reads that of all runs. mlflow.log_table itself would append the rows a
    second time when it is retried after a lost response.
    """
    log_csv(columns, rows, name)
    log_page(json.dumps({"columns": [*columns], "data": [*rows]}), f"{name}.json")
    if is_enabled():
        active_runs[-1].tables.append(f"{name}.json")
        tables = [{"path": table, "type": "table"} for table in active_runs[-1].tables[::-1]]
        send("tags", values={MLFLOW_LOGGED_ARTIFACTS: json.dumps(tables)})  # the UI opens the first


def log_file(path: Path) -> None:
    """Logs a file as artifact of the active run."""
    if path.name == escape(path.name):
        send("artifact", path=str(path.absolute()), folder="")
        return
    with _new_artifact(path.name) as copy:  # no store accepts its name
        shutil.copy(path, copy)


@contextmanager
def _new_artifact(name: str) -> Generator[Path]:
    """Yields the path of a file for the block to write; it is then logged as artifact ``name``."""
    target = PurePosixPath(escape(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, target.name)
        yield path
        send("artifact", path=str(path), folder=str(target.parent).removeprefix("."))


def log_dataset(
    path: Path, fingerprint: str, context: str, profile: Mapping[str, object] | None = None
) -> None:
    """Logs the data set as an input of the active run; its digest is the start of the fingerprint.

    The UI shows the ``profile``, numbers by name, wherever it names the data set.
    """
    description = _data_set(path, path.stem, fingerprint[:16])
    description |= {} if profile is None else {"profile": json.dumps(dict(profile))}
    send("dataset", description=description, context=context)


def _data_set(path: Path, name: str, digest: str) -> dict[str, Any]:
    source = cast("Any", LocalArtifactDatasetSource(str(path.resolve())))
    return MetaDataset(source, name=name, digest=digest).to_dict()


def log_model(data: Path, name: str = "pneumothorax") -> str:
    """Logs the folder that serving.save wrote as a model of the active run; returns ``models:/<id>``.

    If the store is unreachable, the model is buffered, to be logged later: returns its local folder.
    """
    run = active_runs[-1]
    kept = run.client.folder.with_name(f"model-{run.id}")
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary, "model")
        save_model(saved, data)
        try:
            return str(run.client.send("model", run_id=run.id, path=str(saved), name=name))
        except StoreUnreachable:
            shutil.rmtree(kept, ignore_errors=True)  # of an earlier process of this run
            shutil.copytree(saved, kept)
    path = os.path.relpath(kept, run.client.folder)
    run.client.buffer("model", run_id=run.id, path=path, name=name)
    log.warning("%s: tracking server unreachable: model saved to %s", run.client.store, kept)
    return str(kept)
