"""How both sides of a session take events: one at a time, each with all that it leads to.

An action that leads to an event puts it into the queue; it is taken when all actions of the one
before are done. None of it waits for the network: what is sent is buffered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

E = TypeVar("E")

# An event may have to wait for a disk, and QEMU waits for whoever asks.
IDLE_TIMEOUT_S: Final = 2.0


class EventQueue(Generic[E]):
    """The events of one session, run to completion."""

    def __init__(self, take: Callable[[E], Awaitable[None]]) -> None:
        self._take = take
        self._events: deque[E] = deque()
        self._lock = asyncio.Lock()
        self._changed = asyncio.Condition(self._lock)

    def put(self, event: E) -> None:
        """Add an event from within an action."""
        self._events.append(event)

    async def run(self, event: E, possible: Callable[[], bool] = lambda: True) -> bool:
        """Take an event, and what it leads to, if it is ``possible`` when its turn comes.

        Return whether it was. Raises what an action raises; what it would have led to is dropped.
        """
        async with self._lock:
            if not possible():
                return False
            self._events.append(event)
            try:
                while self._events:
                    await self._take(self._events.popleft())
            finally:
                self._events.clear()
                self._changed.notify_all()
        return True

    async def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until events have made something true; return False if it is not in time."""
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                await self._changed.wait_for(predicate)
        except TimeoutError:
            return False
        return True

    async def wait_until_idle(self) -> bool:
        """Wait until what was heard by now is taken; return False if that is not in time."""
        return await self.wait_for(lambda: True, IDLE_TIMEOUT_S)
