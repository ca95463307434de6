"""How the experiment shows in MLflow's UI."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pneumo_experiments import tracking, ui
from pneumo_experiments.settings import Sample, Train
from pneumo_experiments.tracking import experiment


def state_of(tag: str) -> dict[str, Any]:
    """What the UI unpacks from a saved view."""
    kind, _, packed = json.loads(tag)["state"].partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(b64decode(packed)))


def test_a_view_shows_the_runs_of_its_stage_by_their_first_metric(store: Path) -> None:
    with tracking.run("train", Train()):
        tracking.log_metrics({"dice": 0.5})
    with tracking.run("sample", Sample()):
        pass
    client = MlflowClient()
    (shown,) = client.search_experiments()
    state = state_of(shown.tags["mlflow.sharedViewState.trainings"])
    found = client.search_runs([shown.experiment_id], state["searchFilter"])
    assert [run.data.tags["pneumo.stage"] for run in found] == ["train"]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`dice`", False)
    assert {"metrics.`val/dice`", "params.`network`"} <= set(state["selectedColumns"])
    assert (shown.name, shown.tags["mlflow.experimentKind"]) == (ui.EXPERIMENT, "custom_model_development")
    assert ui.EXPERIMENT == experiment.DEFAULT_EXPERIMENT
    assert ui.VIEW in experiment.VIEWS


@pytest.mark.parametrize("name", ["mlflow.note.content", "mlflow.experiment.primaryMetric.name"])
def test_what_a_person_wrote_about_the_experiment_stays(name: str, store: Path) -> None:
    client, id = MlflowClient(), tracking.open_store()
    client.set_experiment_tag(id, name, "mine")
    assert tracking.open_store() == id
    assert client.get_experiment(id).tags[name] == "mine"
