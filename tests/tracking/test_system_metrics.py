"""GPU use among the system metrics, with a stand-in for NVIDIA's library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.metrics import gpu_monitor

from pneumo_experiments import tracking
from pneumo_experiments.settings import Train

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
