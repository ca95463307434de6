"""Processes that work side by side."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait

from pneumo_experiments.dicom.limits import limit_memory

# A worker's matrix products are small: more threads than workers would only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT = ONE_THREAD | {
    # glibc would return each picture's memory and take it anew, page by page: as much work as resampling.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(workers: int, max_pixels: int | None = None) -> Generator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends; an exception in the block ends them at once.

    Those that read files get no more memory than a picture of ``max_pixels`` may take.
    """
    # Spawned, since a fork would copy whatever threads the caller has.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (max_pixels,))
    others = set(active_children())
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # processes start until all are there
    try:
        _start(executor, workers)
        yield executor
    except BaseException:
        # What they have in hand may take minutes, and a decoder in C heeds nothing else.
        for process in set(active_children()) - others:
            process.kill()
        raise
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


def _begin(max_pixels: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if max_pixels is not None:
        limit_memory(max_pixels)
    # Workers wait for work that a parent killed by -9 never sends.
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
