"""Memory and CPU time limits for reading one radiograph, enforced by the operating system.

A few kilobytes can demand gigabytes or hours, and a C decoder cannot be stopped from within. So decoders run
in processes that may be killed. Memory is limited on Linux only.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pneumo_experiments.errors import Rejected

# Measured at 100 megapixels, with a copy of the file: at most 8.6 bytes per pixel, for HTJ2K; of an image in
# three components 6 for each of its values, and max_pixels counts these.
BASE_BYTES, BYTES_PER_PIXEL = 2**28, 16
# Measured: at most 0.9 s per megabyte, for lossless JPEG 2000 and progressive JPEG.
BASE_SECONDS, SECONDS_PER_MEGABYTE = 20, 4
MAX_BYTES_PER_PIXEL, MAX_HEADER_BYTES = 4, 2**24  # of a file

TIME_LIMIT_EXIT_CODE = -signal.SIGPROF  # of a process killed by the timer
# A worker's matrix products are small: more threads would only compete for the cores.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Otherwise glibc returns each image's memory to the system and maps it again: as slow as resampling.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def max_file_bytes(max_pixels: int) -> int:
    """Size that one file may have, unpacked."""
    return MAX_BYTES_PER_PIXEL * max_pixels + MAX_HEADER_BYTES


def check_file_size(size: int, max_pixels: int, image_id: str) -> None:
    """Rejects a file that is larger than ``max_file_bytes``."""
    if size > max_file_bytes(max_pixels):
        raise Rejected(f"rejected because {size:,} bytes are more than max_pixels allows", image_id)


def max_bytes(max_pixels: int) -> int:
    """Memory that reading one file may use."""
    return BASE_BYTES + BYTES_PER_PIXEL * max_pixels


def max_seconds(file_bytes: int) -> int:
    """CPU time that reading one file may use: CPU time, so that the load of the machine does not matter."""
    return BASE_SECONDS + SECONDS_PER_MEGABYTE * file_bytes // 10**6


def limit_memory(max_pixels: int) -> None:
    """Limits this process to its initial memory plus ``max_bytes``; beyond it MemoryError is raised."""
    if initial := _initial_bytes():
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = initial + max_bytes(max_pixels)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def is_memory_full() -> bool:
    """Whether this process has used up its limit of memory, but for a part of what every file may use."""
    used, (limit, _) = _address_space(), resource.getrlimit(resource.RLIMIT_AS)
    return used > 0 and limit >= 0 and limit - used < BASE_BYTES // 4


@contextmanager
def limit_time(seconds: float) -> Generator[None]:
    """Kills this process by SIGPROF if the block uses more CPU time, even within C code."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@cache
def _initial_bytes() -> int:
    return _address_space()


def _address_space() -> int:
    """Bytes of this process; 0 where /proc is not available."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
