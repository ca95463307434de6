"""A model: as files, of which damaged and foreign ones run nothing, several as one, and in batches."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
import yaml
from dicom_files import GREYS, dicom_bytes, jpeg_file
from helpers import ended
from mlflow import MlflowClient
from PIL import Image
from tiny_network import CPU, squares, tiny_member

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.calibration import Calibration
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.metrics.thresholds import NativeThresholds, Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, load, make_ensemble, save
from pneumo_experiments.settings import Train, as_config
from pneumo_experiments.tracking import model_data
from pneumo_experiments.tracking.models import save_model

pytestmark = pytest.mark.usefixtures("tiny")


def detector(*members: TrainedNetwork) -> Detector:
    return Detector(members, 32, Thresholds(0.2, 0.6, 100, 0.3), "a", frozenset({"one", "two"}), 0.22)


def refusal_of(folder: Path) -> str:
    """The one line that loading it ends with."""
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_folder_keeps_every_member(tmp_path: Path) -> None:
    augmentations = ["flip+scale", "none", "none"]
    members = [tiny_member(seed, fold=str(seed), tta=tta) for seed, tta in enumerate(augmentations)]
    line, compute = Calibration(0.6, -1.3), ComputeConfig(CPU.device, "bf16")
    members[1] = replace(members[1], predictor=replace(members[1].predictor, calibration=line))
    members[2] = replace(members[2], predictor=replace(members[2].predictor, compute=compute))
    saved = detector(*members)
    save(tmp_path, saved)
    names = {"model.json", *(f"weights-{n}.pt" for n in range(3))}
    assert {path.name for path in tmp_path.iterdir()} == names
    again = load(tmp_path)
    for name in ("image_size", "thresholds", "training_images", "prevalence"):
        assert getattr(again, name) == getattr(saved, name), name
    assert [member.settings["fold"] for member in again.members] == ["0", "1", "2"]
    assert [member.predictor.tta for member in again.members] == augmentations
    assert [member.predictor.calibration for member in again.members] == [Calibration(), line, Calibration()]
    # As its training did, though this machine is faster in one of them.
    assert [member.predictor.compute for member in again.members] == [CPU, CPU, compute]
    images = squares(1).images.numpy()
    before, after = (next(each.predictor.predict(images)) for each in (saved, again))
    np.testing.assert_array_equal(before.mask, after.mask)
    assert before.presence == after.presence
    (tmp_path / "weights-1.pt").unlink()
    assert "weights-1.pt: missing or damaged (" in refusal_of(tmp_path)


def test_a_model_without_calibration_predicts_what_its_network_says(tmp_path: Path) -> None:
    own = detector(tiny_member(0))
    save(tmp_path, own)
    path = tmp_path / "model.json"
    description = json.loads(path.read_text())
    # Models of earlier versions lack them.
    for name in ("calibration", "prevalence", "min_area_of"):
        del description[name]
    path.write_text(json.dumps(description))
    old, images = load(tmp_path), squares(2).images.numpy()
    assert old.prevalence is None
    assert old.thresholds == NativeThresholds(0.2, 0.6, 100, 0.3) != own.thresholds
    assert old.with_thresholds({"min_area_px": 7}).thresholds == NativeThresholds(0.2, 0.6, 7, 0.3)
    save(tmp_path, old)
    assert load(tmp_path).thresholds == old.thresholds  # saved again, they mean the same
    plain, network = torch.from_numpy(images)[:, None].float() / 255, own.members[0].predictor.network.eval()
    raw = [torch.sigmoid(network(view).presence) for view in (plain, plain.flip(-1))]
    found = [one.presence for one in old.predictor.predict(images)]
    np.testing.assert_allclose(found, torch.stack(raw).mean(0).detach(), atol=1e-7)


# Damage

DESCRIPTION: dict[str, Any] = {
    "image_size": 32,
    "thresholds": vars(Thresholds()),
    "settings": as_config(Train()),
    "data_fingerprint": "0123",
}
SETTINGS: dict[str, list[Any]] = {
    "network": ["unet", ["fcn_resnet50"]],
    "folds": ["many"],
    "holdout": [True],
    "fold": [5],
    "tta": ["mirror", ["flip"]],
}
WRONG: dict[str, list[Any]] = {
    "settings": [{}, *(DESCRIPTION["settings"] | {n: v} for n, some in SETTINGS.items() for v in some)],
    "image_size": ["32", 10**9, -1, float("inf"), True],
    "thresholds": [
        *(vars(Thresholds()) | {"x": 1}, {"presence_threshold": float("nan")}),
        *({"top_score": "0.5"}, {"min_area_px": 1e308}),
    ],
    "data_fingerprint": [5],
    "calibration": [
        *({"slope": value} for value in (0, -1.0, float("inf"), float("nan"), "1", None)),
        *({"bias": float("nan")}, {"power": 2}, 7, None),
    ],
    "min_area_of": [512, "1024", []],
    "members": [[], 7, [7], [{}], [{"settings": {}}]],
    "prevalence": [-0.1, 1.1, float("nan"), "0.2", [0.5], True],
}
BROKEN = [
    *("", json.dumps(DESCRIPTION)[:100], "[]", "7", "[" * 100_000, '{"image_size": ' + "9" * 5000 + "}"),
    *(json.dumps({key: DESCRIPTION[key] for key in DESCRIPTION if key != name}) for name in DESCRIPTION),
    *(json.dumps(DESCRIPTION | {name: value}) for name, some in WRONG.items() for value in some),
]


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    for text in BROKEN:
        (tmp_path / "model.json").write_text(text, encoding="utf-8")
        assert "model.json: missing or damaged (" in refusal_of(tmp_path), text[:500]


def packed(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"rubbish" * 100, b"PK\x03\x04", packed({"a": torch.ones(300)})[:500]),
        *(packed([torch.ones(3)]), packed({"a": torch.ones(300)}), packed({"mean": "text", 7: 8})),
    ],
    ids=["empty", "rubbish", "zip", "cut", "list", "other names", "other kinds"],
)
def test_damaged_weights_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION), encoding="utf-8")
    (tmp_path / "weights.pt").write_bytes(content)
    assert "weights.pt: missing or damaged (" in refusal_of(tmp_path)


def test_weights_of_another_type_of_numbers_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, detector(member := tiny_member(0)))
    state = member.predictor.network.state_dict()
    torch.save({name: tensor.double() for name, tensor in state.items()}, tmp_path / "weights.pt")
    assert "holds torch.float64" in refusal_of(tmp_path)


# Logged models of others


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder as log_model leaves it, with empty weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.json").write_text(json.dumps(DESCRIPTION), encoding="utf-8")
    (tmp_path / "made" / "weights.pt").touch()
    save_model(tmp_path / "model", tmp_path / "made")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "text",
    [
        *("", "%", "- a list", "flavors: 3", "flavors: {python_function: {}}"),
        "flavors: {python_function: {loader_module: pneumo_experiments.serving}}",
        "flavors: {python_function: {loader_module: [1], data: {}}}",
        "flavors: {python_function: {loader_module: pneumo_experiments.serving, data: 7}}",
        *("!!python/object/apply:os.mkdir [sprung]", "[" * 2_000, "a: \x00", "a: \xff"),
    ],
)
def test_a_damaged_mlmodel_is_one_line(text: str, model: Path) -> None:
    (model / "MLmodel").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^model={model}: [^\n]*$"):
        model_data(str(model))
    assert not Path("sprung").exists()


def test_data_outside_of_the_model_is_not_read(model: Path) -> None:
    for data in ("../made", str(model.parent / "made"), "nothing"):
        found = yaml.safe_load((model / "MLmodel").read_text())
        found["flavors"]["python_function"]["data"] = data
        (model / "MLmodel").write_text(yaml.safe_dump(found))
        with pytest.raises(UserError, match=rf"it has no folder {data}\)"):
            model_data(str(model))


@pytest.mark.parametrize("name", ["MLmodel", "data/made/model.json", "data/made/weights.pt"])
@pytest.mark.parametrize("kind", ["missing", "device", "pipe"])
def test_a_model_with_a_file_missing_or_without_end_is_refused(kind: str, name: str, model: Path) -> None:
    path = model / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match=path.name):
        load(model_data(str(model)))


class Trap(mlflow.pyfunc.PythonModel):
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder),)

    def predict(self, context: Any, model_input: list[str]) -> list[str]:
        return model_input


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("entry_point", ["score", "register"])
def test_a_command_refuses_a_model_before_its_pickle_or_code_is_read(
    entry_point: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("d.h5").touch()  # a data set that is missing would be refused before
    dataset = ["--dataset", "d.h5"]

    def line_of(folder: Path) -> str:
        capsys.readouterr()  # what making the model said
        end = ended([entry_point, "--model", str(folder), *dataset], monkeypatch, capsys)
        (line,) = end.err.splitlines()
        assert end.code == 2, line
        assert {run.info.status for run in MlflowClient().search_runs(["0"])} == {"FAILED"}
        return line.removeprefix("Error: ")

    theirs, trap, before = model.with_name("theirs"), model.with_name("sprung"), list(sys.path)
    mlflow.pyfunc.save_model(str(theirs), python_model=Trap(trap), pip_requirements=["mlflow"])
    shutil.rmtree(trap, ignore_errors=True)
    assert line_of(theirs).startswith(f"model={theirs}: is not a model of this project")
    assert not trap.exists()
    assert line_of(model).startswith(f"{model}/data/made/weights.pt: missing or damaged (")
    assert sys.path == before
    assert not any(str(model) in (getattr(m, "__file__", None) or "") for m in list(sys.modules.values()))


# Detectors: several models as one, and batches of files


def trained(seed: int, thresholds: Thresholds | None = None, **settings: Any) -> Detector:
    """Of a training with these settings, that saw one image of its own."""
    size, dataset = settings.pop("image_size", 32), settings.pop("data_fingerprint", "a")
    members, images = (tiny_member(seed, **settings),), frozenset({f"image {seed}"})
    return Detector(members, size, thresholds or Thresholds(), dataset, images)


def test_a_joined_model_has_seen_what_any_has_and_its_thresholds_are_means() -> None:
    several = [
        trained(0, thresholds=Thresholds(0.2, 0.6, 100, 0.3), fold="0"),
        trained(1, thresholds=Thresholds(0.7, 0.9, 201, 0.32), fold="1"),
        trained(2, thresholds=Thresholds(0.3, 0.7, 300, 0.4), fold="1", folds=3),
    ]
    for some in itertools.permutations(several):
        joined = make_ensemble(some)
        assert joined.training_images == {"image 0", "image 1", "image 2"}
        assert vars(joined.thresholds) == pytest.approx(vars(Thresholds(0.4, 0.73, 200, 0.34)), abs=1e-12)
        assert joined.thresholds == make_ensemble(several).thresholds
    assert [member.settings["fold"] for member in make_ensemble(several).members] == ["0", "1", "1"]
    natives = [replace(one, thresholds=NativeThresholds(*vars(one.thresholds).values())) for one in several]
    assert make_ensemble(natives).thresholds == NativeThresholds(
        *vars(make_ensemble(several).thresholds).values()
    )
    assert make_ensemble([natives[0], *several[1:]]).thresholds == make_ensemble(several).thresholds
    flat = make_ensemble([make_ensemble(several[:2]), several[2]])
    assert len(flat.members) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_size": 64}, "one image size, but these were trained on images of 32 and 64 px"),
        ({"data_fingerprint": "b"}, "one data set, but these were trained on two"),
        ({"holdout": 0.3}, "holdout=0.2 split_seed=0 and holdout=0.3 split_seed=0: what one holds out has"),
        ({"split_seed": 7}, "holdout=0.2 split_seed=0 and holdout=0.2 split_seed=7: what one holds out has"),
    ],
)
def test_models_that_cannot_be_one_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as error:
        make_ensemble([trained(0), trained(1), trained(2, **changes)])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_png_picture_and_a_gzip_file_are_answered_like_their_dicom_file() -> None:
    picture = io.BytesIO()
    Image.fromarray(GREYS).save(picture, "PNG")
    contents = [dicom_bytes(GREYS), picture.getvalue(), gzip.compress(dicom_bytes(GREYS))]
    original, *others = trained(0).detect_each([(str(n), content) for n, content in enumerate(contents)])
    assert original.error == ""
    for other in others:
        assert (other.error, other.presence) == ("", pytest.approx(original.presence, abs=1e-6))
        assert other.mask is not None
        assert np.array_equal(other.mask, original.mask)


def test_a_batch_of_any_size_keeps_its_order_and_its_outputs() -> None:
    files = [(str(n), b"no DICOM" if n % 5 == 4 else jpeg_file(GREYS)) for n in range(37)]
    one = trained(0)
    findings = list(one.detect_each(files))
    assert [finding.image_id for finding in findings] == [image_id for image_id, _ in files]
    assert [bool(finding.error) for finding in findings] == [n % 5 == 4 for n in range(37)]
    (alone,) = one.detect_each(files[:1])
    presences = [finding.presence for finding in findings if not finding.error]
    assert presences == [pytest.approx(alone.presence, abs=1e-5)] * 30
    assert [finding.error for finding in one.detect_each(files[4:5])] == ["4: not a DICOM file"]
    assert not list(one.detect_each([]))
