"""Samples of what the machine does during a run: processor, memory, disk, network and GPU."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from threading import Event, Thread

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pneumo_experiments.tracking.delivery import Outbox

# MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another.
INTERVAL_SECONDS = 5
# The thread may be about to find out that the store is away.
PATIENCE_SECONDS = 10

log = logging.getLogger(__name__)


@contextmanager
def log_system_metrics(box: Outbox, run_id: str, started_ms: int) -> Generator[None]:
    """Logs ``system/...`` metrics of the run every few seconds, and once at the end.

    Their step is the second since the start of the run, so that a run that goes on needs no look back.
    Values as MLflow's own system metrics, with a GPU's where nvidia-ml-py is installed. MLflow's
    own thread would end for good with the first sample that cannot be delivered.
    """
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # a line for each lacking value
    meter = SystemMetricsMonitor(run_id, sampling_interval=INTERVAL_SECONDS)
    stop = Event()

    def sample() -> None:
        meter.collect_metrics()
        values = {f"system/{name}": float(value) for name, value in meter.aggregate_metrics().items()}
        for monitor in meter.monitors:
            monitor.clear_metrics()
        now = time.time_ns() // 1_000_000
        step = (now - started_ms) // 1000
        box.offer_sample("metrics", run_id=run_id, values=values, step=step, timestamp=now, model_id=None)

    def watch() -> None:
        try:
            meter.collect_metrics()  # the use of the processor is counted from call to call
            while not stop.wait(meter.sampling_interval):
                sample()
            sample()
        except Exception as error:  # a lost GPU, a refused value: no reason to end the run
            log.warning("no more system metrics: %s", str(error).split("\n")[0])

    thread = Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE_SECONDS)
