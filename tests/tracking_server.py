"""A real MLflow server that tests kill and restart."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from command_server import Command, CommandServer
from helpers import environment
from mlflow import MlflowClient

# `mlflow server` in this process, not in another one that it would start.
CODE = """
import os

output = os.open("server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
import mlflow.server
import uvicorn
from mlflow.cli import cli


def run_here(command, extra_env, **unused):
    os.environ.update(extra_env)
    uvicorn.main(command[3:])  # after python -m uvicorn


mlflow.server._exec_cmd = run_here
cli()
"""
TIMEOUT_SECONDS = 120  # reached only by a hang


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {TIMEOUT_SECONDS} s"
        time.sleep(0.1)


@dataclass
class Server:
    """An MLflow server with its database and artifacts in a folder."""

    folder: Path
    port: int
    commands: CommandServer
    process: Command | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def start(self) -> None:
        words = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        words += ["--artifacts-destination", f"{self.folder}/artifacts"]
        words += ["--host", "127.0.0.1", "--port", str(self.port)]
        variables = environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = self.commands.start(
            "server", *words, folder=self.folder, environment=variables, code=CODE
        )
        wait_until(self.responds)

    def responds(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            self.process = None


def calls_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
