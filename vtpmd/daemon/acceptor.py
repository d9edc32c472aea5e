"""Accept connections on a listening socket, for ever: no failing accept() ends a service."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, Final

from vtpmd.daemon.limited_log import LimitedLog
from vtpmd.daemon.readiness import Readiness

log = logging.getLogger(__name__)

# When descriptors or memory have run out, accepting again at once would fail again.
RETRY_S: Final = 0.1


class Acceptor:
    """Gives the connections of one listening socket, which is non-blocking and the caller's."""

    def __init__(self, listening: socket.socket, what: str) -> None:
        """Take a socket that listens; ``what`` it is, is for errors."""
        self._listening = listening
        self._what = what
        self._log = LimitedLog(log, lines_max=1)

    async def accept(self) -> tuple[socket.socket, Any]:
        """Wait for a connection; return it, non-blocking, and the address of its other end.

        Returns without a pause while there are connections. Cancelled, it takes none.
        """
        readiness = Readiness(self._listening)
        try:
            while True:
                try:
                    connection, address = self._listening.accept()
                except BlockingIOError:
                    # Not loop.sock_accept(): cancelled in the wrong moment it forgets a connection.
                    await readiness.wait()
                except ConnectionAbortedError:
                    pass  # this one is gone, and the next may be there
                except OSError as error:
                    reason = error.strerror
                    self._log.write(
                        logging.ERROR, f"cannot accept on {self._what}: {reason}; trying again"
                    )
                    await asyncio.sleep(RETRY_S)
                else:
                    connection.setblocking(False)
                    return connection, address
        finally:
            readiness.close()
