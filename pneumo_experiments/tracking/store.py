"""The tracking store: opens it, and creates a new one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
from alembic.migration import MigrationContext
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.db.base_sql_model import Base
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import Engine, NullPool, create_engine, inspect, make_url, text

from pneumo_experiments.errors import ServerUnreachable, UserError
from pneumo_experiments.files import write_atomically
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.tracking.experiment import DEFAULT_EXPERIMENT, missing_tags
from pneumo_experiments.tracking.processes import HOST_TAG
from pneumo_experiments.tracking.servers import (
    DATABASE_PORTS,
    check_server,
    connect,
    database_file,
    is_misread_by_mlflow,
    local_path,
    scheme_of,
    with_driver,
)

SETTING = "MLFLOW_TRACKING_URI"
LOCK_TIMEOUT_SECONDS = 60
# Any number that other programs do not take; the connection's end releases it.
POSTGRESQL_LOCK = 7_368_662_513
OUTDATED = "out-of-date database schema"  # MLflow's words
QUIET = {
    "mlflow.store.db.utils": logging.CRITICAL,  # a traceback for each lock
    "mlflow.pyfunc": logging.WARNING,  # a line for the example of each model
    "alembic": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,  # a line for each retry
}


def tracking_uri() -> str:
    """Address of the store, without passwords."""
    return hide_passwords(mlflow.get_tracking_uri())


def open_store() -> str:
    """Opens the store, creating a new one; returns the id of the experiment. May be called repeatedly.

    Raises UserError if the store cannot be opened.
    """
    with _connected():
        experiment = _experiment()
        if is_misread_by_mlflow(location := experiment.artifact_location):
            raise UserError(
                f"{location}: MLflow would store artifacts in {local_path(location)};"
                " rename the folder: UTF-8, and no % before two digits"
            )
        for name, text in missing_tags(experiment).items():
            with suppress(MlflowException):  # another process has just set it
                MlflowClient().set_experiment_tag(experiment.experiment_id, name, text)
    return experiment.experiment_id


def connect_store() -> None:
    """Opens the store to read from it: without an experiment. Raises UserError if it cannot be opened."""
    with _connected():
        pass


@contextmanager
def _connected() -> Generator[None]:
    """The store, locked if it is a database; what fails becomes a UserError."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    try:
        check_server(SETTING, mlflow.get_tracking_uri())
        if (uri := with_driver(mlflow.get_tracking_uri())) != mlflow.get_tracking_uri():
            mlflow.set_tracking_uri(uri)  # also for the processes that this one starts
        with _lock(uri):
            yield
    except UserError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy, its drivers and the file system: errors of many kinds
        raise UserError(f"{SETTING}={tracking_uri()}: {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    """What an error of the store means, and what to do."""
    reason = str(error).split("\n")[0].split(". ")[0]
    if OUTDATED in reason:
        return (
            f"another program, or another version of MLflow than {mlflow.__version__}, made this database;"
            " use that version, or name another store; one of an earlier version can be upgraded: back it up,"
            f" then run: mlflow db upgrade {tracking_uri()}"
        )
    if "MLFLOW_ALLOW_FILE_STORE" in str(error):
        return (
            f"a folder of files, which MLflow {mlflow.__version__} opens only with"
            " MLFLOW_ALLOW_FILE_STORE=true; copy its runs into a database with: mlflow migrate-filestore"
            " --source FOLDER --target sqlite:///mlflow.db"
        )
    remedy = "make room there, or " if "is full" in reason else ""
    # MLflow's own commands create an SQLite store in place.
    if "already exists" in reason and database_file(mlflow.get_tracking_uri()):
        remedy = "its creation was interrupted: delete it, or "
    return (
        f"the store cannot be opened ({hide_passwords(reason)}); {remedy}name another in that variable, such"
        " as sqlite:///runs.db"
    )


def _experiment() -> Experiment:
    """The experiment that the environment names; raises UserError if that, or the run, is gone."""
    run_id, name = os.environ.get("MLFLOW_RUN_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME")
    id, info, setting = os.environ.get("MLFLOW_EXPERIMENT_ID"), None, f"MLFLOW_EXPERIMENT_NAME={name}"
    try:
        if not name and (id or "0") == "0":
            _rename_default(run_id)
        if run_id:  # `mlflow run` has created the run
            setting = f"MLFLOW_RUN_ID={run_id}"
            info = mlflow.get_run(run_id).info
            experiment = mlflow.get_experiment(info.experiment_id)
        elif id and name is None:
            setting = f"MLFLOW_EXPERIMENT_ID={id}"
            experiment = mlflow.get_experiment(id)
        else:
            name = name or DEFAULT_EXPERIMENT
            setting = f"MLFLOW_EXPERIMENT_NAME={name}"
            experiment = mlflow.get_experiment_by_name(name) or _create_experiment(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        what = "experiment; name one in MLFLOW_EXPERIMENT_NAME, which is created if it does not exist"
        if run_id:
            what = "run; unset that variable for a new one"
        raise UserError(f"{setting}: {tracking_uri()} has no such {what}") from error
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:  # MLflow keeps it until `mlflow gc`
        raise UserError(
            f"{setting}: the experiment {experiment.name} is deleted; restore it with: mlflow experiments"
            f" restore --experiment-id {experiment.experiment_id}, or name another in MLFLOW_EXPERIMENT_NAME"
        )
    if info and info.lifecycle_stage != LifecycleStage.ACTIVE:
        raise UserError(
            f"{setting}: the run is deleted; restore it with: mlflow runs restore --run-id {run_id}, or unset"
            " that variable for a new one"
        )
    return experiment


def _rename_default(run_id: str | None) -> None:
    """Gives MLflow's first experiment our name, in a store of this machine where all its runs are ours.

    `mlflow run` starts its runs there, and a new store has no other experiment.
    """
    client: Any = MlflowClient()
    if database_file(mlflow.get_tracking_uri()) is None or client.get_experiment_by_name(DEFAULT_EXPERIMENT):
        return
    default = client.get_experiment_by_name(Experiment.DEFAULT_EXPERIMENT_NAME)
    if default is None or default.experiment_id != "0" or default.lifecycle_stage != LifecycleStage.ACTIVE:
        return
    runs = client.search_runs(["0"], run_view_type=ViewType.ALL)
    if all(run.info.run_id == run_id or HOST_TAG in run.data.tags for run in runs):
        client.rename_experiment("0", DEFAULT_EXPERIMENT)


def _create_experiment(name: str) -> Experiment:
    """Not by mlflow.set_experiment, which would set it for the whole process."""
    client: Any = MlflowClient()
    # By default the artifacts would be stored in the working directory of the first process.
    file = database_file(mlflow.get_tracking_uri())
    place = (file.parent / "mlruns").as_uri() if file else None
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=place))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process has just created it
            raise
        return client.get_experiment_by_name(name)


@contextmanager
def _lock(uri: str) -> Generator[None]:
    """Lets one process at a time open a database: two that create its tables at the same time break it."""
    if path := database_file(uri):
        if not path.parent.is_dir():
            raise UserError(f"{SETTING}={tracking_uri()}: no folder {path.parent}; create it")
        with FileLock(path.with_name(path.name + ".lock"), LOCK_TIMEOUT_SECONDS):
            if not path.exists() or not path.stat().st_size:
                _create(path)
            connect(uri)  # MLflow itself would retry for minutes
            _refuse_migration(create_engine(uri, poolclass=NullPool))
            yield
    elif scheme_of(uri) in DATABASE_PORTS:
        engine = create_engine(uri, poolclass=NullPool)
        with engine.connect() as connection:
            if scheme_of(uri) == "postgresql":
                connection.execute(text(f"SET lock_timeout = {1000 * LOCK_TIMEOUT_SECONDS}"))
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": POSTGRESQL_LOCK})
            _refuse_migration(engine)
            yield
    else:
        yield


def _create(path: Path) -> None:
    """Creates a store in a file that appears when it is complete, with artifacts in ``mlruns`` beside it.

    MLflow can neither use nor complete a database whose creation was killed or ran out of room.
    """
    url = make_url(mlflow.get_tracking_uri())
    with write_atomically(path) as temporary:
        temporary.touch()  # MLflow would try for minutes to open what cannot be written
        file = Path(url.database or "").with_name(temporary.name)  # an absolute path may need quotes
        SqlAlchemyStore(str(url.set(database=str(file))), (path.parent / "mlruns").as_uri()).engine.dispose()


def _refuse_migration(engine: Engine) -> None:
    """Raises for a store that lacks tables, which MLflow would migrate unasked.

    The version of MLflow that made the store could not open it any more.
    """
    with engine.connect() as connection:
        version = MigrationContext.configure(connection).get_current_revision()
    if version and not Base.metadata.tables.keys() <= set(inspect(engine).get_table_names()):
        raise MlflowException(OUTDATED)


def wait_for_store(seconds: float = 300) -> None:
    """Waits until the store's server responds; raises ServerUnreachable after so many seconds."""
    end, is_waiting = time.monotonic() + seconds, False
    while True:
        try:
            return check_server(SETTING, mlflow.get_tracking_uri())
        except ServerUnreachable as error:
            if time.monotonic() > end:
                raise
            if not is_waiting:
                print(f"{error}; waiting for it")
            is_waiting = True
            time.sleep(2)
