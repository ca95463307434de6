"""Workers of a search whose trials sleep: real processes that start within a second.

They are forked from a process that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import ROOT, collect_rarely, do_not_wait_for_the_disk
from helpers import environment

PRELOADED = ["sleeping_workers", "sleeping_search", "optuna.importance", "sklearn.ensemble", "pandas"]
PRELOADED += ["optuna.visualization.matplotlib", "mlflow.store.tracking.sqlalchemy_store", "psycopg"]

context = multiprocessing.get_context("forkserver")


def start_forkserver() -> None:
    """Starts the process that the workers are forked from; later calls do nothing."""
    from multiprocessing import forkserver

    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        for name, value in (environment() | {"PYTHONPATH": os.pathsep.join(folders)}).items():
            patch.setenv(name, value)
        context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def start_worker(folder: Path, uri: str, *words: object) -> BaseProcess:
    """Starts ``sleeping_search.py`` with these words in a folder, where ``log`` keeps its output."""
    start_forkserver()
    process = context.Process(target=_work, args=(folder, uri, [str(word) for word in words]))
    process.start()
    return process


def _work(folder: Path, uri: str, words: list[str]) -> None:
    import sleeping_search

    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    do_not_wait_for_the_disk()
    collect_rarely()
    # What its own workers start from.
    sys.path.append(str(ROOT / "benchmarks"))
    sys.argv = [sleeping_search.__file__, *words]
    sleeping_search.main(words)


def ended(process: BaseProcess, seconds: float = 120) -> int:
    """Waits for a worker; its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"a worker has not ended within {seconds} s")
    return process.exitcode
