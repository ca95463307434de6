"""Logged models."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import get_model_info
from mlflow.models.model import MLMODEL_FILE_NAME

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.addresses import hide_passwords
from pneumo_experiments.tracking.buffer import model_folder
from pneumo_experiments.tracking.calls import LOADER, save_model
from pneumo_experiments.tracking.delivery import StoreUnreachable, current
from pneumo_experiments.tracking.store import open_store

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
    "pyjpegls",
    "pylibjpeg-openjpeg",
)


def log_model(folder: Path) -> str:
    """Logs what serving.save wrote to the folder as a model of the active run; returns ``models:/<id>``.

    Where the store cannot take it, the model is kept, to be logged later: returns its local folder.
    """
    active = mlflow.active_run()
    assert active is not None
    run_id = active.info.run_id
    # Of torch's version only what other machines have, too.
    requirements = [f"{name}=={version(name).split('+')[0]}" for name in MODEL_REQUIREMENTS]
    box = current()
    box.hurry()
    try:
        return str(box.offer("model", run_id=run_id, path=str(folder), requirements=requirements))
    except StoreUnreachable:
        kept = model_folder(box.folder, run_id)
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier process of this run
        save_model(kept, str(folder), requirements)
        data = kept / "data" / folder.name
        box.keep("model", run_id=run_id, path=str(data.relative_to(kept.parent)), requirements=requirements)
        log.warning("%s does not take the model: kept in %s", box.store, kept)
        return str(kept)


def model_data(address: str) -> Path:
    """The folder that serving.save wrote of a logged or registered model, made local where it is remote.

    Nothing of the model is run: not its pickles, nor the code beside it. Raises UserError where it cannot be
    had, and where it was not made by this project.
    """
    open_store()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(address))
        if not (folder / MLMODEL_FILE_NAME).is_file():  # a device has no end, a pipe no beginning
            raise FileNotFoundError(f"no file {folder / MLMODEL_FILE_NAME}")
        described: Any = yaml.safe_load((folder / MLMODEL_FILE_NAME).read_text(encoding="utf-8"))
    except (MlflowException, OSError, ValueError, ImportError) as error:  # e.g. no library for s3://
        raise _cannot_be_loaded(address, hide_passwords(str(error).split("\n")[0])) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise _cannot_be_loaded(address, f"its {MLMODEL_FILE_NAME} is damaged") from error
    try:
        flavor = described["flavors"]["python_function"]
        loader, data = flavor["loader_module"], flavor["data"]
    except (TypeError, LookupError):
        loader, data = None, None
    if loader != LOADER or not isinstance(data, str):
        raise UserError(f"model={address}: was not made by this project; `train` logs one")
    place = (folder / data).resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_dir():
        raise _cannot_be_loaded(address, f"it has no folder {data}")
    return place


def _cannot_be_loaded(address: str, reason: str) -> UserError:
    return UserError(f"model={address}: cannot be loaded ({reason}); `train` logs one, `register` names one")


def model_id_of(address: str) -> str | None:
    """Id of the logged model behind an address; None where there is none."""
    try:
        return get_model_info(address).model_id
    except MlflowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"model={address}: not found ({reason})") from error
