"""The device and the number format that a setting names."""

from __future__ import annotations

import pytest
import torch
from helpers import changed

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning.device import choose_compute, choose_compute_for
from pneumo_experiments.settings import Device


def test_a_missing_device_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is available")
    with pytest.raises(UserError, match="device=cuda"):
        choose_compute(changed(Device(), device="cuda"))


def test_what_was_trained_in_fp16_computes_in_fp32_on_a_cpu_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose_compute_for("fp16", Device(device="cpu")).precision == "fp32"
    assert "using fp32" in caplog.text
    assert choose_compute_for("fp16", Device(device="cpu", precision="bf16")).precision == "bf16"
