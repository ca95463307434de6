"""Several models as one: the mean of their probabilities, when scored, trained with fold=all and served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from helpers import changed, make
from mlflow import MlflowClient
from tiny_network import tiny_member
from tracked import artifact, last_run, log_model, runs, table

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.load_models import load_models
from pneumo_experiments.evaluation.subset import Subset, hash_image_ids, make_split
from pneumo_experiments.learning.calibration import Calibration
from pneumo_experiments.learning.predict import to_native
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.metrics.thresholds import ThresholdCounts, Thresholds, apply_thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, load, make_ensemble
from pneumo_experiments.settings import Register, Score, Train
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.train import train
from pneumo_experiments.training.folds import COMPARED_IMAGES, MUCH_DISAGREEMENT, disagreement

SETTINGS = make(Train, network="tiny", folds=2, holdout=0.3)


pytestmark = pytest.mark.usefixtures("no_charts", "no_code", "tiny", "store")


def member(seed: int, fold: int) -> TrainedNetwork:
    return tiny_member(seed, folds=2, fold=str(fold), holdout=0.3)


def test_score_takes_several_models_in_any_order(small_dataset: Path) -> None:
    with Dataset.open(small_dataset) as opened:
        split = make_split(opened, SETTINGS.split)
        holdout = Subset(opened, split.holdout)
        seen = hash_image_ids(Subset(opened, np.append(split.train, split.validation)))
        size, fingerprint, thresholds = opened.image_size, opened.fingerprint, Thresholds(0, 0.4, 0, 0.3)
        members = [(member(seed, seed % 2),) for seed in range(3)]
        detectors = [Detector(one, size, thresholds, fingerprint, seen) for one in members]
        alone = [list(holdout.predictions(detector.predictor)) for detector in detectors]
        presence = np.mean([[each.presence for _, each in one] for one in alone], axis=0)
    addresses = [log_model(detector, SETTINGS) for detector in detectors]
    tables: list[list[dict[str, str]]] = []
    settings = make(Score, dataset=small_dataset, overlays=0, device="cpu")
    for order in ([0, 1, 2], [2, 0, 1]):
        settings = changed(settings, model=", ".join(addresses[place] for place in order))
        result = score(settings)
        assert result.scores is not None
        run = last_run("score")
        assert run.data.metrics["dice"] == result.scores.dice
        assert run.data.params["precision_used"] == "fp32"
        tables.append(table(run, "scores.csv"))
    assert tables[0] == tables[1]
    assert [float(row["presence"]) for row in tables[0]] == pytest.approx(presence.tolist(), abs=1e-6)
    for address in addresses:  # the scores are no member's
        assert not mlflow.get_logged_model(address.removeprefix("models:/")).metrics
    with pytest.raises(UserError, match=r"subset=validation: the model's 3 networks were each trained on"):
        score(changed(settings, subset="validation"))
    for model_setting in (f"{addresses[0]},{addresses[0]}", f"{addresses[0]},"):
        with pytest.raises(UserError, match=f"model={model_setting}: names a model twice, or none"):
            score(changed(settings, model=model_setting))


def test_the_thresholds_of_several_models_are_searched_on_their_mean_predictions(
    small_dataset: Path, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Dataset.open(small_dataset) as opened:
        validation = Subset(opened, make_split(opened, SETTINGS.split).validation)
        alone: list[Detector] = []
        for seed, line in enumerate((Calibration(), Calibration(3.0, -9.0))):  # about p and p^3
            one = member(seed, fold=0)
            predictor = replace(one.predictor, calibration=line)
            thresholds = best_of_all(validation.count(predictor)).thresholds
            size, fingerprint = opened.image_size, opened.fingerprint
            alone.append(Detector((replace(one, predictor=predictor),), size, thresholds, fingerprint))
        means = make_ensemble(alone).thresholds
        counts = validation.count(make_ensemble(alone).predictor)
        other = replace(alone[1], members=(replace(alone[1].members[0], settings=member(1, 1).settings),))
        folds = [validation.count(alone[0].predictor)]
        folds.append(
            Subset(opened, make_split(opened, other.members[0].split).validation).count(other.predictor)
        )
    best = best_of_all(counts)
    assert counts.dice(means).mean() < best.dice - 1e-3
    addresses = [log_model(one, SETTINGS) for one in (*alone, other)]
    together = ",".join(addresses[:2])
    settings = make(Score, model=together, dataset=small_dataset, overlays=0, device="cpu")
    scored = score(changed(settings, subset="validation")).scores
    assert scored is not None
    assert scored.dice == pytest.approx(best.dice)
    used = ", ".join(f"{name} {value:g}" for name, value in vars(best.thresholds).items())
    assert last_run("score").data.tags["thresholds"] == used
    version = register(make(Register, model=together, dataset=small_dataset, promote="never"))
    assert version is not None
    assert load(tracking.model_data(version.source)).thresholds == best.thresholds
    # Of different folds: each predicts its own validation images, as with fold=all.
    found = load_models(f"{addresses[0]},{addresses[2]}", small_dataset, settings.compute)
    assert found.thresholds == best_of_all(ThresholdCounts.joined(folds)).thresholds
    nowhere = small_dataset.with_name("nowhere.h5")
    for wrong, reason in ((nowhere, f"{nowhere}: no such"), (dataset, f"dataset={dataset}: is another")):
        caplog.clear()
        assert load_models(together, wrong, settings.compute).thresholds == means
        (warning,) = (record.getMessage() for record in caplog.records)  # --quiet does not hide it
        assert "the mean of the models', which costs Dice" in warning
        assert f"({reason}" in warning


def test_all_folds_become_one_model_that_is_scored_registered_and_served(
    small_dataset: Path, dataset: Path
) -> None:
    short = {"weights": "none", "epochs": 1, "batch_size": 8, "threshold_trials": 0, "overlays": 0}
    trained = train(changed(SETTINGS, dataset=small_dataset, fold="all", device="cpu", **short))
    parent = last_run("train")
    detector = load(tracking.model_data(trained.model))
    outputs = MlflowClient().get_run(parent.info.run_id).outputs.model_outputs
    assert trained.model in {f"models:/{output.model_id}" for output in outputs}
    folds = [last_run(f"fold {number}") for number in range(2)]
    alone = [
        load(tracking.model_data(f"models:/{run.outputs.model_outputs[0].model_id}"))
        for run in (MlflowClient().get_run(fold.info.run_id) for fold in folds)
    ]
    with Dataset.open(small_dataset) as opened:
        validations = [Subset(opened, make_split(opened, one.members[0].split).validation) for one in alone]
        joined = ThresholdCounts.joined(
            [part.count(one.predictor) for part, one in zip(validations, alone, strict=True)]
        )
        holdout = make_split(opened, alone[0].members[0].split).holdout
        assert detector.training_images == hash_image_ids(
            Subset(opened, np.setdiff1d(np.arange(len(opened)), holdout))
        )
        known = np.delete([entry.area_px > 0 for entry in opened.entries], holdout)
        assert [one.prevalence for one in (detector, *alone)] == [pytest.approx(known.mean())] * 3
        best = best_of_all(joined)
        assert detector.thresholds == best.thresholds
        assert f"top_score {best.thresholds.top_score:g}," in parent.data.tags["thresholds"]
        assert parent.data.metrics["thresholds/dice_optimistic"] == pytest.approx(best.dice)
        assert parent.data.metrics["oof/dice"] == pytest.approx(trained.scores.dice)
        pixels = opened.images(holdout[:COMPARED_IMAGES])
        a, b = (np.array([p.presence for p in one.predictor.predict(pixels)]) for one in alone)
        expected = float(np.abs(a - b).mean() / 2)  # the standard deviation of two
        assert parent.data.metrics["oof/members_disagreement"] == pytest.approx(expected, abs=1e-6)
        assert disagreement(detector, validations[0]) == pytest.approx(expected, abs=1e-6)
        one, other = detector.members
        certain = replace(one, predictor=replace(one.predictor, calibration=Calibration(1.0, 30.0)))
        assert disagreement(replace(detector, members=(certain, other)), validations[0]) > MUCH_DISAGREEMENT

        settings = make(Score, model=trained.model, dataset=small_dataset, overlays=0, device="cpu")
        scored = score(settings).scores
        assert scored is not None
        pairs = zip(*(Subset(opened, holdout).predictions(one.predictor) for one in alone), strict=True)
        for row, ((index, first), (_, second)) in zip(
            table(last_run("score"), "scores.csv"), pairs, strict=True
        ):
            mean = (first.mask + second.mask) / 2
            presence = (first.presence + second.presence) / 2
            mask = apply_thresholds(to_native(mean, opened.mask(index).shape), presence, detector.thresholds)
            assert float(row["presence"]) == pytest.approx(presence, abs=1e-6)
            assert int(row["predicted_area_px"]) == np.count_nonzero(mask)
    searched, single = (
        score(make(Score, counts=artifact(run, "threshold_counts.npz"), threshold_trials=0)).scores
        for run in (parent, folds[1])
    )
    assert searched is not None and single is not None
    metrics = runs("score")[-2].data.metrics
    assert metrics["thresholds/dice_cross_fitted"] == pytest.approx(parent.data.metrics["oof/dice"])
    assert metrics["thresholds/dice_exact"] == pytest.approx(best.dice)
    assert (searched.images, searched.patients) == (trained.scores.images, trained.scores.patients)
    assert single.dice == pytest.approx(folds[1].data.metrics["val/dice"])
    version = register(Register(model=trained.model))
    card = MlflowClient().get_model_version(version.name, version.number).description
    assert "tiny" in str(card)

    paths = sorted((dataset.parent / "sample" / "dicom-images-train").rglob("*.dcm"))[:3]
    served: Any = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.number}")
    names, contents = [path.stem for path in paths], [path.read_bytes() for path in paths]
    answer = served.predict({"image_id": names, "dicom": contents})
    singles = [
        [found.presence for found in one.detect_each(zip(names, contents, strict=True))] for one in alone
    ]
    assert len(answer) == len(paths) > 0
    np.testing.assert_allclose(answer["presence"], np.mean(singles, axis=0), atol=1e-6)
