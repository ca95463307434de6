"""Networks beside the default one: train, go on, score, serve; export/test_onnx_file.py exports them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from helpers import Call, make, soak, words_of
from mlflow import MlflowClient
from tiny_network import CPU
from tracked import log_model, runs, stopped_in_training

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, load
from pneumo_experiments.settings import Score, Train, as_config
from pneumo_experiments.settings.networks import LIBRARY
from pneumo_experiments.stages.score import score
from pneumo_experiments.stages.train import train
from pneumo_experiments.tracking.models import EXAMPLE

pytestmark = pytest.mark.usefixtures("no_charts", "no_code")


def settings_of(network: str, dataset: Path, weights: str) -> Train:
    short = {"epochs": 2, "threshold_trials": 0, "overlays": 0, "batch_size": 8, "tta": "none"}
    return make(Train, network=network, dataset=dataset, weights=weights, ema=0.9, **short)


# The smallest encoder that timm has.
TINY_UNET = "unet:tu-test_resnet"


@pytest.mark.parametrize("network", [TINY_UNET, pytest.param("lraspp_mobilenet_v3_large", marks=soak)])
def test_a_network_is_trained_continued_scored_and_served(
    network: str, small_dataset: Path, store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = PneumothoraxNet(network).backbone.state_dict()
    torch.save(backbone, tmp_path / "backbone.pt")
    settings = settings_of(network, small_dataset, str(tmp_path / "backbone.pt"))
    whole = train(settings)
    with stopped_in_training(1, monkeypatch):
        train(settings)
    resumed = train(settings)
    first, again = (load(tracking.model_data(result.model)) for result in (whole, resumed))
    ours, theirs = (one.members[0].predictor.network.state_dict() for one in (first, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    conv = next(iter(backbone))
    assert not torch.equal(ours[f"backbone.{conv}"], backbone[conv])
    assert resumed.scores.dice == whole.scores.dice

    metrics = MlflowClient().get_run(runs("train")[-1].info.run_id).data.metrics
    assert "loss/aux" not in metrics
    scored = score(make(Score, model=resumed.model, dataset=small_dataset, overlays=0))
    assert scored.scores is not None and 0 <= scored.scores.dice <= 1

    folder = tracking.model_data(resumed.model).parents[1]
    needs = [line for line in (folder / "requirements.txt").read_text().split() if "segmentation" in line]
    assert len(needs) == (":" in network)
    frame = pd.DataFrame({"image_id": ["a"], "dicom": [EXAMPLE.read_bytes()]})
    (row,) = mlflow.pyfunc.load_model(resumed.model).predict(frame).to_dict("records")  # pyright: ignore
    (finding,) = again.detect_each([("a", EXAMPLE.read_bytes())])
    assert (row["error"], row["presence"]) == ("", pytest.approx(finding.presence, abs=1e-6))


def test_a_model_whose_library_is_missing_says_what_to_install(
    store: Path, small_dataset: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    settings = settings_of(TINY_UNET, small_dataset, "none")
    member = TrainedNetwork(Predictor(PneumothoraxNet(TINY_UNET), CPU), as_config(settings))
    model = log_model(Detector((member,), 16, Thresholds(), "data"), settings)
    folder = tracking.model_data(model)
    assert json.loads((folder / "model.json").read_text())["libraries"] == ["segmentation-models-pytorch"]
    monkeypatch.setitem(sys.modules, LIBRARY, None)
    install = f"{TINY_UNET} needs segmentation_models_pytorch; pip install 'pneumo-experiments[smp]'"
    for use in (lambda: load(folder), lambda: mlflow.pyfunc.load_model(model)):  # pyright: ignore
        with pytest.raises(UserError) as caught:
            use()
        assert str(caught.value).endswith(f": network: {install}")
    before = len(runs())
    for words in (
        ["train", *words_of(settings)],
        ["search", "--dataset", str(small_dataset), "--network", TINY_UNET],
    ):
        assert call(words).mistake.startswith(f"network: {install}; see ")
    assert len(runs()) == before  # no run was started
