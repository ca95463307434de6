"""The device and the number format that a setting names."""

from __future__ import annotations

import platform
import resource

import pytest
import torch
from helpers import changed

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import choose_compute
from pneumo_experiments.settings import Device


def test_a_missing_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is available")
    with pytest.raises(UserError, match="device=cuda"):
        choose_compute(changed(Device(), device="cuda"))


def test_what_was_trained_in_fp16_computes_in_fp32_on_a_cpu_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose_compute(Device(device="cpu"), "fp16").precision == "fp32"
    assert "using fp32" in caplog.text
    assert choose_compute(Device(device="cpu", precision="bf16"), "fp16").precision == "bf16"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_cpu_uses_freed_memory_again_without_asking_the_system() -> None:
    choose_compute(Device(device="cpu", precision="fp32"))
    pages = 2**25 // resource.getpagesize()
    new_pages: list[int] = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**25, dtype=torch.uint8)  # 32 MB, for which glibc otherwise asks each time
        new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(new_pages) < pages / 10  # not the first ones: the freed places must fit
