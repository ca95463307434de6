"""The device and number format that a network computes in."""

from __future__ import annotations

import ctypes
import logging
import timeit
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pneumo_experiments.errors import UserError
from pneumo_experiments.learning import distributed
from pneumo_experiments.settings import Device

# Parameters of glibc's mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeConfig:
    """A device and the format of its matrix products (fp32, bf16 or fp16)."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which the network computes in the chosen format."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=FORMATS[self.precision])


def choose_compute(settings: Device, trained_in: str = "auto") -> ComputeConfig:
    """The device and format that the settings name, or the best device and the format of the training.

    Without either format it is the fastest. A CPU has no fp16: a network ``trained_in`` it computes in fp32,
    with a warning. Raises UserError when the named device is not available or cannot compute in the named
    format.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = settings.device
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise UserError(f"device={name}: not available here; device=auto uses the best one that is")
    device = distributed.local_device(name)
    if name == "cpu":
        _keep_freed_memory()
    precision = settings.precision if settings.precision != "auto" else trained_in
    if precision == "auto":
        precision = distributed.broadcast(_fastest(device))
    if precision == "fp16" and name == "cpu":
        if settings.precision == "fp16":
            raise UserError("precision=fp16: not on a CPU; precision=auto uses the fastest format there")
        log.warning("the model was trained in fp16, which a CPU does not support: using fp32")
        precision = "fp32"
    return ComputeConfig(device, precision)


def count_gpus() -> int:
    """CUDA devices that this process sees."""
    return torch.cuda.device_count()


def from_numpy(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory; torch's own function has no type for its argument."""
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; through pinned memory, since the host would wait for any other copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _keep_freed_memory() -> None:
    """Lets the C library use freed memory again instead of returning it to the system.

    A step of a training frees and takes hundreds of MB, and the system fills each page with zeros before it
    hands it out again. Other C libraries than glibc have no such setting.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, 2**30)


def _fastest(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":
        # bf16 is faster with AMX or AVX512-BF16 and slower where it is emulated: time one convolution.
        return min(("fp32", "bf16"), key=_seconds_of_convolution)
    return "fp32"


@cache  # a process times its CPU once, however many networks it trains or loads
def _seconds_of_convolution(precision: str) -> float:
    dtype = FORMATS.get(precision, torch.float32)
    images = torch.ones(4, 256, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernels = torch.ones(256, 256, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        times = timeit.repeat(lambda: functional.conv2d(images, kernels, padding=1), number=1, repeat=4)
    return min(times[1:])
