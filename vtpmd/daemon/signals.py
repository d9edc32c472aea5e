"""The signals that end a vTPM, and how they are kept until somebody can stop it in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


def ends() -> tuple[signal.Signals, ...]:
    """Return the signals that end a vTPM; nohup(1) has a terminal's end ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return signal.SIGTERM, signal.SIGINT
    return signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@contextmanager
def held() -> Iterator[None]:
    """Keep them pending, also across execve(): the engine that this process becomes takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release() -> None:
    """Let them come, now that they have handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends())
