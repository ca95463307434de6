"""How much memory and time one radiograph may take; the system holds the process that reads it to them.

A few kilobytes can ask for gigabytes or hours, and a decoder in C cannot be stopped from within. So each
runs in a process that may die. Memory is limited on Linux only; time wherever there are such timers.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# Of 100 megapixels the costliest decoder took 8.2 bytes a pixel, with JPEG 2000.
BASE_BYTES, BYTES_PER_PIXEL = 2**28, 16
# Lossless JPEG 2000 took 0.9 s a megabyte; what hangs is small.
BASE_SECONDS, SECONDS_PER_MEGABYTE = 20, 4
LARGEST_PIXEL, LARGEST_HEADER = 4, 2**24  # bytes: no file is larger than its pixels can be

TIME_LIMIT_EXIT_CODE = -getattr(signal, "SIGPROF", 0)  # how a process ends that took too long


def max_bytes(max_pixels: int) -> int:
    """Memory that reading one file may take."""
    return BASE_BYTES + BYTES_PER_PIXEL * max_pixels


def max_seconds(file_bytes: int) -> int:
    """Processor time that reading one file may take: a busy machine rejects what an idle one does."""
    return BASE_SECONDS + SECONDS_PER_MEGABYTE * file_bytes // 10**6


def memory_limit_message(max_pixels: int) -> str:
    """Why a file is rejected that takes more than ``max_bytes``."""
    return f"takes more than {max_bytes(max_pixels) / 1e9:.1f} GB of memory to decode"


def time_limit_message(file_bytes: int) -> str:
    """Why a file is rejected that takes more than ``max_seconds``."""
    return f"takes more than {max_seconds(file_bytes)} s of processor time to decode"


def limit_memory(max_pixels: int) -> None:
    """From now on this process gets so much more than it had at first; beyond it there is a MemoryError."""
    if own := _initial_bytes():
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = own + max_bytes(max_pixels)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


@contextmanager
def limit_time(seconds: float) -> Generator[None]:
    """Ends the process by SIGPROF when the block takes more processor time; no code can hold that up."""
    if not TIME_LIMIT_EXIT_CODE:
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@cache
def _initial_bytes() -> int:
    """Address space of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()
