"""A model behind a real `mlflow models serve`: formats, bad rows, thresholds, pictures, the example."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests
import torch
from click.testing import CliRunner
from dicom_files import GREYS, JPEGBaseline8Bit, dicom_bytes, jpeg, jpeg_file
from helpers import BIN, environment, environment_of_mlflow
from mlflow.models import convert_input_example_to_serving_input
from mlflow.models.cli import commands
from mlflow.pyfunc import load_model
from PIL import Image
from pydicom import dcmread, uid
from tiny_network import CPU, random_network
from tracking_server import free_port

from pneumo_experiments.dataset.rle import decode
from pneumo_experiments.learning.network import PneumothoraxNet
from pneumo_experiments.learning.predict import Predictor
from pneumo_experiments.metrics.thresholds import Thresholds
from pneumo_experiments.serving import Detector, ServedModel, TrainedNetwork, new_folder, save
from pneumo_experiments.settings import Train, as_config, from_flat
from pneumo_experiments.tracking.models import save_model

GOOD = {"light": jpeg_file(GREYS), "dark": jpeg_file(GREYS // 3), "wide": jpeg_file(GREYS[:9])}
NETWORK = "unet:tu-test_resnet"  # the smallest that a server without the tests has
NAMES = ["image_id", "presence", "area_px", "rle", "error"]


def without_pixels() -> bytes:
    file, content = dcmread(io.BytesIO(GOOD["light"])), io.BytesIO()
    del file.PixelData
    file.save_as(content)
    return content.getvalue()


def deflate_bomb(megabytes: int = 220) -> bytes:
    """Zeros, deflated to a thousandth."""
    whole = dicom_bytes(GREYS, syntax=uid.DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack_from("<I", whole, 140)[0]  # after group 2, which is never deflated
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    megabyte = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    return whole[:start] + megabyte * megabytes + packer.flush()


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
    member = TrainedNetwork(Predictor(network, CPU, "none"), settings)
    return Detector((member,), 32, Thresholds(**thresholds), "")  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Served:
    """A served model: its folder, its address, the folder where the server runs and what it should answer."""

    model: Path
    address: str
    folder: Path
    expected: dict[str, dict[str, Any]]

    def post(self, body: object, content_type: str = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, str | bytes) else json.dumps(body)
        data = data.encode() if isinstance(data, str) else data
        headers = {"Content-Type": content_type}
        answer = requests.post(f"{self.address}/invocations", data, headers=headers, timeout=60)
        return answer.status_code, answer.content.decode()

    def rows(self, body: object, content_type: str = "application/json") -> list[dict[str, Any]]:
        status, text = self.post(body, content_type)
        assert status == 200, text[:2000]
        return rows_in(text)

    def ask(self, contents: dict[str, bytes], **params: object) -> list[dict[str, Any]]:
        columns = {"image_id": [*contents], "dicom": [b64encode(each).decode() for each in contents.values()]}
        return self.rows({"dataframe_split": split(columns), "params": params})


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
    network = PneumothoraxNet(NETWORK)
    torch.nn.init.normal_(network.presence_head.weight, std=0.1)  # so that images differ
    torch.nn.init.normal_(network.mask_head.last.weight)  # pyright: ignore
    detector = detector_of(network, NETWORK, presence_threshold=0, top_score=0.05, bottom_score=0.05)
    with new_folder() as data:
        save(data, detector)
        save_model(folder / "model", data)
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
        with suppress(requests.RequestException):
            requests.get(url, timeout=2).raise_for_status()
            return
        time.sleep(0.1)
    pytest.fail(f"{url} does not answer")


def same(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal but for rounding of the probability; the masks may differ in a pixel of 100."""
    close = abs(row["presence"] - expected["presence"]) < 1e-4
    return close and abs(row["area_px"] - expected["area_px"]) <= 0.01 * expected["area_px"]


Columns = dict[str, list[Any]]


def records(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def split(columns: Columns) -> dict[str, Any]:
    return {"columns": list(columns), "data": [[*row] for row in zip(*columns.values(), strict=True)]}


def as_csv(columns: Columns) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    return file.getvalue()


# A request in each format that MLflow takes, but for Parquet.
FORMATS: dict[str, Callable[[Columns], Any]] = {
    "dataframe_split": lambda columns: {"dataframe_split": split(columns)},
    "dataframe_records": lambda columns: {"dataframe_records": records(columns)},
    "inputs": lambda columns: {"inputs": columns},
    "inputs of records": lambda columns: {"inputs": records(columns)},
    "instances": lambda columns: {"instances": records(columns)},
    "csv": as_csv,
}


def kind_of(name: str) -> str:
    """The content type of a request whose name begins with its format."""
    kinds = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet"}
    return kinds.get(name.split()[0], "application/json")


def test_64_files_with_every_fault_among_them_are_answered_in_every_format(
    served: Served, tmp_path: Path
) -> None:
    wrong = faults(tmp_path)
    data = [(name, text) for name, (text, _) in wrong.items()]
    goods = [(name, b64encode(content).decode()) for name, content in GOOD.items()]
    data += [goods[n % len(goods)] for n in range(64 - len(data))]
    data = [data[n * 5 % 64] for n in range(64)]  # mixed
    slow = "deflate bomb"  # is no different in another format
    fewer = [row for n, row in enumerate(data) if row[0] in wrong.keys() - {slow} or n < 6]
    for name, given in [("dataframe_split", data), *((name, fewer) for name in FORMATS)]:
        image_ids, texts = ([*column] for column in zip(*given, strict=True))
        rows = served.rows(FORMATS[name]({"image_id": image_ids, "dicom": texts}), kind_of(name))
        assert [row["image_id"] for row in rows] == image_ids
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


@pytest.mark.parametrize(("columns", "id"), [(["image_id", "file"], "a"), (["id", "file"], "0")])
def test_a_missing_column_is_named_in_the_answer(served: Served, columns: list[str], id: str) -> None:
    (row,) = served.rows({"dataframe_split": {"columns": columns, "data": [["a", "b"]]}})
    assert row["error"] == f"{id}: {NO_COLUMN[3:]}"


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"inputs": {}}', '{"dataframe_split": 1}'])
def test_what_is_no_request_gets_one_answer_without_a_traceback(served: Served, body: str) -> None:
    _, text = served.post(body)
    assert json.loads(text)
    assert "Traceback" not in text
    assert '.py"' not in text


def test_params_replace_thresholds_and_name_their_mistake_in_each_row(served: Served) -> None:
    before, after = (served.ask(GOOD, **params) for params in ({}, {"bottom_score": 0, "top_score": 0.0}))
    shapes = {"light": 32 * 48, "dark": 32 * 48, "wide": 9 * 48}
    assert {row["image_id"]: row["area_px"] for row in after} == shapes
    assert [row["presence"] for row in before] == pytest.approx([row["presence"] for row in after], abs=1e-5)
    wrong = {"top_score": 1.5, "bottom_score": 0.123, "min_area_px": -1, "presence_threshold": -0.1}
    for name, value in wrong.items():
        rows = served.ask(GOOD, **{name: value})
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


IDS, FILES = list(GOOD), list(GOOD.values())
TEXTS, NUMBERS = [b64encode(content).decode() for content in FILES], ["0", "1", "2"]
FULL: Columns = {"image_id": IDS, "dicom": TEXTS}
NO_ID, EXTRA = {"dicom": TEXTS}, {"size": [1, 2, 3]} | FULL
INTS, OTHERS = {"image_id": [7, 8, 9], "dicom": TEXTS}, {"image_id": ["007", "1e3", None], "dicom": TEXTS}
SOME = [{"dicom": TEXTS[0]}, {"image_id": "dark", "dicom": TEXTS[1]}]


# The table of docs/serving.md: what is given, and the ids that come back; all else is as for the frame.
IN_PROCESS: dict[str, tuple[Any, list[str]]] = {
    "frame": (pd.DataFrame({"image_id": IDS, "dicom": FILES}), IDS),
    "frame of bytearrays": (pd.DataFrame({"image_id": IDS, "dicom": [*map(bytearray, FILES)]}), IDS),
    "frame of memoryviews": (pd.DataFrame({"image_id": IDS, "dicom": [*map(memoryview, FILES)]}), IDS),
    "frame of dtype string": (pd.DataFrame(FULL, dtype="string"), IDS),
    "frame with an index": (pd.DataFrame(FULL, index=[7, 7, 9]), IDS),
    "frame in another order": (pd.DataFrame(FULL)[["dicom", "image_id"]], IDS),
    "frame without ids": (pd.DataFrame(NO_ID), NUMBERS),
    "frame with other ids": (pd.DataFrame(OTHERS), ["007", "1e3", "2"]),
    "lists": ({"image_id": IDS, "dicom": FILES}, IDS),
    "lists with more": (EXTRA, IDS),
    "arrays of objects": ({"image_id": np.array(IDS), "dicom": np.array(FILES, object)}, IDS),
    "series": ({"image_id": pd.Series(IDS), "dicom": pd.Series(FILES)}, IDS),
    "records, some with ids": (SOME, ["0", "dark"]),
    "one record without id": ({"dicom": TEXTS[0]}, ["0"]),
    "a series called dicom": (pd.Series(FILES, name="dicom"), NUMBERS),
}
OVER_HTTP: dict[str, tuple[object, list[str]]] = {
    "split without ids": ({"dataframe_split": split(NO_ID)}, NUMBERS),
    "split with other ids": ({"dataframe_split": split(OTHERS)}, ["007", "1e3", "2"]),
    "records, some with ids": ({"dataframe_records": SOME}, ["0", "dark"]),
    "inputs without ids": ({"inputs": NO_ID}, NUMBERS),
    "inputs with more": ({"inputs": EXTRA}, IDS),
    "inputs of one without id": ({"inputs": {"dicom": TEXTS[0]}}, ["0"]),
    "instances of lists": ({"instances": FULL}, IDS),
    "csv with a mark": ("\ufeff" + as_csv(FULL), IDS),
    "csv with other ids": (as_csv(OTHERS), ["007", "1e3", "2"]),
    "csv with more columns": (as_csv(EXTRA), IDS),
    "parquet": (pd.DataFrame({"image_id": IDS, "dicom": FILES}).to_parquet(), IDS),
}


def require_same(rows: list[dict[str, Any]], ids: list[str], served: Served) -> None:
    """Fails unless these are the frame's rows, but for the ids."""
    assert [row["image_id"] for row in rows] == ids
    for row, name in zip(rows, IDS, strict=False):
        assert row["error"] == ""
        assert same(row, served.expected[name])


@pytest.fixture(scope="module")
def loaded(served: Served) -> Any:
    return load_model(str(served.model))


@pytest.mark.parametrize("form", IN_PROCESS)
def test_a_loaded_model_takes_this_form(form: str, served: Served, loaded: Any) -> None:
    given, ids = IN_PROCESS[form]
    require_same(loaded.predict(given).to_dict("records"), ids, served)


@pytest.mark.parametrize("form", OVER_HTTP)
def test_a_server_takes_this_form(form: str, served: Served) -> None:
    body, ids = OVER_HTTP[form]
    require_same(served.rows(body, kind_of(form)), ids, served)


@pytest.mark.parametrize(
    "given", [FILES, TEXTS, [*zip(IDS, FILES, strict=True)], np.array(FILES, object), FILES[0], TEXTS[0]]
)
def test_files_without_the_names_of_columns_get_one_row_that_asks_for_them(given: Any, loaded: Any) -> None:
    assert [*loaded.predict(given)["error"]] == [NO_COLUMN]


NO_COLUMN = "0: the request has no column dicom; give columns image_id (optional) and dicom"


SPARK = """
import json, sys
import mlflow.pyfunc
from pyspark.sql import SparkSession
from pyspark.sql.functions import base64, col, struct, when

spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
kinds = "image_id string, presence double, area_px double, rle string, error string"
find = mlflow.pyfunc.spark_udf(spark, sys.argv[1], env_manager="local", result_type=kinds)
files = spark.createDataFrame(
    [(name, bytearray.fromhex(text)) for name, text in json.load(sys.stdin).items()],
    "image_id string, dicom binary",
)
forms = struct("image_id", "dicom"), struct("dicom"), struct("image_id", base64("dicom").alias("dicom"))
for form in forms:
    found = files.coalesce(1).select(find(form).alias("found")).select("found.*")
    found = found.withColumn("rle", when(col("error") == "", col("rle")))
    print(json.dumps([row.asDict() for row in found.collect()]))
spark.stop()
"""


def test_spark_takes_bytes_and_texts_and_one_bad_file_costs_its_row(served: Served) -> None:
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    given = json.dumps({name: content.hex() for name, content in (GOOD | {"bad": b"no DICOM"}).items()})
    variables = environment() | {"PYTHONPATH": os.pathsep.join(sys.path), "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(
        [sys.executable, "-c", SPARK, served.model],
        input=given,
        env=variables,
        cwd=served.model.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line, ids in zip(
        done.stdout.splitlines(), [[*IDS, "bad"], [*NUMBERS, "3"], [*IDS, "bad"]], strict=True
    ):
        *rows, bad = json.loads(line)
        require_same(rows, ids[:-1], served)
        assert bad.pop("error") == f"{ids[-1]}: not a DICOM file"
        assert bad == {"image_id": ids[-1], "presence": None, "area_px": None, "rle": None}


@pytest.mark.parametrize("content_type", ["json", "csv"])
def test_mlflow_models_predict_writes_the_same_answer(
    served: Served, tmp_path: Path, content_type: str
) -> None:
    columns = {"image_id": ["light", "nothing"], "dicom": [TEXTS[0], None]}
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    asked.write_text(as_csv(columns) if content_type == "csv" else json.dumps({"inputs": columns}))
    words = ["predict", "-m", str(served.model), "--env-manager", "local", "-t", content_type]
    done = CliRunner().invoke(commands, [*words, "-i", str(asked), "-o", str(answered)])
    assert done.exit_code == 0, done.output
    light, nothing = rows_in(answered.read_text())
    assert same(light, served.expected["light"])
    assert (nothing["presence"], nothing["error"]) == (None, "nothing: no file: dicom is empty")


def test_threads_get_their_own_answers(tiny: None) -> None:
    model = ServedModel(detector_of(random_network(0), "tiny", presence_threshold=0))
    frames = [pd.DataFrame({"image_id": [name], "dicom": [content]}) for name, content in GOOD.items()]
    alone = [model.predict(frame)["presence"][0] for frame in frames]

    def ask(frame: pd.DataFrame) -> list[float]:
        return [model.predict(frame)["presence"][0] for _ in range(5)]

    with ThreadPoolExecutor(len(frames)) as pool:
        answers = [*pool.map(ask, frames)]
    assert len(set(alone)) == len(GOOD)
    assert answers == [pytest.approx([presence] * 5) for presence in alone]


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
