"""Keep this host's processors from sleeping while a guest stands still.

A hand-over is a dozen messages between processes that all wait most of the time, and a processor
that sleeps takes 30 to 200 microseconds to wake up for each. Linux lets a process say how long that
may take at most (PM QoS, Documentation/power/pm_qos_interface.rst), for as long as it holds a file
open. Where that may not be opened, which is root's, a hand-over takes longer, and is otherwise the
same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from pathlib import Path
from typing import Final

from vtpmd.daemon.precedence import Precedence

log = logging.getLogger(__name__)

LATENCY_FILE: Final = Path("/dev/cpu_dma_latency")
# From the moment that the guest stops, if nothing ends it before. Processors that do not sleep cost
# power, but not for longer than this.
HOLD_S: Final = 0.5

# In microseconds.
_NO_LATENCY: Final = struct.pack("=i", 0)


class Wakefulness:
    """A wish of this process, one at a time; it is over when the file is closed."""

    def __init__(self, path: Path = LATENCY_FILE) -> None:
        self._path = path
        self._precedence = Precedence()
        self._fd: int | None = None
        self._release: asyncio.TimerHandle | None = None

    def hold(self) -> None:
        """Have the processors stay awake for HOLD_S from now on."""
        if self._release is None:
            self._wish()
        else:
            self._release.cancel()
        self._release = asyncio.get_running_loop().call_later(HOLD_S, self.release)

    def give_way(self) -> None:
        """As hold(), and have the engine go before this process until take_back(), or as long."""
        self.hold()
        self._precedence.give_way()

    def take_back(self) -> None:
        """Go before nobody, and after nobody. May be repeated."""
        self._precedence.take_back()

    def release(self) -> None:
        """Let them sleep again, and take back what was given way. May be repeated."""
        self.take_back()
        if self._release is not None:
            self._release.cancel()
            self._release = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _wish(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._fd, _NO_LATENCY)
        except OSError as error:  # nothing depends on it
            log.debug("processors may sleep: %s: %s", self._path, error.strerror)
