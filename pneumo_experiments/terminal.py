"""stdout and stderr that never fail: a closed terminal or a full disk behind them must not end the work."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path

from pneumo_experiments.errors import reason_of
from pneumo_experiments.spawning import environment


class _UnfailingStream(TextIOWrapper):
    """A text stream that switches to the null device, with a warning on stderr, when it cannot be written."""

    def write(self, s: str, /) -> int:
        try:
            return super().write(s)
        except OSError as error:
            self._switch_to_null(error)
            return len(s)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._switch_to_null(error)

    def _switch_to_null(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        # Buffered text goes there too: else Python would fail on it once more at exit.
        super().flush()
        if self is sys.stdout and error.errno != errno.EPIPE:  # a reader such as head has what it wants
            print(f"stdout: cannot be written ({reason_of(error)}); continuing without it", file=sys.stderr)


def make_streams_unfailing() -> None:
    """Replaces stdout and stderr, closed or not, by line-buffered streams that never fail."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Else the next opened file would get this number, and print would write to it.
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and type(stream) is not TextIOWrapper:  # replaced, such as by a test
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportUnknownMemberType]
            continue
        buffer = stream.buffer if stream else os.fdopen(number, "wb", closefd=False)
        # Names that the terminal cannot show are escaped; each line is shown at once, in a pipe, too.
        encoding, errors = stream.encoding if stream else "utf-8", "backslashreplace"
        setattr(sys, name, _UnfailingStream(buffer, encoding, errors, line_buffering=True))


@contextmanager
def silence() -> Generator[None]:
    """Within it, neither this process nor those that it starts show anything but warnings and errors."""
    sys.stdout.flush()
    before = os.dup(1)
    with environment({"TQDM_DISABLE": "1"}), Path(os.devnull).open("w") as null, redirect_stdout(null):
        os.dup2(null.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(before, 1)
            os.close(before)
