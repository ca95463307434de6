"""The entry point ``search``: its runs, what it keeps, and how it goes on."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import numpy as np
import optuna
import pytest
import torch
import yaml
from helpers import Call, changed, make, soak
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from tracked import artifact, runs

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.interrupts import Interrupted
from pneumo_experiments.learning.network import build_network
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds
from pneumo_experiments.search import report as study_report
from pneumo_experiments.search import trial as trial_module
from pneumo_experiments.search import trial_training, workers
from pneumo_experiments.search.space import SPACE, Space, suggest
from pneumo_experiments.search.storage import open_storage
from pneumo_experiments.search.study import TrainingResult, confirmations, set_confirmation
from pneumo_experiments.search.trial_training import TrialScores, TrialTraining
from pneumo_experiments.search.winner import best_of_study
from pneumo_experiments.search.workers import open_search
from pneumo_experiments.settings import Recipe, Search, Train, flat
from pneumo_experiments.stages import search as stage
from pneumo_experiments.stages.search import SearchResult, search
from pneumo_experiments.stages.train import train
from pneumo_experiments.training.loop import EpochResult

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")

STORAGE = "sqlite:///optuna.db"
TWO = "dice_weight,focal_weight"  # the fewer are searched, the fewer axes are drawn
SHORT = {"study": "s", "storage": STORAGE, "search_epochs": 2, "pruner": "none", "confirm": 0, "keep": 0}

PICTURES = ("history", "intermediate_values", "parallel_coordinate", "slice", "importances", "contour")


@pytest.fixture(autouse=True)
def no_run_stays_open(store: Path) -> Iterator[None]:
    yield
    assert mlflow.active_run() is None


@pytest.fixture(autouse=True)
def only_wanted_pictures(request: pytest.FixtureRequest) -> None:
    if "pictures" not in request.keywords:
        request.getfixturevalue("no_pictures")


@pytest.fixture
def settings(small_dataset: Path, tiny: None) -> Search:
    shared = {"network": "tiny", "weights": "none", "batch_size": 8, "precision": "fp32", "device": "cpu"}
    return make(Search, dataset=small_dataset, trials=2, **(SHORT | shared))


def first_value(recipe: Recipe) -> float:
    """From 0 to 0.5, another for every dice_weight."""
    return recipe.loss.dice_weight / (recipe.loss.dice_weight + 1) / 2


@dataclass
class Quick:
    """Searches with trainings that take no time, and have the Dice that a function gives them."""

    dataset: Path
    made: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """seed and fold of what has trained"""

    def __call__(
        self,
        value: Callable[[Recipe], float] = first_value,
        alarms: Callable[[Recipe], float] = lambda recipe: 0.0,
        **values: Any,
    ) -> SearchResult:
        made = self.made

        class Training:
            def __init__(self, dataset: Dataset, settings: Search) -> None:
                made.append((settings.recipe.seed, settings.split.fold))
                self.settings, self.cache = settings, "host"

            def epochs(
                self, recipe: Recipe, trials_left: int = 1
            ) -> Iterator[tuple[TrialScores, dict[str, float]]]:
                for part in (0.5, 1):
                    dice = value(recipe) * part
                    scores = (dice, dice + 0.01, dice / 2, alarms(recipe), 0.0, Thresholds(), 0.01)
                    yield TrialScores(*scores, np.full(4, dice)), {"epoch/dice_cross_fitted": dice}

            def overlays(self, count: int) -> list[Any]:
                return [np.zeros((4, 4, 3), np.uint8)]

            def save_model(self, folder: Path, recipe: Recipe) -> None:
                (folder / "weights.pt").write_bytes(bytes(1000))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial_module, "TrialTraining", Training)
            return search(make(Search, **({"dataset": self.dataset} | SHORT | values)))


@pytest.fixture
def quick(small_dataset: Path) -> Quick:
    return Quick(small_dataset)


def parent() -> Run:
    (run,) = runs("search")
    return run


def study(name: str = "s") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=STORAGE)


def reported() -> list[dict[str, Any]]:
    """The rows of the report's table of trials."""
    table = json.loads(artifact(parent(), "trials.json").read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def finished() -> list[optuna.trial.FrozenTrial]:
    return study().get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


# Runs, and what the parent holds


def test_every_trial_is_a_child_run_with_its_own_settings_and_the_best_keep_their_models(
    quick: Quick,
) -> None:
    quick(trials=4, keep=2)
    children = runs("trial")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent().info.run_id}
    for trial, run in zip(study().trials, children, strict=True):
        assert run.info.run_id == trial.user_attrs["run_id"]
        assert run.info.run_name.startswith(
            f"trial {trial.number} {trial.value:.4f} · dice_weight {trial.params['dice_weight']:.3g}"
        )
        assert float(run.data.params["dice_weight"]) == trial.params["dice_weight"]
        assert run.data.params["trial_state"] == "complete"
        assert run.data.metrics["trial/value"] == trial.value == trial.user_attrs["dice"]
    assert [run.info.status for run in runs()] == ["FINISHED"] * 5
    best = sorted(study().trials, key=lambda trial: -trial.values[0])[:2]
    models = MlflowClient().search_logged_models(["0"])
    assert {model.source_run_id for model in models} == {trial.user_attrs["run_id"] for trial in best}
    assert len([*Path("mlruns").rglob("weights.pt")]) == 2  # the others' files are gone


@pytest.mark.pictures
def test_the_parent_holds_a_table_the_best_settings_and_trials_pictures_and_what_the_result_does_not_say(
    quick: Quick, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_report, "TRIALS_FOR_IMPORTANCE", 5)
    monkeypatch.setattr(study_report, "MAX_DESCRIBED", 3)
    result = quick(trials=5, searched=TWO)  # their Dice are below 0.5, that of all-empty masks is above
    rows = reported()
    assert [row["trial"] for row in rows] == [*range(5)]
    assert [row["value"] for row in rows] == [trial.value for trial in study().trials]
    assert [row["dice_weight"] for row in rows] == [t.params["dice_weight"] for t in study().trials]
    best = yaml.safe_load(artifact(parent(), "best.yaml").read_text())
    assert best["dice_weight"] == result.recipe.loss.dice_weight == study().best_params["dice_weight"]
    assert parent().data.metrics["search/best_trial"] == result.trial == study().best_trial.number
    names = {path.path for path in MlflowClient().list_artifacts(parent().info.run_id, "study")}
    assert names == {f"study/{name}.png" for name in PICTURES}
    values = [trial.values[0] for trial in study().trials]
    curves = {
        name: MlflowClient().get_metric_history(parent().info.run_id, name)
        for name in ("trial/value", "search/best_value")
    }
    points = {name: [(point.step, point.value) for point in curve] for name, curve in curves.items()}
    assert points["trial/value"] == [*enumerate(values)]
    assert points["search/best_value"] == [(n, max(values[: n + 1])) for n in range(len(values))]
    told = "no trial beat all-empty masks, which have a Dice of 0."
    assert f"search: {told}" in capsys.readouterr().out
    note = parent().data.tags["mlflow.note.content"]
    assert told.replace("no trial", "No trial") in note
    rows = [line.strip("| ").split(" | &emsp;") for line in note.splitlines() if line.startswith("| ")]
    first = sorted(study().trials, key=lambda trial: -trial.values[0])[:3]
    assert rows[0] == ["trial", "Dice", "on positives", *TWO.split(","), "seconds"]
    assert [row[0].strip("*") for row in rows[1:]] == [str(trial.number) for trial in first]
    assert rows[1][0] == f"**{first[0].number}**"
    assert "The best 3 of 5 completed trials" in note


def test_a_dashboard_finds_notes_and_overlays_of_the_trials_of_which_one_is_pruned(quick: Quick) -> None:
    values = iter([0.5, 0.5, 0.1, 0.1])
    quick(lambda recipe: next(values), trials=2, pruner="median", keep=1)
    (file,) = Path("optuna.db-artifacts").iterdir()
    first, second = study().trials
    (picture,) = [json.loads(v) for k, v in first.system_attrs.items() if k.startswith("artifacts:")]
    assert (picture["artifact_id"], picture["mimetype"]) == (file.name, "image/png")
    assert not any(name.startswith("artifacts:") for name in second.system_attrs)
    storage = RDBStorage(STORAGE)
    notes = storage.get_study_system_attrs(storage.get_study_id_from_name("s"))
    run = first.user_attrs["run_id"]
    assert notes["dashboard:1:note_str:0"] == f"complete: Dice 0.5000, on positives 0.2500; MLflow run {run}"
    assert notes["dashboard:2:note_str:0"].startswith("pruned after epoch 1 of 2: Dice 0.0500")
    assert notes["dashboard:note_str:0"].startswith("Study s: 1 complete, 1 pruned.\nBest: trial 0")
    assert notes["dashboard:note_ver"] == 1
    run = runs("trial 1")[0]
    assert run.data.params["trial_state"] == "pruned"
    assert run.info.run_name.startswith("trial 1 pruned 0.")


def test_a_trial_whose_process_died_is_interrupted_and_not_counted(
    quick: Quick, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(trials=1)
    study().tell(study().ask({"dice_weight": SPACE["dice_weight"]}), state=TrialState.FAIL)
    quick(trials=3)
    assert "search: 2 of 3 trials done, about 10 seconds left\n" in capsys.readouterr().out
    assert "Study s: 3 complete.\n" in parent().data.tags["mlflow.note.content"]
    states = [row["state"] for row in reported()]
    assert states == ["complete", "interrupted", "complete", "complete"]


@pytest.mark.pictures
def test_importances_of_too_few_trials_are_not_drawn() -> None:
    few = optuna.create_study(direction="maximize")
    few.optimize(lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1), 4)
    assert set(study_report.pictures(few)) == {"history", "parallel_coordinate", "slice"}


@pytest.mark.parametrize("gain", [pytest.param(0.005, marks=soak), 0.03])
def test_the_second_trainings_of_the_best_and_of_the_settings_as_given_choose_the_winner(
    quick: Quick, gain: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the next fold, with the next seed: there only the second best is better, by the gain."""
    firsts = set[float]()

    def value(recipe: Recipe) -> float:
        first = first_value(recipe)
        if recipe.seed == 7:
            firsts.add(first)
            return first
        return {min(firsts): 0.4, sorted(firsts)[-2]: 0.4 + gain}.get(first, 0.3)

    result = quick(value, trials=4, confirm=2, seed=7)
    assert quick.made == [(7, "0"), (8, "1")]
    best, second, _, given = sorted(study().trials, key=lambda trial: -trial.values[0])
    assert given.number == 0  # all others are better in the first training
    assert confirmations(study()).keys() == {0, best.number, second.number}
    is_clear = gain > 0.02
    assert result.trial == (second.number if is_clear else 0)
    assert parent().data.metrics["search/value"] == pytest.approx(0.4 + gain * is_clear)
    note = parent().data.tags["mlflow.note.content"]
    others = {second.number: f"{0.4 + gain:.4f}", best.number: "0.3000"}
    listed = ", ".join(f"{number} ({others[number]})" for number in sorted(others))
    assert f"trials 0 (0.4000), {listed}." in note
    assert ("trial 0, the settings as given, cross" in capsys.readouterr().out) != is_clear
    assert {run.data.tags["mlflow.parentRunId"] for run in runs("confirm")} == {parent().info.run_id}


def test_a_second_training_that_fails_is_not_repeated(quick: Quick) -> None:
    def value(recipe: Recipe) -> float:
        if recipe.seed == 1 and recipe.loss.dice_weight == 1:  # of the settings as given
            raise UserError("diverged")
        return first_value(recipe)

    for _ in range(2):
        quick(value, trials=3, confirm=1)
    assert sorted(run.info.status for run in runs("confirm")) == ["FAILED", "FINISHED"]
    assert len(confirmations(study())) == 1


def test_a_second_training_whose_process_has_died_ends_as_killed(quick: Quick) -> None:
    quick(trials=2)
    dead = MlflowClient().create_run("0", run_name="of a dead process").info.run_id
    study().set_user_attr("confirm_run.0", dead)
    quick(trials=2, confirm=1)
    assert MlflowClient().get_run(dead).info.status == "KILLED"
    again = {study().user_attrs[f"confirm_run.{number}"] for number in (0, 1)}
    assert again == {run.info.run_id for run in runs("confirm")}
    assert {run.info.status for run in runs("confirm")} == {"FINISHED"}


def test_a_second_training_that_another_process_does_is_left_to_it(
    quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(trials=2)
    other = {"pneumo.machine": "elsewhere", "pneumo.process": "1:1.0"}
    study().set_user_attr("claim.confirm.0", other)
    study().set_user_attr("alive." + "/".join(other.values()), time.time())
    result = TrainingResult(0.3, [0.3] * 4, {})
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: set_confirmation(study(), 0, result))
    quick(trials=2, confirm=1)
    assert confirmations(study()).keys() == {0, 1}
    assert len(runs("confirm 1")) == 1 and not runs("confirm 0")


def test_a_study_whose_second_trainings_are_of_an_earlier_version_gives_no_settings(quick: Quick) -> None:
    quick(trials=2)
    optuna.create_study(study_name="s-confirm", storage=STORAGE)
    with pytest.raises(UserError, match=r"^from_study=s: .* an earlier version; run search with the same"):
        best_of_study(STORAGE, "s")
    quick(trials=2, confirm=1)
    assert best_of_study(STORAGE, "s")


def test_a_trial_with_too_many_false_alarms_is_infeasible_and_never_the_best(quick: Quick) -> None:
    # The more, the higher the Dice; of the settings as given 0.25.
    result = quick(alarms=first_value, trials=4, max_false_alarms=0.22, target=0.24, keep=1)
    values = [trial.values[0] for trial in study().trials]
    assert len(values) == 4  # none that reaches the target is feasible
    feasible = [value for value in values if value <= 0.22]
    assert values[0] == 0.25 and 0 < len(feasible) < 4
    assert first_value(result.recipe) == max(feasible) == study().best_value
    for trial, value in zip(study().trials, values, strict=True):
        assert trial.constraints == {"all_empty": 0, "false_alarms": pytest.approx(value - 0.22)}
        assert trial.intermediate_values[2] == pytest.approx(value - max(0, value - 0.22))
    (model,) = MlflowClient().search_logged_models(["0"])
    assert model.source_run_id == study().best_trial.user_attrs["run_id"]


@pytest.mark.pictures
def test_several_objectives_give_a_pareto_front_and_no_pruning(quick: Quick) -> None:
    quick(trials=3, objectives="dice,seconds", pruner="hyperband", searched=TWO)
    assert all(len(trial.values) == 2 and not trial.intermediate_values for trial in study().trials)
    assert artifact(parent(), "study/pareto_front.png").read_bytes()[:4] == b"\x89PNG"
    assert [direction.name for direction in study().directions] == ["MAXIMIZE", "MINIMIZE"]


# Going on


def test_trials_is_the_total_of_the_study_and_its_parent_stays(quick: Quick) -> None:
    quick(trials=1)
    before = parent().info.run_id
    quick(trials=3)
    assert len(finished()) == 3
    assert parent().info.run_id == before
    quick(trials=3)
    assert len(finished()) == 3
    assert len(reported()) == 3


def test_a_target_or_the_time_ends_a_study_early(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    quick(trials=9, target=0.2)
    assert len(finished()) == 1  # the first value is 0.25
    with pytest.raises(UserError, match="no trial has completed; give it more trials, or more time"):
        quick(trials=9, study="late", timeout=1e-9)
    assert not study("late").get_trials(states=(TrialState.COMPLETE,))


def test_a_trial_that_fails_is_one_trial_and_the_study_goes_on(
    quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room"), UserError("diverged")]
    failing: dict[str, Exception] = dict(zip(("trial 1", "trial 2", "trial 4"), errors, strict=True))

    def value(recipe: Recipe) -> float:
        title = " ".join(str(mlflow.get_run(tracking.active_run()).info.run_name).split()[:2])
        if title in failing:
            raise failing[title]
        return nan if title == "trial 5" else first_value(recipe)

    def of_the_sampler(trial: optuna.Trial, space: Space) -> dict[str, Any]:
        if trial.number == 7:
            raise RuntimeError("singular matrix")
        return suggest(trial, space)

    monkeypatch.setattr(trial_module, "suggest", of_the_sampler)
    quick(value, trials=7)
    states = [trial.state.name[0] for trial in study().trials]
    assert "".join(states) == "CFFCFFCF"
    said = [study().trials[number].user_attrs["error"] for number in (1, 2, 4, 7)]
    assert said == [*map(str, errors), "singular matrix"]
    assert sorted(run.info.status for run in runs()) == [*["FAILED"] * 3, *["FINISHED"] * 5]


def test_three_failures_in_a_row_end_the_search_with_one_line(quick: Quick) -> None:
    def value(recipe: Recipe) -> float:
        raise RuntimeError("no such device\nmore")

    with pytest.raises(UserError, match=r"^search: the last 3 trials failed: no such device$"):
        quick(value, trials=9)
    assert len(study().trials) == 3 + sum(trial.state is TrialState.WAITING for trial in study().trials)
    assert parent().info.status == "FAILED"


def test_failures_of_trials_and_of_second_trainings_are_counted_apart(quick: Quick) -> None:
    calls = iter(range(100))

    def value(recipe: Recipe) -> float:
        if next(calls) >= 4:  # after two trials
            raise RuntimeError("no such device")
        return first_value(recipe)

    quick(value, trials=4, confirm=1)
    assert [trial.state.name for trial in study().trials] == [*["COMPLETE"] * 2, *["FAIL"] * 2]
    assert [run.info.status for run in runs("confirm")] == ["FAILED"] * 2


def test_after_ctrl_c_the_same_command_tries_the_same_trial_again(quick: Quick) -> None:
    calls = iter(range(100))

    def value(recipe: Recipe) -> float:
        if next(calls) == 3:  # the second epoch of the second trial
            raise Interrupted
        return first_value(recipe)

    with pytest.raises(Interrupted):
        quick(value, trials=3)
    assert parent().info.status == "KILLED"
    interrupted = study().trials[1]
    quick(trials=3)
    again = [trial for trial in finished() if trial.params == interrupted.params]
    assert len(again) == 1
    assert len(finished()) == 3
    assert parent().info.status == "FINISHED"
    assert sorted(run.info.status for run in runs()) == [*["FINISHED"] * 4, "KILLED"]


def test_ctrl_c_while_the_data_are_read_costs_no_trial(
    quick: Quick, settings: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TrialTraining, "__init__", _interrupt)
        with pytest.raises(Interrupted):
            search(settings)
    search(settings)
    assert finished()[0].params["dice_weight"] == settings.recipe.loss.dice_weight  # still tried first


def test_the_same_data_and_settings_have_one_study_and_others_another(quick: Quick, dataset: Path) -> None:
    def names() -> set[str]:
        if not Path("optuna.db").exists():
            return set()
        with closing(sqlite3.connect("optuna.db")) as database:  # to open a storage takes a while
            return {name for (name,) in database.execute("SELECT study_name FROM studies")}

    def name(**values: Any) -> str:
        before = names()
        quick(**({"study": "auto", "trials": 1} | values))
        (new,) = names() - before or {"none"}
        return new

    first = name()
    assert re.fullmatch(r"search-[0-9a-f]{8}", first)
    assert name(trials=2, sampler="random", keep=1) == "none"  # how, not what
    others = [name(dataset=dataset), name(weight_decay=0.02), name(searched="dice_weight")]
    assert len({first, "none", *others}) == 5


def test_a_study_of_an_earlier_version_goes_on_with_the_defaults_of_later_settings(quick: Quick) -> None:
    quick(trials=1)
    recorded = dict(study().user_attrs["made_with"])
    assert recorded.pop("balance") == "image"
    recorded["positive_share"] = recorded.pop("positive_fraction")
    recorded["augment"] = {"none": "false", "mild": "true"}[recorded["augment"]]
    study().set_user_attr("made_with", recorded)
    quick(trials=2)
    assert len(study().trials) == 2
    with pytest.raises(UserError, match=r"^study=s: was made with balance image, now patient; name another"):
        quick(trials=3, balance="patient")


def test_a_study_of_other_data_is_refused_and_the_difference_named(quick: Quick, dataset: Path) -> None:
    quick(trials=1)
    for values, difference in (
        (
            {"weight_decay": 0.05, "holdout": 0.25},
            r"weight_decay .*, now 0\.05; holdout 0\.2, now 0\.25",
        ),
        ({"dataset": dataset}, r"data [0-9a-f]{16}, now [0-9a-f]{16}"),
        (
            {"searched": "focal_weight,presence_weight,learning_rate"},
            r".*range of dice_weight 0\.1 to 10, logarithmic, now not searched",
        ),
    ):
        with pytest.raises(UserError, match=rf"^study=s: was made with {difference}; name another"):
            quick(trials=1, **values)
    assert len(study().trials) == 1
    assert [run.info.status for run in runs("search")] == ["FINISHED"]  # no run is opened only to fail


# Real trainings


def test_the_best_settings_train_a_network(settings: Search, tiny_default: None, call: Call) -> None:
    settings = changed(settings, network="fcn_resnet50", trials=2, dice_weight=3.0, presence_weight=1.0)
    result = search(settings)
    assert len(finished()) == 2
    config = str(artifact(parent(), "best.yaml"))
    short = ["--epochs", "1", "--threshold_trials", "0", "--overlays", "0", "--device", "cpu"]
    end = call(["train", "--config", config, *short])
    assert end.code == 0, end.err
    shared = {
        name: flat(settings)[name] for name in ("dataset", "weights", "batch_size", "precision", "device")
    }
    train(make(Train, **shared, from_study="s", storage=STORAGE, epochs=1, threshold_trials=0, overlays=0))
    trained = runs("train")
    assert len(trained) == 2
    assert result.recipe.loss.dice_weight != 1.0  # the default
    for run in trained:
        assert float(run.data.params["dice_weight"]) == result.recipe.loss.dice_weight
        assert float(run.data.params["presence_weight"]) == result.recipe.loss.presence_weight
    with pytest.raises(UserError, match=r"^from_study=t: no such study in the storage; there are s"):
        train(make(Train, **shared, from_study="t", storage=STORAGE))


def test_a_learning_rate_that_diverges_fails_only_its_trials(settings: Search, store: Path) -> None:
    (store / "space.yaml").write_text("learning_rate: {choices: [1.0e-4, 1.0e+30]}\n")
    chosen = {"searched": "learning_rate", "space": store / "space.yaml", "sampler": "random", "trials": 5}
    search(changed(settings, learning_rate=1e-4, **chosen))
    failed = {trial.params["learning_rate"] for trial in study().trials if trial.state is TrialState.FAIL}
    assert failed == {1e30}
    assert {trial.params["learning_rate"] for trial in finished()} == {1e-4}


def test_a_trial_on_two_folds_is_worth_their_mean(settings: Search, dataset: Path) -> None:
    settings = changed(settings, dataset=dataset)
    with Dataset.open(settings.dataset) as dataset, tracking.run("search", settings):
        both = changed(settings, folds_per_trial=2)
        one, two = (
            [scores for scores, _ in TrialTraining(dataset, s).epochs(s.recipe)]
            for s in (settings, changed(settings, fold="1"))
        )
        mean = [scores for scores, _ in TrialTraining(dataset, both).epochs(both.recipe)]
    assert len(mean) == 4
    assert mean[1].dice == one[-1].dice
    assert one[-1].dice != two[-1].dice
    assert mean[-1].dice == pytest.approx((one[-1].dice + two[-1].dice) / 2)
    for scores in (one[-1], two[-1], mean[-1]):
        assert scores.patient_dice.mean() == pytest.approx(scores.dice)
    assert len(mean[-1].patient_dice) == len(one[-1].patient_dice) + len(two[-1].patient_dice)


def test_warm_up_epochs_are_trained_once_and_deleted_at_the_end(
    settings: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, calls = changed(settings, search_warmup_epochs=1), list[int]()
    fit = trial_training.fit

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return fit(*arguments, **named)

    monkeypatch.setattr(trial_training, "fit", counted)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "make_report", _interrupt)
        with pytest.raises(Interrupted):
            search(settings)
    assert len([*Path("output/checkpoints").glob("warm-up-*")]) == 1
    with Dataset.open(settings.dataset) as dataset, tracking.run("search", settings):
        first = TrialTraining(dataset, settings)._initial.state_dict()  # what every trial starts from
        saved = trial_training.warmup_checkpoint(settings, dataset.fingerprint).last()
    assert saved is not None
    untrained = build_network(settings.recipe.network.network, "none", settings.recipe.seed).state_dict()
    assert all(torch.equal(first[name], saved["networks"][1][name]) for name in first)
    assert not torch.equal(first["mask_head.0.weight"], untrained["mask_head.0.weight"])
    search(changed(settings, trials=3))
    assert calls == [1]
    assert not [*Path("output/checkpoints").glob("warm-up-*/*.pt")]


def test_second_trainings_have_their_own_fold_seed_and_start(
    settings: Search, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "space.yaml").write_text("weight_decay: {choices: [0.01, 0.0100001]}\n")  # trials nearly alike
    alike = {"searched": "weight_decay", "weight_decay": 0.01, "space": store / "space.yaml"}
    not_empty = {"learning_rate": 0.05, "search_epochs": 3, "positive_fraction": 0.9, "folds": 3}
    not_empty |= {"final_positive_fraction": 0.9}
    search(changed(settings, **alike, **not_empty, search_warmup_epochs=1, confirm=1))
    for name, fold, seed in (("trial", "0", "0"), ("confirm", "1", "1")):
        params = [run.data.params for run in runs(name)]
        assert [(each["fold"], each["seed"]) for each in params] == [(fold, seed)] * 2
    assert capsys.readouterr().out.count("every trial starts from one network") == 2
    assert not [*Path("output/checkpoints").glob("warm-up-*/*.pt")]
    assert len(parent().inputs.dataset_inputs) == 1
    assert parent().data.params["cache_used"] == "host"


def test_a_trial_may_validate_on_a_part_of_the_patients_with_as_many_findings(settings: Search) -> None:
    with Dataset.open(settings.dataset) as dataset, tracking.run("search", settings):
        (whole,) = TrialTraining(dataset, changed(settings, folds=2))._folds
        limit = len(whole.images.validation) // 2
        (part,) = TrialTraining(dataset, changed(settings, folds=2, search_validation_images=limit))._folds
    assert set(part.images.validation.indices) < set(whole.images.validation.indices)
    assert abs(len(part.images.validation) - limit) <= 2
    patients = {entry.patient for entry in part.images.validation.entries}
    rest = set(whole.images.validation.indices.tolist()) - set(part.images.validation.indices.tolist())
    with Dataset.open(settings.dataset) as dataset:
        assert patients.isdisjoint(dataset.entries[index].patient for index in rest)
    positives = [sum(entry.area_px > 0 for entry in fold.images.validation.entries) for fold in (whole, part)]
    assert positives[1] == pytest.approx(positives[0] / 2, abs=1)
    assert set(part.half.tolist()) == {0, 1}


def test_a_kept_start_is_the_network_that_the_trials_started_from(settings: Search) -> None:
    settings = changed(settings, search_warmup_epochs=1, trials=1)
    start = search(settings, keep_start=True).start
    assert start is not None
    first = torch.load(start, weights_only=True)
    start.unlink()
    assert search(settings, keep_start=True).start == start  # the study has ended: trained again
    again = torch.load(start, weights_only=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    untrained = build_network(settings.recipe.network.network, "none", settings.recipe.seed).state_dict()
    assert not torch.equal(first["mask_head.0.weight"], untrained["mask_head.0.weight"])
    other = changed(settings, search_warmup_epochs=0, study="other")
    assert search(other, keep_start=True).start is None


def test_the_warm_up_sees_no_image_that_a_fold_of_the_trials_validates_on(
    settings: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fit = list[int](), trial_training.fit

    def counted(network: Any, data: Any, *others: Any) -> Any:
        seen.append(len(data))
        return fit(network, data, *others)

    monkeypatch.setattr(trial_training, "fit", counted)
    settings = changed(settings, search_warmup_epochs=1, folds_per_trial=2)
    with Dataset.open(settings.dataset) as dataset, tracking.run("search", settings):
        one, other = trial_training.split_folds(dataset, settings)
        TrialTraining(dataset, settings)
    assert seen == [len(set(one.train.tolist()) - set(other.validation.tolist()))]
    assert seen[0] < len(one.train)


@pytest.mark.parametrize("top", [0, 100])
def test_a_trial_without_any_mask_loses_less_the_better_it_would_outline(top: int, settings: Search) -> None:
    """A network that marks too much, so that empty masks score best; or one that is right."""
    with Dataset.open(settings.dataset) as dataset, tracking.run("search", settings):
        training = TrialTraining(dataset, settings)
    (fold,) = training._folds
    validation, areas = fold.images.validation, fold.images.validation.areas_px
    half = np.argsort(np.argsort(areas)) % 2  # positives in both
    assert set(half[areas > 0].tolist()) == {0, 1}
    pixels = np.zeros((len(areas), 2, 101), np.int32)
    pixels[:, 0] = 4_000_000  # everywhere marked, at any score: Dice of positives is about their area
    pixels[:, 1] = areas[:, None]
    if top:
        pixels[:, :, 1:] = areas[:, None, None]
    counts = replace(
        ThresholdCounts.of(pixels, np.full(len(areas), 0.05, np.float32)), patient=validation.patients
    )
    result = EpochResult(cast("Any", None), Evaluation(validation, counts, Thresholds()))
    scores = trial_training._score_fold(replace(fold, half=half), result)
    sums, images = dict[str, float](), len(areas)
    for entry in validation.entries:
        sums[entry.patient] = sums.get(entry.patient, 0) + (entry.area_px == 0 or top > 0)
    assert scores.patient_dice.tolist() == pytest.approx(
        [sums[name] * len(sums) / images for name in sorted(sums)]
    )
    if top:
        assert (scores.empty_loss, scores.dice, scores.false_alarms) == (0, 1, 0)
    else:
        outlined = np.mean([2 * area / (4_000_000 + area) for area in areas if area])
        assert scores.empty_loss == pytest.approx(1 - outlined)
        assert (scores.dice, scores.false_alarms) == (np.mean(areas == 0), 0)


def _interrupt(*arguments: Any) -> None:
    raise Interrupted


# Several workers


def owner_elsewhere(last_seen: float, has_run: bool = True) -> None:
    """A process of another machine owns the study, and was seen then."""
    tags = {"pneumo.host": "another", "pneumo.machine": "", "pneumo.process": "1:1"}
    study().set_user_attr("claim.owner", tags)
    if has_run:
        study().set_user_attr("parent_process", tags)
    study().set_user_attr("alive.another//1:1", last_seen)


def test_a_worker_that_joins_runs_trials_for_the_owner_and_takes_over_when_that_one_has_died(
    quick: Quick, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(trials=1)
    before = parent()
    owner_elsewhere(time.time())
    result = quick(trials=3)
    assert f"search: best is trial {result.trial}," in capsys.readouterr().out
    assert len(finished()) == 3
    assert {run.data.tags["mlflow.parentRunId"] for run in runs("trial")} == {before.info.run_id}
    assert parent().data.tags == before.data.tags and len(reported()) == 1  # all of it is the owner's
    assert parent().info.end_time == before.info.end_time
    owner_elsewhere(time.time() - 61)
    quick(trials=3)
    assert parent().info.run_id == before.info.run_id and len(reported()) == 3


def test_a_worker_reports_when_the_owner_has_died_meanwhile(quick: Quick) -> None:
    quick(trials=1)
    owner_elsewhere(time.time())

    def value(recipe: Recipe) -> float:
        owner_elsewhere(0)
        return first_value(recipe)

    quick(value, trials=2)
    assert len(reported()) == 2


def test_a_worker_waits_for_the_run_of_a_new_owner(quick: Quick, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(trials=1)
    owner_elsewhere(time.time(), has_run=False)
    new = MlflowClient().create_run("0", run_name="of the new owner").info.run_id

    def start_run(seconds: float) -> None:
        study().set_user_attr("parent_run", new)
        owner_elsewhere(time.time())

    monkeypatch.setattr(stage, "time", SimpleNamespace(sleep=start_run))
    quick(trials=2)
    parents = {run.info.run_name[:7]: run.data.tags["mlflow.parentRunId"] for run in runs("trial")}
    assert parents == {"trial 0": parent().info.run_id, "trial 1": new}


def test_a_trial_without_a_process_is_dead_after_a_minute_whatever_the_clocks_of_the_machines(
    quick: Quick,
) -> None:
    with open_search(make(Search, dataset=quick.dataset, trials=2, **SHORT)) as trials:
        study().ask()
        with closing(sqlite3.connect("optuna.db")) as database, database:
            database.execute("UPDATE trials SET datetime_start = datetime(datetime_start, '-1 hour')")
        workers._next_task(trials)
        assert trials.study.trials[0].state.name == "RUNNING"
        trials.first_seen[0] -= 61
        workers._next_task(trials)
        assert trials.study.trials[0].state.name == "FAIL"


def test_a_trial_whose_worker_has_died_is_run_again(quick: Quick) -> None:
    quick(trials=1)
    dead = study().ask()
    names = ("dice_weight", "focal_weight", "presence_weight", "learning_rate")
    values = suggest(dead, {name: SPACE[name] for name in names})
    dead.set_user_attr("process", tracking.process_tags() | {"pneumo.process": "1:1.0"})
    quick(trials=2)
    states = [trial.state.name for trial in study().trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study().trials[2].params == values


def test_no_two_workers_on_sqlite_take_the_same_waiting_trial() -> None:
    first = optuna.create_study(study_name="s", storage=open_storage(STORAGE))
    for number in range(30):
        first.enqueue_trial({"x": number})
    taken, start = list[int](), threading.Barrier(4)

    def note(trial: optuna.Trial) -> float:
        taken.append(trial.number)
        return 0.0

    def take() -> None:
        study = optuna.load_study(study_name="s", storage=open_storage(STORAGE))
        start.wait()
        while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.optimize(note, n_trials=1)

    workers = [threading.Thread(target=take) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(number for number in taken if number < 30) == list(range(30))
