"""Errors that the user can fix; each class has its exit code."""

from __future__ import annotations

import re
from typing import ClassVar


class UserError(ValueError):
    """A mistake in the input: the message is one line that names the culprit and the fix.

    The command line prints the message and exits with ``exit_code``, without a traceback.

    >>> try:
    ...     train(Train.of(epochs=0))
    ... except UserError as error:
    ...     print(error)
    epochs: 0 is not in the range 1<=x<=100000
    """

    exit_code: ClassVar[int] = 2


class ServerUnreachable(UserError):
    """A server does not respond; the same may succeed later."""


class Rejected(UserError):
    """One file that cannot be used, and the ``reason``; the other files are still used.

    The message names the image too, where it is known whose file that is.
    """

    def __init__(self, reason: str, image_id: str = "") -> None:
        super().__init__(f"{image_id}: {reason}" if image_id else reason)
        self.reason = reason


def reason_of(error: OSError) -> str:
    """The operating system's reason, such as ``No space left on device``."""
    if error.strerror:
        return error.strerror
    hidden = re.search(r"\[Errno \d+\] ([^:\n]+)", str(error))  # in a library's longer text
    return hidden[1] if hidden else str(error).split("\n")[0] or type(error).__name__
