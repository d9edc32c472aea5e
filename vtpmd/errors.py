"""The errors that a person gets to read: one line each, and an exit status."""


class VtpmdError(Exception):
    """Base of every expected failure: ``str()`` says what failed, on what, why, and what to do."""

    exit_status = 1


class UsageError(VtpmdError):
    """The command line asks for what does not go together."""

    exit_status = 2
