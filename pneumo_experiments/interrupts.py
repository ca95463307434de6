"""Ctrl-C and SIGTERM as exceptions, so that runs end properly and half-written files are removed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import ClassVar, NoReturn


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (SIGINT)."""

    exit_code: ClassVar[int] = 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """SIGTERM."""

    exit_code: ClassVar[int] = 128 + signal.SIGTERM


def handle_signals() -> None:
    """Makes both signals raise, once."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def ignore_signals() -> None:
    """Ignores both signals, in a process that is ending anyway."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raises Interrupted, or Terminated for SIGTERM; from then on both signals are ignored."""
    # `mlflow run` forwards Ctrl-C as SIGTERM: a second signal must not interrupt the clean-up of the first.
    ignore_signals()
    raise Terminated if number == signal.SIGTERM else Interrupted
