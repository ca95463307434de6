"""The entry point ``train``: folds, what it leaves in its run, and going on."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from command_server import CommandServer
from helpers import BIN, ROOT, changed, environment_of_mlflow, make, soak, words_of
from mlflow import MlflowClient
from tiny_network import tiny_member, weights_of
from torch.nn.modules.module import register_module_forward_hook
from tracked import log_model, runs, stopped_in_training, table

from pneumo_experiments import dry_run, tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset, hash_image_ids, make_split
from pneumo_experiments.learning.calibration import Calibration, fit_calibration
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.metrics.dice import calibration_error, dice
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.search.trial_training import doubt_of_start as search_doubt
from pneumo_experiments.serving import Detector, load
from pneumo_experiments.settings import Main, Score, Search, SplitSettings, Train, flat
from pneumo_experiments.stages.main import _training_recipe
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.search import SearchResult, search
from pneumo_experiments.stages.train import train
from pneumo_experiments.training.fold import Fold, FoldResult, doubt_of_start, initial_network
from pneumo_experiments.training.loop import EpochResult
from pneumo_experiments.training.resume import TrainingState

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")


@pytest.fixture
def settings(small_dataset: Path, tiny: None, store: Path) -> Train:
    """Short trainings."""
    return make(
        Train,
        network="tiny",
        dataset=small_dataset,
        weights="none",
        epochs=2,
        threshold_trials=0,
        overlays=0,
        batch_size=8,
    )


def test_all_folds_are_child_runs_and_each_image_is_scored_by_a_network_that_never_saw_it(
    settings: Train, small_dataset: Path
) -> None:
    train(changed(settings, fold="all", folds=2, epochs=1, holdout=0.25))
    parent, *folds = runs()
    assert [run.info.run_name for run in folds] == ["fold 0", "fold 1"]
    assert {run.data.tags["mlflow.parentRunId"] for run in folds} == {parent.info.run_id}
    assert parent.data.params["fold"] == "all"
    rows = table(parent, "out_of_fold.csv")
    with Dataset.open(small_dataset) as opened:
        areas = {entry.image_id: entry.area_px for entry in opened.entries}
    splits = [mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/split.json")["parts"] for run in folds]
    assert len(rows) == sum(split["validation"]["images"] for split in splits)
    assert len({row["image_id"] for row in rows}) == len(rows) == 24 - splits[0]["holdout"]["images"]
    assert all(int(row["truth_area_px"]) == areas[row["image_id"]] for row in rows)
    with Dataset.open(small_dataset) as opened:
        truths = {entry.image_id: opened.mask(index) for index, entry in enumerate(opened.entries)}
    for row in rows:
        mask, truth = decode(row["rle"], truths[row["image_id"]].shape), truths[row["image_id"]]
        assert np.count_nonzero(mask) == int(row["predicted_area_px"])
        assert dice(mask, truth) == pytest.approx(float(row["dice"]))
    mean = np.mean([float(row["dice"]) for row in rows])
    assert parent.data.metrics["oof/dice"] == pytest.approx(mean)
    assert parent.data.params["oof_images"] == str(len(rows))
    assert not {"dice", "val/dice", "oof_images"} & parent.data.metrics.keys()


def test_folds_that_had_ended_are_not_trained_again(
    settings: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folds = changed(settings, fold="all", folds=2, epochs=1)
    with stopped_in_training(2, monkeypatch):
        train(folds)
    assert capsys.readouterr().out.count("epoch 1/1") == 1  # of the second it is not said, but saved
    train(folds)
    said = capsys.readouterr().out
    assert said.count("continues after epoch 1 of 1") == 2
    assert "epoch 1/1" not in said
    parents = [run for run in runs() if run.data.tags.get("pneumo.stage") == "train"]
    assert [run.info.status for run in parents] == ["KILLED", "FINISHED"]
    assert not list(Path("output/checkpoints").glob("*"))


def test_the_run_holds_curves_pictures_and_how_the_time_was_spent(settings: Train) -> None:
    train(changed(settings, overlays=2))
    (run,) = runs()
    client = MlflowClient()
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"first_batch.png", "learning_curves.png", "overlays.png", "split.json"} <= names
    for name in ("loss/total", "epoch/dice", "epoch/auroc", "speed/images_per_second", "speed/wait_fraction"):
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert steps == [1, 2], name
    final = [metric.step for metric in client.get_metric_history(run.info.run_id, "val/dice")]
    assert final == [0]
    images = [item.path.split("+")[:3] for item in client.list_artifacts(run.info.run_id, "images")]
    followed = {(path.removeprefix("images/"), int(step)) for path, _, step in images}
    assert followed == {(name, step) for name in ("typical finding", "small finding") for step in (0, 1)}
    detector = load(tracking.model_data(f"models:/{run.outputs.model_outputs[0].model_id}"))
    (predictor,) = detector.predictor.members
    with Dataset.open(settings.dataset) as opened:
        split = make_split(opened, settings.split)
        used = Subset(opened, np.append(split.train, split.validation))
        assert detector.prevalence == np.mean([entry.area_px > 0 for entry in used.entries])
        validation = Subset(opened, split.validation)
        plain = validation.count(replace(predictor, calibration=Calibration()))
        truth, own = plain.truth_area > 0, validation.count(predictor)
    assert predictor.calibration == fit_calibration(plain.presence, truth, detector.prevalence)
    assert predictor.calibration != Calibration()
    for name, counts in (("_raw", plain), ("", own)):
        (error,) = calibration_error(truth, counts.presence, np.ones((1, len(truth))))
        assert run.data.metrics[f"val/calibration_error{name}"] == pytest.approx(error, abs=1e-6)
    assert float(run.data.params["presence_slope"]) == predictor.calibration.slope
    assert float(run.data.params["presence_bias"]) == predictor.calibration.bias
    assert run.data.metrics["thresholds/dice_exact"] == own.dice(detector.thresholds).mean()
    constants = {"val_images", "val_positives", "val_dice_baseline", "best_epoch"}
    assert constants <= run.data.params.keys()
    assert not constants & run.data.metrics.keys()
    assert not {"dice", "dice_positive", "auroc"} & run.data.metrics.keys()
    assert (run.data.params["weights_source"], run.data.params["weights_sha256"]) == ("none", "none")
    assert run.data.params["cache_used"] == ("device" if torch.cuda.is_available() else "host")
    assert not list(Path("output/checkpoints").glob("*"))


def test_another_micro_batch_restarts_the_training(
    settings: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_in_training(1, monkeypatch):
        train(settings)
    capsys.readouterr()
    train(changed(settings, micro_batch=2))  # batch norm and the batch's Dice see other images
    assert "continues after" not in capsys.readouterr().out
    finish = Fold.finish

    def finish_alone(self: Fold, state: TrainingState) -> FoldResult:
        assert state.trainer is None  # the optimizer has left the device
        return finish(self, state)

    monkeypatch.setattr(Fold, "finish", finish_alone)
    train(settings)
    assert "continues after epoch 1 of 2" in capsys.readouterr().out


@pytest.fixture
def learning(settings: Train) -> Train:
    """A training that finds something, and is soon at its best."""
    values = {"learning_rate": 3e-2, "warmup": 0.1, "augment": False, "tta": "none", "best_k": 1}
    return changed(settings, epochs=25, holdout=0, folds=2, **values)


def test_patience_counts_from_the_first_epoch_that_finds_something(
    learning: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing, stopped = "after every epoch an empty mask for every", "no better Dice in 1 epochs: stopped"
    train(changed(learning, patience=1, epochs=3, learning_rate=1e-9))
    said = capsys.readouterr().out
    assert nothing in said
    assert stopped not in said
    train(changed(learning, patience=1))
    said = capsys.readouterr().out
    assert stopped in said
    assert nothing not in said


@pytest.mark.parametrize("values", [{"best_k": 2}, {"ema": 0.3}])
def test_averaged_weights_whose_batch_statistics_are_wrong_get_their_own(
    learning: Train, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = TrainingState.add

    def add_wrong_statistics(self: TrainingState, result: EpochResult, best_k: int) -> None:
        add(self, result, best_k)
        self.counts.clear()
        for state in self.networks.values():
            for name in state:
                if name.endswith("running_mean"):
                    state[name] = torch.full_like(state[name], 100.0)

    monkeypatch.setattr(TrainingState, "add", add_wrong_statistics)
    trained = train(changed(learning, epochs=4, **values))
    (run,) = runs()
    assert run.data.params["own_batch_statistics"] == "true"
    assert run.data.params["averaged_epochs"] == str(values.get("best_k", 1))
    assert trained.scores.dice_positive > 0
    model = score(Score(dataset=learning.dataset, model=trained.model, subset="validation", overlays=0))
    assert model.scores is not None
    assert model.scores.dice == pytest.approx(trained.scores.dice)  # the model has the weights that were kept


def test_the_best_epoch_is_not_predicted_again(settings: Train) -> None:
    predictions = list[int]()

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, PneumothoraxNet) and not module.training:
            predictions.append(len(inputs[0]))

    with Dataset.open(settings.dataset) as opened:
        validation = len(make_split(opened, settings.split).validation)
    hook = register_module_forward_hook(note)
    try:
        train(changed(settings, best_k=1, tta="none"))
    finally:
        hook.remove()
    assert sum(predictions) == 2 * validation  # once after each epoch
    assert runs()[0].data.params["own_batch_statistics"] == "false"


# Two processes that import nothing; test_distributed.py starts new ones.
FORKED = """
from functools import partial
from pneumo_experiments import cli
from pneumo_experiments.learning import launch

launch.LaunchConfig = partial(launch.LaunchConfig, start_method="fork")
cli.main()
"""


def test_two_processes_train_in_one_run(
    settings: Train, store: Path, tiny_default: None, commands: CommandServer
) -> None:
    chosen = changed(settings, network="fcn_resnet50", processes=2, aux_weight=0.0)
    options: dict[str, Any] = {"environment": dict(os.environ), "tiny": True, "code": FORKED}
    code, said = commands.start("train", *words_of(chosen), folder=store, **options).communicate()
    assert code == 0, said
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert {m.step for m in MlflowClient().get_metric_history(run.info.run_id, "loss/total")} == {1, 2}
    (model,) = MlflowClient().search_logged_models(["0"])
    assert model.source_run_id == run.info.run_id
    assert f"model     {model.model_uri}" in said
    (final,) = MlflowClient().get_metric_history(run.info.run_id, "val/dice")
    epochs = MlflowClient().get_metric_history(run.info.run_id, "epoch/dice")
    # Of the same images at the best of all thresholds, not of the coarse grid alone.
    assert max(epoch.value for epoch in epochs) <= final.value + 1e-12 <= 1 + 1e-12
    assert said.count("epoch 1/2") == 1
    assert "Warning" not in said


def test_a_training_may_start_from_a_models_weights_and_has_seen_what_that_has(
    settings: Train, tmp_path: Path
) -> None:
    model = Detector((tiny_member(3),), 16, Thresholds(), "other data", frozenset({"another image"}))
    address, own = log_model(model, settings), weights_of(model.members[0].predictor.network)
    folder = mlflow.artifacts.download_artifacts(address)
    for weights in (address, folder, Path(folder).as_uri()):
        network = initial_network(changed(settings, weights=weights).recipe.network, seed=0)
        assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())
        assert network.source == weights
        assert network.pretrained == {name for name, _ in network.named_parameters()}
    result = train(changed(settings, weights=address, epochs=1))
    assert load(tracking.model_data(result.model)).training_images > {"another image"}
    assert runs()[-1].data.params["weights_source"] == address


def test_a_start_that_has_seen_what_other_folds_validate_on_is_told_once_and_at_first(
    settings: Train, small_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Dataset.open(small_dataset) as dataset:
        split = make_split(dataset, SplitSettings(holdout=0.25, folds=3))
        known = hash_image_ids(Subset(dataset, np.append(split.train, split.validation)))
        member = tiny_member(3, holdout=0.25, folds=3)
        address = log_model(Detector((member,), 16, Thresholds(), "of 8 px", known), settings)
        same = changed(settings, weights=address, epochs=1, holdout=0.25, folds=3)
        assert doubt_of_start(same, dataset) == ""
        another = doubt_of_start(changed(same, split_seed=1), dataset)
    held_out = len(split.holdout)  # the validation images of the two other folds, and these
    line = (
        f"weights={address}: of those that validate or are held out, {len(split.train)} of"
        f" {len(split.train) + held_out} images trained that model or chose its thresholds: "
    )
    caplog.clear()
    train(changed(same, fold="all"))
    (told,) = [text for record in caplog.records if "weights=" in (text := record.getMessage())]
    assert told.startswith(f"Warning: {line}validation and out-of-fold scores and thresholds are too")
    assert (
        sum(text.startswith("train: " + line) for text in dry_run.lines("train", changed(same, fold="all")))
        == 1
    )
    assert "trained that model" in another  # that hold-out is not its own
    own = {"device": "cpu", "precision": "fp32", "batch_size": 8, "holdout": 0.25, "folds": 3, "keep": 0}
    one = {"trials": 1, "search_epochs": 1, "storage": f"sqlite:///{Path.cwd()}/optuna.db"}
    searched = make(Search, dataset=small_dataset, network="tiny", weights=address, **own, **one)
    with Dataset.open(small_dataset) as dataset:
        assert search_doubt(changed(searched, confirm=0), dataset) == ""
        validated = make_split(dataset, SplitSettings(holdout=0.25, folds=3, fold="1")).validation
    # Second trainings are of fold 1; the hold-out is that model's own, too.
    line = f" {len(validated)} of {len(validated) + held_out} images trained that model"
    assert [line in each for each in dry_run.lines("search", searched)].count(True) == 1
    caplog.clear()
    search(searched)
    (told,) = [text for record in caplog.records if "weights=" in (text := record.getMessage())]
    assert line in told and "confirm=0" in told


def test_weights_of_what_is_no_single_network_are_named(settings: Train, tmp_path: Path) -> None:
    def start(weights: str) -> None:
        initial_network(changed(settings, weights=weights).recipe.network, seed=0)

    pair = Detector((tiny_member(3), tiny_member(4)), 16, Thresholds(), "data")
    address = log_model(pair, settings)
    with pytest.raises(
        UserError, match=f"^weights={address}: is the mean of 2 networks; name a model of one$"
    ):
        start(address)
    with pytest.raises(UserError, match=rf"^weights={tmp_path}: cannot be loaded \(no file .*MLmodel\)"):
        start(str(tmp_path))
    for weights in ("models:/nobody/1", "runs:/0123/model", "mlflow-artifacts:/0/x"):
        with pytest.raises(UserError, match=f"^weights={weights}: cannot be loaded"):
            start(weights)
    with pytest.raises(UserError, match=r"^weights=https:/.*: no such file; give .* or a models:/ address"):
        start("https://example.org/w.pt")


@pytest.mark.parametrize(("weights", "is_kept"), [("none", False), ("models:/m-1", True), ("w.pt", False)])
def test_main_starts_from_the_network_of_the_trials_unless_that_is_a_models(
    weights: str, is_kept: bool, tmp_path: Path
) -> None:
    settings = make(Main, weights=weights)
    recipe = _training_recipe(
        settings, SearchResult(settings.recipe, 0, [], "", Path("best.yaml"), tmp_path / "epoch-1.pt")
    )
    assert recipe.network.weights == (weights if is_kept else f"{tmp_path}/epoch-1.pt")


@soak
def test_under_mlflow_run_a_training_goes_on_in_its_first_run(settings: Train, tmp_path: Path) -> None:
    words = [f"-P{name}={flat(settings)[name]}" for name in ("dataset", "weights", "threshold_trials")]
    words += ["-Pepochs=2", f"-Pcheckpoints={tmp_path / 'checkpoints'}", "-Pprecision=fp32"]
    command = [BIN / "mlflow", "run", ROOT, "-e", "train", "--env-manager", "local", *words]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment_of_mlflow(uri),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    while not list(tmp_path.glob("checkpoints/*/last.pt")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment_of_mlflow(uri), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train: continues after epoch" in done.stdout + done.stderr
    run, other = runs()
    assert run.info.run_name.startswith("train fcn_resnet50 16px fold 0 · ")
    assert other.info.run_name == "continued in an earlier run"
    assert run.info.run_id in other.data.tags["mlflow.note.content"]
    assert run.info.status == other.info.status == "FINISHED"
    assert len({m.step for m in MlflowClient().get_metric_history(run.info.run_id, "loss/total")}) == 2
