"""A model behind a real `mlflow models serve`: formats, bad rows, thresholds, pictures, the example."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from dicom_files import GREYS, JPEGBaseline8Bit, dicom_bytes, jpeg, jpeg_file
from helpers import BIN, environment_of_mlflow
from mlflow.models import convert_input_example_to_serving_input
from mlflow.models.cli import commands
from mlflow.pyfunc import load_model
from PIL import Image
from pydicom import dcmread, uid
from tiny_network import CPU, random_network
from tracking_server import free_port

from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.scoring.thresholds import Thresholds
from pneumo_experiments.serving import Detector, Member, ServedModel, load, new_folder, save
from pneumo_experiments.settings import Train, as_config, from_flat
from pneumo_experiments.tracking.calls import save_model

GOOD = {"light": jpeg_file(GREYS), "dark": jpeg_file(GREYS // 3), "wide": jpeg_file(GREYS[:9])}
NAMES = ["image_id", "presence", "area_px", "rle", "error"]


def without_pixels() -> bytes:
    file, content = dcmread(io.BytesIO(GOOD["light"])), io.BytesIO()
    del file.PixelData
    file.save_as(content)
    return content.getvalue()


def deflate_bomb(megabytes: int = 220) -> bytes:
    """An element of zeros, deflated to a thousandth."""
    whole = dicom_bytes(GREYS, syntax=uid.DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack_from("<I", whole, 140)[0]  # after group 2, which is never deflated
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    packed = [packer.compress(b"\x09\0\x01\x10OB\0\0" + struct.pack("<I", megabytes * 10**6))]
    packed += [packer.compress(bytes(10**6)) for _ in range(megabytes)]
    rest = zlib.decompress(whole[start:], -zlib.MAX_WBITS)
    return whole[:start] + b"".join(packed) + packer.compress(rest) + packer.flush()


def faults(folder: Path) -> dict[str, tuple[str | None, str]]:
    """What can be sent instead of a radiograph's base64 text, and a part of the reason that comes back."""
    (folder / "real.dcm").write_bytes(GOOD["light"])
    huge = dicom_bytes(
        np.zeros((8, 8), np.uint8), 8, JPEGBaseline8Bit, jpeg(GREYS), Rows=32_000, Columns=32_000
    )
    return {
        "nothing": (None, "no file: dicom is empty"),
        "empty": ("", "no file: dicom is empty"),
        "not base64": ("not base64!", "dicom is not base64 text"),
        "path": (str(folder / "real.dcm"), "dicom is not base64 text"),
        "address": ((folder / "real.dcm").as_uri(), "dicom is not base64 text"),
        "text": (b64encode(b"a letter to the radiologist").decode(), "not a DICOM file"),
        "half": (b64encode(GOOD["light"][: len(GOOD["light"]) // 2]).decode(), "truncated"),
        "no pixels": (b64encode(without_pixels()).decode(), "no pixel data"),
        "1 GB": (b64encode(huge).decode(), "32000 x 32000 pixels exceed"),
        "deflate bomb": (b64encode(deflate_bomb()).decode(), "inflates to more than"),
    }


def detector_of(network: PneumothoraxNet, name: str, **thresholds: float) -> Detector:
    settings = as_config(from_flat(Train, {"network": name, "tta": "none"}))
    member = Member(Predictor(network, CPU, "none"), settings)
    return Detector((member,), 32, Thresholds(**thresholds), "")  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Served:
    """A served model: its folder, its address, the folder where the server runs and what it should answer."""

    model: Path
    address: str
    folder: Path
    expected: dict[str, dict[str, Any]]

    def post(self, body: object, content_type: str = "application/json") -> tuple[int, str]:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/invocations", data, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def rows(self, body: object, content_type: str = "application/json") -> list[dict[str, Any]]:
        status, text = self.post(body, content_type)
        assert status == 200, text[:2000]
        return rows_in(text)

    def ask(self, contents: dict[str, bytes], **params: object) -> list[dict[str, Any]]:
        data = [[image_id, b64encode(content).decode()] for image_id, content in contents.items()]
        return self.rows({"dataframe_split": {"columns": NAMES_IN, "data": data}, "params": params})


NAMES_IN = ["image_id", "dicom"]


def rows_in(text: str) -> list[dict[str, Any]]:
    """The rows of an answer, as a client reads it that does not accept NaN."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)["predictions"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server runs in an empty folder, from a copy of the model, without a store, package or pickle."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    network = PneumothoraxNet("fcn_resnet50")
    torch.nn.init.normal_(network.presence_head.weight, std=0.1)  # so that images differ
    torch.nn.init.normal_(network.mask_head[-1].weight)  # pyright: ignore[reportArgumentType]
    detector = detector_of(network, "fcn_resnet50", presence_threshold=0, top_score=0.05, bottom_score=0.05)
    with new_folder() as data:
        save(data, detector)
        save_model(folder / "model", str(data), ["mlflow"])
    expected = ServedModel(detector).predict(pd.DataFrame({"image_id": GOOD.keys(), "dicom": GOOD.values()}))
    port, work = free_port(), folder / "work"
    work.mkdir()
    variables = environment_of_mlflow("") | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [BIN / "mlflow", "models", "serve", "-m", folder / "model", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    del variables["MLFLOW_TRACKING_URI"]
    with (
        (folder / "serve.log").open("w") as log,
        subprocess.Popen(command, env=variables, cwd=work, stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", server)
            yield Served(
                folder / "model",
                f"http://127.0.0.1:{port}",
                work,
                {row["image_id"]: row for row in expected.to_dict("records")},
            )
        finally:
            server.terminate()
    assert list(work.iterdir()) == []  # no store was made
    assert "Traceback" not in (folder / "serve.log").read_text()


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"{url} does not answer")


def same(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal but for rounding of the probability; the masks may differ in a pixel of 100."""
    close = abs(row["presence"] - expected["presence"]) < 1e-4
    return close and abs(row["area_px"] - expected["area_px"]) <= 0.01 * expected["area_px"]


def as_csv(columns: list[str], data: list[list[str | None]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([columns, *data])
    return file.getvalue()


def bodies(data: list[list[str | None]]) -> dict[str, tuple[object, str]]:
    """A request in each format that MLflow takes, and its content type."""
    records = [dict(zip(NAMES_IN, row, strict=True)) for row in data]
    columns = {name: [row[place] for row in data] for place, name in enumerate(NAMES_IN)}
    as_json: dict[str, object] = {
        "dataframe_split": {"columns": NAMES_IN, "data": data},
        "dataframe_records": records,
        "inputs": columns,
        "instances": records,
    }
    formats = {name: ({name: content}, "application/json") for name, content in as_json.items()}
    formats["inputs of records"] = {"inputs": records}, "application/json"
    formats["csv"] = as_csv(NAMES_IN, data), "text/csv"
    return formats


def test_64_files_with_every_fault_among_them_are_answered_in_every_format(
    served: Served, tmp_path: Path
) -> None:
    wrong = faults(tmp_path)
    data: list[list[str | None]] = [[name, text] for name, (text, _) in wrong.items()]
    goods = [[name, b64encode(content).decode()] for name, content in GOOD.items()]
    data += [goods[n % len(goods)] for n in range(64 - len(data))]
    data = [data[n * 5 % 64] for n in range(64)]  # mixed
    slow = "deflate bomb"  # is no different in another format
    fewer = [row for n, row in enumerate(data) if row[0] in wrong.keys() - {slow} or n < 6]
    for name, (body, content_type) in (bodies(fewer) | {"all": bodies(data)["dataframe_split"]}).items():
        rows = served.rows(body, content_type)
        assert [row["image_id"] for row in rows] == [row[0] for row in (data if name == "all" else fewer)]
        for row in rows:
            assert list(row) == NAMES
            if (image_id := row["image_id"]) in GOOD:
                assert row["error"] == ""
                assert same(row, served.expected[image_id]), name
            else:
                assert wrong[image_id][1] in row["error"], name
                assert (row["presence"], row["area_px"], row["rle"]) == (None, None, None)
    presences = {row["presence"] for row in served.expected.values()}
    assert len(presences) == len(GOOD)  # the answers could not be mixed up unnoticed


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (["image_id", "file"], "no column dicom"),
        (["id", "dicom"], "no column image_id"),
        (["id", "file"], "no column image_id and no column dicom"),
    ],
)
def test_wrong_columns_are_named_in_the_answer(served: Served, columns: list[str], reason: str) -> None:
    rows = served.rows({"dataframe_split": {"columns": columns, "data": [["a", "b"]]}})
    assert len(rows) == 1
    assert f"the request has {reason};" in rows[0]["error"]


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"inputs": {}}', '{"dataframe_split": 1}'])
def test_what_is_no_request_gets_one_answer_without_a_traceback(served: Served, body: str) -> None:
    _, text = served.post(body)
    assert json.loads(text)
    assert "Traceback" not in text
    assert '.py"' not in text


def test_a_row_without_an_id_has_its_number(served: Served) -> None:
    content = b64encode(GOOD["light"]).decode()
    rows = served.rows({"dataframe_split": {"columns": NAMES_IN, "data": [[None, content], ["7", content]]}})
    assert [row["image_id"] for row in rows] == ["0", "7"]
    assert all(same(row, served.expected["light"]) for row in rows)


def test_params_replace_thresholds_and_name_their_mistake_in_each_row(served: Served) -> None:
    before, after = (served.ask(GOOD, **params) for params in ({}, {"bottom_score": 0, "top_score": 0.0}))
    shapes = {"light": 32 * 48, "dark": 32 * 48, "wide": 9 * 48}
    assert {row["image_id"]: row["area_px"] for row in after} == shapes
    assert [row["presence"] for row in before] == pytest.approx([row["presence"] for row in after], abs=1e-5)
    for params in (
        {"top_score": 1.5},
        {"bottom_score": 0.123},
        {"min_area_px": -1},
        {"presence_threshold": -0.1},
    ):
        ((name, value),) = params.items()
        rows = served.ask(GOOD, **params)
        assert all(f"{row['image_id']}: {name}={value}: give " in row["error"] for row in rows)
        assert {row["presence"] for row in rows} == {None}


def test_a_request_may_ask_for_pictures(served: Served) -> None:
    files = GOOD | {"text": b"no DICOM"}
    for row in served.ask(files, overlay=True, mask=True):
        assert list(row) == [*NAMES, "overlay", "mask"]
        if row["image_id"] == "text":
            assert (row["overlay"], row["mask"]) == (None, None)
            continue
        shape = (9 if row["image_id"] == "wide" else 32, 48)
        with Image.open(io.BytesIO(b64decode(row["mask"]))) as mask:
            assert mask.mode == "1"
            assert (np.asarray(mask) == decode(row["rle"], shape)).all()
        with Image.open(io.BytesIO(b64decode(row["overlay"]))) as picture:
            assert (picture.format, picture.mode, picture.width) == ("PNG", "RGB", 512)
            assert picture.height == round(512 * shape[0] / shape[1])
            colours = np.asarray(picture).astype(int)
        is_orange = colours[..., 0] - colours[..., 2] > 100
        assert is_orange.any() == (0 < row["area_px"] < shape[0] * shape[1])
    assert all(list(row) == [*NAMES, "mask"] for row in served.ask(GOOD, mask=True, overlay=False))


def test_the_example_that_travels_with_a_model_is_a_request_that_works(served: Served) -> None:
    request = (served.model / "serving_input_example.json").read_text()
    example = json.loads((served.model / "input_example.json").read_text())
    assert json.loads(convert_input_example_to_serving_input(example) or "") == json.loads(request)
    (row,) = served.rows(request)
    assert (row["image_id"], row["error"]) == ("example", "")
    in_process = load_model(str(served.model)).predict(example)
    assert same(row, in_process.to_dict("records")[0])


def test_a_loaded_model_takes_every_form_that_mlflow_hands_over(served: Served) -> None:
    model, ids, files = load_model(str(served.model)), list(GOOD), list(GOOD.values())
    texts = [b64encode(content).decode() for content in files]
    forms: dict[str, Any] = {
        "frame": pd.DataFrame({"image_id": ids, "dicom": files}),
        "dictionary of lists": {"image_id": ids, "dicom": files},
        "of texts": {"image_id": ids, "dicom": texts},
        "of arrays": {"image_id": np.array(ids), "dicom": np.array(texts)},
        "list of dictionaries": [
            {"image_id": one, "dicom": file} for one, file in zip(ids, files, strict=True)
        ],
    }
    for name, form in forms.items():
        answer = model.predict(form)
        assert answer["image_id"].tolist() == ids, name
        assert all(same(row, served.expected[row["image_id"]]) for row in answer.to_dict("records")), name
    (one,) = model.predict({"image_id": ids[0], "dicom": files[0]}).to_dict("records")
    assert same(one, served.expected[ids[0]])


@pytest.mark.parametrize("content_type", ["json", "csv"])
def test_mlflow_models_predict_writes_the_same_answer(
    served: Served, tmp_path: Path, content_type: str
) -> None:
    data: list[list[str | None]] = [["light", b64encode(GOOD["light"]).decode()], ["nothing", None]]
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    body, _ = bodies(data)["csv" if content_type == "csv" else "dataframe_records"]
    asked.write_text(body if isinstance(body, str) else json.dumps(body))
    words = ["predict", "-m", str(served.model), "--env-manager", "local", "-t", content_type]
    done = CliRunner().invoke(commands, [*words, "-i", str(asked), "-o", str(answered)])
    assert done.exit_code == 0, done.output
    light, nothing = rows_in(answered.read_text())
    assert same(light, served.expected["light"])
    assert (nothing["presence"], nothing["error"]) == (None, "nothing: no file: dicom is empty")


def test_the_data_in_a_model_have_a_name(served: Served) -> None:
    assert sorted(path.name for path in (served.model / "data" / "detector").iterdir()) == [
        "model.json",
        "weights.pt",
    ]


def test_threads_get_their_own_answers(tiny: None) -> None:
    model = ServedModel(detector_of(random_network(0), "tiny", presence_threshold=0))
    frames = [pd.DataFrame({"image_id": [name], "dicom": [content]}) for name, content in GOOD.items()]
    alone = [model.predict(frame)["presence"][0] for frame in frames]
    answers: dict[int, list[float]] = {n: [] for n in range(len(frames))}

    def ask(n: int) -> None:
        for _ in range(5):
            answers[n].append(model.predict(frames[n])["presence"][0])

    threads = [threading.Thread(target=ask, args=(n,)) for n in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(alone)) == len(GOOD)
    assert [answers[n] for n in answers] == [pytest.approx([presence] * 5) for presence in alone]


def test_a_failure_of_the_network_is_a_reason_and_the_next_request_is_answered(
    tiny: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = random_network(0)
    model = ServedModel(detector_of(network, "tiny", presence_threshold=0))
    frame = pd.DataFrame({"image_id": ["a", "b"], "dicom": [GOOD["light"], b"no DICOM"]})
    good = model.predict(frame)
    assert good["presence"].tolist()[1] is None
    with monkeypatch.context() as patch:
        patch.setattr(network.backbone, "forward", lambda _: 1 / 0)  # as if memory ran out
        failed = model.predict(frame)
    assert failed["error"].tolist() == [
        f"{name}: the model failed (ZeroDivisionError); the server's log has the details" for name in "ab"
    ]
    assert "ZeroDivisionError" in caplog.text
    assert model.predict(frame)["presence"].tolist() == good["presence"].tolist()


def test_a_network_of_nan_is_a_reason_in_each_row(tiny: None) -> None:
    network = random_network(0)
    with torch.no_grad():
        network.presence_head.bias.fill_(float("nan"))
    model = ServedModel(detector_of(network, "tiny"))
    answer = model.predict(pd.DataFrame({"image_id": ["a"], "dicom": [GOOD["light"]]}))
    assert "a: network output is NaN" in answer["error"][0]


def test_loaded_weights_are_those_that_were_saved_and_of_no_other_type(tiny: None, tmp_path: Path) -> None:
    network = random_network(3)
    save(tmp_path, detector_of(network, "tiny"))
    loaded = load(tmp_path).members[0].predictor.network
    assert {name: tensor.device.type for name, tensor in loaded.state_dict().items()} == dict.fromkeys(
        network.state_dict(), "cpu"
    )
    assert all(
        torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in network.state_dict().items()
    )
    torch.save(
        {name: tensor.double() for name, tensor in network.state_dict().items()}, tmp_path / "weights.pt"
    )
    with pytest.raises(UserError, match=r"weights\.pt: missing or damaged .*holds torch.float64"):
        load(tmp_path)


def test_a_real_radiograph_is_outlined(real_data: Path, tiny: None) -> None:
    path = sorted((real_data / "dicom-images-test").glob("*.dcm"))[0]
    model = ServedModel(
        detector_of(random_network(1), "tiny", presence_threshold=0, top_score=0.5, bottom_score=0.5)
    )
    frame = pd.DataFrame({"image_id": [path.stem], "dicom": [b64encode(path.read_bytes()).decode()]})
    (row,) = model.predict(frame, {"overlay": True, "mask": True}).to_dict("records")
    assert row["error"] == ""
    with Image.open(io.BytesIO(b64decode(row["mask"]))) as mask:
        assert mask.size == (1024, 1024)
        assert np.asarray(mask).sum() == row["area_px"]
    with Image.open(io.BytesIO(b64decode(row["overlay"]))) as picture:
        assert picture.size == (512, 512)
        assert np.asarray(picture).std() > 20
