"""Several workers of one study on one machine, each a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import TypeVar

from pneumo_experiments.errors import UserError
from pneumo_experiments.interrupts import Terminated, handle_signals
from pneumo_experiments.learning.device import count_gpus
from pneumo_experiments.terminal import make_streams_unfailing

Settings = TypeVar("Settings")
GPUS, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


def count_workers(requested: int) -> int:
    """The number of workers: for 0 one per GPU, or one."""
    return requested or max(1, count_gpus())


def run_workers(count: int, work: Callable[[Settings], object], settings: Settings) -> None:
    """Runs ``work(settings)`` in so many new processes, each with a GPU or a part of the cores.

    A process that dies leaves its trial to the others; it is reported, not an error. When this process is
    interrupted, so are they.
    """
    context = get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for number in range(count):
            with _environment(_share(number, count)):
                process = context.Process(target=_work, args=(work, settings), name=f"search worker {number}")
                process.start()
            processes.append(process)
        for process in processes:
            process.join()
            if process.exitcode not in (0, UserError.exit_code):
                print(f"search: {process.name} ended with exit code {process.exitcode}", file=sys.stderr)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()


def _share(number: int, count: int) -> dict[str, str]:
    """Environment of a worker: its GPU, or its part of the cores."""
    gpus = count_gpus()
    if gpus:
        visible = os.environ.get(GPUS, ",".join(map(str, range(gpus)))).split(",")
        return {GPUS: visible[number % gpus]}
    return {THREADS: str(max(1, (os.cpu_count() or 1) // count))}


@contextmanager
def _environment(values: dict[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(work: Callable[[Settings], object], settings: Settings) -> None:
    handle_signals()
    make_streams_unfailing()
    # Ctrl-C reaches the whole process group; the main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("MLFLOW_RUN_ID", None)  # the run of the main process
    try:
        work(settings)
    except UserError as error:
        print(f"search: a worker stopped: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Terminated as stop:
        sys.exit(stop.exit_code)
