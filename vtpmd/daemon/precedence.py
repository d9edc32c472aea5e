"""Let the engine, and QEMU, go before this process while a guest stands still.

From the freeze to the Grant the engines answer, and vtpmd hears of it afterwards. What it does in
the meantime takes processors that they wait for: Linux mostly leaves a process that runs there,
unless it is nicer than the one that wakes up (sched(7)). So for that time it is nicer, if it may
take that back, which takes CAP_SYS_NICE or RLIMIT_NICE. Else a hand-over takes longer on a host
whose processors are busy, and is otherwise the same.
"""

from __future__ import annotations

import os
import threading
from typing import Final

# Of 20: a tenth of the processor, where an engine wants all of it.
NICENESS: Final = 10
NICENESS_MAX: Final = 19


class Precedence:
    """How nice the thread is that this was made in, and that asks."""

    def __init__(self) -> None:
        self._usual = os.getpriority(os.PRIO_PROCESS, 0)
        self._may = may_take_back()

    def give_way(self) -> None:
        """Have others go first. May be repeated."""
        if self._may:
            _be(min(self._usual + NICENESS, NICENESS_MAX))

    def take_back(self) -> None:
        """Go as usual again. May be repeated."""
        if self._may:
            _be(self._usual)


def may_take_back() -> bool:
    """Return whether a thread that has given way may go as before: tried in one that then ends."""
    found: list[bool] = []

    def try_it() -> None:
        usual = os.getpriority(os.PRIO_PROCESS, 0)  # Linux: of this thread
        try:
            _be(min(usual + 1, NICENESS_MAX))
            _be(usual)
        except PermissionError:
            found.append(False)
        else:
            found.append(True)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return found == [True]


def _be(niceness: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
