"""What the benchmarks share: the machine in a line, and the memory of a tree of processes."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package is used from its folder, not installed
REAL_DATA = Path(os.environ.get("PNEUMO_REAL_DATA") or ROOT.parent / "shared" / "siim")  # see CONTRIBUTING.md


def machine() -> str:
    """The machine in one line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {os.cpu_count()} cores ({', '.join(units[:2]) or 'no AVX2'}), {memory:.0f} GiB,"
        f" Python {platform.python_version()}"
    )


def gflop_per_second() -> float:
    """Of all cores in a 3 x 3 convolution like those of the network, in the faster of fp32 and bf16."""
    import torch
    from torch.nn import functional

    channels, side, images, repeats = 512, 16, 8, 8
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        pixels = torch.ones(images, channels, side, side, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        kernels = torch.ones(channels, channels, 3, 3, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        with torch.inference_mode():
            for _ in range(repeats):
                start = time.perf_counter()
                functional.conv2d(pixels, kernels, padding=1)
                flop = 2 * 9 * channels**2 * images * side**2
                best = max(best, flop / (time.perf_counter() - start) / 1e9)
    return best


@dataclass
class Peak:
    """The largest sum of resident memory seen so far."""

    gigabytes: float = 0.0


@contextmanager
def peak_memory(pid: int) -> Generator[Peak]:
    """Watches a process and all below it; memory that two of them share counts twice."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(0.5):  # oftener would slow down what it watches
            peak.gigabytes = max(peak.gigabytes, _resident(pid) / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _resident(pid: int) -> int:
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in family:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
