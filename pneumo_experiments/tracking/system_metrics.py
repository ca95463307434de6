"""System metrics of a run: CPU, memory, disk, network and GPU."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Event, Thread
from typing import Any

from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pneumo_experiments.tracking.log import ActiveRun, is_enabled, now_ms

INTERVAL_SECONDS = 5  # MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another
JOIN_SECONDS = 10  # the thread may be waiting for a server that does not respond

log = logging.getLogger(__name__)


@contextmanager
def log_system_metrics(run: ActiveRun) -> Generator[None]:
    """Logs ``system/...`` metrics of the run every few seconds, and once at the end.

    Their step is the number of seconds since the start of the run, also in a resumed run. Names and values
    are those of MLflow's SystemMetricsMonitor, whose own thread would end at the first sample that cannot be
    sent.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # it warns of each missing value
    monitor: Any = SystemMetricsMonitor(run.id, sampling_interval=INTERVAL_SECONDS)
    stop = Event()

    def watch() -> None:
        try:
            monitor.collect_metrics()  # CPU use is measured between two calls
            is_last = False
            while not is_last:
                is_last = stop.wait(monitor.sampling_interval)
                monitor.collect_metrics()
                values = {f"system/{name}": float(x) for name, x in monitor.aggregate_metrics().items()}
                for each in monitor.monitors:
                    each.clear_metrics()
                now = now_ms()
                step = (now - run.start_ms) // 1000
                run.client.try_send("metrics", run_id=run.id, values=values, timestamp=now, step=step)
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
    if not is_enabled():
        return
    try:
        GPUMonitor()
    except Exception as error:  # no package nvidia-ml-py, no library of the driver, an AMD GPU
        with suppress(Exception):
            ROCMMonitor()
            return
        log.warning("no GPU use among the system metrics: %s", str(error).split("\n")[0])
