"""Runs and the processes that write them: neither outlives the other unseen."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from functools import cache
from pathlib import Path

import psutil
from mlflow import MlflowClient

PROCESS_TAG = "pneumo.process"  # pid:start of the process that writes the run
HOST_TAG = "pneumo.host"
MACHINE_TAG = "pneumo.machine"  # machine/boot/namespace in which the pid counts
WHOLE_MACHINE = "pid:[4026531836]"  # the namespace outside of all containers; Linux gives it this number

log = logging.getLogger(__name__)


def process_tags() -> dict[str, str]:
    """Tags by which end_orphaned_runs knows this process."""
    process = psutil.Process()
    return {
        HOST_TAG: socket.gethostname(),
        MACHINE_TAG: _machine(),
        PROCESS_TAG: f"{process.pid}:{process.create_time()}",
    }


@cache
def _machine() -> str:
    """Of Linux its id, the id of its start and the namespace of pids; empty where a system has none."""

    def content(path: str) -> str:
        try:
            return Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""

    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return "/".join([content("/etc/machine-id"), content("/proc/sys/kernel/random/boot_id"), namespace])


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


def end_orphaned_runs(experiment_id: str) -> None:
    """Marks as KILLED the runs whose process on this host is gone (kill -9, power cut).

    A container of the same name on this or another machine is left alone, and so is one that was started
    again: its processes cannot be told from those of a living one.
    """
    client = MlflowClient()
    running = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{socket.gethostname()}'"
    for found in client.search_runs([experiment_id], running):
        tags = found.data.tags
        if is_dead(tags.get(MACHINE_TAG, ""), tags.get(PROCESS_TAG, ""), _machine()):
            client.set_terminated(found.info.run_id, "KILLED")
            log.warning(
                "run %s was left RUNNING by a process that is gone: marked KILLED", found.info.run_name
            )


def is_dead(machine: str, process: str, here: str) -> bool:
    """Whether a process on a machine of this name is known to have ended; ``here`` is this machine."""
    if machine == here:
        return not _is_alive(process)
    ours, theirs = here.split("/"), machine.split("/")
    # The same machine was started again. Two containers, or two machines without an id, may look like that.
    return ours[0] != "" and ours[2] == WHOLE_MACHINE and theirs[::2] == ours[::2]


def _is_alive(process: str) -> bool:
    pid, _, start = process.partition(":")
    try:
        return str(psutil.Process(int(pid)).create_time()) == start
    except (ValueError, psutil.NoSuchProcess):
        return False
