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
from mlflow.entities import Run, RunInfo, RunTag
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
from pneumo_experiments.settings import NONE, as_config, as_params, as_texts
from pneumo_experiments.tracking.buffered_client import FILE, FOLDER, BufferedClient, outages_as_user_errors
from pneumo_experiments.tracking.code_version import CODE_VERSION_TAG, code_version
from pneumo_experiments.tracking.experiment import STAGE_TAG
from pneumo_experiments.tracking.log import (
    NAME_TAG,
    ActiveRun,
    active_runs,
    as_name,
    is_enabled,
    log_params,
    log_yaml,
    now_ms,
    send,
)
from pneumo_experiments.tracking.processes import end_orphaned_runs, end_with_mlflow_run, process_tags
from pneumo_experiments.tracking.servers import check_server, if_exists
from pneumo_experiments.tracking.store import SETTING, open_store, tracking_uri
from pneumo_experiments.tracking.system_metrics import log_system_metrics

WAIT_SECONDS = 600  # for `mlflow run` to end
log = logging.getLogger(__name__)


@contextmanager
def run(
    stage: str,
    settings: object,
    name: str = "",
    *,
    continues: str | None = None,
    parent: str | None = None,
    system_metrics: bool = False,
) -> Generator[str]:
    """Starts a run of a stage, with a name that says what is special about it; yields its id.

    Its params are the key settings and those that differ from their defaults; all are in its config.yaml.
    Inside another run it is a child run. In a process started by `mlflow run`, the first run is the one that
    `mlflow run` created, whose name stays if a person gave it. It ends FINISHED, KILLED after Ctrl-C or
    SIGTERM, else FAILED with the error as its description.
    ``continues`` is the run to resume, if it still exists and this is no child run; a finished one only if it
    is a search, which may have more trials.
    ``parent`` is the parent run, if another process has it.
    ``system_metrics`` logs CPU, memory and GPU use every few seconds.
    If the store becomes unreachable, the run continues: see BufferedClient. Raises UserError if it is
    unreachable at the start.
    """
    if not is_enabled():
        yield ""
        return
    with outages_as_user_errors():
        started, is_named = _start(stage, as_name(name or stage), continues, parent)
    status = "FAILED"
    with _active(started.info, started.info.run_id, is_named) as active:
        try:
            samples = system_metrics or MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get()
            with outages_as_user_errors(), log_system_metrics(active) if samples else nullcontext():
                texts = as_params(settings)
                if active.id != continues:
                    texts |= _differing(as_texts(settings), started.data.params)
                log_params({name: hide_passwords(text) for name, text in texts.items()})
                log_yaml(as_config(settings), "config.yaml")  # repeats the step: -P config=…
                yield active.id
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = hide_passwords(reason)[:5000]
            send("tags", values={"error": reason, MLFLOW_RUN_NOTE: f"Failed: {reason}"})
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
        joined = if_exists(MlflowClient().get_run, run_id)
        if joined is None:
            raise UserError(
                f"{SETTING}={tracking_uri()}: has no run {run_id}, which this process was to join; give it"
                " the same tracking server as the process that has that run"
            )
        _end_unused(given, run_id)
    with _active(joined.info, f"{run_id}-{os.getpid()}", is_named=True):
        yield


@contextmanager
def _active(info: RunInfo, buffer: str, is_named: bool) -> Generator[ActiveRun]:
    """Makes a run the active one; at the end of the outermost run, warns of unsent calls.

    A resumed run also sends the calls that an earlier process left in the ``buffer`` of this name.
    """
    is_outermost, folder = not active_runs, (FOLDER / f"undelivered-{buffer}").absolute()
    client = BufferedClient(folder) if is_outermost else active_runs[-1].client
    active_runs.append(ActiveRun(info, client, is_named))
    try:
        yield active_runs[-1]
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


def _start(stage: str, name: str, continues: str | None, parent: str | None) -> tuple[Run, bool]:
    """Creates a run, or takes the one to resume or that `mlflow run` created for this process.

    Returns also whether a person named it.
    """
    if active_runs:
        check_server(SETTING, mlflow.get_tracking_uri())  # since the outer run started
        experiment, given, parent = active_runs[-1].info.experiment_id, None, active_runs[-1].id
    else:
        experiment, given = _open()
    client: Any = MlflowClient()  # not earlier: it would create a store
    # Tags at once: end_orphaned_runs needs them, whenever the process is killed.
    tags = process_tags() | {CODE_VERSION_TAG: code_version(), STAGE_TAG: stage}
    names = {MLFLOW_RUN_NAME: name, NAME_TAG: name}
    if parent is None and continues is not None and _is_resumable(continues):
        _end_unused(given, continues)
        given = continues
    elif given is None:
        tags |= names | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
        return client.create_run(experiment, tags=resolve_tags(tags), run_name=name), False
    earlier = client.get_run(given)
    is_named = not _is_random(before := earlier.info.run_name or "") and before != earlier.data.tags.get(
        NAME_TAG
    )
    tags |= {} if is_named else names
    if "error" in earlier.data.tags:  # it goes on
        tags |= {"error": "", MLFLOW_RUN_NOTE: ""}
    client.update_run(given, status="RUNNING")
    client.log_batch(given, tags=[RunTag(*tag) for tag in tags.items()])
    return client.get_run(given), is_named


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
        tags = process_tags() | {MLFLOW_RUN_NOTE: f"This process continued run {continued}."}
        if _is_random(client.get_run(given).info.run_name or ""):
            tags[MLFLOW_RUN_NAME] = "continued in an earlier run"
        client.log_batch(given, tags=[RunTag(*tag) for tag in tags.items()])
        client.set_terminated(given, "FINISHED")


def _is_resumable(run_id: str) -> bool:
    earlier = if_exists(MlflowClient().get_run, run_id)
    if earlier is None or earlier.info.lifecycle_stage != "active":
        return False
    # A finished training is complete: resumed, it would have its last results twice.
    return earlier.info.status != "FINISHED" or earlier.data.tags.get(STAGE_TAG) == "search"


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
        client.log_batch(run_id, tags=[RunTag(*tag) for tag in process_tags().items()])  # it is ours
        client.set_terminated(run_id, status, info.end_time)
