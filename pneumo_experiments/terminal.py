"""The two streams to the terminal, which may be closed, full or gone: no work ends because nobody listens."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from pneumo_experiments.errors import reason_of


class _UnfailingStream(TextIOWrapper):
    """A text stream that turns to nowhere, with a word on stderr, when the system takes no more."""

    def write(self, s: str, /) -> int:
        try:
            return super().write(s)
        except OSError as error:
            self._give_up(error)
            return len(s)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # What is buffered follows: else Python would fail on it once more at the very end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        super().flush()
        if self is sys.stdout:
            print(
                f"stdout: cannot be written ({reason_of(error)}); the work goes on without it",
                file=sys.stderr,
            )


def make_streams_unfailing() -> None:
    """Makes stdout and stderr streams that never fail, line by line, also where they are closed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened would get the number, and be written to by mistake.
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and type(stream) is not TextIOWrapper:  # somebody else's, in a test for example
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportUnknownMemberType]
            continue
        buffer = os.fdopen(number, "wb", closefd=False) if stream is None else stream.buffer
        # Errors: of a name that the terminal cannot show. Lines: progress shows at once in a pipe, too.
        encoding = "utf-8" if stream is None else stream.encoding
        steadfast = _UnfailingStream(
            buffer, encoding=encoding, errors="backslashreplace", line_buffering=True
        )
        setattr(sys, name, steadfast)
