"""Runs, and what a run holds."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import numpy as np
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
from numpy.typing import NDArray

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import as_params, as_text
from pneumo_experiments.tracking.models import model_id_of
from pneumo_experiments.tracking.processes import process_tags
from pneumo_experiments.tracking.store import open_store, without_password


@contextmanager
def run(step: str, settings: object, description: str = "") -> Generator[str]:
    """A run named after its step, with every setting as a param; yields its id.

    Inside another run it is a child. The first run of a process that `mlflow run` started is the
    one that `mlflow run` made. Ends FINISHED, KILLED on Ctrl-C and SIGTERM, else FAILED.
    """
    open_store()
    nested = mlflow.active_run() is not None
    try:
        # With its tags from the first moment: end_orphans knows it whenever the process is killed.
        started = mlflow.start_run(run_name=step, nested=nested, tags=process_tags())
        run_id = started.info.run_id
        mlflow.set_tag("mlflow.runName", step)  # `mlflow run` chose a random name
        describe(description)
        # `mlflow run` has logged the text of its own parameters; a second text for one name is refused.
        there = mlflow.get_run(run_id).data.params
        params = {name: text for name, text in as_params(settings).items() if name not in there}
        mlflow.log_params({name: without_password(text) for name, text in params.items()})
        yield run_id
    except KeyboardInterrupt:
        mlflow.end_run("KILLED")
        raise
    except BaseException as error:
        if isinstance(error, UserError):
            mlflow.set_tag("error", str(error)[:5000])
        mlflow.end_run("FAILED")
        raise
    mlflow.end_run()


def describe(text: str) -> None:
    """The description that the UI shows for the active run."""
    if text:
        mlflow.set_tag("mlflow.note.content", text)


def log_metrics(values: Mapping[str, float], step: int | None = None, model: str | None = None) -> None:
    """Metrics of the active run, also of the model where its address is given."""
    mlflow.log_metrics(dict(values), step=step, model_id=model_id_of(model) if model else None)


def log_found(values: Mapping[str, object]) -> None:
    """Params that the step found rather than was told."""
    mlflow.log_params({name: as_text(value) for name, value in values.items()})


def log_picture(picture: NDArray[np.uint8], name: str) -> None:
    """An RGB picture (H, W, 3) as artifact ``name`` of the active run."""
    mlflow.log_image(picture, artifact_file=name)


def log_json(value: Mapping[str, Any], name: str) -> None:
    """A JSON artifact of the active run."""
    mlflow.log_dict(dict(value), name)


def log_file(path: Path) -> None:
    """A file as artifact of the active run."""
    mlflow.log_artifact(str(path))


def log_dataset(path: Path, fingerprint: str, context: str) -> None:
    """The data set as an input of the active run; its digest is the start of the fingerprint."""
    source = LocalArtifactDatasetSource(str(path.resolve()))
    mlflow.log_input(MetaDataset(source, name=path.stem, digest=fingerprint[:16]), context=context)


def artifacts_of_active_run() -> str:
    """Where the active run's artifacts lie: a folder where they are local, else an address."""
    active = mlflow.active_run()
    assert active is not None
    uri = active.info.artifact_uri or ""
    return _shown(Path(urlparse(uri).path)) if urlparse(uri).scheme in ("", "file") else uri


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
