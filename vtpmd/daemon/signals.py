"""The signals that end a vTPM, and how they are kept until somebody can stop it in order."""

from __future__ import annotations

import signal


def ends() -> tuple[signal.Signals, ...]:
    """Return the signals that end a vTPM; nohup(1) has a terminal's end ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return signal.SIGTERM, signal.SIGINT
    return signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def hold() -> None:
    """Keep them pending, also across execve(): the engine that this process becomes takes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ends())


def release() -> None:
    """Let them come, now that they have handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends())
