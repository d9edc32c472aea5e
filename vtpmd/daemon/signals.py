"""The signals that end a vTPM, and how they are kept until somebody can stop it in order."""

from __future__ import annotations

import signal

from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def ends() -> tuple[signal.Signals, ...]:
    """Return the signals that end a vTPM; nohup(1) has a terminal's end ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return signal.SIGTERM, signal.SIGINT
    return signal.SIGTERM, signal.SIGINT, signal.SIGHUP


def hold() -> None:
    """Keep them pending, also across execve(): the engine that this process becomes takes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ends())


def take(on_first: Callable[[], None]) -> None:
    """Have the first of them told to the running event loop; the others stay pending, for ever.

    They are waited for and never handled: a handler of Python's is interrupted by the next one, and
    somebody may send them faster than any of them runs.
    """
    import asyncio
    from contextlib import suppress
    from threading import Thread

    loop = asyncio.get_running_loop()

    def wait() -> None:
        signal.sigwait(ends())
        with suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(on_first)

    hold()
    Thread(target=wait, name="signals", daemon=True).start()
