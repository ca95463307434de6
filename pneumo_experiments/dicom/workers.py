"""The cores of this machine, and a pool of processes that write the synthetic sample."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait

# A worker's matrix products are small: more threads would only compete for the cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT = ONE_THREAD | {
    # Otherwise glibc returns each image's memory to the system and maps it again: as slow as resampling.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(workers: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end with this one, even after kill -9; an exception in the block kills them."""
    # Spawned, since fork is not safe when the caller has threads.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _initialise_worker)
    others = set(active_children())
    saved = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # inherited by the workers
    try:
        _start(executor, workers)
        yield executor
    except BaseException:
        # They would finish what they have begun.
        for process in set(active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(executor: ProcessPoolExecutor, workers: int) -> None:
    """Starts the workers with SIGINT ignored: Ctrl-C reaches all processes, only the parent handles it."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        for _ in range(workers):
            executor.submit(os.getpid)
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _initialise_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Without this, workers of a parent killed by -9 would wait for work forever.
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
