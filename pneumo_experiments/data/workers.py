"""Processes that work side by side."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

ENVIRONMENT = {
    # A worker's matrix products are small: more threads than workers would only wait for each other.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc would return each picture's memory and take it anew, page by page: as much work as resampling.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(workers: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends; leaving the block drops what they have not begun."""
    # Spawned, since a fork would copy whatever threads the caller has.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # processes start until all are there
    try:
        _start(executor, workers)
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(executor: ProcessPoolExecutor, workers: int) -> None:
    """Starts the processes, which inherit that Ctrl-C (it reaches all of a terminal) is left to this one."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        for _ in range(workers):
            executor.submit(os.getpid)
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers wait for work that a parent killed by -9 never sends.
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
