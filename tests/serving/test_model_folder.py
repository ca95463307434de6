"""A model as files: what is saved is read back, and damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_network import CPU, squares, tiny_member

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.calibration import Calibration
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.metrics.thresholds import NativeThresholds, Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork, load, save

pytestmark = pytest.mark.usefixtures("tiny")


def detector(*members: TrainedNetwork) -> Detector:
    return Detector(members, 32, Thresholds(0.2, 0.6, 100, 0.3), "a", frozenset({"one", "two"}), 0.22)


def test_a_model_folder_keeps_every_member(tmp_path: Path) -> None:
    augmentations = ["flip+scale", "none", "none"]
    members = [tiny_member(seed, fold=str(seed), tta=tta) for seed, tta in enumerate(augmentations)]
    line = Calibration(0.6, -1.3)
    members[1] = replace(members[1], predictor=replace(members[1].predictor, calibration=line))
    saved = detector(*members)
    save(tmp_path, saved)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.json",
        *(f"weights-{n}.pt" for n in range(3)),
    }
    again = load(tmp_path)
    assert (again.image_size, again.thresholds, again.training_images) == (
        32,
        saved.thresholds,
        saved.training_images,
    )
    assert again.prevalence == 0.22
    assert [member.settings["fold"] for member in again.members] == ["0", "1", "2"]
    assert [member.predictor.tta for member in again.members] == augmentations
    assert [member.predictor.calibration for member in again.members] == [Calibration(), line, Calibration()]
    images = squares(1).images.numpy()
    before, after = (next(each.predictor.predict(images)) for each in (saved, again))
    np.testing.assert_array_equal(before.mask, after.mask)
    assert before.presence == after.presence


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
    raw = [torch.sigmoid(own.members[0].predictor.network.eval()(view).presence) for view in views(images)]
    found = [one.presence for one in old.predictor.predict(images)]
    np.testing.assert_allclose(found, torch.stack(raw).mean(0).detach(), atol=1e-7)


def views(images: np.ndarray) -> list[torch.Tensor]:
    plain = torch.from_numpy(images)[:, None].float() / 255
    return [plain, plain.flip(-1)]


@pytest.mark.parametrize(
    "damage",
    [
        *({"calibration": {"slope": value}} for value in (0, -1.0, float("inf"), float("nan"), "1", None)),
        *({"calibration": value} for value in ({"bias": float("nan")}, {"power": 2}, 7, None)),
        *({"min_area_of": value} for value in (512, "1024", [])),
        *({"members": members} for members in ([], 7, [7], [{}], [{"settings": {}}])),
        *({"prevalence": value} for value in (-0.1, 1.1, float("nan"), "0.2", [0.5], True)),
        "weights-1.pt",
    ],
)
def test_what_is_damaged_or_missing_is_named(damage: dict[str, Any] | str, tmp_path: Path) -> None:
    save(tmp_path, detector(tiny_member(0), tiny_member(1)))
    path = tmp_path / (damage if isinstance(damage, str) else "model.json")
    if isinstance(damage, str):
        path.unlink()
    else:
        content = json.loads(path.read_text())
        if "calibration" in damage:  # it is a member's
            damage = {"members": [content["members"][0] | damage, content["members"][1]]}
        path.write_text(json.dumps(content | damage))
    with pytest.raises(UserError, match=rf"{path.name}: missing or damaged .*; train again"):
        load(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # of which this machine is faster in one
def test_a_model_computes_as_its_training_did(precision: str, tmp_path: Path) -> None:
    member = tiny_member(0)
    compute = ComputeConfig(CPU.device, precision)
    save(tmp_path, detector(replace(member, predictor=replace(member.predictor, compute=compute))))
    assert load(tmp_path).members[0].predictor.compute == compute
