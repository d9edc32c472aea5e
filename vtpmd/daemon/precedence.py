"""Let the engine, and QEMU, go before this process.

The rounds of a migration come in the middle of QEMU's own work, and nobody waits for them. Linux
gives a process that wakes up the processor of one that runs, but not if its policy is SCHED_BATCH
(sched(7)), which needs no right: it gets as much of the processors, and interrupts nobody. Only
where a guest stands still it is as others are, as then there is somebody who waits.

From the freeze to the Grant the engines answer, and vtpmd hears of it afterwards. What it does in
the meantime takes processors that they wait for: Linux mostly leaves a process that runs there,
unless it is nicer than the one that wakes up. So for that time it is nicer, if it may take that
back, which takes CAP_SYS_NICE or RLIMIT_NICE. It is not nicer in the rounds: on a host without an
idle processor the guest would then wait for a process that is to see that it has stopped. Else a
hand-over takes longer on a host whose processors are busy, and is otherwise the same.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Final

# Of 20: a tenth of the processor, where an engine wants all of it.
NICENESS: Final = 10
NICENESS_MAX: Final = 19


def interrupt_nobody() -> None:
    """Have this process, and the threads that it makes from now on, take only what is free."""
    _have_policy(os.SCHED_BATCH)


class Precedence:
    """How nice the thread is that this was made in, and that asks."""

    def __init__(self) -> None:
        self._usual = os.getpriority(os.PRIO_PROCESS, 0)
        self._policy = os.sched_getscheduler(0)
        self._may = may_take_back()

    def hurry(self) -> None:
        """Interrupt others, as most processes do. May be repeated."""
        _have_policy(os.SCHED_OTHER)

    def calm_down(self) -> None:
        """Interrupt others no more, if it was so before. May be repeated."""
        _have_policy(self._policy)

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


def _have_policy(policy: int) -> None:
    with suppress(OSError):  # it may be forbidden here; nothing depends on it
        os.sched_setscheduler(0, policy, os.sched_param(0))


def _be(niceness: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
