"""Processes on this machine that work as one group, by PyTorch's own launcher (torchrun's)."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pneumo_experiments.errors import UserError
from pneumo_experiments.interrupts import handle_signals, ignore_signals, stop
from pneumo_experiments.learning import distributed
from pneumo_experiments.terminal import make_streams_unfailing

Answer = TypeVar("Answer")
MISTAKE = "UserError: "


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(processes: int, work: Callable[..., Answer], *arguments: Any) -> Answer:
    """The answer of the first of so many new processes that each call ``work(*arguments)`` in one group.

    When one of them fails, the others are ended. Raises UserError where one did, RuntimeError for
    other failures, with the process's own traceback.
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
    try:
        return elastic_launch(config, _member)(work, arguments)[0]
    except SignalException as caught:
        stop(caught.sigval, None)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told: Any = failure.message  # a text, or what torch's ``record`` wrote of an exception
        reason, trace = (
            (told["message"], told["extraInfo"]["py_callstack"]) if isinstance(told, dict) else (told, "")
        )
        if reason.startswith(MISTAKE):
            raise UserError(reason.removeprefix(MISTAKE)) from None
        raise RuntimeError(f"process {rank} of {processes} failed: {reason}\n{trace}") from None
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def _member(work: Callable[..., Answer], arguments: tuple[Any, ...]) -> Answer | None:
    handle_signals()
    try:
        distributed.init_process_group()
        make_streams_unfailing()
        answer = work(*arguments)
        return answer if distributed.is_main_process() else None
    finally:
        ignore_signals()
