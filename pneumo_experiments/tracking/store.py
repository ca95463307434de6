"""The tracking store: found, checked and opened once per process."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportPrivateUsage=false

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _get_store
from sqlalchemy import NullPool, create_engine

from pneumo_experiments.errors import UserError
from pneumo_experiments.tracking.addresses import (
    check_address,
    database_file,
    hide_passwords,
    is_misread_by_mlflow,
    kind_of,
    local_path,
    server_of,
)
from pneumo_experiments.tracking.processes import end_orphaned_runs, end_with_mlflow_run

SERVER_TIMEOUT_SECONDS = 5
LOCK_TIMEOUT_SECONDS = 60
KIND_TAG = "mlflow.experimentKind"


def open_store() -> None:
    """Makes sure that the store answers and that its experiment exists; once per process and store."""
    _open(mlflow.get_tracking_uri())


@cache
def _open(uri: str) -> None:
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for each lock
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each new attempt
    adopted = "MLFLOW_RUN_ID" in os.environ
    try:
        check_address("MLFLOW_TRACKING_URI", uri)
        check_server(uri)
        with _creation_lock():
            if adopted:
                experiment_id = mlflow.get_run(os.environ["MLFLOW_RUN_ID"]).info.experiment_id
            else:
                experiment_id = _experiment()
            _check_place(experiment_id)
            _mark(experiment_id)
        end_orphaned_runs(experiment_id)
    except UserError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy, its drivers and the file system: errors of many kinds
        reason = str(error).split("\n")[0].split(". ")[0]
        room = "make room there, or " if "is full" in reason else ""
        raise UserError(
            f"MLFLOW_TRACKING_URI={tracking_uri()}: the store does not open ({hide_passwords(reason)});"
            f" {room}name another in that variable, such as sqlite:///runs.db"
        ) from error
    if adopted:
        end_with_mlflow_run()


def _experiment() -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name is None:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    file = database_file(mlflow.get_tracking_uri())
    if file and mlflow.get_experiment_by_name(name) is None:
        # Without a location the artifacts land wherever the first process happened to be started.
        mlflow.create_experiment(name, artifact_location=(file.parent / "mlruns").as_uri())
    return mlflow.set_experiment(name).experiment_id


def _mark(experiment_id: str) -> None:
    # Else the UI opens on its pages for language models, without curves or registered models.
    if KIND_TAG not in mlflow.get_experiment(experiment_id).tags:
        with suppress(MlflowException):  # another process has just set it
            MlflowClient().set_experiment_tag(experiment_id, KIND_TAG, "custom_model_development")


def _check_place(experiment_id: str) -> None:
    location = mlflow.get_experiment(experiment_id).artifact_location
    if is_misread_by_mlflow(location):
        raise UserError(
            f"{location}: MLflow would put the files of the runs into {local_path(location)};"
            " give the folder a name in UTF-8 without a % before two digits"
        )


@contextmanager
def _creation_lock() -> Generator[None]:
    # Two processes that create the tables of one new database at once break it.
    with ExitStack() as stack:
        if path := database_file(mlflow.get_tracking_uri()):
            if not path.parent.is_dir():
                raise UserError(f"MLFLOW_TRACKING_URI={tracking_uri()}: no folder {path.parent}; create it")
            stack.enter_context(FileLock(path.with_name(path.name + ".lock"), LOCK_TIMEOUT_SECONDS))
            _connect()
            # Creates the tables, and the default experiment with an address: see local_path.
            _get_store(artifact_uri=(path.parent / "mlruns").as_uri())
        yield


def reach(uri: str) -> None:
    """Raises OSError within seconds where no server answers; MLflow itself would retry for minutes."""
    if kind_of(uri) in ("http", "https"):
        requests.head(uri, timeout=SERVER_TIMEOUT_SECONDS)  # any answer will do
    elif server := server_of(uri):
        socket.create_connection(server, timeout=SERVER_TIMEOUT_SECONDS).close()


def check_server(uri: str) -> None:
    """Raises UserError within seconds where nothing answers."""
    try:
        reach(uri)
    except OSError as error:  # requests' exceptions are OSErrors too
        raise UserError(
            f"MLFLOW_TRACKING_URI={tracking_uri()}: nothing answers there;"
            " start the server, or unset the variable to use mlflow.db in this folder"
        ) from error
    if server_of(uri):
        _connect()


def _connect() -> None:
    # MLflow itself would try again for minutes where the database refuses.
    create_engine(mlflow.get_tracking_uri(), poolclass=NullPool).connect().close()


def tracking_uri() -> str:
    """Address of the store in use, without a password."""
    return hide_passwords(mlflow.get_tracking_uri())
