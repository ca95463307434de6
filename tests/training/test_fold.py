"""A fold is trained and evaluated from Python alone, without a store or a run."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
from helpers import make

from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.evaluation.evaluate import Evaluation
from pneumo_experiments.evaluation.report import Context, make_report
from pneumo_experiments.evaluation.subset import all_images
from pneumo_experiments.learning.checkpoint import Checkpoint
from pneumo_experiments.metrics.best_thresholds import best_of_all
from pneumo_experiments.settings import Score, Train
from pneumo_experiments.training.fold import Fold, FoldResult
from pneumo_experiments.training.folds import join_folds, predict_out_of_fold
from pneumo_experiments.training.resume import TrainingState

pytestmark = pytest.mark.usefixtures("tiny")


def settings_of(path: Path, **values: object) -> Train:
    chosen = {"network": "tiny", "weights": "none", "batch_size": 8, "learning_rate": 0.03, "warmup": 0.1}
    chosen |= {
        "device": "cpu",
        "precision": "fp32",
        "folds": 2,
        "holdout": 0,
        "epochs": 3,
        "threshold_trials": 0,
    }
    return make(Train, dataset=path, **(chosen | values))


def trained(settings: Train, dataset: Dataset, state: TrainingState) -> FoldResult:
    fold = Fold.prepare(settings, dataset)
    for _ in fold.epochs(state):
        pass
    return fold.finish(state)


@pytest.fixture
def no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run can be started, and nothing is left in the working directory."""

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("talks to MLflow")

    monkeypatch.chdir(tmp_path)
    for name in ("start_run", "MlflowClient", "set_experiment"):
        monkeypatch.setattr(mlflow, name, refuse)


@pytest.mark.usefixtures("no_store", "no_charts")
def test_a_fold_is_trained_and_evaluated_without_a_store(small_dataset: Path, tmp_path: Path) -> None:
    with Dataset.open(small_dataset) as dataset:
        settings, state = settings_of(small_dataset, best_k=1), TrainingState()
        result = trained(settings, dataset, state)
        evaluation, counts = result.evaluation, result.evaluation.counts
        assert state.history == result.history
        assert len(state.history) == 3
        assert state.dices == {result.best_epoch: max(m["epoch/dice"] for m in state.history)}
        best = best_of_all(counts)
        assert evaluation.thresholds == best.thresholds
        assert evaluation.scores.dice == pytest.approx(best.dice, abs=1e-12)
        assert evaluation.scores.dice >= max(metrics["epoch/dice"] for metrics in state.history) - 1e-12
        again = evaluation.subset.count(result.detector.predictor)
        np.testing.assert_array_equal(again.pixels, counts.pixels)
        np.testing.assert_allclose(again.presence, counts.presence, atol=1e-6)
        assert counts.patient.tolist() == [entry.patient for entry in evaluation.subset.entries]
        assert result.as_metrics()["val/dice"] == evaluation.scores.dice
        everyone = all_images(dataset)
        whole = Evaluation(everyone, everyone.count(result.detector.predictor), evaluation.thresholds)
        seen = [row[-1] for row in whole.image_rows(result.detector.training_images)]
        assert (seen.count("image"), len(seen)) == (24, 24)
        report = make_report(Context(make(Score, overlays=2), "all"), whole, result.detector)
        assert f"<b>{whole.scores.dice:.4f}</b>" in report.page
        assert len([name for name in report.pictures if name.startswith("overlays/")]) == 2
        dices = [row[list(report.tables["scores"][0]).index("dice")] for row in report.tables["scores"][1]]
        assert np.mean(np.array(dices, float)) == pytest.approx(whole.scores.dice)
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("no_store")
def test_a_training_that_goes_on_from_its_saved_state_ends_in_the_same_scores(
    small_dataset: Path, tmp_path: Path
) -> None:
    checkpoint, settings = Checkpoint(tmp_path / "checkpoint"), settings_of(small_dataset)
    with Dataset.open(small_dataset) as dataset:
        whole = trained(settings, dataset, TrainingState())
        state = TrainingState()
        next(Fold.prepare(settings, dataset).epochs(state))
        state.save(checkpoint)
        saved = TrainingState.load(checkpoint)
        assert saved is not None and len(saved.history) == 1
        resumed = trained(settings, dataset, saved)
        np.testing.assert_array_equal(resumed.evaluation.counts.pixels, whole.evaluation.counts.pixels)
        assert resumed.detector.thresholds == whole.detector.thresholds
        assert resumed.as_metrics() == whole.as_metrics()


@pytest.mark.usefixtures("no_store")
def test_all_folds_are_one_model_without_a_store(small_dataset: Path) -> None:
    with Dataset.open(small_dataset) as dataset:
        folds = [
            trained(settings_of(small_dataset, fold=fold, epochs=1), dataset, TrainingState())
            for fold in ("0", "1")
        ]
        predicted, model = predict_out_of_fold(folds), join_folds(folds, threshold_trials=0, seed=0)
    assert sorted(row[0] for row in predicted.rows) == sorted(entry.image_id for entry in dataset.entries)
    assert predicted.scores.dice <= model.search.optimum.dice + 1e-12
    assert np.bincount(model.counts.fold).tolist() == [len(fold.evaluation.counts) for fold in folds]
    assert len(model.detector.members) == 2
