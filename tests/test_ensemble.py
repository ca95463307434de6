"""Several models as one: the mean of their probabilities, when scored, trained with fold=all and served."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from helpers import changed, copy_store, make
from mlflow import MlflowClient
from mlflow.entities import Run
from samples import stored_sample
from tiny_network import CPU, random_network

from pneumo_experiments import tracking
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.errors import UserError
from pneumo_experiments.experiment.scored_images import digests
from pneumo_experiments.experiment.subset import Subset, make_split
from pneumo_experiments.learning.predict import Ensemble, Predictor, to_native
from pneumo_experiments.scoring.exact import best_of_all
from pneumo_experiments.scoring.thresholds import ThresholdCounts, Thresholds, apply_thresholds
from pneumo_experiments.serving import Detector, Member, join, load, save
from pneumo_experiments.settings import Register, Score, Train, as_config
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.train import train

SETTINGS = make(Train, network="tiny", folds=2, holdout=0.3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_sample(tmp_path_factory.mktemp("data"), images=24, image_size=32)


@pytest.fixture
def store(
    dataset: Path, tiny: None, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty store; returns the path of the data set."""
    copy_store(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(None)
    yield dataset
    mlflow.set_tracking_uri(None)


def member(seed: int, **changes: Any) -> Member:
    settings = changed(SETTINGS, **changes)
    predictor = Predictor(random_network(seed), CPU, settings.recipe.network.tta)
    return Member(predictor, as_config(settings))


def model(seed: int, **changes: Any) -> Detector:
    """Of a training with these settings, that saw one image of its own."""
    fields = {"image_size": 32, "thresholds": Thresholds(), "data_fingerprint": "a"}
    fields |= {name: changes.pop(name) for name in fields if name in changes}
    return Detector((member(seed, **changes),), seen=frozenset({f"image {seed}"}), **fields)


def logged(detector: Detector) -> str:
    folder = Path(f"model {len(list(Path().glob('model *')))}")
    folder.mkdir()
    save(folder, detector)
    with tracking.run("train", SETTINGS):
        return tracking.log_model(folder)


def last_run(name: str) -> Run:
    runs = MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"])
    return next(run for run in runs if run.info.run_name.startswith(name))


def rows_of(run: Run, name: str) -> list[dict[str, str]]:
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name)
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32), np.uint8)


@pytest.mark.usefixtures("tiny")
def test_an_ensemble_predicts_the_mean_of_its_members_in_any_order() -> None:
    members = [Predictor(random_network(seed), CPU, tta="flip" if seed == 1 else "none") for seed in range(3)]
    alone = [list(member.predict(pixels(5))) for member in members]
    for order in itertools.permutations(range(3)):
        together = Ensemble(tuple(members[place] for place in order)).predict(pixels(5), batch_size=2)
        for image, prediction in enumerate(together):
            mask = np.mean([each[image].mask.astype(np.float64) for each in alone], axis=0)
            np.testing.assert_allclose(prediction.mask, mask, atol=2e-7)
            presence = np.mean([each[image].presence for each in alone])
            assert prediction.presence == pytest.approx(presence, abs=2e-7)
        assert image == 4
    assert np.ptp([each[0].presence for each in alone]) > 0.01  # the mean is none of them


@pytest.mark.usefixtures("tiny")
def test_a_joined_model_has_seen_what_any_has_and_its_thresholds_are_means() -> None:
    several = [
        model(0, thresholds=Thresholds(0.2, 0.6, 100, 0.3), fold="0"),
        model(1, thresholds=Thresholds(0.7, 0.9, 201, 0.32), fold="1"),
        model(2, thresholds=Thresholds(0.3, 0.7, 300, 0.4), fold="1", folds=3),
    ]
    for some in itertools.permutations(several):
        joined = join(some)
        assert joined.seen == {"image 0", "image 1", "image 2"}
        assert vars(joined.thresholds) == pytest.approx(vars(Thresholds(0.4, 0.73, 200, 0.34)), abs=1e-12)
        assert joined.thresholds == join(several).thresholds
    assert [member.settings["fold"] for member in join(several).members] == ["0", "1", "1"]
    flat = join([join(several[:2]), several[2]])
    assert len(flat.members) == 3


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_size": 64}, "one image size, but these were trained on images of 32 and 64 px"),
        ({"data_fingerprint": "b"}, "one data set, but these were trained on two"),
        ({"holdout": 0.2}, "holdout=0.3 split_seed=0 and holdout=0.2 split_seed=0: what one holds out has"),
        ({"split_seed": 7}, "holdout=0.3 split_seed=0 and holdout=0.3 split_seed=7: what one holds out has"),
    ],
)
def test_models_that_cannot_be_one_are_refused_with_the_reason(changes: Any, reason: str) -> None:
    with pytest.raises(UserError) as error:
        join([model(0), model(1), model(2, **changes)])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("tiny")
def test_a_model_folder_keeps_every_member(tmp_path: Path) -> None:
    joined = join(
        [model(seed, fold=str(seed), tta="flip+scale" if seed == 0 else "none", folds=5) for seed in range(3)]
    )
    save(tmp_path, joined)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.json",
        *(f"weights-{n}.pt" for n in range(3)),
    }
    again = load(tmp_path)
    assert (again.image_size, again.thresholds, again.seen) == (32, joined.thresholds, joined.seen)
    assert [member.settings["fold"] for member in again.members] == ["0", "1", "2"]
    assert [member.predictor.tta for member in again.members] == ["flip+scale", "none", "none"]
    before, after = (next(each.predictor.predict(pixels(1))) for each in (joined, again))
    np.testing.assert_array_equal(before.mask, after.mask)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("members", [[], 7, [7], [{}], [{"settings": {}}]])
def test_damaged_members_are_named(members: Any, tmp_path: Path) -> None:
    save(tmp_path, join([model(0), model(1)]))
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"members": members}))
    with pytest.raises(UserError, match=r"model\.json: missing or damaged .*; train again"):
        load(tmp_path)


@pytest.mark.usefixtures("tiny")
def test_missing_weights_of_a_member_are_named(tmp_path: Path) -> None:
    save(tmp_path, join([model(0), model(1)]))
    (tmp_path / "weights-1.pt").unlink()
    with pytest.raises(UserError, match=r"weights-1\.pt: missing or damaged .*; train again"):
        load(tmp_path)


def test_score_takes_several_models_in_any_order(store: Path) -> None:
    with Dataset.open(store) as opened:
        split = make_split(opened, SETTINGS.split)
        holdout = Subset(opened, split.holdout)
        seen = digests(Subset(opened, np.append(split.train, split.validation)))
        detectors = [
            Detector(
                (member(seed, fold=str(seed % 2)),),
                32,
                Thresholds(0, 0.4, 0, 0.3),
                opened.fingerprint,
                seen,
            )
            for seed in range(3)
        ]
        alone = [list(holdout.predictions(detector.predictor)) for detector in detectors]
        presence = np.mean([[each.presence for _, each in one] for one in alone], axis=0)
    addresses = [logged(detector) for detector in detectors]
    tables: list[list[dict[str, str]]] = []
    for order in ([0, 1, 2], [2, 0, 1]):
        settings = make(
            Score,
            model=", ".join(addresses[place] for place in order),
            dataset=store,
            overlays=0,
            device="cpu",
        )
        result = score(settings)
        assert result.scores is not None
        run = last_run("score")
        assert run.data.metrics["dice"] == result.scores.dice
        assert run.data.params["precision_used"] == "fp32"
        tables.append(rows_of(run, "scores.csv"))
    assert tables[0] == tables[1]
    assert [float(row["presence"]) for row in tables[0]] == pytest.approx(presence.tolist(), abs=1e-6)
    for address in addresses:  # the scores are no member's
        assert not mlflow.get_logged_model(address.removeprefix("models:/")).metrics
    with pytest.raises(UserError, match=r"subset=validation: the model's 3 networks were each trained on"):
        score(changed(settings, subset="validation"))
    for model_setting in (f"{addresses[0]},{addresses[0]}", f"{addresses[0]},"):
        with pytest.raises(UserError, match=f"model={model_setting}: names a model twice, or none"):
            score(changed(settings, model=model_setting))
    other = logged(model(0, data_fingerprint="another"))
    with pytest.raises(UserError, match="one data set"):
        score(changed(settings, model=f"{addresses[0]},{other}"))


def test_all_folds_become_one_model_that_is_scored_registered_and_served(store: Path) -> None:
    settings = changed(
        SETTINGS,
        dataset=store,
        fold="all",
        weights="none",
        epochs=1,
        batch_size=8,
        threshold_trials=0,
        overlays=0,
        device="cpu",
    )
    trained = train(settings)
    parent = last_run("train")
    detector = load(tracking.model_data(trained.model))
    outputs = MlflowClient().get_run(parent.info.run_id).outputs.model_outputs
    assert trained.model in {f"models:/{output.model_id}" for output in outputs}
    folds = [last_run(f"fold {number}") for number in range(2)]
    alone = [
        load(tracking.model_data(f"models:/{run.outputs.model_outputs[0].model_id}"))
        for run in (MlflowClient().get_run(fold.info.run_id) for fold in folds)
    ]
    with Dataset.open(store) as opened:
        validations = [Subset(opened, make_split(opened, one.members[0].split).validation) for one in alone]
        joined = ThresholdCounts.joined(
            part.count(one.predictor) for part, one in zip(validations, alone, strict=True)
        )
        holdout = make_split(opened, alone[0].members[0].split).holdout
        assert detector.seen == digests(Subset(opened, np.setdiff1d(np.arange(len(opened)), holdout)))
        best = best_of_all(joined)
        assert detector.thresholds == best.thresholds
        assert parent.data.params["top_score"] == str(best.thresholds.top_score)
        assert parent.data.metrics["val_dice_optimistic"] == pytest.approx(best.dice)
        assert parent.data.metrics["oof_dice"] == pytest.approx(trained.scores.dice)

        scored = score(make(Score, model=trained.model, dataset=store, overlays=0, device="cpu")).scores
        assert scored is not None
        pairs = zip(*(Subset(opened, holdout).predictions(one.predictor) for one in alone), strict=True)
        for row, ((index, first), (_, second)) in zip(
            rows_of(last_run("score"), "scores.csv"), pairs, strict=True
        ):
            mean = (first.mask + second.mask) / 2
            presence = (first.presence + second.presence) / 2
            mask = apply_thresholds(to_native(mean, opened.mask(index).shape), presence, detector.thresholds)
            assert float(row["presence"]) == pytest.approx(presence, abs=1e-6)
            assert int(row["predicted_area_px"]) == np.count_nonzero(mask)
    version = register(Register(model=trained.model))
    assert MlflowClient().get_model_version(version.name, version.number).tags["network"] == "tiny"

    files = sorted((store.parent / "sample" / "dicom-images-train").rglob("*.dcm"))[:3]
    served: Any = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.number}")
    contents = [file.read_bytes() for file in files]
    answer = served.predict({"image_id": [file.stem for file in files], "dicom": contents})
    singles = [
        list(one.detect((file.stem, content) for file, content in zip(files, contents, strict=True)))
        for one in alone
    ]
    assert len(answer) == len(files) > 0
    for place, presence in enumerate(answer["presence"]):
        assert presence == pytest.approx(np.mean([one[place].presence for one in singles]), abs=1e-6)
