"""Where a model comes from: the runs that trained, searched, scored and prepared, as links of the UI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pneumo_experiments.settings import NONE, is_none
from pneumo_experiments.tracking.buffered_client import is_outage
from pneumo_experiments.tracking.code_version import CODE_VERSION_TAG, code_version

STUDY_PARAM = "study_used"  # of a search, and of a training whose settings it found: the study's name
PARENT_TAG = "mlflow.parentRunId"
SEARCH, MAX_DEPTH = "search", 4  # name of its runs; main, train and fold, and one to spare


@dataclass(frozen=True)
class Link:
    """A page of the UI; the address is relative to every page of the UI, below whatever prefix."""

    text: str
    address: str


@dataclass(frozen=True)
class Lineage:
    """What is known of a model's origin; an empty list of links where runs are deleted or elsewhere."""

    links: Sequence[Link]
    training_runs: Sequence[str]
    """ids of the runs that logged the model or its members"""
    code_version: str
    """of the trainings"""


def lineage(model_ids: Sequence[str], fingerprint: str, score_run: str | None) -> Lineage:
    """Links to the trainings of these logged models, their search, settings, scores and data report."""
    client: Any = MlflowClient()
    links, versions = list[Link](), list[str]()
    runs = list[Run]()
    for place, model_id in enumerate(model_ids, start=1):
        number = f" {place}" if len(model_ids) > 1 else ""
        model = _or_none(lambda model_id=model_id: client.get_logged_model(model_id))
        run = _or_none(lambda model=model: client.get_run(model.source_run_id)) if model else None
        if model is None or run is None:
            continue
        runs.append(run)
        versions.append(run.data.tags.get(CODE_VERSION_TAG, "unknown"))
        links.append(Link(f"training{number}", _page(run)))
        links.append(Link(f"config{number}", _page(run, "config.yaml")))
        if (search := _search_of(client, run)) is not None:
            links.append(Link(f"search{number}", _page(search)))
    if score_run and (run := _or_none(lambda: client.get_run(score_run))):
        links.append(Link("scores", _page(run)))
        links.append(Link("report of the scores", _page(run, "report.html")))
    if (data := _preprocess_of(client, fingerprint)) is not None:
        report: list[Any] = _or_none(lambda: client.list_artifacts(data.info.run_id)) or list[Any]()
        names: list[str] = [file.path for file in report if file.path.endswith(".report.html")]
        links.append(Link("data report", _page(data, *names[:1])))
    return Lineage(
        [*dict.fromkeys(links)],
        [run.info.run_id for run in runs],
        ", ".join(dict.fromkeys(versions)) or code_version(),
    )


def _page(run: Run, artifact: str = "") -> str:
    """The page of a run, or of one of its artifacts."""
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return f"{page}/artifacts/{quote(artifact)}" if artifact else page


def _search_of(client: Any, training: Run) -> Run | None:
    """The search that found the settings of a training: around it, or in the same chain, or of its study."""
    experiments, run = [training.info.experiment_id], training
    for _ in range(MAX_DEPTH):
        parent = run.data.tags.get(PARENT_TAG)
        above = _or_none(lambda parent=parent: client.get_run(parent)) if parent else None
        if above is None:
            break
        if above.info.run_name == SEARCH:  # the training is a trial
            return above
        condition = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.run_name = '{SEARCH}'"
        if (beside := _last_run(client, experiments, condition)) is not None:
            return beside
        run = above
    fold = _last_run(client, experiments, f"tags.`{PARENT_TAG}` = '{training.info.run_id}'")
    noted = [each.data.params.get(STUDY_PARAM, "") for each in (training, fold) if each is not None]
    study = next((name for name in noted if not is_none(name)), NONE)
    if is_none(study) or "'" in study:
        return None
    return _last_run(
        client, experiments, f"params.{STUDY_PARAM} = '{study}' and attributes.run_name = '{SEARCH}'"
    )


def _preprocess_of(client: Any, fingerprint: str) -> Run | None:
    """The latest run that wrote a data set with this fingerprint, or found it written."""
    digest = fingerprint[:16]  # as log_dataset logs it
    condition = f"dataset.digest = '{digest}' and dataset.context = 'preprocessed'"
    return _last_run(client, [each.experiment_id for each in client.search_experiments()], condition)


def _last_run(client: Any, experiments: list[str], condition: str) -> Run | None:
    found = _or_none(
        lambda: client.search_runs(
            experiments, condition, max_results=1, order_by=["attributes.start_time DESC"]
        )
    )
    return found[0] if found else None


def _or_none(call: Any) -> Any:
    """What a call answers; None if what it asks for does not exist."""
    try:
        return call()
    except MlflowException as error:
        if is_outage(error):
            raise
        return None
