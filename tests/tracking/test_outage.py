"""A tracking store that becomes unreachable during a run.

The server is a real one, killed with -9 and restarted on the same port.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from command_server import Command, CommandServer
from helpers import copy_store, environment, make, working_in
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException, RestException
from tracked import artifact
from tracking_server import Server, calls_in, free_port

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.registry import scores, versions
from pneumo_experiments.settings import Preprocess, Sample, Train
from pneumo_experiments.tracking import buffered_client
from pneumo_experiments.tracking.__main__ import send_buffered
from pneumo_experiments.tracking.buffered_client import BufferedClient
from pneumo_experiments.tracking.log import active_runs
from pneumo_experiments.tracking.servers import is_outage

# Logs before, during and after an outage; continues at each line on stdin. Its stderr is the file err.
TRAINING = """
import os
import sys
from pathlib import Path
import numpy as np
from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.settings import Schedule, Train
from pneumo_experiments.tracking import buffered_client, models

os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)

def wait(word):
    print(word, flush=True)
    sys.stdin.readline()

def count_pings(address):
    pings.append(address)
    ping(address)

pings, ping, buffered_client.ping = [], buffered_client.ping, count_pings
buffered_client.RETRY_SECONDS = float(sys.argv[1])
settings = Train(schedule=Schedule(epochs=9))
with tracking.run("train", settings, system_metrics=sys.argv[2] == "sampled") as run_id:
    print(run_id)
    tracking.log_metrics({"dice": 0.1, "loss": 0.9}, step=1)
    wait("up")
    before = len(pings)
    for step in range(2, 12):
        tracking.log_metrics({"dice": step / 10, "loss": 1 - step / 10}, step=step)
    tracking.log_params({"device_used": "none", "epochs": "77"})
    tracking.log_dataset(Path("data.h5"), "0123456789abcdef0123", "training")
    tracking.log_json({"parts": [1, 2]}, "sheets/split.json")
    tracking.log_image(np.full((4, 5, 3), 200, np.uint8), "sheets/sheet.png")
    tracking.describe("What came of it.")
    print(len(pings) - before)
    try:
        with tracking.run("child", Train()):
            print("a child was made")
    except UserError as error:
        print(error)
    wait("down")
    tracking.log_metrics({"dice": 1.2}, step=12)
    if sys.argv[2] == "model":
        folder = Path("weights")
        folder.mkdir()
        (folder / "model.json").write_text("{}")
        models.PACKAGE = folder  # to upload all of the package takes seconds
        print(tracking.log_model(folder))
print("end")
"""
# python -m pneumo_experiments.tracking
SEND = "import runpy; runpy.run_module('pneumo_experiments.tracking', run_name='__main__', alter_sys=True)"


@dataclass
class Training:
    """A process of TRAINING, and its lines on stdout."""

    folder: Path
    process: Command
    lines: list[str] = field(default_factory=list[str])
    code: int | None = None

    def read_until(self, word: str) -> None:
        while not self.lines or self.lines[-1] != word:
            line = self.process.stdout.readline()
            assert line, self.err
            self.lines.append(line.strip())

    def resume(self) -> None:
        self.process.stdin.write("\n")

    def finish(self) -> None:
        self.read_until("end")
        self.code = self.process.wait()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def run_id(self) -> str:
        return self.lines[0]

    @property
    def file(self) -> Path:
        return self.folder / "output" / f"undelivered-{self.run_id}" / "calls.jsonl"


def start(server: Server, folder: Path, commands: CommandServer, *words: str) -> Training:
    folder.mkdir()
    variables = environment() | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_EXPERIMENT_NAME": "Default"}
    variables |= {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
    return Training(folder, commands.start(*words, folder=folder, environment=variables, code=TRAINING))


@dataclass(frozen=True)
class Outage:
    """Two trainings whose server died: one ended after it was restarted, the other before."""

    server: Server
    reconnected: Training
    buffered: list[dict[str, Any]]
    cut_off: Training
    left: list[dict[str, Any]]  # the calls in the file of the second
    left_files: list[str]
    sent: tuple[int, str]


@pytest.fixture(scope="module")
def outage(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, commands: CommandServer
) -> Iterator[Outage]:
    folder = tmp_path_factory.mktemp("outage")
    copy_store(empty_store, folder, "mlflow-artifacts:/0").rename(folder / "server.db")
    server = Server(folder, free_port(), commands)
    trainings = list[Training]()
    try:
        server.start()
        reconnected = start(server, folder / "reconnected", commands, "1", "sampled")
        cut_off = start(server, folder / "cut_off", commands, "3600", "model")
        trainings = [reconnected, cut_off]
        for training in trainings:
            training.read_until("up")
        server.kill()
        for training in trainings:
            training.resume()
        for training in trainings:
            training.read_until("down")
        buffered = calls_in(reconnected.file)
        cut_off.resume()
        cut_off.finish()
        left = calls_in(cut_off.file)
        left_files = sorted(path.name for path in cut_off.file.parent.rglob("*.*"))
        variables = environment() | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_EXPERIMENT_NAME": "Default"}
        server.start()
        reconnected.resume()
        reconnected.finish()
        command = commands.start(cut_off.file, folder=cut_off.folder, environment=variables, code=SEND)
        sent = command.communicate()
        yield Outage(server, reconnected, buffered, cut_off, left, left_files, sent)
    finally:
        server.kill()
        for training in trainings:
            with suppress(ProcessLookupError):
                training.process.send_signal(signal.SIGKILL)
            training.process.communicate()


def check_complete(server: Server, run_id: str, last_step: int) -> None:
    dice = server.client.get_metric_history(run_id, "dice")
    assert [(m.step, m.value) for m in dice] == [(step, step / 10) for step in range(1, last_step + 1)]
    assert [m.timestamp for m in dice] == sorted(m.timestamp for m in dice)
    loss = server.client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in loss] == [(1, 0.9)] + [(s, 1 - s / 10) for s in range(2, 12)]
    run = server.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["epochs"], run.data.params["device_used"]) == ("9", "none")
    assert run.data.tags["mlflow.note.content"] == "What came of it."
    assert {name for name in run.data.metrics if not name.startswith("system/")} == {"dice", "loss"}
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("data", "0123456789abcdef")
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}
    sheets = server.folder / "artifacts" / "0" / run_id / "artifacts" / "sheets"
    assert sorted(path.name for path in sheets.iterdir()) == ["sheet.png", "split.json"]
    assert json.loads((sheets / "split.json").read_text()) == {"parts": [1, 2]}


def test_buffered_calls_arrive_once_in_order_and_with_their_timestamps(outage: Outage) -> None:
    training = outage.reconnected
    assert training.code == 0
    check_complete(outage.server, training.run_id, 12)
    buffered = {call["step"]: call["timestamp"] for call in outage.buffered if call["call"] == "metrics"}
    assert list(buffered) == list(range(2, 12))
    arrived = outage.server.client.get_metric_history(training.run_id, "dice")
    assert {m.step: m.timestamp for m in arrived if m.step in buffered} == buffered
    assert not training.file.parent.exists()


def test_an_outage_and_its_end_are_each_reported_once(outage: Outage) -> None:
    start, end = outage.reconnected.err.splitlines()
    assert (
        f"{outage.server.uri}: tracking server unreachable: buffering to {outage.reconnected.file}" in start
    )
    assert f"{outage.server.uri}: reachable again" in end


def test_system_metrics_continue_after_an_outage(outage: Outage) -> None:
    samples = outage.server.client.get_metric_history(
        outage.reconnected.run_id, "system/cpu_utilization_percentage"
    )
    last_buffered = max(call["timestamp"] for call in outage.buffered if "timestamp" in call)
    assert max(m.timestamp for m in samples) > last_buffered
    assert all(call["call"] != "metrics" or "dice" in call["values"] for call in outage.buffered)


def test_during_an_outage_logging_does_not_wait_but_a_child_run_needs_the_server(outage: Outage) -> None:
    attempts, line = outage.cut_off.lines[2:4]
    assert attempts == "1"  # for all calls
    assert line.startswith(f"MLFLOW_TRACKING_URI={outage.server.uri}: no server responds")


def test_a_run_whose_server_stays_unreachable_succeeds_and_leaves_the_missing_calls(outage: Outage) -> None:
    training = outage.cut_off
    assert training.code == 0
    names = ["metrics"] * 10 + ["params", "dataset", "artifact", "artifact", "tags"]
    assert [call["call"] for call in outage.left] == [*names, "metrics", "model", "end"]
    assert {call["run_id"] for call in outage.left} == {training.run_id}
    metrics = [(call["step"], call["values"]) for call in outage.left if call["call"] == "metrics"]
    expected = [(step, {"dice": step / 10, "loss": 1 - step / 10}) for step in range(2, 12)]
    assert metrics == [*expected, (12, {"dice": 1.2})]
    assert outage.left[-1]["status"] == "FINISHED"
    assert outage.left_files == ["calls.jsonl", "sheet.png", "split.json"]


def test_the_model_is_saved_and_the_last_line_names_the_command_that_sends_the_rest(outage: Outage) -> None:
    saved = outage.cut_off.folder / "output" / f"model-{outage.cut_off.run_id}"
    start, model, last = outage.cut_off.err.splitlines()
    assert "unreachable" in start
    assert str(saved) in model
    assert "18 calls of this run are undelivered" in last
    assert last.endswith(f"python -m pneumo_experiments.tracking {outage.cut_off.file}")
    assert outage.cut_off.lines[-2] == str(saved)
    assert {path.name for path in saved.iterdir()} >= {"MLmodel", "code", "data"}


def test_the_command_sends_the_missing_calls(outage: Outage) -> None:
    training = outage.cut_off
    code, said = outage.sent
    assert code == 0, said
    check_complete(outage.server, training.run_id, 12)
    end = outage.server.client.get_run(training.run_id).info.end_time
    assert end == outage.left[-1]["end_time"]
    (model,) = outage.server.client.search_logged_models(["0"])
    assert (model.source_run_id, str(model.status)) == (training.run_id, "READY")
    assert model.model_uri in said
    assert not training.file.parent.exists()


# A server that responds, but with errors


class Proxy(ThreadingHTTPServer):
    """A proxy before a server: forwards requests, or answers all but HEAD with a status, or hangs."""

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.behind, self.behaviour, self.ended, self.hung = server, "forwards", threading.Event(), 0
        self.uri = f"http://127.0.0.1:{self.server_port}"


class ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behaviour = "forwards" if self.command == "HEAD" else self.server.behaviour
        if behaviour == "hangs":
            self.server.hung += 1
            self.server.ended.wait()
        elif behaviour == "forwards":
            address = self.server.behind.uri + self.path
            headers = {name: text for name, text in self.headers.items() if name.lower() != "host"}
            answer = requests.request(self.command, address, data=body, headers=headers, timeout=60)
            self.answer(answer.status_code, answer.headers.get("Content-Type", ""), answer.content)
        else:
            page = b"<html>\n<body>gateway, log in first</body>\n</html>"
            self.answer(int(behaviour), "text/html", page)

    def answer(self, status: int, kind: str, content: bytes) -> None:
        with suppress(OSError):  # the program may have given up
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy(outage: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(outage.server) as between, working_in(tmp_path, between.uri):
        threading.Thread(target=between.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield between
        between.ended.set()
        between.shutdown()


@pytest.mark.parametrize("behaviour", ["500", "404", "hangs"])
def test_a_server_that_starts_to_fail_ends_the_next_stage_with_one_line(behaviour: str, proxy: Proxy) -> None:
    stages: dict[str, Callable[[], object]] = {
        "start": lambda: tracking.run("sample", Sample()).__enter__(),
        "best": lambda: scores.best_model("lungs"),
        "data": lambda: tracking.model_data("models:/nobody@champion"),
        "register": lambda: versions.registering("models:/m-1", "lungs").__enter__(),
    }
    if behaviour != "500":  # one shows that it is an outage
        stages = {"start": stages["start"]}
    for name, call in stages.items():
        with pytest.raises(UserError) as error, tracking.run("main", Sample()) as run_id:
            proxy.behaviour = behaviour
            call()
        line = str(error.value)
        assert len(line.splitlines()) == 1, name
        assert "<body>" not in line, name
        assert line.startswith((f"MLFLOW_TRACKING_URI={proxy.uri}: ", "model=models:/")), name
        proxy.behaviour = "forwards"
        send_buffered(Path("output") / f"undelivered-{run_id}" / "calls.jsonl")
        assert MlflowClient().get_run(run_id).info.status == "FAILED", name


@pytest.mark.parametrize("behaviour", ["403", "200", "hangs"])
def test_a_server_that_fails_from_the_start_is_named(behaviour: str, proxy: Proxy) -> None:
    proxy.behaviour = behaviour
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI={proxy.uri}: .*cannot be opened") as error:
        tracking.open_store()
    assert "\n" not in str(error.value)


def test_a_call_does_not_wait_for_minutes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (MLFLOW_HTTP_REQUEST_TIMEOUT, MLFLOW_HTTP_REQUEST_MAX_RETRIES)
    for each in limits:
        monkeypatch.setenv(each.name, "1")  # so that it is restored, whatever it was
        monkeypatch.delenv(each.name)
    assert [each.get() for each in limits] == [120, 7]  # MLflow's own
    importlib.reload(tracking)
    assert [each.get() for each in limits] == [30, 1]


def test_a_server_that_hangs_does_not_block_a_run_and_gets_everything_later(
    proxy: Proxy, tmp_path: Path, no_code: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffered_client, "RETRY_SECONDS", 0)  # the duration of an attempt sets the pause
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.json").write_text("{}")
    with tracking.run("train", Train(), system_metrics=True) as run_id:
        tracking.log_metrics({"dice": 0.1}, step=1)
        proxy.behaviour = "hangs"
        for step in range(2, 50):
            tracking.log_metrics({"dice": step / 100}, step=step)
        tracking.log_json({"a": 1}, "sheets/a.json")
        saved = tracking.log_model(tmp_path / "made")
    assert saved == f"{Path.cwd()}/output/model-{run_id}"
    assert 1 <= proxy.hung < 10
    file = tmp_path / "output" / f"undelivered-{run_id}" / "calls.jsonl"
    names = [call["call"] for call in calls_in(file)]
    assert names == ["metrics"] * 48 + ["artifact", "model", "end"]
    proxy.behaviour = "forwards"
    send_buffered(file)
    run = MlflowClient().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [m.step for m in MlflowClient().get_metric_history(run_id, "dice")] == list(range(1, 50))
    models = MlflowClient().search_logged_models(["0"])
    assert [str(m.status) for m in models if m.source_run_id == run_id] == ["READY"]
    assert not file.parent.exists()


# A database in a file


@pytest.fixture
def client(store: Path) -> MlflowClient:
    return MlflowClient()


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def buffer_dice(unsent: BufferedClient, run_id: str, step: int) -> None:
    unsent.buffer("metrics", run_id=run_id, values={"dice": step / 10}, timestamp=7, step=step)


def test_a_database_that_fails_gets_its_metrics_later(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # A lock raises the same kind of error, but only after the 20 s that MLflow waits for it.
    def alter(words: str) -> None:
        with sqlite3.connect(tmp_path / "mlflow.db") as other:
            other.execute(f"ALTER TABLE {words}")

    with tracking.run("train", Train()) as run_id:
        tracking.log_metrics({"dice": 0.1}, step=1)
        alter("metrics RENAME TO away")
        tracking.log_metrics({"dice": 0.2}, step=2)
        tracking.log_metrics({"dice": 0.3}, step=3)
        assert len(calls_in(tmp_path / "output" / f"undelivered-{run_id}" / "calls.jsonl")) == 2
        alter("away RENAME TO metrics")
        monkeypatch.setattr(active_runs[-1].client, "_next_attempt", 0.0)
        tracking.log_metrics({"dice": 0.4}, step=4)
        assert history(client, run_id, "dice") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert list((tmp_path / "output").iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_resumed_run_sends_the_calls_that_its_first_process_left(client: MlflowClient) -> None:
    with suppress(KeyboardInterrupt), tracking.run("train", Train()) as run_id:
        raise KeyboardInterrupt
    left = BufferedClient(Path("output") / f"undelivered-{run_id}")
    for step in (1, 2):
        buffer_dice(left, run_id, step)
    with tracking.run("train", Train(), continues=run_id) as again:
        assert again == run_id
        assert history(client, run_id, "dice") == [(1, 0.1), (2, 0.2)]
    assert not left.folder.exists()


@pytest.mark.parametrize(
    ("error", "is_temporary"),
    [
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}), True),
        (RestException({"error_code": "REQUEST_LIMIT_EXCEEDED"}), True),
        (RestException({"error_code": "PERMISSION_DENIED"}), True),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE"}), False),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST"}), False),
        (MlflowException("API request to endpoint /x failed with error code 404 != 200"), True),
        (requests.ConnectionError(), True),
        (requests.ReadTimeout(), True),
        (requests.exceptions.InvalidURL(), False),
        (FileNotFoundError(), False),
    ],
)
def test_only_a_temporary_error_is_an_outage(error: Exception, is_temporary: bool) -> None:
    assert is_outage(error) == is_temporary


@pytest.mark.parametrize("damage", ["nothing", "a run that is gone", "flipped bits", "an incomplete line"])
def test_calls_that_cannot_be_sent_stay_and_do_not_block_the_others(
    damage: str, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = client.create_run("0").info.run_id
    unsent = BufferedClient(tmp_path / "box")
    buffer_dice(unsent, run_id, 1)
    if damage == "a run that is gone":
        buffer_dice(unsent, "0" * 32, 2)
    elif damage == "flipped bits":
        with unsent.file.open("ab") as file:
            file.write(b'{"call": "t\xffgs", "ru\n[7]\n')
    buffer_dice(unsent, run_id, 3)
    if damage == "an incomplete line":  # of a process that was killed while it wrote
        with unsent.file.open("a") as file:
            file.write('{"call": "tags", "run_')
    before = unsent.file.read_bytes().splitlines()
    if damage in ("nothing", "an incomplete line"):
        send_buffered(unsent.file)
        assert not unsent.folder.exists()
    else:
        with pytest.raises(UserError, match=r"calls\.jsonl: \d calls are still missing"):
            send_buffered(unsent.file)
        assert unsent.file.read_bytes().splitlines() == before[1:-1]
    assert history(client, run_id, "dice") == [(1, 0.1), (3, 0.3)]
    assert ("incomplete last line" in caplog.text) == (damage == "an incomplete line")


def test_buffered_files_are_sent_from_a_moved_folder_and_only_they_are_removed(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = client.create_run("0")
    unsent = BufferedClient(tmp_path / "output" / "box")
    monkeypatch.setattr(unsent, "_next_attempt", float("inf"))  # as after a failed attempt
    monkeypatch.setattr(buffered_client, "WORTH_AN_ATTEMPT", ())
    (tmp_path / "a.txt").write_text("kept")
    for folder in ("x", "y"):
        path = str(tmp_path / "a.txt")
        unsent.send_or_buffer("artifact", run_id=run.info.run_id, path=path, folder=folder)
    (tmp_path / "a.txt").write_text("changed")
    (tmp_path / "output").rename(tmp_path / "moved")
    (tmp_path / "moved" / "box" / "letter.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "moved" / "box")
    send_buffered(Path("calls.jsonl"))
    assert [path.name for path in Path().rglob("*")] == ["letter.txt"]
    assert [artifact(run, f"{folder}/a.txt").read_text() for folder in ("x", "y")] == ["kept", "kept"]


def test_copies_for_calls_of_another_process_stay(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first = client.create_run("0"), BufferedClient(tmp_path / "box")
    second = BufferedClient(tmp_path / "box")
    monkeypatch.setattr(first, "_next_attempt", float("inf"))  # as after a failed attempt
    (tmp_path / "a.txt").write_text("kept")
    artifact_call = {"run_id": run.info.run_id, "path": str(tmp_path / "a.txt")}
    first.send_or_buffer("artifact", folder="x", **artifact_call)
    sender = BufferedClient(tmp_path / "box")
    first.send_or_buffer("artifact", folder="y", **artifact_call)
    buffer_dice(second, run.info.run_id, 1)
    assert sender.flush()
    assert second.flush()  # though the file is gone
    assert [path.read_text() for path in (tmp_path / "box").rglob("a.txt")] == ["kept"]


def test_a_name_that_is_not_utf_8_can_be_sent(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, shown = os.fsdecode(b"x\xff"), "x\\udcff"
    (tmp_path / f"{odd}.txt").write_text("here")
    settings = make(Preprocess, dicom_dir=Path(odd), dataset=Path(f"{odd}.h5"))
    with tracking.run("preprocess", settings) as run_id:
        tracking.log_file(tmp_path / f"{odd}.txt")
        monkeypatch.setattr(active_runs[-1].client, "_next_attempt", float("inf"))
        tracking.describe(f"File {odd}")
        tracking.log_params({"place": Path(odd)})
        tracking.log_dataset(Path(f"{odd}.h5"), "0123456789abcdef0123", "training")
        (tmp_path / f"{odd}.txt").rename(tmp_path / f"{odd}.csv")
        tracking.log_file(tmp_path / f"{odd}.csv")
    run = client.get_run(run_id)
    assert run.data.params["dicom_dir"] == run.data.params["place"] == shown
    assert run.data.tags["mlflow.note.content"] == f"File {shown}"
    assert run.inputs.dataset_inputs[0].dataset.name == shown
    assert [artifact(run, f"{shown}.{kind}").read_text() for kind in ("txt", "csv")] == ["here", "here"]


@pytest.mark.parametrize(
    ("uri", "name", "reason"),
    [
        ("http://127.0.0.1:9", "calls.jsonl", "no server responds"),
        ("sqlite:///mlflow.db", "nothing.jsonl", "nothing.jsonl: no such"),
    ],
)
def test_sending_buffered_calls_needs_the_store_and_the_file(
    uri: str, name: str, reason: str, store: Path, tmp_path: Path
) -> None:
    BufferedClient(tmp_path).buffer("tags", run_id="0" * 32, values={"a": "b"})
    with working_in(tmp_path, uri), pytest.raises(UserError, match=reason):
        send_buffered(tmp_path / name)
    assert len(calls_in(tmp_path / "calls.jsonl")) == 1
