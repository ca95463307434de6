"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in the input: its message is one line that names the culprit and the mend.

    The command line prints the message and exits with code 2, without a traceback.
    """


class Rejected(UserError):
    """One file that cannot be used; the message is the reason, the rest of the input goes on."""
