"""Models of others and damaged ones: nothing of them is run, and one line says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import pytest
import torch
import yaml
from helpers import ended
from mlflow import MlflowClient

from pneumo_experiments.errors import UserError
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import load
from pneumo_experiments.settings import Train, as_config
from pneumo_experiments.tracking.models import save_model

DESCRIPTION: dict[str, Any] = {
    "image_size": 32,
    "thresholds": vars(Thresholds()),
    "settings": as_config(Train()),
    "data_fingerprint": "0123",
}


@pytest.fixture
def error_of(
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """The one line of a command that ends with 2 and leaves its run FAILED."""
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(None)

    def fail(*words: str) -> str:
        capsys.readouterr()  # what making the model said
        end = ended(list(words), monkeypatch, capsys)
        (line,) = end.err.splitlines()
        assert end.code == 2, line
        assert {run.info.status for run in MlflowClient().search_runs(["0"])} == {"FAILED"}
        return line.removeprefix("Error: ")

    return fail


def description(**changes: Any) -> dict[str, Any]:
    return DESCRIPTION | changes


def our_model(folder: Path, text: str, weights: bytes | None = b"") -> Path:
    """A model folder as log_model leaves it, with such a description and such weights."""
    data = folder / "made"
    data.mkdir(parents=True)
    (data / "model.json").write_text(text, encoding="utf-8")
    if weights is not None:
        (data / "weights.pt").write_bytes(weights)
    save_model(folder / "model", data)
    return folder / "model"


class Trap(mlflow.pyfunc.PythonModel):
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder),)

    def predict(self, context: Any, model_input: list[str]) -> list[str]:
        return model_input


@pytest.mark.parametrize("entry_point", ["score", "register"])
def test_a_model_of_others_is_refused_before_its_pickle_is_read(
    entry_point: str, error_of: Callable[..., str], tmp_path: Path
) -> None:
    trap = tmp_path / "sprung"
    mlflow.pyfunc.save_model(str(tmp_path / "theirs"), python_model=Trap(trap), pip_requirements=["mlflow"])
    shutil.rmtree(trap, ignore_errors=True)
    line = error_of(entry_point, "--model", str(tmp_path / "theirs"))
    assert line.startswith(f"model={tmp_path / 'theirs'}: ")
    assert "not a model of this project" in line
    assert not trap.exists()


def test_code_beside_a_model_is_not_put_on_the_path(error_of: Callable[..., str], tmp_path: Path) -> None:
    model = our_model(tmp_path, json.dumps(DESCRIPTION))
    before = list(sys.path)
    assert "weights.pt: missing or damaged" in error_of("score", "--model", str(model))
    assert sys.path == before
    assert not any(str(model) in (getattr(m, "__file__", None) or "") for m in list(sys.modules.values()))


def test_data_outside_of_the_model_is_not_read(error_of: Callable[..., str], tmp_path: Path) -> None:
    model = our_model(tmp_path / "a", json.dumps(DESCRIPTION))
    for data in ("../made", str(tmp_path / "a" / "made"), "nothing"):
        found = yaml.safe_load((model / "MLmodel").read_text())
        found["flavors"]["python_function"]["data"] = data
        (model / "MLmodel").write_text(yaml.safe_dump(found))
        assert f"cannot be loaded (it has no folder {data})" in error_of("score", "--model", str(model))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "%",
        "- a list",
        "flavors: 3",
        "flavors: {python_function: {}}",
        "flavors: {python_function: {loader_module: pneumo_experiments.serving}}",
        "flavors: {python_function: {loader_module: [1], data: {}}}",
        "flavors: {python_function: {loader_module: pneumo_experiments.serving, data: 7}}",
        "!!python/object/apply:os.mkdir [sprung]",
        "[" * 20_000,
        "a: \x00",
        "a: \xff",
    ],
)
def test_a_damaged_mlmodel_is_one_line(
    text: str | None, error_of: Callable[..., str], tmp_path: Path
) -> None:
    model = our_model(tmp_path, json.dumps(DESCRIPTION))
    if text is None:
        (model / "MLmodel").unlink()
    else:
        (model / "MLmodel").write_bytes(text.encode("latin-1"))
    assert error_of("score", "--model", str(model)).startswith(f"model={model}: ")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["MLmodel", "data/made/model.json", "data/made/weights.pt"])
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_model_with_a_file_without_end_is_one_line(
    kind: str, name: str, error_of: Callable[..., str], tmp_path: Path
) -> None:
    path = our_model(tmp_path, json.dumps(DESCRIPTION)) / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    assert path.name in error_of("score", "--model", str(tmp_path / "model"))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in DESCRIPTION.items() if key != name}


def setting(name: str, value: Any) -> dict[str, Any]:
    return description(settings=DESCRIPTION["settings"] | {name: value})


BROKEN_DESCRIPTIONS = {
    "empty": "",
    "cut": json.dumps(DESCRIPTION)[:100],
    "list": "[]",
    "number": "7",
    "deep": "[" * 100_000,
    "long number": '{"image_size": ' + "9" * 5000 + "}",
    **{f"no {name}": json.dumps(without(name)) for name in DESCRIPTION},
    "no settings": json.dumps(description(settings={})),
    "size is text": json.dumps(description(image_size="32")),
    "size is huge": json.dumps(description(image_size=10**9)),
    "size is negative": json.dumps(description(image_size=-1)),
    "size is infinite": json.dumps(description(image_size=float("inf"))),
    "size is true": json.dumps(description(image_size=True)),
    "unknown network": json.dumps(setting("network", "unet")),
    "network is a list": json.dumps(setting("network", ["fcn_resnet50"])),
    "folds is text": json.dumps(setting("folds", "many")),
    "holdout is true": json.dumps(setting("holdout", True)),
    "fold is a number": json.dumps(setting("fold", 5)),
    "unknown tta": json.dumps(setting("tta", "mirror")),
    "tta is a list": json.dumps(setting("tta", ["flip"])),
    "unknown threshold": json.dumps(description(thresholds=vars(Thresholds()) | {"x": 1})),
    "threshold is nan": json.dumps(description(thresholds={"presence_threshold": float("nan")})),
    "threshold is text": json.dumps(description(thresholds={"top_score": "0.5"})),
    "area is huge": json.dumps(description(thresholds={"min_area_px": 1e308})),
    "fingerprint is a number": json.dumps(description(data_fingerprint=5)),
}


@pytest.mark.parametrize("damage", BROKEN_DESCRIPTIONS)
def test_a_damaged_description_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(BROKEN_DESCRIPTIONS[damage], encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.json: missing or damaged .*; train again") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "rubbish", "cut", "list", "other names", "other kinds"]
)
def test_damaged_weights_are_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION), encoding="utf-8")
    path = tmp_path / "weights.pt"
    if damage in ("empty", "rubbish"):
        path.write_bytes(b"" if damage == "empty" else b"rubbish" * 100)
    elif damage != "missing":
        content = {"list": [torch.ones(3)], "other kinds": {"mean": "text", 7: 8}}
        torch.save(content.get(damage, {"a": torch.ones(300)}), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"weights\.pt: missing or damaged .*; train again") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [None, b"", b"PK\x03\x04"])
def test_a_logged_model_with_damaged_weights_ends_the_command_with_one_line(
    weights: bytes | None, error_of: Callable[..., str], tmp_path: Path
) -> None:
    model = our_model(tmp_path, json.dumps(DESCRIPTION), weights)
    for entry_point in ("score", "register"):
        line = error_of(entry_point, "--model", str(model))
        assert line.startswith(f"{model}/data/made/weights.pt: missing or damaged (")
