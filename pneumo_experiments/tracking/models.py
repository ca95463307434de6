"""Logged models and the model registry."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import get_model_info
from mlflow.models.model import MLMODEL_FILE_NAME

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.addresses import without_password
from pneumo_experiments.tracking.calls import LOADER, save_model
from pneumo_experiments.tracking.delivery import Away, current
from pneumo_experiments.tracking.kept import model_folder
from pneumo_experiments.tracking.store import open_store

log = logging.getLogger(__name__)

ALIAS = "champion"
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


@dataclass(frozen=True)
class Version:
    """A registered version and whether it holds the alias champion."""

    name: str
    number: str
    champion: bool
    reason: str


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
        described: Any = yaml.safe_load((folder / MLMODEL_FILE_NAME).read_text(encoding="utf-8"))
    except (MlflowException, OSError, ValueError, ImportError) as error:  # e.g. no library for s3://
        raise _cannot_be_loaded(address, without_password(str(error).split("\n")[0])) from error
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


def best_model() -> str:
    """Address of the experiment's model with the highest official Dice.

    Raises UserError where no model has been scored.
    """
    experiment = _current_experiment()
    found = mlflow.search_logged_models(
        experiment_ids=[experiment],
        order_by=[{"field_name": "metrics.dice", "ascending": False}],
        max_results=1,
        output_format="list",
    )
    if not found or _metric_of(found[0], "dice") is None:
        raise UserError(
            "model=best: no scored model in this experiment; `score` one first, or give models:/<id>"
        )
    return f"models:/{found[0].model_id}"


def _current_experiment() -> str:
    active = mlflow.active_run()
    assert active is not None
    return active.info.experiment_id


def _metric_of(model: Any, key: str) -> float | None:
    values: list[tuple[int, float]] = [
        (metric.timestamp, metric.value) for metric in model.metrics or [] if metric.key == key
    ]
    return max(values)[1] if values else None


def register_model(address: str, name: str, promote: str, tags: Mapping[str, str]) -> Version:
    """A new version of ``name`` with its scores as tags, and the alias if ``promote`` grants it.

    With ``auto`` the alias goes to the higher Dice on the same data, or to the first version.
    """
    client = MlflowClient()
    model_id = model_id_of(address)
    model = mlflow.get_logged_model(model_id) if model_id else None
    scores = (
        {key: _metric_of(model, key) for key in ("dice", "dice_baseline", "dice_positive")} if model else {}
    )
    noted = dict(tags) | {key: str(value) for key, value in scores.items() if value is not None}
    before = _champion(client, name)
    # By model id: a runs:/ address would take the run's last model, whatever was meant.
    try:
        made = mlflow.register_model(f"models:/{model_id}" if model_id else address, name, tags=noted)
    except MlflowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"name={name}: cannot be registered ({reason}); take a plain word") from error
    champion, reason = _earned(noted, before, promote)
    if champion:
        client.set_registered_model_alias(name, ALIAS, made.version)
    client.update_model_version(name, made.version, description=f"{reason}. Logged model {model_id}.")
    return Version(name, str(made.version), champion, reason)


def _champion(client: MlflowClient, name: str) -> dict[str, str] | None:
    try:
        return dict(client.get_model_version_by_alias(name, ALIAS).tags)
    except MlflowException:  # no such model, or no such alias yet
        return None


def _earned(new: Mapping[str, str], old: Mapping[str, str] | None, promote: str) -> tuple[bool, str]:
    if promote != "auto":
        return promote == "always", f"promote={promote}"
    if old is None:
        return True, "the first champion"
    if new.get("data_fingerprint") != old.get("data_fingerprint"):
        return (
            False,
            "the champion was scored on other data, so the two do not compare (promote=always decides it)",
        )
    mine, theirs = float(new.get("dice", "-1")), float(old.get("dice", "-1"))
    verdict = "better than" if mine > theirs else "not better than"
    return mine > theirs, f"Dice {mine:.4f} is {verdict} the champion's {theirs:.4f}"
