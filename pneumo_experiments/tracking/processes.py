"""Processes and their runs: ends runs whose process died, and this process when `mlflow run` dies."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
from mlflow import MlflowClient

PROCESS_TAG = "pneumo.process"  # pid:start time of the process that writes the run
HOST_TAG = "pneumo.host"
MACHINE_TAG = "pneumo.machine"  # machine id/boot id/pid namespace: where the pid is unique
HOST_NAMESPACE = "pid:[4026531836]"  # outside of all containers; Linux gives it this number

log = logging.getLogger(__name__)


def process_tags() -> dict[str, str]:
    """Tags that identify this process for end_orphaned_runs."""
    process = psutil.Process()
    return {
        HOST_TAG: socket.gethostname(),
        MACHINE_TAG: _machine_id(),
        PROCESS_TAG: f"{process.pid}:{process.create_time()}",
    }


@cache
def _machine_id() -> str:
    """Linux's machine id, boot id and pid namespace; each is empty if the system has none."""
    parts = ["", "", ""]
    for place, path in enumerate(("/etc/machine-id", "/proc/sys/kernel/random/boot_id")):
        with suppress(OSError):
            parts[place] = Path(path).read_text(encoding="ascii", errors="backslashreplace").strip()
    with suppress(OSError):
        parts[2] = str(Path("/proc/self/ns/pid").readlink())
    return "/".join(parts)


def end_with_mlflow_run() -> None:
    """Sends SIGTERM to this process when the `mlflow run` that started it dies; does nothing without one.

    Otherwise a killed `mlflow run` would leave its work running in the background.
    """
    if "MLFLOW_RUN_ID" not in os.environ:  # set by `mlflow run` for the run to use
        return
    # There may be a shell between the two.
    parent = next((p for p in psutil.Process().parents() if p.name() not in ("bash", "sh", "dash")), None)
    if parent is None or parent.pid == 1:
        return

    def watch() -> None:
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-mlflow-run", daemon=True).start()


def end_orphaned_runs(experiment_id: str) -> None:
    """Marks runs as KILLED whose process on this host is dead (kill -9, power cut).

    Runs of other containers with this host name, and of a restarted container, are left RUNNING: their
    processes may be alive.
    """
    client = MlflowClient()
    running = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], running):
        if has_ended(run.data.tags):
            client.set_terminated(run.info.run_id, "KILLED")
            log.warning("run %s was left RUNNING by a dead process: marked KILLED", run.info.run_name)


def has_ended(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``process_tags`` has certainly ended; False for one of another host."""
    is_here = tags.get(HOST_TAG) == socket.gethostname()
    return is_here and is_dead(tags.get(MACHINE_TAG, ""), tags.get(PROCESS_TAG, ""), _machine_id())


def is_dead(machine: str, process: str, this_machine: str) -> bool:
    """Whether a process of a machine with this host name has certainly ended."""
    if machine == this_machine:
        return not _is_alive(process)
    this, other = this_machine.split("/"), machine.split("/")
    # The same machine after a reboot. Two containers, or two machines without an id, may look the same.
    return this[0] != "" and this[2] == HOST_NAMESPACE and other[::2] == this[::2]


def _is_alive(process: str) -> bool:
    pid, _, start = process.partition(":")
    try:
        return str(psutil.Process(int(pid)).create_time()) == start
    except (ValueError, psutil.NoSuchProcess):
        return False
