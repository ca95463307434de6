"""Several trainings side by side: their table, their runs, and what an interruption leaves."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import changed, make
from mlflow import MlflowClient
from tracked import stopped_in_training

from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import Train
from pneumo_experiments.stages.train import train_each

pytestmark = pytest.mark.usefixtures("tiny", "no_pictures", "no_charts", "no_code", "store")


@pytest.fixture
def several(small_dataset: Path) -> list[Train]:
    """Two seeds at two learning rates."""
    short: dict[str, Any] = {"epochs": 1, "threshold_trials": 0, "overlays": 0, "device": "cpu"}
    first = make(Train, dataset=small_dataset, network="tiny", weights="none", **short)
    return [changed(first, seed=seed, learning_rate=rate) for rate in (1e-3, 1e-2) for seed in (0, 1)]


def test_the_parent_shows_mean_and_spread_over_seeds(
    several: list[Train], capsys: pytest.CaptureFixture[str]
) -> None:
    dices = [result.scores.dice for result in train_each(several)]
    runs = MlflowClient().search_runs(["0"], order_by=["attributes.start_time"])
    parent, *children = runs
    assert parent.info.run_name == "trainings seed 0,1; learning_rate 0.001,0.01"
    assert parent.data.params["values"] == "seed 0,1; learning_rate 0.001,0.01"
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * 4
    assert [run.data.params["seed"] for run in children] == ["0", "1", "0", "1"]
    assert [run.data.metrics["val/dice"] for run in children] == pytest.approx(dices)
    for step, pair in enumerate((dices[:2], dices[2:])):
        for name, expected in (("mean", statistics.mean(pair)), ("sd", statistics.stdev(pair))):
            history = MlflowClient().get_metric_history(parent.info.run_id, f"trainings/dice_{name}")
            assert history[step].value == pytest.approx(expected, abs=1e-12)
    said = capsys.readouterr().out.splitlines()
    row = ["0.001", "2", f"{statistics.mean(dices[:2]):.4f}", f"{statistics.stdev(dices[:2]):.4f}"]
    assert any(line.split()[:4] == row for line in said)
    assert not list(Path("output/checkpoints").glob("*"))


def test_what_has_ended_before_an_interruption_is_not_trained_again(
    several: list[Train], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_in_training(2, monkeypatch):
        train_each(several[:3])
    capsys.readouterr()
    train_each(several[:3])
    said = capsys.readouterr().out
    assert said.count("continues after epoch 1 of 1") == 2
    assert said.count("epoch 1/1") == 1  # of the third


def test_one_that_fails_leaves_the_others_alone_and_alike_ones_are_refused_before(
    several: list[Train], capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = changed(several[1], learning_rate=1e30)
    with pytest.raises(UserError, match=r"^1 of 3 trainings failed: training 2 \(seed 1, .*diverged"):
        train_each([several[0], diverging, several[2]])
    runs = MlflowClient().search_runs(["0"], order_by=["attributes.start_time"])
    assert [run.info.status for run in runs] == ["FAILED", "FINISHED", "FAILED", "FINISHED"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("0.0")]
    assert [(row[:2], row[3]) for row in rows] == [(["0.001", "1"], "–"), (["0.01", "1"], "–")]
    for alike, reason in (
        (changed(several[0], threshold_trials=5), "two of the trainings would end in the same weights"),
        (changed(several[1], from_study="s"), "from_study and reproduce name settings"),
    ):
        with pytest.raises(UserError, match=reason):
            train_each([several[0], alike])
    assert len(MlflowClient().search_runs(["0"])) == 4


def test_a_group_of_torchrun_trains_one(several: list[Train], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="torchrun trains one network"):
        train_each([replace(one) for one in several])
