"""Ctrl-C and SIGTERM as exceptions, so that runs are ended and half-written files removed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


def handle_signals() -> None:
    """Lets both signals raise, once."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def ignore_signals() -> None:
    """Lets neither of them disturb what is ending anyway."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raises KeyboardInterrupt, or Terminated for SIGTERM; from then on both signals are ignored."""
    # `mlflow run` passes Ctrl-C on as SIGTERM: a second signal must not break the first one's cleaning up.
    ignore_signals()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
