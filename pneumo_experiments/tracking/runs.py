"""Runs: starts, resumes and ends them."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import mlflow
import psutil
from mlflow import MlflowClient
from mlflow.entities import Run, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags  # pyright: ignore[reportUnknownVariableType]
from mlflow.utils.mlflow_tags import (
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_PROJECT_ENTRY_POINT,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
)
from mlflow.utils.name_utils import (
    _GENERATOR_NOUNS,  # pyright: ignore[reportPrivateUsage]
    _GENERATOR_PREDICATES,  # pyright: ignore[reportPrivateUsage]
)

from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import NONE, as_config, as_params
from pneumo_experiments.tracking.buffered_client import FILE, FOLDER, BufferedClient, outages_as_user_errors
from pneumo_experiments.tracking.code_version import CODE_VERSION_TAG, code_version
from pneumo_experiments.tracking.log import (
    ActiveRun,
    active_runs,
    is_enabled,
    log_params,
    log_yaml,
    now_ms,
    send,
)
from pneumo_experiments.tracking.processes import end_orphaned_runs, end_with_mlflow_run, process_tags
from pneumo_experiments.tracking.servers import check_server
from pneumo_experiments.tracking.store import SETTING, open_store, tracking_uri
from pneumo_experiments.tracking.system_metrics import log_system_metrics

WAIT_SECONDS = 600  # for `mlflow run` to end
log = logging.getLogger(__name__)


@contextmanager
def run(
    name: str,
    settings: object,
    continues: str | None = None,
    parent: str | None = None,
    system_metrics: bool = False,
    even_finished: bool = False,
) -> Generator[str]:
    """Starts a run with every setting as a param; yields its id.

    Inside another run it is a child run. In a process started by `mlflow run`, the first run is the one that
    `mlflow run` created. It ends FINISHED, KILLED after Ctrl-C or SIGTERM, else FAILED.
    ``continues`` is the run to resume, if it still exists and this is no child run; if it is finished, only
    with ``even_finished``.
    ``parent`` is the parent run, if another process has it.
    ``system_metrics`` logs CPU, memory and GPU use every few seconds.
    If the store becomes unreachable, the run continues: see BufferedClient. Raises UserError if it is
    unreachable at the start.
    """
    if not is_enabled():
        yield ""
        return
    with outages_as_user_errors():
        started = _start(name, continues, parent, even_finished)
    status = "FAILED"
    with _active(started, started.info.run_id) as active:
        try:
            samples = system_metrics or MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get()
            with outages_as_user_errors(), log_system_metrics(active) if samples else nullcontext():
                texts = {name: hide_passwords(text) for name, text in as_params(settings).items()}
                if active.id != continues:
                    texts |= _differing(texts, started.data.params)
                log_params(texts)
                log_yaml(as_config(settings), "config.yaml")  # repeats the step: -P config=…
                yield active.id
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except UserError as error:
            send("tags", values={"error": hide_passwords(str(error))[:5000]})
            raise
        finally:
            send("end", status=status, end_time=now_ms())


@contextmanager
def joined_run(run_id: str) -> Generator[None]:
    """Within it, the runs of this process are child runs of another process's run, which stays as it is.

    Raises UserError if the store does not have that run.
    """
    with outages_as_user_errors():
        _, given = _open()
        try:
            joined = MlflowClient().get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"{SETTING}={tracking_uri()}: has no run {run_id}, which this process was to join; give it"
                " the same tracking server as the process that has that run"
            ) from error
        _end_unused(given, run_id)
    with _active(joined, f"{run_id}-{os.getpid()}"):
        yield


@contextmanager
def _active(started: Run, buffer: str) -> Generator[ActiveRun]:
    """Makes a run the active one; at the end of the outermost run, warns of unsent calls.

    A resumed run also sends the calls that an earlier process left in the ``buffer`` of this name.
    """
    info, is_outermost = started.info, not active_runs
    folder = (FOLDER / f"undelivered-{buffer}").absolute()
    client = BufferedClient(folder) if is_outermost else active_runs[-1].client
    active = ActiveRun(info.run_id, info.experiment_id, info.artifact_uri or "", info.start_time or 0, client)
    active_runs.append(active)
    try:
        yield active
    finally:
        active_runs.pop()
        if is_outermost:
            _warn_of_unsent(client, info.run_id)


def _warn_of_unsent(client: BufferedClient, run_id: str) -> None:
    """Names the unsent calls of this process, and those left by killed ones that had joined the run."""
    for file in sorted(client.folder.parent.glob(f"undelivered-{run_id}*/{FILE}")):
        pid = file.parent.name.removeprefix(f"undelivered-{run_id}-")
        if file == client.file or (pid.isdecimal() and not psutil.pid_exists(int(pid))):
            with suppress(FileNotFoundError):  # another process has just sent it
                log.warning(
                    "%s: %d calls of this run are undelivered, buffered in %s; when the server is reachable,"
                    " send them with: python -m pneumo_experiments.tracking %s",
                    *(client.store, file.read_bytes().count(b"\n"), file, shlex.quote(str(file))),
                )


def _start(name: str, continues: str | None, parent: str | None, even_finished: bool) -> Run:
    """Creates a run, or takes the one to resume or that `mlflow run` created for this process."""
    if active_runs:
        check_server(SETTING, mlflow.get_tracking_uri())  # since the outer run started
        experiment, given, parent = active_runs[-1].experiment_id, None, active_runs[-1].id
    else:
        experiment, given = _open()
    client: Any = MlflowClient()  # not earlier: it would create a store
    # Tags at once: end_orphaned_runs needs them, whenever the process is killed.
    tags = process_tags() | {CODE_VERSION_TAG: code_version()}
    if parent is None and continues is not None and _is_resumable(continues, even_finished):
        _end_unused(given, continues)
        given = continues
    elif given is None:
        tags |= {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
        return client.create_run(experiment, tags=resolve_tags(tags), run_name=name)
    elif _is_random(client.get_run(given).info.run_name or ""):
        tags[MLFLOW_RUN_NAME] = name
    client.update_run(given, status="RUNNING")
    client.log_batch(given, tags=[RunTag(*tag) for tag in tags.items()])
    return client.get_run(given)


def _open() -> tuple[str, str | None]:
    """Opens the store for a process's first run; the experiment, and the run that `mlflow run` created."""
    experiment = open_store()
    end_orphaned_runs(experiment)
    end_with_mlflow_run()
    return experiment, os.environ.pop("MLFLOW_RUN_ID", None)


def _end_unused(given: str | None, continued: str) -> None:
    """Ends the run that `mlflow run` created, with a note that says where the work continued."""
    if given is not None:
        client = MlflowClient()  # it cannot be deleted: `mlflow run` ends it once more
        client.set_tag(given, MLFLOW_RUN_NAME, "continued in an earlier run")
        client.set_tag(given, MLFLOW_RUN_NOTE, f"This process continued run {continued}.")
        client.set_terminated(given, "FINISHED")


def _is_resumable(run_id: str, even_finished: bool) -> bool:
    try:
        info = MlflowClient().get_run(run_id).info
    except MlflowException:
        return False
    # A finished training is complete: resumed, it would have its last results twice.
    return info.lifecycle_stage == "active" and (even_finished or info.status != "FINISHED")


def _is_random(name: str) -> bool:
    """Whether MLflow chose a run's name, such as able-ant-7, and not a person by ``--run-name``."""
    predicate, _, rest = name.partition("-")
    noun, _, number = rest.partition("-")
    is_usual = predicate in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdecimal()
    return not name or is_usual


def _differing(texts: dict[str, str], logged: dict[str, str]) -> dict[str, str]:
    """Settings that differ from what `mlflow run` logged, such as a default that the config file beats."""

    def is_same(text: str, other: str) -> bool:
        try:
            return float(text) == float(other)  # 1e-3 is 0.001
        except ValueError:
            return text.lower() == (other.lower() or NONE)

    return {
        f"{name}_used": text
        for name, text in texts.items()
        if name in logged and not is_same(text, logged[name])
    }


def end_if_running(run_id: str, status: str) -> None:
    """Ends another process's run, if it still exists and is RUNNING."""
    client = MlflowClient()
    with suppress(MlflowException):
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)


def end_given_run(run_id: str, status: str, reason: str, mlflow_pid: str = "") -> None:
    """Ends the run that `mlflow run` created, named after its entry point; one that has ended stays so.

    After that of an interrupted process `mlflow run` itself says FAILED, whatever was said before. So with
    its ``mlflow_pid`` this waits until it has ended.
    """
    if mlflow_pid:
        with suppress(psutil.Error):
            psutil.Process(int(mlflow_pid)).wait(WAIT_SECONDS)
    check_server(SETTING, mlflow.get_tracking_uri())
    client = MlflowClient()
    run = client.get_run(run_id)
    tags, info = run.data.tags, run.info
    if MLFLOW_PROJECT_ENTRY_POINT in tags and info.status in ("RUNNING", "FAILED" if mlflow_pid else ""):
        if _is_random(info.run_name or ""):
            client.set_tag(run_id, MLFLOW_RUN_NAME, tags[MLFLOW_PROJECT_ENTRY_POINT])
        if MLFLOW_RUN_NOTE not in tags:
            client.set_tag(run_id, MLFLOW_RUN_NOTE, reason)
        client.set_terminated(run_id, status, info.end_time)
