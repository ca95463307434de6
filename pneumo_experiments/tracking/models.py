"""Logged models: how train logs one, and how score and register read one."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
import requests
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import get_model_info
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking.buffer_file import model_folder
from pneumo_experiments.tracking.buffered_client import StoreUnreachable
from pneumo_experiments.tracking.calls import LOADER, save_model
from pneumo_experiments.tracking.context import active_client

log = logging.getLogger(__name__)

MODEL_REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pydicom",
    "pillow",
    "psutil",
    "pandas",
    "imagecodecs",
)


def log_model(folder: Path) -> str:
    """Logs the folder that serving.save wrote as a model of the active run; returns ``models:/<id>``.

    If the store is unreachable, the model is buffered, to be logged later: returns its local folder.
    """
    active = mlflow.active_run()
    assert active is not None
    run_id = active.info.run_id
    # Without torch's local version (+cu126), which the package index may not have.
    requirements = [f"{name}=={version(name).split('+')[0]}" for name in MODEL_REQUIREMENTS]
    client = active_client()
    client.skip_pause()
    try:
        return str(client.send("model", run_id=run_id, path=str(folder), requirements=requirements))
    except StoreUnreachable:
        saved = model_folder(client.folder, run_id)
        shutil.rmtree(saved, ignore_errors=True)  # of an earlier process of this run
        save_model(saved, str(folder), requirements)
        path = str((saved / "data" / folder.name).relative_to(saved.parent))
        client.buffer("model", run_id=run_id, path=path, requirements=requirements)
        log.warning("%s: tracking server unreachable: model saved to %s", client.store, saved)
        return str(saved)


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


def model_id_of(address: str) -> str | None:
    """Id of the logged model at an address; None if it is no logged model."""
    try:
        return get_model_info(address).model_id
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
