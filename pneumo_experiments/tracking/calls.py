"""What is sent to MLflow once a run has started: calls whose arguments fit into a line of JSON.

Each may be sent twice without harm: a call whose answer was lost is sent again.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

LOADER = "pneumo_experiments.serving"
SCORE_TAG = "score."  # of a model: what is known of the images with the identity that follows

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image_id"), ColSpec(DataType.binary, "dicom")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "image_id"),
            ColSpec(DataType.double, "presence"),
            ColSpec(DataType.long, "area_px"),
            ColSpec(DataType.string, "rle"),
            ColSpec(DataType.string, "error"),
        ]
    ),
)


def metrics(
    run_id: str, values: Mapping[str, float], step: int | None, timestamp: int, model_id: str | None
) -> None:
    """Metrics of a run, and of the model where one is named; ``timestamp`` in ms since 1970."""
    mlflow.log_metrics(dict(values), step=step, run_id=run_id, timestamp=timestamp, model_id=model_id)


def scores(
    run_id: str,
    values: Mapping[str, float],
    timestamp: int,
    model_id: str | None,
    images: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Metrics of a run, and of the model where one is named, that bear the identity of what was scored.

    ``images`` is the ``to_dict`` of a data set whose digest is that identity. ``facts`` on them become a tag
    of the model, before the metrics: a metric of the model never lacks them.
    """
    scored = Dataset(**images)
    if model_id is not None:
        MlflowClient().set_logged_model_tags(model_id, {SCORE_TAG + scored.digest: json.dumps(dict(facts))})
    mlflow.log_metrics(dict(values), run_id=run_id, timestamp=timestamp, model_id=model_id, dataset=scored)


def params(run_id: str, values: Mapping[str, str]) -> None:
    """Params of a run that it does not have yet: a second text for one name would be refused."""
    client = MlflowClient()
    there = client.get_run(run_id).data.params
    new = [Param(name, text) for name, text in values.items() if name not in there]
    client.log_batch(run_id, params=new)


def tags(run_id: str, values: Mapping[str, str]) -> None:
    """Tags of a run; an earlier text for one name is replaced."""
    MlflowClient().log_batch(run_id, tags=[RunTag(name, text) for name, text in values.items()])


def dataset(run_id: str, description: Mapping[str, Any], context: str) -> None:
    """A data set, as its ``to_dict`` describes it, as an input of a run."""
    used = DatasetInput(Dataset(**description), [InputTag("mlflow.data.context", context)])
    MlflowClient().log_inputs(run_id, [used])


def artifact(run_id: str, path: str, folder: str) -> None:
    """A file as artifact of a run, in a folder of the artifacts ("" for the top)."""
    MlflowClient().log_artifact(run_id, path, folder or None)


def model(run_id: str, path: str, requirements: Sequence[str]) -> str:
    """What serving.save wrote to the folder ``path`` as a model of a run; returns ``models:/<id>``."""
    active = mlflow.active_run()
    inside = active is not None and active.info.run_id == run_id
    with nullcontext() if inside else mlflow.start_run(run_id, nested=True), _no_example():
        info = mlflow.pyfunc.log_model(name="pneumothorax", **_pyfunc_of(path, requirements))
    return str(info.model_uri)


def save_model(folder: Path, path: str, requirements: Sequence[str]) -> None:
    """The same model as a new local folder; what serving.save wrote lies in its ``data``."""
    with _no_example():
        mlflow.pyfunc.save_model(str(folder), **_pyfunc_of(path, requirements))


@contextmanager
def _no_example() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ii]nput example")  # the signature is given instead
        yield


def _pyfunc_of(path: str, requirements: Sequence[str]) -> dict[str, Any]:
    return {
        "loader_module": LOADER,
        "data_path": path,
        "code_paths": [str(Path(__file__).parents[1])],
        "signature": SIGNATURE,
        # Given, not guessed: guessing loads the model in a new process and takes seconds.
        "pip_requirements": list(requirements),
    }


def end(run_id: str, status: str, end_time: int) -> None:
    """The end of a run; ``end_time`` in ms since 1970."""
    MlflowClient().set_terminated(run_id, status, end_time)


CALLS: dict[str, Callable[..., str | None]] = {
    "metrics": metrics,
    "scores": scores,
    "params": params,
    "tags": tags,
    "dataset": dataset,
    "artifact": artifact,
    "model": model,
    "end": end,
}
