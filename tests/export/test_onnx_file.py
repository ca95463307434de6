"""``register`` with export=onnx: the file agrees with the model and can be used alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, make, soak, store_in
from mlflow import MlflowClient
from mlflow.entities import Run
from tiny_network import CPU, random_network
from tracked import artifact, last_run, log_model

from pneumo_experiments import __version__
from pneumo_experiments.errors import UserError
from pneumo_experiments.export import onnx_file
from pneumo_experiments.export.onnx_file import LIMIT, check_batches
from pneumo_experiments.learning import onnx_export
from pneumo_experiments.learning.calibration import Calibration
from pneumo_experiments.learning.device import ComputeConfig
from pneumo_experiments.learning.network import NETWORKS, PneumothoraxNet
from pneumo_experiments.learning.onnx_export import Difference, difference, in_fp32, write_onnx
from pneumo_experiments.learning.predict import Ensemble, Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, TrainedNetwork
from pneumo_experiments.settings import Register, Train, as_config
from pneumo_experiments.settings.networks import DECODERS
from pneumo_experiments.stages.register import register
from pneumo_experiments.synthetic.kaggle_layout import Contents, write_sample

SIDE = 32
MORE = [f"{decoder}:resnet18" for decoder in DECODERS]
MEMBERS = ((0, "none", "fp32"), (1, "flip+scale", "bf16"))


def detector_of(*members: tuple[int, str, str]) -> Detector:
    """Of members by seed, test-time augmentation and number format."""
    built = list[TrainedNetwork]()
    for seed, tta, precision in members:
        compute = ComputeConfig(torch.device("cpu"), precision)
        calibration = Calibration(1.7, -5.0) if seed else Calibration()
        settings = as_config(make(Train, network="tiny", tta=tta))
        built.append(TrainedNetwork(Predictor(random_network(seed), compute, tta, calibration), settings))
    return Detector(tuple(built), SIDE, Thresholds(0.1, 0.6, 9000, 0.45), "a fingerprint")


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SIDE, SIDE), np.uint8)


@dataclass(frozen=True)
class Exported:
    """What a registration left."""

    model: str
    path: Path
    detector: Detector
    run: Run
    out: str
    err: str

    def session(self) -> Any:
        return onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: None, empty_store: Path) -> Iterator[Exported]:
    folder, detector = tmp_path_factory.mktemp("onnx"), detector_of(*MEMBERS)
    with store_in(folder, empty_store):
        model, path = log_model(detector, Train()), folder / "new folder" / "model.onnx"
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            version = register(make(Register, model=model, export="onnx", onnx_file=path))
        assert version is not None and not version.champion
        yield Exported(model, path, detector, last_run("register"), out.getvalue(), err.getvalue())


def test_the_file_predicts_what_the_ensemble_predicts_for_any_number_of_images(exported: Exported) -> None:
    session = exported.session()
    for count in (1, 3, 17):
        mask, presence = session.run(["mask", "presence"], {"pixels": pixels(count)})
        expected = list(in_fp32(exported.detector.predictor).predict(pixels(count)))
        assert mask.dtype == presence.dtype == np.float32
        np.testing.assert_allclose(mask, [one.mask for one in expected], rtol=0, atol=1e-6)
        np.testing.assert_allclose(presence, [one.presence for one in expected], rtol=0, atol=1e-6)
    assert np.ptp(mask) > 0.03
    assert np.ptp(presence) > 0.01
    # Neither one member's, nor that of other views.
    ensemble = in_fp32(exported.detector.predictor)
    for other in (*ensemble.members, in_fp32(exported.detector.with_tta("none").predictor)):
        assert not difference(exported.path, other, [pixels(3)]).is_within(LIMIT)


def test_the_file_can_be_used_alone_and_holds_nothing_of_this_machine(exported: Exported) -> None:
    session = exported.session()
    facts = session.get_modelmeta().custom_metadata_map
    texts = {
        "package": f"pneumo_experiments {__version__}",
        "image_size": "32",
        "presence_threshold": "0.1",
        "top_score": "0.6",
        "min_area_px": "9000",
        "min_area_of": "1024",
        "bottom_score": "0.45",
        "data_fingerprint": "a fingerprint",
        "networks": "tiny,tiny",
        "tta": "none,flip+scale",
    }
    assert {name: facts[name] for name in texts} == texts
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [
        ("pixels", "tensor(uint8)", ["n", 32, 32])
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [
        ("mask", ["n", 32, 32]),
        ("presence", ["n"]),
    ]
    graph = onnx.load(str(exported.path)).graph
    assert [value.doc_string for value in (*graph.input, *graph.output)] == [
        facts[name] for name in ("pixels", "mask", "presence")
    ]
    content = exported.path.read_bytes()
    assert b"aux_head" not in content  # for training alone
    assert b"mask_head" in content
    for text in (str(ROOT), "network.py", "stack_trace"):
        assert text.encode() not in content


def test_the_run_has_the_file_and_how_far_it_is_from_the_model(exported: Exported) -> None:
    assert artifact(exported.run, "model.onnx").read_bytes() == exported.path.read_bytes()
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]
    found = difference(exported.path, in_fp32(exported.detector.predictor), check_batches(SIDE))
    assert 0 < found.mask < 1e-5
    params = exported.run.data.params
    assert [float(params[f"onnx_{name}_difference"]) for name in ("mask", "presence")] == [*found]
    assert f"model.onnx, 0 MB; differences from the model in fp32: {found}" in exported.out
    own = difference(exported.path, exported.detector.predictor, check_batches(SIDE))
    assert own.mask > 1e-4  # so far is bf16 from fp32
    assert f"from the model in its own format, fp32,bf16: {own}" in exported.out
    # Nothing of the exporter's hints, only what MLflow says.
    assert {line.split(" ")[0] for line in exported.err.splitlines()} <= {"Successfully", "Created"}


def test_the_example_of_the_docs_outlines_what_the_model_outlines(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "sample", Contents(0, 2, 3))
    (tmp_path / "output").symlink_to(exported.path.parent)
    exported.path.with_name("pneumothorax.onnx").symlink_to(exported.path)
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    areas = []
    for file in sorted((tmp_path / "sample").rglob("*.dcm")):
        Path("radiograph.dcm").write_bytes(file.read_bytes())
        names: dict[str, Any] = {}
        exec(code, names)
        (finding,) = exported.detector.detect_each([(file.stem, file.read_bytes())])
        assert finding.mask is not None
        assert names["mask"].shape == finding.mask.shape
        assert np.count_nonzero(names["mask"] != finding.mask) <= finding.mask.size / 10_000
        areas.append(np.count_nonzero(finding.mask))
    assert max(areas) > 100


def test_a_file_that_differs_from_the_model_is_not_written(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = exported.path.read_bytes()
    monkeypatch.setattr(onnx_file, "write_onnx", lambda path, *_: path.write_bytes(before))  # a wrong graph
    model, path = log_model(detector_of((0, "none", "fp32")), Train()), tmp_path / "model.onnx"
    for earlier in (None, b"earlier " + onnx_export.PRODUCER.encode()):
        if earlier is not None:
            path.write_bytes(earlier)
        with pytest.raises(
            UserError, match=r"not written: its probabilities differ .* \d\.\de-0[123] \(mask"
        ):
            register(make(Register, model=model, name="other", export="onnx", onnx_file=path))
        assert [file.read_bytes() for file in tmp_path.iterdir()] == ([earlier] if earlier else [])
    assert last_run().info.status == "FAILED"
    assert not MlflowClient().search_registered_models("name = 'other'")
    assert not Difference(float("nan"), 0).is_within(LIMIT)


def test_an_export_that_cannot_be_written_is_one_line_and_replaces_no_other_file(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, runs = tmp_path / "thesis.txt", len(MlflowClient().search_runs(["0"]))
    mine.write_text("mine")
    settings = make(Register, model="models:/absent", export="onnx")
    for path in (mine, tmp_path):
        with pytest.raises(UserError, match=f"onnx_file={path}: exists"):
            register(replace(settings, onnx_file=path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UserError, match=r"needs onnxruntime; pip install 'pneumo-experiments\[onnx\]'"):
            register(settings)
    assert len(MlflowClient().search_runs(["0"])) == runs
    with pytest.raises(UserError, match=r"thesis.txt/model.onnx: cannot be written \(.+\)"):
        register(replace(settings, model=exported.model, onnx_file=mine / "model.onnx"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_that_appears_during_the_export_is_not_replaced(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(temporary: Path, *_: object) -> None:
        for path in (temporary, tmp_path / "model.onnx"):
            path.write_text("mine")

    monkeypatch.setattr(onnx_file, "write_onnx", write)
    monkeypatch.setattr(onnx_file, "difference", lambda *_: Difference(0, 0))
    with pytest.raises(UserError, match=r"model\.onnx: exists"):
        onnx_file.export_onnx(tmp_path / "model.onnx", exported.detector)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_too_many_networks_for_one_file_are_refused(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sum(t.nbytes for n, t in random_network(0).state_dict().items() if not n.startswith("aux_head"))
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 2 * one)
    with pytest.raises(UserError, match=r"3 networks of .* GB are more .* at most 2 of them"):
        write_onnx(tmp_path / "model.onnx", detector_of(*MEMBERS, *MEMBERS[:1]).predictor, SIDE, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "tta", "side"),
    [
        ("unet:tu-test_resnet", "none", 40),  # which it pads
        *(pytest.param(name, "flip+scale", 64, marks=soak) for name in (*NETWORKS, *MORE)),
    ],
)
def test_every_network_can_be_exported(network: str, tta: str, side: int, tmp_path: Path) -> None:
    built = PneumothoraxNet(network)
    torch.nn.init.normal_(built.presence_head.weight, 0, 0.05)
    predictor = Predictor(built, CPU, tta)
    write_onnx(tmp_path / "model.onnx", Ensemble((predictor,)), side, {})
    assert difference(tmp_path / "model.onnx", predictor, check_batches(side)).is_within(1e-5)
