"""Where a model comes from: the runs that trained, searched, scored and prepared, as links of the UI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pneumo_experiments.registry.scores import read_artifact
from pneumo_experiments.settings import NONE, Train, as_text, is_none, leaves
from pneumo_experiments.tracking.code_version import CODE_VERSION_TAG, code_version
from pneumo_experiments.tracking.experiment import STAGE_TAG
from pneumo_experiments.tracking.log import link_to
from pneumo_experiments.tracking.servers import if_exists

STUDY_PARAM = "study_used"  # of a search, and of a training whose settings it found: the study's name
MAX_DEPTH = 4  # main, train and fold, and one to spare
NEWEST = ["attributes.start_time DESC"]


@dataclass(frozen=True)
class Lineage:
    """What is known of a model's origin; no links to runs that are deleted or elsewhere."""

    links: dict[str, str]
    """pages of the UI by their text; an address is relative to every page of the UI, below whatever prefix"""
    training_runs: Sequence[str]
    """ids of the runs that logged the model or its members"""
    code_version: str
    """of the trainings"""
    shaping: Mapping[str, str]
    """what shaped the weights of the first training: its settings, data set and code, by name"""


def lineage(model_ids: Sequence[str], fingerprint: str) -> Lineage:
    """Links to the trainings of these logged models, their settings and searches, and the data report."""
    client: Any = MlflowClient()
    links, runs = dict[str, str](), list[Run]()
    for place, model_id in enumerate(model_ids, start=1):
        model = if_exists(client.get_logged_model, model_id)
        run = _run(model.source_run_id) if model else None
        if run is None:
            continue
        runs.append(run)
        number = f" {place}" if len(model_ids) > 1 else ""
        links |= {f"training{number}": link_to(run.info), f"config{number}": link_to(run.info, "config.yaml")}
        if (search := _search_of(run)) is not None:
            links[f"search{number}"] = link_to(search.info)
    if (data := _preprocess_of(fingerprint)) is not None:
        files: list[Any] = if_exists(client.list_artifacts, data.info.run_id) or []
        reports = [file.path for file in files if file.path.endswith(".report.html")]
        links["data report"] = link_to(data.info, *reports[:1])
    versions = dict.fromkeys(run.data.tags.get(CODE_VERSION_TAG, "unknown") for run in runs)
    code = ", ".join(versions) or code_version()
    return Lineage(links, [run.info.run_id for run in runs], code, _shaping(runs[0]) if runs else {})


def changes(champion_id: str | None, origin: Lineage) -> dict[str, tuple[str, str]]:
    """What shaped a logged champion's weights otherwise than a new model's: both values by name.

    What is unknown of one of them is left out.
    """
    model = if_exists(MlflowClient().get_logged_model, champion_id) if champion_id else None
    run = _run(model.source_run_id) if model else None
    before, now = _shaping(run) if run else {}, origin.shaping
    return {name: (text, now[name]) for name, text in before.items() if now.get(name, text) != text}


def _shaping(run: Run) -> dict[str, str]:
    config: Any = read_artifact(run.info.run_id, "config.yaml")
    known = cast("dict[str, Any]", config if isinstance(config, dict) else {})
    names = [leaf.name for leaf in leaves(Train) if leaf.arg.shapes_weights]
    facts = {name: as_text(known[name]) for name in names if name in known}
    inputs = run.inputs.dataset_inputs if run.inputs else []
    facts |= {"data set": inputs[0].dataset.digest} if inputs else {}
    return facts | ({"code": code} if (code := run.data.tags.get(CODE_VERSION_TAG)) else {})


def score_links(run_id: str) -> dict[str, str]:
    """Links to the run that scored a model."""
    if (run := _run(run_id)) is None:
        return {}
    return {"scores": link_to(run.info), "report of the scores": link_to(run.info, "report.html")}


def _search_of(training: Run) -> Run | None:
    """The search that found the settings of a training: around it, or in the same chain, or of its study."""
    experiments, run = [training.info.experiment_id], training
    is_search = f"tags.`{STAGE_TAG}` = 'search'"
    for _ in range(MAX_DEPTH):
        parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        above = _run(parent) if parent else None
        if above is None:
            break
        if above.data.tags.get(STAGE_TAG) == "search":  # the training is a trial
            return above
        below = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'"
        if (search := _last(experiments, f"{below} and {is_search}")) is not None:
            return search
        run = above
    fold = _last(experiments, f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{training.info.run_id}'")
    params = [each.data.params.get(STUDY_PARAM, NONE) for each in (training, fold) if each is not None]
    study = next((name for name in params if not is_none(name)), NONE)
    if is_none(study) or "'" in study:
        return None
    return _last(experiments, f"params.{STUDY_PARAM} = '{study}' and {is_search}")


def _preprocess_of(fingerprint: str) -> Run | None:
    """The latest run that wrote a data set with this fingerprint, or found it written."""
    digest = fingerprint[:16]  # as log_dataset logs it
    client: Any = MlflowClient()
    experiments = [each.experiment_id for each in client.search_experiments()]
    return _last(experiments, f"dataset.digest = '{digest}' and dataset.context = 'preprocessed'")


def _run(run_id: str) -> Run | None:
    return if_exists(MlflowClient().get_run, run_id)


def _last(experiments: list[str], condition: str) -> Run | None:
    """The latest run that meets a condition."""
    client: Any = MlflowClient()
    found = if_exists(client.search_runs, experiments, condition, max_results=1, order_by=NEWEST)
    return found[0] if found else None
