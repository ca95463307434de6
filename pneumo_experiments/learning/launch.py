"""Starts the processes of a distributed training on this host, with torchrun's launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pneumo_experiments.errors import UserError
from pneumo_experiments.interrupts import handle_signals, ignore_signals, stop
from pneumo_experiments.learning import distributed
from pneumo_experiments.spawning import without_main
from pneumo_experiments.terminal import make_streams_unfailing

Result = TypeVar("Result")


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(processes: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of rank 0 of new processes that each call ``work(*arguments)`` in one process group.

    When one fails, the others are terminated. Raises its UserError; any other failure is a RuntimeError with
    the process's own traceback.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):  # a line for each process
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory() as folder, without_main():
        try:
            return elastic_launch(config, _worker)(Path(folder), work, arguments)[0]
        except SignalException as caught:
            stop(caught.sigval, None)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failures := [json.loads(file.read_text()) for file in sorted(Path(folder).iterdir())]:
                # When one has left, the others fail in the same second: a mistake is the cause.
                first = min(failures, key=lambda each: (not each["is_mistake"], each["rank"] != rank))
                raise (UserError if first["is_mistake"] else RuntimeError)(first["text"]) from None
            raise RuntimeError(f"process {rank} of {processes} failed: {failure.message}") from None
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, handler)


def _worker(folder: Path, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result | None:
    """Calls ``work``; writes what it raises to a file in the folder, named by the rank."""
    handle_signals()
    rank = os.environ["RANK"]
    try:
        distributed.init_process_group()
        make_streams_unfailing()
        result = work(*arguments)
        return result if distributed.is_main_process() else None
    except Exception as error:
        is_mistake = isinstance(error, UserError)
        text = str(error) if is_mistake else f"process {rank} failed: {traceback.format_exc()}"
        failure = {"rank": int(rank), "is_mistake": is_mistake, "text": text}
        (folder / rank).write_text(json.dumps(failure))
        raise
    finally:
        ignore_signals()
