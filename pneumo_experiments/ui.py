"""MLflow's UI for the store in use: its server, for this machine alone, and the address of the runs.

It imports nothing of MLflow, whose server takes its time to do so.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords

HOST, PORTS = "127.0.0.1", range(5000, 5100)
EXPERIMENT = "pneumothorax"  # unless the environment names another
VIEW = "trainings"  # the saved view that opens, if the experiment has it
OPENER = build_opener(ProxyHandler({}))  # of another server than ours, proxies are none of our business


def serve(port: int | None) -> Iterator[str]:
    """Serves the UI until Ctrl-C; yields the line with its address once it responds.

    Of a store that a server has already, only the line. Raises UserError if there are no runs, if the port is
    in use, or if the server ends.
    """
    store = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if store.startswith(("http://", "https://")):
        server = re.sub("//[^/]*@", "//", store.rstrip("/"))  # a browser asks for the password
        yield f"the runs: {runs_page(server)}"
        return
    file = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(\?.*)?", store)
    if file and not Path(file[1]).is_file():  # the server would create it, with its artifacts elsewhere
        raise UserError(
            f"MLFLOW_TRACKING_URI={store}: no runs there yet; start with main, as `make demo` does"
        )
    address = f"http://{HOST}:{_free_port([port] if port else PORTS)}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", address.rpartition(":")[2]]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning"]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # It imports nothing from the working directory; as an argument, all users could read a password in it.
    environment |= os.environ | {"PYTHONSAFEPATH": "1", "MLFLOW_BACKEND_STORE_URI": store}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not _responds(f"{address}/health"):
                _check_alive(server, log)
                time.sleep(0.2)
            yield f"the runs: {runs_page(address)} (Ctrl-C ends)"
            server.wait()
            _check_alive(server, log)
        except KeyboardInterrupt:
            pass
        finally:
            server.terminate()
            server.wait()


def runs_page(server: str) -> str:
    """Address of the runs of the experiment in use, in its saved view; of the store's first one without."""
    name, id = os.environ.get("MLFLOW_EXPERIMENT_NAME"), os.environ.get("MLFLOW_EXPERIMENT_ID")
    call = f"get-by-name?experiment_name={quote(name or EXPERIMENT)}"
    if id and not name:
        call = f"get?experiment_id={id}"
    experiment: dict[str, Any] = {"experiment_id": "0"}
    address = f"{server}/api/2.0/mlflow/experiments/{call}"
    # There is none, or the server wants a password.
    with suppress(OSError, ValueError, LookupError), OPENER.open(address, timeout=10) as response:
        experiment = json.load(response)["experiment"]
    tags = {tag["key"] for tag in experiment.get("tags", ())}
    view = f"&viewStateShareKey={VIEW}" if f"mlflow.sharedViewState.{VIEW}" in tags else ""
    # Else the UI opens beside its pages for language models.
    return f"{server}/#/experiments/{experiment['experiment_id']}/runs?workflowType=machine_learning{view}"


def _responds(address: str) -> bool:
    try:
        OPENER.open(address, timeout=10).close()
    except OSError:
        return False
    return True


def _check_alive(server: subprocess.Popen[bytes], log: IO[str]) -> None:
    if server.poll() is not None:
        log.seek(0)
        last = next((line for line in reversed(log.read().splitlines()) if line.strip()), "without a word")
        raise UserError(f"MLflow's server ended: {hide_passwords(last.strip())}")


def _free_port(ports: Sequence[int]) -> int:
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UserError(f"port={ports[0]}: in use; leave port out for the next free one, or name another")
