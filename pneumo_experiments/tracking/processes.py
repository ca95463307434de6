"""Runs and the processes that write them: neither outlives the other unseen."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time

import psutil
from mlflow import MlflowClient

PROCESS_TAG = "pneumo.process"  # pid:start of the process that writes the run
HOST_TAG = "pneumo.host"

log = logging.getLogger(__name__)


def process_tags() -> dict[str, str]:
    """Tags by which end_orphans knows this process."""
    process = psutil.Process()
    return {HOST_TAG: socket.gethostname(), PROCESS_TAG: f"{process.pid}:{process.create_time()}"}


def end_with_mlflow_run() -> None:
    """Ends this process by SIGTERM when the `mlflow run` that started it is gone.

    Without that its work would go on unseen after a kill of `mlflow run`.
    """
    # There may be a shell between the two.
    starter = next((p for p in psutil.Process().parents() if p.name() not in ("bash", "sh", "dash")), None)
    if starter is None or starter.pid == 1:
        return

    def watch() -> None:
        while starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-mlflow-run", daemon=True).start()


def end_orphans(experiment_id: str) -> None:
    """Marks as KILLED the runs whose process on this host is gone (kill -9, power cut)."""
    client = MlflowClient()
    running = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{socket.gethostname()}'"
    for found in client.search_runs([experiment_id], running):
        if not _is_alive(found.data.tags.get(PROCESS_TAG, "")):
            client.set_terminated(found.info.run_id, "KILLED")
            log.warning(
                "run %s was left RUNNING by a process that is gone: marked KILLED", found.info.run_name
            )


def _is_alive(process: str) -> bool:
    pid, _, start = process.partition(":")
    try:
        return str(psutil.Process(int(pid)).create_time()) == start
    except (ValueError, psutil.NoSuchProcess):
        return False
