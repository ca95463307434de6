"""Logged models."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import get_model_info

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.calls import save_model
from pneumo_experiments.tracking.delivery import Away, current
from pneumo_experiments.tracking.store import open_store

log = logging.getLogger(__name__)

MODEL_REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pydicom",
    "pillow",
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
    except Away:
        kept = box.folder.with_name(f"model-{run_id}")
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier process of this run
        save_model(kept, str(folder), requirements)
        data = kept / "data" / folder.name
        box.keep("model", run_id=run_id, path=str(data.relative_to(kept.parent)), requirements=requirements)
        log.warning("%s does not take the model: kept in %s", box.store, kept)
        return str(kept)


def load_model(address: str) -> Any:
    """The object that serving's loader made for a logged or registered model."""
    open_store()
    try:
        return mlflow.pyfunc.load_model(address).get_raw_model()
    except (MlflowException, OSError, ValueError, ImportError) as error:  # e.g. no library for s3://
        reason = str(error).split("\n")[0]
        raise UserError(
            f"model={address}: cannot be loaded ({reason}); `train` logs one, `register` names one"
        ) from error


def model_id_of(address: str) -> str | None:
    """Id of the logged model behind an address; None where there is none."""
    try:
        return get_model_info(address).model_id
    except MlflowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"model={address}: not found ({reason})") from error
