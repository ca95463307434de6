"""How long work takes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from threading import Timer

from tqdm import tqdm

FIRST_SECONDS = 5.0  # of work before the first estimate
WORTH_SAYING_SECONDS = 30.0  # shorter work needs no estimate
SILENT_SECONDS = 2.0  # of work without a bar before its line
WITHOUT_COUNTS = "{l_bar}{bar}| {elapsed}<{remaining}"


@dataclass
class ProgressBar:
    """Shows how far the work called ``name`` is, and about how long it still takes, from the rate so far.

    On a terminal it is tqdm's bar. Elsewhere the first line comes after a few seconds, if more than half a
    minute is left, others after each quarter of the time. ``pieces`` pieces of work of this size are still to
    come, this one included: what they take together is said once, on a terminal, too.
    """

    name: str
    total: float
    unit: str = "image"
    _: KW_ONLY
    finished: float = 0  # of the total
    pieces: int = 1
    is_shown: bool = True
    is_kept: bool = False  # the bar stays on the terminal

    def __post_init__(self) -> None:
        # None: tqdm shows nothing unless on a terminal. Counts that are not whole would only confuse.
        self._bar = tqdm(
            total=self.total,
            initial=self.finished,
            desc=self.name,
            unit=self.unit,
            leave=self.is_kept,
            disable=None if self.is_shown and "TQDM_DISABLE" not in os.environ else True,
            bar_format=None if isinstance(self.total, int) else WITHOUT_COUNTS,
        )
        # From the first update on: what comes before, such as the start of processes, happens once.
        self._rate_from: tuple[float, float] | None = None  # time, and what was finished
        self._next_line = time.monotonic() + FIRST_SECONDS

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, count: float = 1) -> None:
        """So much more is done."""
        self._bar.update(count)
        self.finished += count
        now = time.monotonic()
        if self._rate_from is None:
            self._rate_from = now, self.finished
        elif self.is_shown and now >= self._next_line and self.finished > self._rate_from[1]:
            self._say(now, *self._rate_from)

    def _say(self, now: float, since: float, finished_before: float) -> None:
        seconds_each = (now - since) / (self.finished - finished_before)
        left = seconds_each * (self.total - self.finished)
        together = left + (self.pieces - 1) * seconds_each * self.total
        self._next_line = now + max(WORTH_SAYING_SECONDS, (now - since + left) / 4)
        line = f"{self.name}: {duration(left)} left"
        if self.pieces > 1:
            if together >= WORTH_SAYING_SECONDS:
                tqdm.write(f"{line}, with {self.pieces - 1} more {duration(together)}")
            self.pieces = 1
        elif self._bar.disable and left >= WORTH_SAYING_SECONDS:
            tqdm.write(line)


@contextmanager
def said_if_slow(line: str) -> Generator[None]:
    """Says what the block does, if that takes more than two seconds."""
    timer = Timer(SILENT_SECONDS, tqdm.write, [line])
    timer.daemon = True  # an interrupted process does not wait for it
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def duration(seconds: float) -> str:
    """A length of time as one says it: ``about 40 seconds``, ``about 4 minutes``, ``about 1 h 20 min``."""
    if seconds < 90:
        return f"about {max(10, round(seconds / 10) * 10)} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    hours, minutes = divmod(round(seconds / 600) * 10, 60)
    return f"about {hours} h {minutes} min" if minutes else f"about {hours} h"
