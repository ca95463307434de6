"""The entry points ``score`` and ``register``: which scores make a champion."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from helpers import changed, make, store_in
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from samples import packed, write_dataset
from tiny_network import CPU

from pneumo_experiments import tracking
from pneumo_experiments.dataset import rle
from pneumo_experiments.dataset.hdf5 import Dataset
from pneumo_experiments.dataset.packed import Entry, ResizedImage, hash_patient, salted
from pneumo_experiments.dataset.resize import area_resize
from pneumo_experiments.errors import UserError
from pneumo_experiments.evaluation.scored_images import digests, identity
from pneumo_experiments.evaluation.subset import Subset, make_split
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, save
from pneumo_experiments.settings import Register, Score, Train, as_config
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.score import score

pytestmark = pytest.mark.usefixtures("no_layout", "no_code")

EVERYTHING, NOTHING = 0.0, 1.0  # what a presence_threshold lets through, where the others are 0
SIDE = 64  # of the radiographs


def radiographs(name: str, image_size: int, is_changed: bool = False) -> Iterator[ResizedImage]:
    """Those of a sample of that name; every other one has a finding, a large one if they are "theirs"."""
    rng = np.random.default_rng(len(name))
    for number in range(80):
        truth = np.zeros((SIDE, SIDE), bool)
        rows = 40 if name == "theirs" else 4 + 7 * number % 30
        truth[10 : 10 + rows, 8:40] = number % 2
        truth[5, 5] = is_changed and number == 1
        entry = Entry(
            image_id=f"{name}-{number}",
            patient=hash_patient(f"{name}-{number}"),
            view="PA",
            sex="F",
            age=20 + number,
            rows=SIDE,
            columns=SIDE,
            annotations=number % 2,
            area_px=int(truth.sum()),
        )
        image = rng.integers(0, 256, (image_size, image_size), np.uint8)
        yield ResizedImage(entry, image, area_resize(truth, image_size), rle.encode(truth))


def stored(path: Path, images: Iterable[ResizedImage]) -> Path:
    images = list(images)
    size = len(images[0].image)
    write_dataset(path, packed(images, "uint8"), image_size=size, pixel_dtype="uint8")
    return path


def positives_of(images: Iterable[ResizedImage]) -> list[ResizedImage]:
    return [image for image in images if image.entry.area_px]


def dice_of_all(dataset: Dataset, indices: np.ndarray) -> float:
    """Mean Dice of outlining every pixel."""
    truths = [dataset.mask(int(index)) for index in indices]
    return float(np.mean([2 * truth.sum() / (truth.sum() + truth.size) for truth in truths]))


@dataclass(frozen=True)
class Ward:
    """Data sets of positives alone, of both kinds, and of another sample's positives; models in a store.

    The first is the champion of the positives' hold-out part, the second its twin without a score. To outline
    everything, as both do, scores higher on their training images. The last outlines nothing.
    """

    positives: Path
    mixed: Path
    foreign: Path
    settings: Train
    first: str
    second: str
    empty: str
    holdout: Run  # in which the first was scored


def logged(network: PneumothoraxNet, settings: Train, threshold: float, is_old: bool = False) -> str:
    """A model as `train` logs it, but for the training; ``is_old`` as before models knew their patients."""
    with Dataset.open(settings.dataset) as dataset:
        parts = make_split(dataset, settings.split)
        seen = Subset(dataset, np.append(parts.train, parts.validation))
        detector = Detector(
            members=(TrainedNetwork(Predictor(network, CPU), as_config(settings)),),
            image_size=32,
            thresholds=Thresholds(threshold, 0, 0, 0),
            data_fingerprint=dataset.fingerprint,
            training_images=frozenset(salted(f"image {e.image_id}") for e in seen.entries)
            if is_old
            else digests(seen),
        )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), detector)
        with tracking.run("train", settings):
            return tracking.log_model(Path(folder))


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory, empty_store: Path, tiny: None) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("ward")
    positives = stored(folder / "positives.h5", positives_of(radiographs("ours", 32)))
    mixed = stored(folder / "mixed.h5", radiographs("ours", 32))
    foreign = stored(folder / "foreign.h5", positives_of(radiographs("theirs", 32)))
    settings = make(Train, network="tiny", dataset=positives, holdout=0.3, folds=2)
    with Dataset.open(positives) as dataset:
        for seed in range(100):
            parts = make_split(dataset, settings.split)
            if dice_of_all(dataset, parts.train) > dice_of_all(dataset, parts.holdout):
                break
            settings = changed(settings, split_seed=seed)
    with store_in(folder, empty_store):
        network = PneumothoraxNet("tiny")
        first, second = (logged(network, settings, EVERYTHING) for _ in range(2))
        empty = logged(network, changed(settings, dataset=mixed), NOTHING)
        scored(first, positives)
        holdout = last_run()
        assert register(Register(model=first)).champion
        yield Ward(positives, mixed, foreign, settings, first, second, empty, holdout)


def scored(model: str, dataset: Path, subset: str = "holdout", precision: str = "auto") -> float:
    settings = make(
        Score, model=model, dataset=dataset, subset=subset, precision=precision, device="cpu", overlays=0
    )
    judged = score(settings)
    assert judged.scores is not None
    return judged.scores.dice


def champion() -> ModelVersion:
    return MlflowClient().get_model_version_by_alias("pneumothorax", "champion")


def last_run() -> Run:
    return MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"])[0]


# The three cases that made a wrong champion


def test_a_score_on_training_images_makes_no_champion(ward: Ward, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(ward.second, ward.positives, "train") > float(champion().tags["dice"])
    version = register(Register(model=ward.second))
    assert not version.champion
    assert champion().source == ward.first
    assert "no score on unseen images" in version.reason
    assert "not champion: no score on unseen images" in capsys.readouterr().out


def test_a_score_on_other_images_than_the_champions_makes_no_champion(
    ward: Ward, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scored(ward.second, ward.foreign, "all") > float(champion().tags["dice"])
    version = register(Register(model=ward.second))
    assert not version.champion
    assert champion().source == ward.first
    assert "the champion, version 1: they have no scores of the same images" in version.reason
    assert "cannot be compared" in capsys.readouterr().out


def test_a_model_at_the_baseline_is_no_first_champion(ward: Ward, capsys: pytest.CaptureFixture[str]) -> None:
    dice = scored(ward.empty, ward.mixed)
    version = register(make(Register, model=ward.empty, name="another"))
    assert not version.champion
    assert f"is not above the all-empty baseline {dice:.4f}" in version.reason
    assert MlflowClient().get_registered_model("another").aliases == {"challenger": 1}
    assert "is not above the all-empty baseline" in capsys.readouterr().out


# What a score leaves


def test_a_score_names_its_images_whatever_their_stored_size_format_and_order(ward: Ward) -> None:
    larger = stored(ward.positives.with_name("larger.h5"), positives_of(radiographs("ours", 40)))
    with Dataset.open(ward.positives) as small, Dataset.open(larger) as large:
        everyone = np.arange(len(small))
        assert small.fingerprint != large.fingerprint
        whole = identity(Subset(small, everyone))
        assert whole == identity(Subset(large, everyone)) == identity(Subset(small, everyone[::-1]))
        assert len(whole) == 32
        assert whole != identity(Subset(small, everyone[1:]))
    images = positives_of(radiographs("ours", 32, is_changed=True))  # one pixel more in one true mask
    with Dataset.open(stored(ward.positives.with_name("changed.h5"), images)) as changed:
        assert len(changed) == len(everyone)
        assert identity(Subset(changed, everyone)) != whole


def test_a_score_against_a_baseline_shows_the_difference_and_the_images_that_changed(
    ward: Ward, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(
        *(Score, ), model=ward.first, dataset=ward.foreign, subset="all", device="cpu", overlays=0,
        baseline=ward.empty,
    )  # fmt: skip
    result = score(settings)
    assert result.scores is not None
    metrics, run_id = last_run().data.metrics, last_run().info.run_id
    # All images have a finding: the baseline, which marks nothing, has Dice 0 on each. The findings are
    # of the same size, so that all differences are equal, but for rounding.
    assert metrics["baseline_model_dice"] == 0
    assert metrics["dice_difference"] == pytest.approx(result.scores.dice)
    assert (metrics["dice_difference_low"], metrics["dice_difference_high"]) == pytest.approx(
        (result.scores.dice, result.scores.dice), abs=0.01
    )
    assert metrics["probability_better"] == 1
    table = json.loads(
        Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/changed_images.json")).read_text()
    )
    changes = [row[1] for row in table["data"]]
    assert len(changes) == result.scores.images
    assert changes == sorted(changes, reverse=True)
    assert Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/comparison.png")).stat().st_size > 1000
    assert f"against {ward.empty}: +" in capsys.readouterr().out
    page = Path(mlflow.artifacts.download_artifacts(result.report)).read_text(encoding="utf-8")
    assert f"{ward.empty} has a Dice of <b>0.0000</b>" in page
    tags = json.loads(last_run().data.tags["mlflow.loggedArtifacts"])
    assert tags == [{"path": "scores.json", "type": "table"}]  # what the evaluation view opens


def test_a_baseline_that_was_trained_on_the_images_is_refused(ward: Ward) -> None:
    settings = make(Score, model=ward.first, dataset=ward.positives, subset="train", baseline=ward.second)
    with pytest.raises(UserError, match=r"baseline=.* images trained it"):
        score(settings)


def test_every_score_of_a_model_keeps_the_identity_of_its_images(ward: Ward) -> None:
    scored(ward.first, ward.positives, "train")
    train = last_run()
    scored(ward.first, ward.foreign, "all", precision="bf16")
    foreign = last_run()
    logged = mlflow.get_logged_model(ward.first.removeprefix("models:/"))
    found = {(metric.key, metric.dataset_digest): metric.value for metric in logged.metrics or []}
    runs = {"holdout": (ward.holdout, "dice"), "train": (train, "train_dice"), "external": (foreign, "dice")}
    for subset, (run, name) in runs.items():
        params, metrics = run.data.params, run.data.metrics
        assert found[name, params["identity"]] == metrics[name]
        assert json.loads(logged.tags[f"score.{params['identity']}"])["subset"] == subset
        assert {"images", "positives", "patients", "dice_baseline"} <= params.keys()
        assert not {"images", "positives", "dice_baseline"} & metrics.keys()
        assert float(params["presence_threshold_used"]) == EVERYTHING
        assert params["presence_threshold"] == "none"
        assert params["precision_used"] == ("bf16" if subset == "external" else "fp32")
    assert len({run.data.params["identity"] for run, _ in runs.values()}) == 3
    assert "dice" not in train.data.metrics
    tags = champion().tags
    assert tags["identity"] == ward.holdout.data.params["identity"]
    assert tags["subset"] == "holdout"
    assert float(tags["dice"]) == ward.holdout.data.metrics["dice"]
    assert float(tags["dice_baseline"]) == 0.0


def test_a_score_leaves_a_row_for_each_image(ward: Ward) -> None:
    table = mlflow.load_table("scores.json", run_ids=[ward.holdout.info.run_id])
    with Path(
        mlflow.artifacts.download_artifacts(f"{ward.holdout.info.artifact_uri}/scores.csv")
    ).open() as file:
        rows = list(csv.DictReader(file))
    assert list(table.columns) == [*rows[0]]
    assert [float(row["dice"]) for row in rows] == pytest.approx(table["dice"].tolist())
    assert table["dice"].mean() == pytest.approx(ward.holdout.data.metrics["dice"])
    with Dataset.open(ward.positives) as dataset:
        entries = Subset(dataset, make_split(dataset, ward.settings.split).holdout).entries
    assert [(row["image_id"], row["patient"]) for row in rows] == [(e.image_id, e.patient) for e in entries]
    assert table["truth_area_px"].tolist() == [entry.area_px for entry in entries]
    assert table["predicted_area_px"].tolist() == [entry.rows * entry.columns for entry in entries]
    assert table["presence"].between(0, 1).all()


def test_images_that_a_model_has_seen_are_not_external(
    ward: Ward, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(ward.second, ward.mixed, "all")  # another file, with the images of the training among others
    assert "trained the model or chose its thresholds" in capsys.readouterr().out
    assert "all_dice" in last_run().data.metrics
    assert "dice" not in last_run().data.metrics


def grouped(numbers: Iterable[int]) -> list[ResizedImage]:
    """Positives of one sample, of patients with two images each: 1 and 3, 5 and 7, ...; from 25 on of one."""
    images = list(radiographs("grouped", 32))
    patients = {number: hash_patient(str(number // 4 if number < 25 else number)) for number in numbers}
    return [
        replace(images[number], entry=replace(images[number].entry, patient=patient))
        for number, patient in patients.items()
    ]


def test_patients_that_a_model_has_seen_are_not_external(
    ward: Ward, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stored(ward.mixed.with_name("first.h5"), grouped(range(1, 40, 4)))
    settings = changed(ward.settings, dataset=first)
    network = PneumothoraxNet("tiny")
    model, old = (logged(network, settings, EVERYTHING, is_old) for is_old in (False, True))
    with Dataset.open(first) as dataset:
        seen = np.setdiff1d(np.arange(len(dataset)), make_split(dataset, settings.split).holdout)
        known = {dataset.entries[i].patient for i in seen}
        image = int(dataset.entries[seen[0]].image_id.split("-")[1])  # one that is in both data sets
    others = grouped([image, *range(3, 40, 4)])
    second = stored(first.with_name("second.h5"), others)
    expected = ["image"] + ["patient" * (one.entry.patient in known) for one in others[1:]]
    shared = expected.count("patient")
    assert 2 < shared < 9  # some of them are new to the model

    scored(model, second, "all")
    told = f"1 of 11 images trained the model or chose its thresholds, the patients of {shared} more did"
    remedy = " (rename them by patients_csv if others are meant): no external score"
    assert f"score: {told}{remedy}" in capsys.readouterr().out
    run = last_run()
    assert told in run.data.tags["mlflow.note.content"]
    assert "all_dice" in run.data.metrics
    assert "dice" not in run.data.metrics
    table = mlflow.load_table("scores.json", run_ids=[run.info.run_id])
    assert table["seen"].tolist() == expected
    page = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/report.html")).read_text()
    assert told in page
    assert "11 masks cover more than half of their image: look at their overlays." in page
    version = register(make(Register, model=model, name="halves", dataset=second))
    assert version is not None
    assert not version.champion
    assert told.replace("the model", "the new version") in version.reason

    # So they are to a baseline, but for one that knows images alone.
    endings = {model: f", the patients of {shared} more did (rename", old: "; compare models"}
    for baseline, ending in endings.items():
        settings = make(Score, model=model, dataset=second, subset="all", device="cpu", baseline=baseline)
        words = f"baseline={baseline}: 1 of 11 images trained it or chose its thresholds{ending}"
        with pytest.raises(UserError, match=re.escape(words)):
            score(settings)

    # Without these patients the images are new.
    new = [one for one, by in zip(others, expected, strict=True) if not by]
    third = stored(first.with_name("third.h5"), new)
    version = register(make(Register, model=model, name="halves", dataset=third))
    assert version is not None
    assert f"on {len(new)} external images" in version.reason
    out = capsys.readouterr().out
    assert "trained the model" not in out
    assert f"score: {len(new)} masks cover more than half of their image: look at their overlays" in out
    assert "a finding on" not in out  # of all images, as their labels say


def test_an_interval_from_few_patients_is_marked(ward: Ward, tmp_path: Path) -> None:
    few = stored(tmp_path / "few.h5", positives_of(radiographs("few", 32))[:4])
    scored(ward.first, few, "all")
    params, description = last_run().data.params, last_run().data.tags["mlflow.note.content"]
    assert (params["positive_patients"], params["interval_reliable"]) == ("4", "false")
    assert ", unreliable with 4 patients with a finding)" in description
    assert "4 with pneumothorax, masks on 4 of 4" in description
    assert int(ward.holdout.data.params["positive_patients"]) >= 5
    assert ward.holdout.data.params["interval_reliable"] == "true"
    assert "unreliable" not in ward.holdout.data.tags["mlflow.note.content"]
