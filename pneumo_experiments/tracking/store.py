"""The tracking store: opens it, and creates a new one."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import (
    _all_tables_exist,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    _get_schema_version,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    _initialize_tables,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    _verify_schema,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)
from mlflow.tracking._tracking_service.utils import (
    _get_store,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
)
from sqlalchemy import Engine, NullPool, create_engine, make_url, text

from pneumo_experiments.errors import UserError
from pneumo_experiments.files import write_atomically
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking.addresses import (
    DATABASE_PORTS,
    database_file,
    is_misread_by_mlflow,
    local_path,
    scheme_of,
    with_driver,
)
from pneumo_experiments.tracking.servers import check_server, connect, wait_for_server

SETTING = "MLFLOW_TRACKING_URI"
LOCK_TIMEOUT_SECONDS = 60
POSTGRESQL_LOCK = (
    7_368_662_513  # any number that other programs do not take; the connection's end releases it
)
KIND_TAG = "mlflow.experimentKind"


def open_store() -> str:
    """Opens the store, creating a new one; returns the id of the experiment. May be called repeatedly.

    Raises UserError if the store cannot be opened.
    """
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for each lock
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # a line for the example of each model
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry
    try:
        check_server(SETTING, mlflow.get_tracking_uri())
        if (uri := with_driver(mlflow.get_tracking_uri())) != mlflow.get_tracking_uri():
            mlflow.set_tracking_uri(uri)  # also for the processes that this one starts
        with _creation_lock():
            experiment = _experiment()
            _check_artifact_location(experiment)
            _set_kind(experiment)
    except UserError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy, its drivers and the file system: errors of many kinds
        reason = str(error).split("\n")[0].split(". ")[0]
        if "out-of-date database schema" in reason:
            raise UserError(
                f"{SETTING}={tracking_uri()}: another program, or another version of MLflow than"
                f" {mlflow.__version__}, made this database; use that version, or name another store;"
                " one of an earlier version can be upgraded: back it up, then run:"
                f" mlflow db upgrade {tracking_uri()}"
            ) from error
        if "MLFLOW_ALLOW_FILE_STORE" in str(error):
            raise UserError(
                f"{SETTING}={tracking_uri()}: a folder of files, which MLflow {mlflow.__version__} opens only"
                " with MLFLOW_ALLOW_FILE_STORE=true; copy its runs into a database with: mlflow"
                " migrate-filestore --source FOLDER --target sqlite:///mlflow.db"
            ) from error
        room = "make room there, or " if "is full" in reason else ""
        # MLflow's own commands create an SQLite store in place.
        if "already exists" in reason and database_file(mlflow.get_tracking_uri()):
            room = "its creation was interrupted: delete it, or "
        raise UserError(
            f"{SETTING}={tracking_uri()}: the store cannot be opened ({hide_passwords(reason)});"
            f" {room}name another in that variable, such as sqlite:///runs.db"
        ) from error
    return experiment.experiment_id


def _experiment() -> Experiment:
    """The experiment that the environment names; raises UserError if that, or the run, is gone."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):  # `mlflow run` has created the run
        with _must_exist("MLFLOW_RUN_ID", run_id, "run; unset that variable for a new one"):
            info = mlflow.get_run(run_id).info
        experiment = _active(mlflow.get_experiment(info.experiment_id), "MLFLOW_RUN_ID", run_id)
        if info.lifecycle_stage != LifecycleStage.ACTIVE:
            raise UserError(
                f"MLFLOW_RUN_ID={run_id}: the run is deleted; restore it with: mlflow runs restore --run-id"
                f" {run_id}, or unset that variable for a new one"
            )
        return experiment
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name is None:
        id = os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        remedy = "experiment; name one in MLFLOW_EXPERIMENT_NAME, which is created if it does not exist"
        with _must_exist("MLFLOW_EXPERIMENT_ID", id, remedy):
            return _active(mlflow.get_experiment(id), "MLFLOW_EXPERIMENT_ID", id)
    file = database_file(mlflow.get_tracking_uri())
    if (existing := mlflow.get_experiment_by_name(name)) is not None:
        _active(existing, "MLFLOW_EXPERIMENT_NAME", name)
    elif file:
        # By default the artifacts would be stored in the working directory of the first process.
        location = (file.parent / "mlruns").as_uri()
        mlflow.create_experiment(name, artifact_location=location)  # pyright: ignore[reportUnknownMemberType]
    return mlflow.set_experiment(name)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def _must_exist(variable: str, value: str, what: str) -> Generator[None]:
    """Raises UserError if MLflow does not find what a variable names."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{variable}={value}: {tracking_uri()} has no such {what}") from error


def _active(experiment: Experiment, variable: str, value: str) -> Experiment:
    """The experiment; raises UserError if it is deleted, which MLflow keeps until `mlflow gc`."""
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise UserError(
            f"{variable}={value}: the experiment {experiment.name} is deleted; restore it with: mlflow"
            f" experiments restore --experiment-id {experiment.experiment_id}, or name another in"
            " MLFLOW_EXPERIMENT_NAME"
        )
    return experiment


def _set_kind(experiment: Experiment) -> None:
    # Else the UI opens its pages for language models, without curves or registered models.
    if KIND_TAG not in experiment.tags:
        with suppress(MlflowException):  # another process has just set it
            MlflowClient().set_experiment_tag(experiment.experiment_id, KIND_TAG, "custom_model_development")


def _check_artifact_location(experiment: Experiment) -> None:
    location = experiment.artifact_location
    if is_misread_by_mlflow(location):
        raise UserError(
            f"{location}: MLflow would store artifacts in {local_path(location)};"
            " rename the folder: UTF-8, and no % before two digits"
        )


@contextmanager
def _creation_lock() -> Generator[None]:
    # Two processes that create the tables of a new database at the same time break it.
    uri = mlflow.get_tracking_uri()
    with ExitStack() as stack:
        if path := database_file(uri):
            if not path.parent.is_dir():
                raise UserError(f"{SETTING}={tracking_uri()}: no folder {path.parent}; create it")
            stack.enter_context(FileLock(path.with_name(path.name + ".lock"), LOCK_TIMEOUT_SECONDS))
            if not path.exists() or not path.stat().st_size:
                _create_tables(path)
            connect(uri)  # MLflow itself would retry for minutes
            _refuse_migration(create_engine(uri, poolclass=NullPool))
            # Creates the default experiment with an artifact location: see local_path.
            _get_store(artifact_uri=(path.parent / "mlruns").as_uri())
        elif scheme_of(uri) in DATABASE_PORTS:
            engine = create_engine(uri, poolclass=NullPool)
            if scheme_of(uri) == "postgresql":
                connection = stack.enter_context(engine.connect())
                connection.execute(text(f"SET lock_timeout = {1000 * LOCK_TIMEOUT_SECONDS}"))
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": POSTGRESQL_LOCK})
            _refuse_migration(engine)
        yield


def _refuse_migration(engine: Engine) -> None:
    """Raises MLflow's error for a store of another schema, also where MLflow would migrate it unasked.

    It does so when a table is missing. The MLflow that made the store could not open it any more.
    """
    if _get_schema_version(engine) and not _all_tables_exist(engine):
        _verify_schema(engine)


def _create_tables(path: Path) -> None:
    """Creates MLflow's tables in a file that appears when it is complete.

    MLflow can neither use nor complete a database whose creation was killed or ran out of room.
    """
    url = make_url(mlflow.get_tracking_uri())
    with write_atomically(path) as temporary:
        _initialize_tables(create_engine(url.set(database=str(temporary)), poolclass=NullPool))


def wait_for_store() -> None:
    """Waits until the store's server responds; raises ServerUnreachable after five minutes."""
    wait_for_server(SETTING, mlflow.get_tracking_uri())


def tracking_uri() -> str:
    """Address of the store, without passwords."""
    return hide_passwords(mlflow.get_tracking_uri())
