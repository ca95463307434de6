"""The database of Optuna studies, and the repetition of trials whose worker died."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, event

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import is_none

# Attributes of a trial
RUN_ID, PROCESS, ERROR = "run_id", "process", "error"
AS_GIVEN = "as_given"  # the trial with the settings as given
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60  # a worker that is silent for so long is taken for dead
RECONNECT_SECONDS = 120  # a database may be restarted
SQLITE_TIMEOUT_SECONDS = 60
ATTEMPTS = 5  # to open a new database, which another worker may be filling


@contextmanager
def allow_experimental() -> Generator[None]:
    """Silences Optuna's warnings that a function may change in the future: see its range in pyproject."""
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        yield


class _Storage(RDBStorage):
    """A database whose short outages do not stop the heartbeats of a trial."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):  # the next one follows soon
            super().record_heartbeat(trial_id)


def open_storage(address: str) -> BaseStorage:
    """The database of studies at an address, created if it is new; in memory for none.

    Raises UserError if it cannot be opened.
    """
    if is_none(address):
        return InMemoryStorage()
    if "://" not in address or address.startswith("grpc"):
        raise UserError(
            f"storage={hide_passwords(address)}: not the address of a database. Optuna's journals and gRPC"
            " proxies have no heartbeat, by which the trial of a dead worker is repeated: name a database,"
            " such as sqlite:///optuna.db or a PostgreSQL address"
        )
    tracking.check_server("storage", address)
    file = tracking.database_file(address)
    if file and not file.parent.is_dir():
        raise UserError(f"storage={hide_passwords(address)}: no folder {file.parent}; create it")
    with ExitStack() as stack:
        if file:  # workers that create the tables at the same time would fail
            stack.enter_context(FileLock(file.with_name(file.name + ".lock")))
        for attempt in range(ATTEMPTS):
            try:
                return _open(address, {"timeout": SQLITE_TIMEOUT_SECONDS} if file else {})
            except Exception as error:  # SQLAlchemy and its drivers raise errors of many kinds
                if file or attempt == ATTEMPTS - 1:
                    raise cannot_be_opened(address, error) from error
                time.sleep(0.2 * 2**attempt)  # another worker is creating the tables
    raise AssertionError


def _open(address: str, connect: dict[str, Any]) -> _Storage:
    with allow_experimental():
        storage = _Storage(
            tracking.with_driver(address),
            # The database may have been restarted.
            engine_kwargs={"pool_pre_ping": True, "connect_args": connect},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=retry,
        )
    event.listen(storage.engine, "do_connect", _connect_patiently)
    if storage.engine.dialect.name == "sqlite":
        event.listen(storage.engine, "begin", _begin_exclusively)
    return storage


def _begin_exclusively(connection: Connection) -> None:
    """Without row locks, as in SQLite, two workers would take the same waiting trial."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _connect_patiently(dialect: Any, record: Any, arguments: Any, parameters: Any) -> Any:
    """Opens a connection as SQLAlchemy would, again and again while the database is restarted."""
    start = time.monotonic()
    while True:
        try:
            return dialect.connect(*arguments, **parameters)
        except dialect.loaded_dbapi.OperationalError:
            if time.monotonic() - start > RECONNECT_SECONDS:
                raise
            time.sleep(1)


def cannot_be_opened(address: str, error: Exception) -> UserError:
    """The error for a database that refuses; without its password."""
    reason = hide_passwords(str(error).split("\n")[0])
    return UserError(
        f"storage={hide_passwords(address)}: the study's database cannot be opened ({reason});"
        " name another, such as sqlite:///optuna.db, or none"
    )


def load_study(setting: str, storage: BaseStorage, name: str) -> Study:
    """A study that exists; UserError if there is none of that name, with the names there are."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = optuna.get_all_study_names(storage)
        there = f"there are {', '.join(names[:10])}" if names else "there is none yet"
        raise UserError(f"{setting}={name}: no such study in the storage; {there}") from None


def retry(study: Study, trial: FrozenTrial) -> None:
    """Queues a trial whose worker died, with the same settings, and ends its run as KILLED."""
    again = copy.copy(trial)
    # A constraint of the trial that died could not be set again.
    again.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith("constraints")}
    again.user_attrs = {name: value for name, value in trial.user_attrs.items() if name == AS_GIVEN}
    with allow_experimental():
        RetryHeartbeatStaleTrialCallback()(study, again)
    if run_id := trial.user_attrs.get(RUN_ID):
        tracking.end_if_running(run_id, "KILLED")


def retry_dead_trials(study: Study, first_seen: dict[int, float]) -> None:
    """Fails the trials whose worker has died, and queues them again.

    Those of this machine at once, others when their heartbeat has stopped. A worker that died before its
    trial's first line has left neither its name nor a heartbeat: its trial is failed when it is still like
    this after the grace period. ``first_seen`` keeps, by number, when this process saw such a trial first
    (time.monotonic): the clocks of two machines may differ by hours.
    """
    with allow_experimental():
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        process, now = trial.user_attrs.get(PROCESS), time.monotonic()
        is_old = process is None and now - first_seen.setdefault(trial.number, now) > GRACE_SECONDS
        if tracking.has_ended(process) if process else is_old:
            with suppress(UpdateFinishedTrialError, ValueError):  # another worker was faster
                study.tell(trial.number, state=TrialState.FAIL)
                retry(study, trial)
