"""Thresholds in place of the model's own, in score and in a request; and a search in a file of counts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from helpers import changed, ended, make
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from tiny_network import CPU, tiny_member
from tracked import artifact, last_run, log_model

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.rle import encode
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.subset import Subset
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import Thresholds, apply_thresholds
from pneumo_experiments.serving import Detector, load
from pneumo_experiments.settings import Score, Train
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.train import train

pytestmark = pytest.mark.usefixtures("no_layout", "no_code")

OWN = Thresholds(0.1, 0.5, 10, 0.45)


@pytest.fixture
def model(small_dataset: Path, tiny: None, store: Path) -> str:
    """A logged model with the thresholds OWN."""
    return logged(small_dataset)


def logged(dataset: Path, prevalence: float | None = None) -> str:
    with Dataset.open(dataset) as opened:
        member, size = tiny_member(0), opened.image_size
        detector = Detector((member,), size, OWN, opened.fingerprint, prevalence=prevalence)
    return log_model(detector, make(Train, network="tiny"))


def middle(model: str, dataset: Path) -> float:
    """A score, in hundredths, between those of the model's pixels."""
    with Dataset.open(dataset) as opened:
        predictions = Subset(opened, np.arange(len(opened))).predictions(
            load(tracking.model_data(model)).predictor
        )
        return round(float(np.median([prediction.mask for _, prediction in predictions])), 2)


def test_given_thresholds_are_scored_logged_and_not_the_models(model: str, small_dataset: Path) -> None:
    settings = make(Score, model=model, dataset=small_dataset, subset="all", overlays=0, device="cpu")
    score(settings)
    plain = last_run("score")
    bottom = middle(model, small_dataset)
    given = changed(settings, bottom_score=bottom, min_area_px=0)
    result = score(given)
    assert result.scores is not None
    run, thresholds = last_run("score"), replace(OWN, bottom_score=bottom, min_area_px=0)
    with Dataset.open(small_dataset) as opened:
        counts = Subset(opened, np.arange(len(opened))).count(load(tracking.model_data(model)).predictor)
    assert result.scores.dice == pytest.approx(counts.dice(thresholds).mean())
    assert counts.dice(thresholds).mean() != counts.dice(OWN).mean()
    used = {name: run.data.params[f"{name}_used"] for name in vars(OWN)}
    assert used == {name: str(value) for name, value in vars(thresholds).items()}
    assert run.data.params["bottom_score"] == str(bottom)
    assert run.data.params["top_score"] == "none"
    assert f"with min_area_px 0, bottom_score {bottom}." in run.data.tags["mlflow.note.content"]
    assert " with " not in plain.data.tags["mlflow.note.content"].split("\n")[0]
    metrics = mlflow.get_logged_model(model.removeprefix("models:/")).metrics or []
    assert {metric.run_id for metric in metrics} == {plain.info.run_id}


def test_another_augmentation_is_scored_logged_and_not_the_models(model: str, small_dataset: Path) -> None:
    settings = make(Score, model=model, dataset=small_dataset, subset="all", overlays=0, device="cpu")
    with Dataset.open(small_dataset) as opened:
        network = load(tracking.model_data(model)).members[0].predictor.network
        everyone = Subset(opened, np.arange(len(opened)))
        counts = {tta: everyone.count(Predictor(network, CPU, tta)) for tta in ("none", "flip")}
    assert counts["none"].presence.tolist() != counts["flip"].presence.tolist()
    runs: dict[str, Run] = {}
    for tta, used in (("auto", "flip"), ("flip", "flip"), ("none", "none")):
        result = score(changed(settings, tta=tta))
        run = runs[tta] = last_run("score")
        assert result.scores is not None
        assert result.scores.dice == pytest.approx(counts[used].dice(OWN).mean())
        assert result.scores.auroc == pytest.approx(run.data.metrics["all_auroc"])
        table = mlflow.load_table("scores.json", run_ids=[run.info.run_id])
        assert table["presence"].tolist() == pytest.approx(counts[used].presence.tolist(), abs=1e-6)
        assert (run.data.params["tta"], run.data.params["tta_used"]) == (tta, used)
    assert "with tta none." in runs["none"].data.tags["mlflow.note.content"]
    metrics = mlflow.get_logged_model(model.removeprefix("models:/")).metrics or []
    assert {metric.run_id for metric in metrics} == {runs["auto"].info.run_id, runs["flip"].info.run_id}


def test_another_prevalence_is_scored_logged_and_not_the_models(model: str, small_dataset: Path) -> None:
    settings = make(Score, model=model, dataset=small_dataset, subset="all", overlays=0, device="cpu")
    with pytest.raises(UserError, match=r"prevalence=0\.05: .*this one holds None"):
        score(changed(settings, prevalence=0.05))
    aware = logged(small_dataset, 0.5)
    found: list[np.ndarray] = []
    for prevalence in (None, 0.05):
        score(changed(settings, model=aware, prevalence=prevalence))
        run = last_run("score")
        table = mlflow.load_table("scores.json", run_ids=[run.info.run_id])
        found.append(np.array(table["presence"], np.float64))
    odds = [presence / (1 - presence) for presence in found]
    np.testing.assert_allclose(odds[1] / odds[0], 0.05 / 0.95, rtol=1e-4)
    assert run.data.params["prevalence"] == "0.05"
    assert "with prevalence 0.05." in run.data.tags["mlflow.note.content"]
    metrics = mlflow.get_logged_model(aware.removeprefix("models:/")).metrics or []
    assert run.info.run_id not in {metric.run_id for metric in metrics}
    assert metrics


@pytest.mark.usefixtures("tiny", "store")
def test_a_request_may_bring_its_thresholds(dataset: Path) -> None:
    model = logged(dataset, prevalence=0.5)
    served: Any = mlflow.pyfunc.load_model(model)
    file = next((dataset.parent / "sample" / "dicom-images-train").rglob("*.dcm"))
    detector, bottom = load(tracking.model_data(model)), middle(model, dataset)
    with Dataset.open(dataset) as opened:
        (index,) = [k for k, entry in enumerate(opened.entries) if entry.image_id == file.stem]
        ((_, prediction),) = Subset(opened, np.array([index])).predictions(detector.predictor)
        shape = opened.mask(index).shape
    areas: list[int] = []
    for params in (
        {},
        {"bottom_score": bottom, "min_area_px": 1},
        {"presence_threshold": 1},
        {"top_score": 1.0},
    ):
        frame = {"image_id": ["one"], "dicom": [file.read_bytes()]}
        (row,) = served.predict(frame, params=params).to_dict("records")
        thresholds = replace(OWN, **params)
        mask = apply_thresholds(to_native(prediction.mask, shape), prediction.presence, thresholds)
        assert row["rle"] == encode(mask), params
        assert row["presence"] == pytest.approx(prediction.presence, abs=1e-6)
        areas.append(row["area_px"])
    assert 0 < areas[1] != areas[0]
    assert areas[2:] == [0, 0]
    rare, wrong = (
        served.predict(frame, params={"prevalence": value}).to_dict("records")[0] for value in (0.001, 1.0)
    )
    odds = prediction.presence / (1 - prediction.presence) * 0.001 / 0.999
    assert rare["presence"] == pytest.approx(odds / (1 + odds), abs=1e-6)
    assert rare["presence"] < OWN.presence_threshold < prediction.presence
    assert rare["area_px"] == 0 < areas[0]
    assert "prevalence=1.0: needs a fraction between 0 and 1" in wrong["error"]
    with pytest.raises(MlflowException, match="min_area_px"):
        served.predict(frame, params={"min_area_px": "many"})


def test_thresholds_are_searched_again_without_model_and_images(
    model: str, small_dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score(make(Score, model=model, dataset=small_dataset, subset="all", overlays=0, device="cpu"))
    path = artifact(last_run("score"), "threshold_counts.npz")
    with Dataset.open(small_dataset) as opened:
        counts = Subset(opened, np.arange(len(opened))).count(load(tracking.model_data(model)).predictor)
    words = [
        "score",
        "--counts",
        str(path),
        "--threshold_trials",
        "5",
        "--dataset",
        "nowhere",
        "--top_score",
        "1",
    ]
    capsys.readouterr()
    end = ended([*words, "--model", "nowhere"], monkeypatch, capsys)
    assert end.code == 0, end.err
    run, best = last_run("score"), best_of_all(counts)
    metrics, params = run.data.metrics, run.data.params
    assert metrics["threshold_dice_exact"] == pytest.approx(best.dice)
    assert metrics["threshold_dice_distance"] == pytest.approx(best.dice - metrics["threshold_dice_optuna"])
    assert {name: params[f"{name}_best"] for name in vars(OWN)} == {
        name: str(value) for name, value in vars(best.thresholds).items()
    }
    given = replace(best.thresholds, top_score=1.0)
    assert metrics["threshold_dice_given"] == pytest.approx(counts.dice(given).mean())
    assert f"best of {best.combinations:,} combinations: Dice {best.dice:.4f}" in end.out
    assert (
        f"cross-fitted, thresholds from other patients: Dice {metrics['threshold_dice_cross_fitted']:.4f}"
        in end.out
    )
    assert re.search(r"Optuna, 5 trials: Dice 0\.\d{4}, below the best by", end.out)
    assert "as given: Dice" in end.out
    names = {item.path for item in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"threshold_trials.csv", "threshold_history.png", "threshold_contours.png"} <= names


def test_the_counts_of_all_folds_give_the_out_of_fold_dice(model: str, small_dataset: Path) -> None:
    settings = make(Train, network="tiny", dataset=small_dataset, weights="none", epochs=1, batch_size=8)
    trained = train(changed(settings, fold="all", folds=2, threshold_trials=0, overlays=0, device="cpu"))
    parent, fold = last_run("train"), last_run("fold 1")
    searched = score(make(Score, counts=artifact(parent, "threshold_counts.npz"), threshold_trials=0)).scores
    assert searched is not None
    metrics = last_run("score").data.metrics
    assert metrics["threshold_dice_cross_fitted"] == pytest.approx(parent.data.metrics["oof_dice"])
    assert metrics["threshold_dice_exact"] == pytest.approx(parent.data.metrics["val_dice_optimistic"])
    assert (searched.images, searched.patients) == (trained.scores.images, trained.scores.patients)
    single = score(make(Score, counts=artifact(fold, "threshold_counts.npz"), threshold_trials=0)).scores
    assert single is not None
    assert single.dice == pytest.approx(fold.data.metrics["val_dice_final"])
