"""System metrics of a run: CPU and memory of its processes, and GPU."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Event, Thread
from typing import Any, cast

import psutil
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

from pneumo_experiments.tracking.log import ActiveRun, is_enabled, now_ms

INTERVAL_SECONDS = 5  # MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another
JOIN_SECONDS = 10  # the thread may be waiting for a server that does not respond

log = logging.getLogger(__name__)


class ProcessTree:
    """The process and those below it; of a group that trains together, all processes on the machine."""

    def __init__(self) -> None:
        self._root = psutil.Process()
        if "LOCAL_RANK" in os.environ:
            self._root = self._root.parent() or self._root  # process 1 of a container has none
        self._since, self._seconds = time.monotonic(), self._use()[0]

    def sample(self) -> dict[str, float]:
        """Memory in MB, and CPU in percent of all cores since the last sample."""
        (seconds, memory_bytes), now = self._use(), time.monotonic()
        used = sum(value - self._seconds.get(process, 0) for process, value in seconds.items())
        percent = 100 * used / (now - self._since) / (psutil.cpu_count() or 1)
        self._since, self._seconds = now, seconds
        return {
            "cpu_utilization_percentage": min(100.0, percent),
            "memory_usage_megabytes": memory_bytes / 1e6,
        }

    def _use(self) -> tuple[dict[psutil.Process, float], int]:
        """CPU seconds of each process so far, and the bytes of all."""
        seconds, memory_bytes = dict[psutil.Process, float](), 0
        for process in (self._root, *self._root.children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                times = process.cpu_times()
                memory_bytes += process.memory_info().rss
                seconds[process] = times.user + times.system
        return seconds, memory_bytes


def _gpu_monitor() -> Any:
    """MLflow's monitor of the GPUs; raises an error that says why there is none."""
    try:
        return GPUMonitor()
    except Exception:  # no package nvidia-ml-py, no library of the driver, an AMD GPU
        with suppress(Exception):
            return ROCMMonitor()
        raise


@contextmanager
def log_system_metrics(run: ActiveRun) -> Generator[None]:
    """Logs ``system/...`` metrics of the run every few seconds, and once at the end.

    Their step is the number of seconds since the start of the run, also in a resumed run. MLflow's own thread
    would end at the first sample that cannot be sent, and its CPU, disk and network are the machine's.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # it warns of each missing value
    processes, gpu, stop = ProcessTree(), None, Event()
    with suppress(Exception):
        gpu = _gpu_monitor()
    interval = cast("float | None", MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get())

    def watch() -> None:
        try:
            is_last = False
            while not is_last:
                is_last = stop.wait(interval or INTERVAL_SECONDS)
                values = processes.sample()
                if gpu is not None:
                    gpu.collect_metrics()
                    values |= gpu.aggregate_metrics()
                    gpu.clear_metrics()
                named, now = {f"system/{name}": float(value) for name, value in values.items()}, now_ms()
                step = (now - (run.info.start_time or 0)) // 1000
                run.client.try_send("metrics", run_id=run.id, values=named, timestamp=now, step=step)
        except Exception as error:  # a lost GPU or a refused value must not end the run
            log.warning("system metrics stopped: %s", str(error).split("\n")[0])

    thread = Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_SECONDS)


@cache  # one line, however many networks a process trains
def warn_without_gpu_metrics() -> None:
    """Says why the system metrics have nothing of the GPU that is used; MLflow leaves it out silently."""
    if is_enabled():
        try:
            _gpu_monitor()
        except Exception as error:
            log.warning("no GPU use among the system metrics: %s", str(error).split("\n")[0])
