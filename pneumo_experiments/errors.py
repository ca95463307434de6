"""The one kind of error that is the user's to mend."""

import re


class UserError(ValueError):
    """A mistake in the input: its message is one line that names the culprit and the mend.

    The command line prints the message and exits with code 2, without a traceback.
    """


class Rejected(UserError):
    """One file that cannot be used; the message is the reason, the rest of the input goes on."""


def reason_of(error: OSError) -> str:
    """Why the system refused, in its words: ``No space left on device``."""
    if error.strerror:
        return error.strerror
    hidden = re.search(r"\[Errno \d+\] ([^:\n]+)", str(error))  # in a library's longer text
    return hidden[1] if hidden else str(error).split("\n")[0] or type(error).__name__
