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
    """Let the first of them come, to the running event loop; keep the others as before.

    asyncio has a handler run for each, and somebody may send them faster than that runs.
    """
    import asyncio

    loop = asyncio.get_running_loop()

    def hold_others(*_: object) -> None:
        hold()
        loop.call_soon_threadsafe(on_first)

    for number in ends():
        signal.signal(number, hold_others)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends())
