"""Runs, and what a run holds."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import verify_artifact_path
from mlflow.tracking.fluent import _active_run_stack
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.validation import _validate_metric, _validate_param
from numpy.typing import NDArray
from PIL import Image

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import as_params, as_text
from pneumo_experiments.tracking.addresses import hide_passwords, local_path, printable
from pneumo_experiments.tracking.delivery import Outbox, StoreUnreachable, current, log_outages, outbox
from pneumo_experiments.tracking.models import model_id_of
from pneumo_experiments.tracking.processes import process_tags
from pneumo_experiments.tracking.store import check_server, open_store
from pneumo_experiments.tracking.system_metrics import log_system_metrics

_is_silent = False


def be_silent() -> None:
    """Lets this process log nothing from now on: it helps another one, which does."""
    global _is_silent
    _is_silent = True


def _deliver(call: str, **arguments: Any) -> None:
    """A call of tracking.calls about the active run."""
    if not _is_silent:
        current().deliver(call, run_id=active_run(), **arguments)


@contextmanager
def run(
    step: str,
    settings: object,
    description: str = "",
    continues: str | None = None,
    parent: str | None = None,
    system_metrics: bool = False,
) -> Generator[str]:
    """A run named after its step, with every setting as a param; yields its id.

    Inside another run it is a child. The first run of a process that `mlflow run` started is the
    one that `mlflow run` made. Ends FINISHED, KILLED on Ctrl-C and SIGTERM, else FAILED.
    ``continues`` names a run to go on in, if it is still there and this is no child.
    ``parent`` names the run of another process below which this one stands.
    ``system_metrics`` logs the use of processor, memory and GPU every few seconds.
    A store that goes away once the run has started ends nothing: see delivery.
    """
    if _is_silent:
        yield ""
        return
    open_store()
    nested = mlflow.active_run() is not None or parent is not None
    if nested:
        check_server(mlflow.get_tracking_uri())  # it may have gone since the outer run began
    with log_outages():
        earlier = None if nested or continues is None else _earlier(continues)
        # With its tags from the first moment: end_orphans knows it whenever the process is killed.
        started = mlflow.start_run(
            earlier,
            run_name=step,
            nested=nested,
            parent_run_id=parent,
            tags=process_tags(),
            log_system_metrics=False,
        )
    # MLflow's own switch asks for them, too.
    system_metrics = system_metrics or bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())
    run_id, status = started.info.run_id, "FAILED"
    with outbox(run_id) as box:
        try:
            samples = (
                log_system_metrics(box, run_id, started.info.start_time) if system_metrics else nullcontext()
            )
            with log_outages(), samples:
                # `mlflow run` chose a random name; tags are for new runs only.
                box.deliver("tags", run_id=run_id, values={"mlflow.runName": step} | process_tags())
                describe(description)
                # Those that `mlflow run` has logged stay as they are.
                params = {name: hide_passwords(text) for name, text in as_params(settings).items()}
                box.deliver("params", run_id=run_id, values=params)
                yield run_id
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except UserError as error:
            box.deliver("tags", run_id=run_id, values={"error": hide_passwords(str(error))[:5000]})
            raise
        finally:
            _end(box, run_id, status)


def _end(box: Outbox, run_id: str, status: str) -> None:
    box.hurry()
    try:
        box.deliver("end", run_id=run_id, status=status, end_time=_now_ms())
    finally:
        # What mlflow.end_run does besides; it would ask the store again, for minutes where that is away.
        _active_run_stack.get().pop()
        os.environ.pop("MLFLOW_RUN_ID", None)


def _earlier(run_id: str) -> str | None:
    """The run to go on in.

    The one that `mlflow run` made for this process ends, and says where the work went on.
    """
    client = MlflowClient()
    try:
        info = client.get_run(run_id).info
        # One that has finished holds everything: gone on in, it would hold its last results twice.
        if info.lifecycle_stage != "active" or info.status == "FINISHED":
            return None
    except MlflowException:
        return None
    made = os.environ.pop("MLFLOW_RUN_ID", None)
    if made is not None:
        # It cannot be deleted: `mlflow run` ends it once more.
        client.set_tag(made, "mlflow.runName", "went on in an earlier run")
        client.set_tag(made, "mlflow.note.content", f"An interrupted training went on in run {run_id}.")
        client.set_terminated(made, "FINISHED")
    return run_id


def active_run() -> str | None:
    """Id of the active run; None where there is none."""
    active = mlflow.active_run()
    return active.info.run_id if active else None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def describe(text: str) -> None:
    """The description that the UI shows for the active run."""
    if text:
        _deliver("tags", values={"mlflow.note.content": text})


def log_metrics(values: Mapping[str, float], step: int | None = None) -> None:
    """Metrics of the active run.

    Raises MlflowException where the store would not take a name.
    """
    found, now = {name: float(value) for name, value in values.items()}, _now_ms()
    for name, value in found.items():
        _validate_metric(name, value, now, step or 0)  # not only when it is delivered
    _deliver("metrics", values=found, step=step, timestamp=now, model_id=None)


def log_scores(
    values: Mapping[str, float], model: str, path: Path, identity: str, facts: Mapping[str, object]
) -> None:
    """Metrics of the active run and of the model at an address, tied to the images that were scored.

    ``identity``, at most 36 characters, stands for images of the data set at ``path`` and their true masks.
    The ``facts`` on them, among them the subset, stay with the model.
    """
    source = LocalArtifactDatasetSource(str(path.resolve()))
    images = MetaDataset(source, name=f"{path.stem} {facts['subset']}", digest=identity).to_dict()
    told = {name: as_text(value) for name, value in facts.items()}
    model_id = model_id_of(model)
    _deliver("scores", values=dict(values), timestamp=_now_ms(), model_id=model_id, images=images, facts=told)


def log_params(values: Mapping[str, object]) -> None:
    """Params that the step found rather than was told; in a run that goes on, the first ones stand.

    Raises MlflowException where the store would not take a name.
    """
    found = {name: as_text(value) for name, value in values.items()}
    for name, text in found.items():
        _validate_param(name, text)
    _deliver("params", values=found)


def log_picture(picture: NDArray[np.uint8], name: str) -> None:
    """An RGB picture (H, W, 3) as artifact ``name`` of the active run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(name).name)
        Image.fromarray(picture).save(path)
        _log_artifact(path, name)


def log_json(value: Mapping[str, Any], name: str) -> None:
    """A JSON artifact of the active run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(name).name)
        path.write_text(json.dumps(value, indent=2), encoding="utf-8")
        _log_artifact(path, name)


def log_table(columns: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> None:
    """A table as artifacts ``name``.csv and ``name``.json, the latter as mlflow.log_table leaves it.

    log_table itself would add the rows once more where it is called again after a lost answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        as_csv, as_json = Path(folder, f"{name}.csv"), Path(folder, f"{name}.json")
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        as_json.write_text(json.dumps({"columns": [*columns], "data": [*rows]}), encoding="utf-8")
        log_file(as_csv)
        log_file(as_json)
    _deliver(
        "tags", values={MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": f"{name}.json", "type": "table"}])}
    )


def log_file(path: Path) -> None:
    """A file as artifact of the active run."""
    _log_artifact(path, path.name)


def _log_artifact(path: Path, name: str) -> None:
    verify_artifact_path(name)  # the store's refusal would look like a failure of the server
    if _is_silent:
        return
    box, folder = current(), str(PurePosixPath(printable(name)).parent).removeprefix(".")
    with tempfile.TemporaryDirectory() as temporary:
        if path.name != printable(path.name):  # no store takes it
            path = Path(shutil.copy(path, Path(temporary, printable(path.name))))
        try:
            box.offer("artifact", run_id=active_run(), path=str(path), folder=folder)
        except StoreUnreachable:
            box.keep("artifact", run_id=active_run(), path=box.copy(path), folder=folder)


def log_dataset(path: Path, fingerprint: str, context: str) -> None:
    """The data set as an input of the active run; its digest is the start of the fingerprint."""
    source = LocalArtifactDatasetSource(str(path.resolve()))
    used = MetaDataset(source, name=path.stem, digest=fingerprint[:16])
    _deliver("dataset", description=used.to_dict(), context=context)


def artifacts_of_active_run() -> str:
    """Where the active run's artifacts lie: a folder where they are local, else an address."""
    active = mlflow.active_run()
    assert active is not None
    uri = active.info.artifact_uri or ""
    path = local_path(uri)
    return _shown(path) if path else uri


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
