"""System metrics of a run; GPU use among them with a stand-in for NVIDIA's library."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.metrics import gpu_monitor
from tracking_server import wait_until

from pneumo_experiments import tracking
from pneumo_experiments.settings import Train

CPU = "system/cpu_utilization_percentage"
MISSING = "NVML Shared Library Not Found"


class NVMLError(Exception):
    """What the library raises."""


def library(init: Callable[[], None]) -> SimpleNamespace:
    """The library on a machine with one GPU."""
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=73),
        nvmlDeviceGetPowerUsage=lambda handle: 350_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
    )


def no_driver() -> None:
    raise NVMLError(MISSING)


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (library(lambda: None), None),
        (library(no_driver), MISSING),
        (None, "`nvidia-ml-py` is not installed"),
    ],
    ids=["one GPU", "no driver", "no package"],
)
def test_a_run_has_the_use_of_its_gpu_or_one_line_says_why_not(
    nvml: SimpleNamespace | None,
    reason: str | None,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    if nvml is not None:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    tracking.warn_without_gpu_metrics.cache_clear()
    with tracking.run("train", Train(), system_metrics=True) as run_id:
        for _ in range(2):  # as for two folds
            tracking.warn_without_gpu_metrics()
    use = MlflowClient().get_run(run_id).data.metrics.get("system/gpu_0_utilization_percentage")
    lines = [record.message for record in caplog.records if record.name.endswith("system_metrics")]
    if reason is None:
        assert (use, lines) == (73, [])
    else:
        (line,) = lines
        assert line.startswith("no GPU use among the system metrics: ")
        assert reason in line
        assert use is None


@pytest.mark.parametrize("error", [None, ValueError("a bug"), KeyboardInterrupt()])
def test_even_a_short_run_has_system_metrics_which_end_with_it(
    error: BaseException | None, store: Path
) -> None:
    before = set(threading.enumerate())
    with (
        suppress(ValueError, KeyboardInterrupt),
        tracking.run("train", Train(), system_metrics=True) as run_id,
    ):
        assert "system-metrics" in {thread.name for thread in threading.enumerate()}
        with tracking.run("child", Train()) as child:
            tracking.log_metrics({"dice": 0.5})
        if error is not None:
            raise error
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"MLflowAsync"}
    assert len(MlflowClient().get_metric_history(run_id, CPU)) >= 1
    assert set(MlflowClient().get_run(child).data.metrics) == {"dice"}


def test_system_metrics_continue_in_a_resumed_run(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.4")
    client = MlflowClient()
    with suppress(KeyboardInterrupt), tracking.run("train", Train(), system_metrics=True) as run_id:
        wait_until(lambda: len(client.get_metric_history(run_id, CPU)) >= 3)
        raise KeyboardInterrupt
    first = client.get_metric_history(run_id, CPU)
    with tracking.run("train", Train(), continues=run_id, system_metrics=True):
        pass
    both = client.get_metric_history(run_id, CPU)
    assert len(both) > len(first)
    steps = [metric.step for metric in both]
    assert steps == sorted(steps)
    assert all(0 <= metric.value <= 100 for metric in both)
    memory = client.get_run(run_id).data.metrics["system/memory_usage_megabytes"]
    assert 100 < memory < 10_000_000
    assert capfd.readouterr().err == ""
