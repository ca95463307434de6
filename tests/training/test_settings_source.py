"""``train reproduce=``: the training of a model again, and what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from helpers import changed, make, store_in
from mlflow import MlflowClient
from mlflow.entities import Run
from samples import write

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.serving import load
from pneumo_experiments.settings import Register, Train, flat
from pneumo_experiments.stages.register import register
from pneumo_experiments.stages.train import train
from pneumo_experiments.training.settings_source import settings_source

pytestmark = pytest.mark.usefixtures("no_charts")


@pytest.fixture(scope="module")
def original(
    small_dataset: Path, tiny_default: None, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The champion, trained with settings of its own; the working directory holds the store."""
    with store_in(tmp_path_factory.mktemp("original"), empty_store):
        own = {"weights": "none", "epochs": 2, "seed": 7, "learning_rate": 0.01, "batch_size": 8}
        model = train(make(Train, dataset=small_dataset, device="cpu", **own, **QUICK)).model
        register(make(Register, model=model, promote="always"))
        yield model


QUICK = {"threshold_trials": 0, "overlays": 0}


@pytest.fixture
def copy(original: str, tmp_path: Path) -> Path:
    """A copy of the champion's folder, to be changed."""
    return Path(shutil.copytree(mlflow.artifacts.download_artifacts(original), tmp_path / "copy"))


@contextmanager
def changing_settings(model: Path) -> Iterator[dict[str, Any]]:
    """The settings that a model's folder records; what is changed in the block is written."""
    (description,) = model.rglob("model.json")
    content = json.loads(description.read_text())
    yield content["settings"]
    description.write_text(json.dumps(content))


def reproduce(model: str, **values: object) -> tuple[str, Run]:
    """The model of the repeated training, and its run."""
    address = train(make(Train, reproduce=model, **QUICK, **values)).model
    logged = mlflow.get_logged_model(address.removeprefix("models:/"))
    assert logged.source_run_id is not None
    return address, MlflowClient().get_run(logged.source_run_id)


def weights(address: str) -> dict[str, torch.Tensor]:
    (member,) = load(tracking.model_data(address)).members
    return member.predictor.network.state_dict()


def test_settings_of_a_study_that_replace_given_ones_are_named() -> None:
    best = {"dice_weight": 0.5, "focal_weight": 3.0, "learning_rate": 0.1}
    source = settings_source(make(Train, from_study="s", dice_weight=2.0, focal_weight=3.0), best)
    assert flat(source.settings).items() >= best.items()
    assert source.replaced == ["dice_weight"]  # the same one, and the default, are no surprise


def test_a_champion_is_trained_again_with_the_same_settings_to_the_same_weights(
    original: str, small_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = reproduce("models:/pneumothorax@champion")
    said = capsys.readouterr().out
    assert model != original
    first, second = weights(original), weights(model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    params = run.data.params
    assert (params["seed"], params["learning_rate"], params["epochs"]) == ("7", "0.01", "2")
    assert params["dataset"] == str(small_dataset)
    assert (params["same_data"], params["same_code"], params["same_weights"]) == ("true", "true", "true")
    assert "train: the weights are those of models:/pneumothorax@champion" in said
    assert "the code is the same" in said
    assert "the data set is the same" in said


def test_another_data_set_other_code_and_other_weights_are_reported(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.h5"
    write(other, count=20, pixel_dtype="uint8")
    with (copy / "code" / "pneumo_experiments" / "learning" / "loss.py").open("a") as file:
        file.write("# changed\n")
    requirements = copy / "requirements.txt"
    requirements.write_text(requirements.read_text().replace("torch==", "torch==1."))
    _, run = reproduce(str(copy), dataset=other)
    said = capsys.readouterr().out
    params = run.data.params
    assert params["dataset"] == str(other)
    assert (params["same_data"], params["same_code"], params["same_weights"]) == ("false", "false", "false")
    assert float(params["weights_difference"]) > 1e-6
    assert "the code is another one: learning/loss.py, torch 1." in said
    assert "the data set is another one" in said
    assert f"from those of {copy}" in said


def test_all_folds_are_trained_again(original: str, small_dataset: Path) -> None:
    """Each run of a fold says whether its weights are the same."""
    settings = make(Train, dataset=small_dataset, weights="none", epochs=1, batch_size=8, fold="all", folds=2)
    ensemble = train(changed(settings, **QUICK)).model
    _, run = reproduce(ensemble)
    assert run.data.params["fold"] == "all"
    folds = MlflowClient().search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    assert [fold.data.params["same_weights"] for fold in folds] == ["true", "true"]
    assert len(load(tracking.model_data(ensemble)).members) == 2


def test_settings_beside_a_model_are_refused(original: str) -> None:
    with pytest.raises(UserError, match=r"leave out epochs, precision,"):
        train(make(Train, reproduce=original, epochs=3, precision="bf16"))
    with pytest.raises(UserError, match="reproduce and from_study both name settings"):
        train(make(Train, reproduce=original, from_study="s"))
    with pytest.raises(UserError, match=r"^model=models:/m-nowhere: cannot be loaded"):
        train(make(Train, reproduce="models:/m-nowhere"))


def test_a_model_of_an_earlier_version_is_repeated_with_the_defaults_of_later_settings(copy: Path) -> None:
    with changing_settings(copy) as recorded:
        assert recorded.pop("balance") == "image"
        now, recorded["augment"] = recorded["augment"], recorded["augment"] != "none"  # as it was: a boolean
    source = settings_source(make(Train, reproduce=str(copy)), None)
    batches = source.settings.recipe.batches
    assert (batches.balance, batches.augment) == ("image", now)
    assert source.settings.schedule.epochs == recorded["epochs"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", None, "does not say epochs"),
        ("epochs", "many", "'many' is not a valid whole number"),
        ("batch_size", 10**9, "is not in the range 2<=x<=65536"),
        ("compile", 1, "1 is not a boolean"),
    ],
)
def test_damaged_settings_of_a_model_are_refused(copy: Path, name: str, value: object, message: str) -> None:
    with changing_settings(copy) as recorded:
        recorded[name] = value
        if value is None:
            del recorded[name]
    with pytest.raises(UserError, match=f"^reproduce={copy}: .*{message}"):
        train(make(Train, reproduce=str(copy)))
