"""A QMP monitor for synchronous code, with an event loop of its own that is closed with it.

The library's takes the thread's loop or makes one, and closes neither: another test's asyncio.run()
then drops it, and the warning about an unclosed loop fails whichever test runs next.
"""

import asyncio
import socket

from qemu.qmp.legacy import QEMUMonitorProtocol


class Monitor(QEMUMonitorProtocol):
    """QEMUMonitorProtocol that leaves nothing behind. Not for use inside a running loop."""

    def __init__(self, address: str | socket.socket) -> None:
        self._own_loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._own_loop)
        try:
            super().__init__(address)
        finally:
            asyncio.set_event_loop(None)

    def close(self) -> None:
        """Disconnect and close the loop. May be repeated."""
        if self._own_loop.is_closed():
            return
        try:
            super().close()
        finally:
            self._own_loop.close()
