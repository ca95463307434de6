"""Logged models: their form in MLflow, how a run logs one, and how score and register read one."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
import mlflow.pyfunc
import requests
import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, get_model_info
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking.servers import is_outage

LOADER = "pneumo_experiments.serving"
PACKAGE = Path(__file__).parents[1]
EXAMPLE = PACKAGE / "serving" / "example.dcm"  # a synthetic radiograph
REQUIREMENTS = (
    *("mlflow", "torch", "torchvision", "numpy", "pydicom", "pillow", "psutil", "pandas", "imagecodecs"),
)
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
            # Null where a file cannot be used: no area and no run lengths would read as healthy.
            ColSpec(DataType.double, "presence", required=False),
            ColSpec(DataType.long, "area_px", required=False),
            ColSpec(DataType.string, "rle", required=False),
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


def save_model(folder: Path, data: Path) -> None:
    """Saves what serving.save wrote in ``data`` as a new folder in MLflow's form, with the package's code."""
    # Without torch's local version (+cu126), which the package index may not have. MLflow would infer the
    # requirements by loading the model in a new process, which takes seconds.
    path = data / "model.json"
    more = json.loads(path.read_text(encoding="utf-8")).get("libraries", ()) if path.is_file() else ()
    requirements = [f"{name}=={version(name).split('+')[0]}" for name in (*REQUIREMENTS, *more)]
    mlflow.pyfunc.save_model(  # pyright: ignore[reportUnknownMemberType]
        str(folder),
        loader_module=LOADER,
        data_path=str(data),
        code_paths=[str(PACKAGE)],
        signature=SIGNATURE,
        input_example=[{"image_id": "example", "dicom": b64encode(EXAMPLE.read_bytes()).decode()}],
        pip_requirements=requirements,
    )


def upload(run_id: str, path: str, name: str) -> str:
    """Logs a folder that ``save_model`` wrote as a model of a run; returns ``models:/<id>``.

    mlflow.pyfunc.log_model would load it to try its example, which takes seconds, and put the model's copy of
    this package on the path.
    """
    client: Any = MlflowClient()
    run = client.get_run(run_id)
    name = re.sub(r"[/:.%\"']", "-", name)  # which MLflow refuses: unet:resnet34 has one
    model_id = client.create_logged_model(
        run.info.experiment_id, name, run_id, params=run.data.params
    ).model_id
    try:
        _complete(client, run, model_id, path)
    except Exception as error:
        if not is_outage(error):  # after which it is logged again, as another model
            with suppress(MlflowException, requests.RequestException):
                client.finalize_logged_model(model_id, "FAILED")
        raise
    return f"models:/{model_id}"


def _complete(client: Any, run: Run, model_id: str, path: str) -> None:
    """Gives a new logged model its metrics and files."""
    run_id = run.info.run_id
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    history = [each for name in run.data.metrics for each in client.get_metric_history(run_id, name)]
    own = [
        Metric(each.key, each.value, each.timestamp, each.step, model_id=model_id, run_id=run_id)
        for each in history
        if each.step == 0 and each.model_id is None
    ]
    client.log_batch(run_id, metrics=own)
    form: Any = Model.load(path)  # pyright: ignore[reportUnknownMemberType]
    form.run_id, form.model_id, form.model_uuid = run_id, model_id, model_id
    form.save(str(Path(path, MLMODEL_FILE_NAME)))
    client.log_model_artifacts(model_id, path)
    client.finalize_logged_model(model_id, "READY")


def model_data(address: str, setting: str = "model") -> Path:
    """The folder that serving.save wrote for a logged or registered model, downloaded if it is remote.

    The address, or the folder of a model, is the value of that setting.
    Nothing of the model is executed: neither pickles nor the code beside it. Raises UserError if it cannot
    be loaded, or if another project logged it.
    """
    try:
        folder = Path(mlflow.artifacts.download_artifacts(address))
        if not (folder / MLMODEL_FILE_NAME).is_file():  # a device or a pipe would block
            raise FileNotFoundError(f"no file {folder / MLMODEL_FILE_NAME}")
        description: Any = yaml.safe_load((folder / MLMODEL_FILE_NAME).read_text(encoding="utf-8"))
    except (MlflowException, OSError, ValueError, ImportError) as error:  # e.g. no library for s3://
        raise _cannot_be_loaded(f"{setting}={address}", hide_passwords(str(error).split("\n")[0])) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise _cannot_be_loaded(f"{setting}={address}", f"its {MLMODEL_FILE_NAME} is damaged") from error
    try:
        flavor = description["flavors"]["python_function"]
        loader, data = flavor["loader_module"], flavor["data"]
    except (TypeError, LookupError):
        loader, data = None, None
    if loader != LOADER or not isinstance(data, str):
        raise UserError(f"{setting}={address}: is not a model of this project; `train` logs one")
    path = (folder / data).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_dir():
        raise _cannot_be_loaded(f"{setting}={address}", f"it has no folder {data}")
    return path


def _cannot_be_loaded(given: str, reason: str) -> UserError:
    remedy = "`train` logs one, `register` names one"
    if given.endswith("@champion"):
        remedy += "; without a champion give models:/NAME/VERSION, or make one: register with promote=always"
    return UserError(f"{given}: cannot be loaded ({reason}); {remedy}")


def model_info(address: str) -> ModelInfo:
    """What MLflow knows of a model: ``model_id`` and ``run_id`` are None or empty if it is no logged model.

    Raises UserError if there is none at the address.
    """
    try:
        return get_model_info(address)
    except MlflowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"model={address}: not found ({reason})") from error


def delete_model(address: str) -> None:
    """Deletes a logged model and its files, to free their room; one that cannot be deleted now stays."""
    client, model_id = MlflowClient(), address.removeprefix("models:/")
    with suppress(MlflowException, requests.RequestException, OSError):
        location = client.get_logged_model(model_id).artifact_location
        get_artifact_repository(location).delete_artifacts()  # pyright: ignore[reportUnknownMemberType]
        client.delete_logged_model(model_id)
