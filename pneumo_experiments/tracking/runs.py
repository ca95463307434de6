"""Runs: starts, resumes and ends them."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress

import mlflow
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.tracking.fluent import _active_run_stack  # pyright: ignore[reportPrivateUsage]
from mlflow.utils.name_utils import (
    _GENERATOR_NOUNS,  # pyright: ignore[reportPrivateUsage]
    _GENERATOR_PREDICATES,  # pyright: ignore[reportPrivateUsage]
)

from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import as_params
from pneumo_experiments.tracking.addresses import local_path
from pneumo_experiments.tracking.buffered_client import BufferedClient, outages_as_user_errors
from pneumo_experiments.tracking.code_version import CODE_VERSION_TAG, code_version
from pneumo_experiments.tracking.context import client_of, is_enabled
from pneumo_experiments.tracking.log import describe, log_config, now_ms
from pneumo_experiments.tracking.processes import end_orphaned_runs, end_with_mlflow_run, process_tags
from pneumo_experiments.tracking.servers import check_server
from pneumo_experiments.tracking.store import SETTING, open_store
from pneumo_experiments.tracking.system_metrics import log_system_metrics


@contextmanager
def run(
    step: str,
    settings: object,
    description: str = "",
    continues: str | None = None,
    parent: str | None = None,
    system_metrics: bool = False,
    even_finished: bool = False,
) -> Generator[str]:
    """Starts a run named after its step, with every setting as a param; yields its id.

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
    nested = mlflow.active_run() is not None or parent is not None
    with outages_as_user_errors():
        if mlflow.active_run() is None:
            end_orphaned_runs(open_store())
            end_with_mlflow_run()
        else:
            check_server(SETTING, mlflow.get_tracking_uri())  # since the outer run started
        resumed = None if nested or continues is None else _resumable(continues, even_finished)
        is_new = nested or not (resumed or os.environ.get("MLFLOW_RUN_ID"))
        # Tags at once: end_orphaned_runs needs them, whenever the process is killed.
        started = mlflow.start_run(
            resumed,
            run_name=step if is_new else None,  # start_run would rename it
            nested=nested,
            parent_run_id=parent,
            tags=process_tags(),
            log_system_metrics=False,
        )
    system_metrics = system_metrics or bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())
    run_id, status = started.info.run_id, "FAILED"
    with client_of(run_id) as client:
        try:
            monitor = (
                log_system_metrics(client, run_id, started.info.start_time)
                if system_metrics
                else nullcontext()
            )
            with outages_as_user_errors(), monitor:
                # start_run sets tags of new runs only, and `mlflow run` has created this one.
                first = process_tags() | {CODE_VERSION_TAG: code_version()}
                if _is_random(started.info.run_name or ""):
                    first |= {"mlflow.runName": step}
                client.send_or_buffer("tags", run_id=run_id, values=first)
                describe(description)
                # `mlflow run` may have logged some: those stay, also where the config file beats a default.
                params = {name: hide_passwords(text) for name, text in as_params(settings).items()}
                suffix = "" if resumed else "_used"
                client.send_or_buffer("params", run_id=run_id, values=params, suffix=suffix)
                log_config(settings)
                yield run_id
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except UserError as error:
            message = hide_passwords(str(error))[:5000]
            client.send_or_buffer("tags", run_id=run_id, values={"error": message})
            raise
        finally:
            _end(client, run_id, status)


def _is_random(name: str) -> bool:
    """Whether MLflow chose a run's name, such as able-ant-7, and not a person by ``--run-name``."""
    predicate, _, rest = name.partition("-")
    noun, _, number = rest.partition("-")
    is_usual = predicate in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdecimal()
    return not name or is_usual


@contextmanager
def joined_run(run_id: str) -> Generator[None]:
    """Within it, this process starts child runs of another process's run, ``run(…, parent=run_id)``.

    The run itself stays as it is.
    """
    with outages_as_user_errors():
        end_orphaned_runs(open_store())
        end_with_mlflow_run()
        _end_unused_run(run_id)
    with client_of(f"{run_id}-{os.getpid()}"):  # one for all child runs: calls of one may be sent in the next
        yield


def end_if_running(run_id: str, status: str) -> None:
    """Ends another process's run, if it still exists and is RUNNING."""
    client = MlflowClient()
    with suppress(MlflowException):
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)


def _end(client: BufferedClient, run_id: str, status: str) -> None:
    client.skip_pause()
    try:
        client.send_or_buffer("end", run_id=run_id, status=status, end_time=now_ms())
    finally:
        # The rest of mlflow.end_run, which would also wait minutes for an unreachable store.
        _active_run_stack.get().pop()  # pyright: ignore[reportUnknownMemberType]
        os.environ.pop("MLFLOW_RUN_ID", None)


def _resumable(run_id: str, even_finished: bool) -> str | None:
    """The run to resume; None if it is deleted, or finished unless ``even_finished``."""
    try:
        info = MlflowClient().get_run(run_id).info
        # A finished training is complete: resumed, it would have its last results twice.
        if info.lifecycle_stage != "active" or (info.status == "FINISHED" and not even_finished):
            return None
    except MlflowException:
        return None
    _end_unused_run(run_id)
    return run_id


def _end_unused_run(run_id: str) -> None:
    """Ends the run that `mlflow run` created for this process, with a note where the work continued."""
    if (unused := os.environ.pop("MLFLOW_RUN_ID", None)) is not None:
        # It cannot be deleted: `mlflow run` ends it once more.
        client = MlflowClient()
        client.set_tag(unused, "mlflow.runName", "continued in an earlier run")
        client.set_tag(unused, "mlflow.note.content", f"This process continued run {run_id}.")
        client.set_terminated(unused, "FINISHED")


def active_run() -> str | None:
    """Id of the active run; None without one."""
    active = mlflow.active_run()
    return active.info.run_id if active else None


def artifacts_of_active_run() -> str:
    """Location of the active run's artifacts: a folder if they are local, else an address."""
    active = mlflow.active_run()
    assert active is not None
    uri = active.info.artifact_uri or ""
    path = local_path(uri)
    return str(path) if path else uri
