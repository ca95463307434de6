"""Thresholds in place of the model's own, in score and in a request; and a search in a file of counts."""

from __future__ import annotations

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
from pneumo_experiments.evaluation.subset import Subset, all_images
from pneumo_experiments.learning.predict import Predictor, to_native
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, apply_thresholds
from pneumo_experiments.serving import Detector, load
from pneumo_experiments.settings import Score, Train
from pneumo_experiments.stages.score import score

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")

OWN = Thresholds(0.1, 0.5, 10, 0.45)


@pytest.fixture
def settings(small_dataset: Path, tiny: None, store: Path) -> Score:
    """Of a score of a model on all images."""
    model = logged(small_dataset)
    return make(Score, model=model, dataset=small_dataset, subset="all", overlays=0, device="cpu")


def logged(dataset: Path) -> str:
    """A logged model with the thresholds OWN."""
    with Dataset.open(dataset) as opened:
        member, size = tiny_member(0), opened.image_size
        detector = Detector((member,), size, OWN, opened.fingerprint, prevalence=0.5)
    return log_model(detector, make(Train, network="tiny"))


def middle(model: str, dataset: Path) -> float:
    """A score, in hundredths, between those of the model's pixels."""
    with Dataset.open(dataset) as opened:
        predictor = load(tracking.model_data(model)).predictor
        return round(float(np.median([one.mask for _, one in all_images(opened).predictions(predictor)])), 2)


def counts_of(dataset: Path, predictor: Predictor) -> ThresholdCounts:
    with Dataset.open(dataset) as opened:
        return all_images(opened).count(predictor)


def dice_and_run(settings: Score, **changes: Any) -> tuple[float, Run]:
    """Dice of a score with these changes, and its run."""
    scores = score(changed(settings, **changes)).scores
    assert scores is not None
    return scores.dice, last_run("score")


def presence_in(run: Run) -> np.ndarray:
    table = mlflow.load_table("scores.json", run_ids=[run.info.run_id])
    return np.array(table["presence"], np.float64)


def runs_of_metrics(model: str) -> set[str]:
    """The runs whose scores are among the model's own."""
    metrics = mlflow.get_logged_model(model.removeprefix("models:/")).metrics or []
    return {metric.run_id for metric in metrics if metric.dataset_digest}


def as_text(thresholds: Thresholds) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in vars(thresholds).items())


def test_what_is_given_in_place_of_the_models_own_is_scored_logged_and_not_the_models(
    settings: Score,
) -> None:
    own = load(tracking.model_data(settings.model))
    network = own.members[0].predictor.network
    counts = {tta: counts_of(settings.dataset, Predictor(network, CPU, tta)) for tta in ("none", "flip")}
    assert counts["none"].presence.tolist() != counts["flip"].presence.tolist()
    bottom = middle(settings.model, settings.dataset)
    lower = replace(OWN, bottom_score=bottom, min_area_px=0)
    assert counts["flip"].dice(lower).mean() != counts["flip"].dice(OWN).mean()
    runs = list[Run]()
    for given, tta, thresholds, text in (
        ({}, "flip", OWN, ""),
        ({"tta": "flip"}, "flip", OWN, " with tta flip."),
        ({"tta": "none"}, "none", OWN, " with tta none."),
        (
            {"bottom_score": bottom, "min_area_px": 0},
            "flip",
            lower,
            f" with min_area_px 0, bottom_score {bottom}.",
        ),
    ):
        dice, run = dice_and_run(settings, **given)
        assert dice == pytest.approx(counts[tta].dice(thresholds).mean())
        assert presence_in(run) == pytest.approx(counts[tta].presence, abs=1e-6)
        params, tags = run.data.params, run.data.tags
        changed_params = {name: str(value) for name, value in given.items()}
        names = ("bottom_score", "min_area_px", "top_score", "tta")  # the others are as they are by default
        assert {name: params[name] for name in names if name in params} == changed_params
        assert (params["tta_used"], tags["thresholds"]) == (tta, as_text(thresholds))
        first = tags["mlflow.note.content"].split("\n")[0]
        assert first.endswith(text) if text else " with " not in first
        runs.append(run)
    _, rare = dice_and_run(settings, prevalence=0.05)
    odds = [presence / (1 - presence) for presence in map(presence_in, (runs[0], rare))]
    np.testing.assert_allclose(odds[1] / odds[0], 0.05 / 0.95, rtol=1e-4)
    assert rare.data.params["prevalence"] == "0.05"
    assert "with prevalence 0.05." in rare.data.tags["mlflow.note.content"]
    assert runs_of_metrics(settings.model) == {run.info.run_id for run in runs[:2]}
    with pytest.raises(UserError, match=r"prevalence=0\.05: .*this one holds None"):
        replace(own, prevalence=None).at_prevalence(0.05)


@pytest.mark.usefixtures("tiny", "store")
def test_a_request_may_bring_its_thresholds(dataset: Path) -> None:
    model = logged(dataset)
    served: Any = mlflow.pyfunc.load_model(model)
    file = next((dataset.parent / "sample" / "dicom-images-train").rglob("*.dcm"))
    detector, bottom = load(tracking.model_data(model)), middle(model, dataset)
    with Dataset.open(dataset) as opened:
        (index,) = [k for k, entry in enumerate(opened.entries) if entry.image_id == file.stem]
        ((_, prediction),) = Subset(opened, np.array([index])).predictions(detector.predictor)
        shape = opened.mask(index).shape
    areas: list[int] = []
    frame = {"image_id": ["one"], "dicom": [file.read_bytes()]}
    given = {"bottom_score": bottom, "min_area_px": 1}
    for params in ({}, given, {"presence_threshold": 1}, {"top_score": 1.0}):
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
    settings: Score, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score(settings)
    path = artifact(last_run("score"), "threshold_counts.npz")
    counts = counts_of(settings.dataset, load(tracking.model_data(settings.model)).predictor)
    words = ["score", "--counts", str(path), "--threshold_trials", "5", "--top_score", "1"]
    capsys.readouterr()
    end = ended([*words, "--model", "nowhere", "--dataset", "nowhere"], monkeypatch, capsys)
    assert end.code == 0, end.err
    run, best = last_run("score"), best_of_all(counts)
    metrics = run.data.metrics
    assert metrics["thresholds/dice_exact"] == pytest.approx(best.dice)
    assert metrics["thresholds/dice_distance"] == pytest.approx(best.dice - metrics["thresholds/dice_optuna"])
    assert run.data.tags["thresholds"] == as_text(best.thresholds)
    given = replace(best.thresholds, top_score=1.0)
    assert metrics["thresholds/dice_given"] == pytest.approx(counts.dice(given).mean())
    crossed = metrics["thresholds/dice_cross_fitted"]
    for said in (
        f"best of {best.combinations:,} combinations: Dice {best.dice:.4f}",
        f"cross-fitted, thresholds from other patients: Dice {crossed:.4f}",
        f"Optuna, 5 trials: Dice {metrics['thresholds/dice_optuna']:.4f}, below the best by",
        "as given: Dice",
    ):
        assert said in end.out
    names = {item.path for item in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"threshold_trials.csv", "threshold_history.png", "threshold_contours.png"} <= names
