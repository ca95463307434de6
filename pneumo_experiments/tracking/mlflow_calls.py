"""The calls that a run sends to MLflow; their arguments are valid JSON.

All are idempotent, apart from a model and an image: a call whose response was lost is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from PIL import Image

from pneumo_experiments.tracking.models import upload
from pneumo_experiments.tracking.servers import if_exists
from pneumo_experiments.words import escape

SCORE_TAG = "score."  # tag of a model: followed by the identity of the scored images


def _dataset(description: Mapping[str, str]) -> Dataset:
    return Dataset(**{name: escape(text) for name, text in description.items()})


def metrics(
    run_id: str,
    values: Mapping[str, float],
    timestamp: int,
    step: int | None = None,
    model_id: str | None = None,
    images: Mapping[str, str] | None = None,
) -> None:
    """Logs metrics of a run, and of the model if one is named; ``timestamp`` in ms since 1970.

    ``images`` is the ``to_dict`` of the data set that they were measured on.
    """
    scored = _dataset(images) if images else None
    mlflow.log_metrics(
        dict(values), step, run_id=run_id, timestamp=timestamp, model_id=model_id, dataset=scored
    )


def training_scores(
    run_id: str,
    model_id: str,
    values: Mapping[str, float],
    constants: Mapping[str, str],
    timestamp: int,
) -> None:
    """Logs a model's scores, measured by a run, in the run that trained it, unless that is deleted.

    At another step than the model's: else MLflow would give them to the model once more, without the images.
    """
    client = MlflowClient()
    model = if_exists(client.get_logged_model, model_id)
    training = if_exists(client.get_run, model.source_run_id) if model and model.source_run_id else None
    if training and training.info.run_id != run_id and training.info.lifecycle_stage == "active":
        metrics(training.info.run_id, values, timestamp, step=1)
        params(training.info.run_id, constants)


def params(run_id: str, values: Mapping[str, str]) -> None:
    """Logs params that the run does not have yet: MLflow refuses a second value for one name."""
    client = MlflowClient()
    existing = client.get_run(run_id).data.params
    new = [Param(name, escape(text)) for name, text in values.items() if name not in existing]
    client.log_batch(run_id, params=new)


def tags(run_id: str, values: Mapping[str, str]) -> None:
    """Sets tags of a run; replaces earlier values."""
    MlflowClient().log_batch(run_id, tags=[RunTag(name, escape(text)) for name, text in values.items()])


def model_tags(model_id: str, values: Mapping[str, str]) -> None:
    """Sets tags of a logged model; replaces earlier values."""
    MlflowClient().set_logged_model_tags(model_id, dict(values))


def dataset(run_id: str, description: Mapping[str, str], context: str) -> None:
    """Logs a data set, described by its ``to_dict``, as an input of a run."""
    data_input = DatasetInput(_dataset(description), [InputTag("mlflow.data.context", context)])
    try:
        MlflowClient().log_inputs(run_id, [data_input])
    except MlflowException as error:
        if "IntegrityError" not in str(error):
            raise
        # Another process created the same data set between MLflow's look-up and its insert: now it exists.
        MlflowClient().log_inputs(run_id, [data_input])


def artifact(run_id: str, path: str, folder: str) -> None:
    """Logs a file as artifact of a run, in a folder of the artifacts ("" for the top)."""
    MlflowClient().log_artifact(run_id, path, folder or None)  # pyright: ignore[reportUnknownMemberType]


def image(run_id: str, path: str, key: str, step: int, timestamp: int) -> None:
    """Logs an image for the UI's grid, under a key, at a step; ``timestamp`` in ms since 1970."""
    client: Any = MlflowClient()
    try:  # the tag that log_image sets last: two workers that set it first would collide
        client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
    with Image.open(path) as picture:
        client.log_image(run_id, picture, key=key, step=step, timestamp=timestamp, synchronous=True)


def end(run_id: str, status: str, end_time: int) -> None:
    """Ends a run; ``end_time`` in ms since 1970."""
    MlflowClient().set_terminated(run_id, status, end_time)


CALLS: Mapping[str, Callable[..., str | None]] = {"model": upload} | {
    call.__name__: call
    for call in (metrics, training_scores, params, tags, model_tags, dataset, artifact, image, end)
}
