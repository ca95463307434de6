"""The calls that a run sends to MLflow; their arguments are valid JSON.

All are idempotent: a call whose response was lost is sent again.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pneumo_experiments.settings import NONE

LOADER = "pneumo_experiments.serving"
PACKAGE = Path(__file__).parents[1]
EXAMPLE = PACKAGE / "serving" / "example.dcm"  # a synthetic radiograph
SCORE_TAG = "score."  # tag of a model: followed by the identity of the scored images

SIGNATURE = ModelSignature(
    # The dicom column is text (base64), since MLflow answers a null or an undecodable text in a binary column
    # with an error for the whole batch; bytes pass as well. Both columns are optional for MLflow: the model
    # answers what is missing in each row.
    inputs=Schema(
        [
            ColSpec(DataType.string, "image_id", required=False),
            ColSpec(DataType.string, "dicom", required=False),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(DataType.string, "image_id"),
            ColSpec(DataType.double, "presence", required=False),  # null where a file cannot be used
            ColSpec(DataType.long, "area_px"),
            ColSpec(DataType.string, "rle"),
            ColSpec(DataType.string, "error"),
        ]
    ),
    params=ParamSchema(  # thresholds and prevalence instead of the model's own, and pictures as columns
        [
            ParamSpec("presence_threshold", DataType.double, None),
            ParamSpec("top_score", DataType.double, None),
            ParamSpec("min_area_px", DataType.long, None),
            ParamSpec("bottom_score", DataType.double, None),
            ParamSpec("prevalence", DataType.double, None),
            ParamSpec("overlay", DataType.boolean, False),
            ParamSpec("mask", DataType.boolean, False),
        ]
    ),
)


def metrics(
    run_id: str, values: Mapping[str, float], step: int | None, timestamp: int, model_id: str | None
) -> None:
    """Logs metrics of a run, and of the model if one is named; ``timestamp`` in ms since 1970."""
    mlflow.log_metrics(dict(values), step=step, run_id=run_id, timestamp=timestamp, model_id=model_id)


def scores(
    run_id: str,
    values: Mapping[str, float],
    timestamp: int,
    model_id: str | None,
    images: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Logs metrics of a run, and of the model if one is named, linked to the scored images.

    ``images`` is the ``to_dict`` of a data set whose digest identifies the images. ``facts`` about them
    become a tag of the model, set before the metrics: no metric of the model is without them.
    """
    scored = Dataset(**images)
    if model_id is not None:
        MlflowClient().set_logged_model_tags(model_id, {SCORE_TAG + scored.digest: json.dumps(dict(facts))})
    mlflow.log_metrics(dict(values), run_id=run_id, timestamp=timestamp, model_id=model_id, dataset=scored)


def params(run_id: str, values: Mapping[str, str], suffix: str = "") -> None:
    """Logs params that the run does not have yet: MLflow refuses a second value for one name.

    With a ``suffix``, a value that differs from the run's is logged under the name with that suffix.
    """
    client = MlflowClient()
    existing = client.get_run(run_id).data.params
    new = {name: text for name, text in values.items() if name not in existing}
    if suffix:
        differing = {n: t for n, t in values.items() if n in existing and not _is_same(t, existing[n])}
        new |= {f"{n}{suffix}": t for n, t in differing.items() if f"{n}{suffix}" not in existing}
    client.log_batch(run_id, params=[Param(name, text) for name, text in new.items()])


def _is_same(text: str, other: str) -> bool:
    """Whether two texts are the same value: 1e-3 is 0.001, and an empty text is none."""
    try:
        return float(text) == float(other)
    except ValueError:
        return text.lower() == (other.lower() or NONE)


def tags(run_id: str, values: Mapping[str, str]) -> None:
    """Sets tags of a run; replaces earlier values."""
    MlflowClient().log_batch(run_id, tags=[RunTag(name, text) for name, text in values.items()])


def dataset(run_id: str, description: Mapping[str, Any], context: str) -> None:
    """Logs a data set, described by its ``to_dict``, as an input of a run."""
    data_input = DatasetInput(Dataset(**description), [InputTag("mlflow.data.context", context)])
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


def model(run_id: str, path: str, requirements: Sequence[str]) -> str:
    """Logs the folder ``path`` that serving.save wrote as a model of a run; returns ``models:/<id>``."""
    active = mlflow.active_run()
    is_active = active is not None and active.info.run_id == run_id
    with nullcontext() if is_active else mlflow.start_run(run_id, nested=True):
        info = Model.log(  # pyright: ignore[reportUnknownMemberType]
            artifact_path=None,
            name="pneumothorax",
            flavor=_Flavor,
            validate_serving_input=False,
            **_pyfunc_of(path, requirements),
        )
    return str(info.model_uri)


class _Flavor:
    """mlflow.pyfunc, except that MLflow does not load each new model to try its example, which takes seconds.

    Loading would also put the model's copy of this package on the path.
    """

    @staticmethod
    def save_model(path: str, *, validate_serving_input: bool, **options: Any) -> None:
        mlflow.pyfunc.save_model(path, **options)  # pyright: ignore[reportUnknownMemberType]


def save_model(folder: Path, path: str, requirements: Sequence[str]) -> None:
    """Saves the same model as a new local folder; what serving.save wrote is in its ``data``."""
    mlflow.pyfunc.save_model(  # pyright: ignore[reportUnknownMemberType]
        str(folder), **_pyfunc_of(path, requirements)
    )


def _pyfunc_of(path: str, requirements: Sequence[str]) -> dict[str, Any]:
    return {
        "loader_module": LOADER,
        "data_path": path,
        "code_paths": [str(PACKAGE)],
        "signature": SIGNATURE,
        "input_example": [{"image_id": "example", "dicom": b64encode(EXAMPLE.read_bytes()).decode()}],
        # MLflow would infer them by loading the model in a new process, which takes seconds.
        "pip_requirements": list(requirements),
    }


def end(run_id: str, status: str, end_time: int) -> None:
    """Ends a run; ``end_time`` in ms since 1970."""
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
