"""The command ui: where it leads, and what stands in its way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_server import CommandServer
from helpers import Call, copy_store, environment, soak, store_address
from mlflow import MlflowClient
from tracking_server import Server, free_port

from pneumo_experiments.ui import EXPERIMENT, serve


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, commands: CommandServer
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    copy_store(empty_store, folder).rename(folder / "server.db")
    server = Server(folder, free_port(), commands)
    server.start()
    yield server
    server.kill()


def test_of_a_server_the_link_opens_the_experiment_in_use_in_its_view(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    runs = f"the runs: {server.uri}/#/experiments/{{}}/runs?workflowType=machine_learning"
    assert [*serve(None)] == [runs.format(0)]
    ours = server.client.create_experiment(EXPERIMENT)
    assert [*serve(None)] == [runs.format(ours)]
    server.client.set_experiment_tag(ours, "mlflow.sharedViewState.trainings", "{}")
    assert [*serve(None)] == [f"{runs.format(ours)}&viewStateShareKey=trainings"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    assert [*serve(None)] == [runs.format(0)]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    assert [*serve(None)] == [f"{runs.format(ours)}&viewStateShareKey=trainings"]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("//", "//me:secret@"))
    assert [*serve(None)] == [runs.format(0)]


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    line = call(["ui"]).mistake
    assert line.startswith("MLFLOW_TRACKING_URI=sqlite:///mlflow.db: no runs there yet; start with main")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert call(["ui", "--port", port]).mistake.startswith(f"port={port}: in use")


@soak
def test_the_server_takes_the_next_free_port_and_ends_quietly(
    tmp_path: Path, empty_store: Path, commands: CommandServer
) -> None:
    copy_store(empty_store, tmp_path)
    variables = environment() | {"MLFLOW_TRACKING_URI": store_address(tmp_path)}
    command = commands.start("ui", folder=tmp_path, environment=variables)
    said = [command.stdout.readline(), command.stdout.readline()]
    assert said[1].startswith("the runs: http://127.0.0.1:50")
    address = said[1].split()[2]
    assert MlflowClient(address.partition("/#")[0]).get_experiment("0").name == "Default"
    command.send_signal(2)
    assert command.communicate() == (0, "")
    port = int(address.rpartition(":")[2].partition("/")[0])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
