"""Waiting for a socket to have something to read, again and again.

asyncio's own ways either carry no descriptors, or register and unregister the socket each time,
which a guest that stands still would wait for.
"""

from __future__ import annotations

import asyncio
import socket


class Readiness:
    """Tells one task when a socket has something to read, or its other end has closed.

    The socket stays watched between two waits, unless it turns readable when nobody waits: then
    watching it on would keep the event loop busy.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._watched = False

    async def wait(self) -> None:
        """Return when reading is worth a try; it may still have to wait again."""
        if not self._watched:
            self._loop.add_reader(self._socket, self._ready)
            self._watched = True
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """Watch the socket no more, which must be done before it is closed; who waits, returns."""
        self._unwatch()
        self._wake()

    def _ready(self) -> None:
        if self._waiter is None:
            self._unwatch()
        self._wake()

    def _unwatch(self) -> None:
        if self._watched:
            self._loop.remove_reader(self._socket)
            self._watched = False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
