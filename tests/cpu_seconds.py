"""Prints the ten tests that need the most CPU seconds, and what the whole suite needs.

A test's CPU seconds are those of its process, of all processes that it or its fixtures started, and of the
commands that have ended. What a process does after its parent has died, as PostgreSQL does, is not counted.
The start of the command server is no test's, but is in the sum.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import suppress
from typing import Any

import psutil
import pytest

# To visit all processes takes milliseconds. After a shorter phase only pytest's own process is asked, and
# what others did counts for the next longer phase.
LONG_SECONDS = 0.3
SERVER = "command_server.serve"  # several pytest processes use it, so its commands count for themselves

_commands = list[float]()


def count_command(seconds: float) -> None:
    """Adds what a command needed that another process started."""
    _commands.append(seconds)


class CpuSeconds:
    """A plugin for pytest; with xdist, each worker measures and the main process prints."""

    def __init__(self) -> None:
        self.counted = self.own = 0.0  # so far: all but commands, and those of this process
        self.per_test, self.wall_seconds = defaultdict[str, float](float), defaultdict[str, float](float)

    def spent(self, wall_seconds: float) -> float:
        """Since the last call, which was so long ago."""
        before, own = self.counted, time.process_time()
        self.counted = _with_children() if wall_seconds >= LONG_SECONDS else before + own - self.own
        self.own = own
        commands = sum(_commands)
        _commands.clear()
        return max(0.0, self.counted - before + commands)  # less, where a process has lost its parent

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        self.spent(LONG_SECONDS)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        report.cpu_seconds = self.spent(call.duration)
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if hasattr(report, "cpu_seconds"):  # not of a worker that died
            self.per_test[report.nodeid] += report.cpu_seconds
            self.wall_seconds[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("ten slowest, with their set-up")
        for name in sorted(self.per_test, key=lambda name: -self.per_test[name])[:10]:
            cpu, wall = self.per_test[name], self.wall_seconds[name]
            terminalreporter.line(f"{cpu:6.1f} CPU seconds, {wall:6.1f} s: {name}")
        terminalreporter.line(f"{sum(os.times()[:4]):6.1f} CPU seconds in all")  # all others have ended


def _with_children() -> float:
    """Of this process, and of all below it that run or have ended, but for the command server."""
    this = psutil.Process()
    below = [child for child in this.children() if not _is_server(child)]
    seconds = 0.0
    for process in (this, *below, *(each for child in below for each in _children(child))):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _is_server(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(SERVER in word for word in process.cmdline())
    return False
