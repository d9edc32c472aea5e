"""An engine that this process has started, and is not attached to: its end is waited for here."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from vtpmd.daemon.engine import EXITS_IN_ORDER, GONE_TIMEOUT_S, STOP_TIMEOUT_S, describe_death
from vtpmd.errors import VtpmdError

log = logging.getLogger(__name__)

EXIT_ENGINE_DIED: Final = 1


async def follow(pid: int, why: VtpmdError, stopped: Callable[[], Awaitable[None]]) -> int:
    """Wait for the engine's end, or end it once ``stopped()`` returns; return the exit status.

    ``why`` it is not attached to is logged if it serves on. One that hangs is killed.
    """
    ended = asyncio.Event()
    loop, pidfd = asyncio.get_running_loop(), os.pidfd_open(pid)
    loop.add_reader(pidfd, ended.set)
    try:
        # Mostly it could not be attached to as it has ended.
        if not await _comes(ended.wait(), GONE_TIMEOUT_S):
            log.error(
                "the engine (pid %d) cannot be attached to, and serves on alone until this vtpmd "
                "is stopped: %s",
                *(pid, why),
            )
            await either(ended.wait(), stopped())
        if not ended.is_set():
            await _end(pidfd, ended)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return _status_of(pid)


async def either(*waits: Awaitable[object]) -> None:
    """Wait until one of them is over, and give up the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _end(pidfd: int, ended: asyncio.Event) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not await _comes(ended.wait(), STOP_TIMEOUT_S):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    await ended.wait()


async def _comes(wait: Awaitable[object], timeout_s: float) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(wait, timeout_s)
        return True
    return False


def _status_of(pid: int) -> int:
    """Return the exit status for an engine that has ended; it is this process's to wait for."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in EXITS_IN_ORDER:
        return code
    log.error("%s", describe_death(pid, code))
    return EXIT_ENGINE_DIED
