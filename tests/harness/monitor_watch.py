"""How long QEMU's monitor is blocked: a client that asks for the status all the time."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import BinaryIO

from vtpmd.closing import Closing
from vtpmd.testing.sockets import connect

INTERVAL_S = 0.02
CONNECT_TIMEOUT_S = 30.0
# A thread that is asked to end may be waiting for an answer that does not come.
ANSWER_TIMEOUT_S = 60.0


class MonitorWatch(Closing):
    """A thread that measures the longest time that query-status took, from start() to close().

    What is not answered, as QEMU was killed meanwhile, does not count. It needs a monitor of QEMU's
    for itself.
    """

    def __init__(self, path: Path) -> None:
        self._socket = connect(path, CONNECT_TIMEOUT_S)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self._ending = threading.Event()
        self._longest_s = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def longest_ms(self) -> int:
        """The longest wait so far."""
        return round(self._longest_s * 1000)

    def close(self) -> None:
        """Stop asking."""
        self._ending.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        # QEMU ends, or close() hangs up: either may cut an answer short.
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as answers:
            answers.readline()  # the greeting
            self._ask("qmp_capabilities", answers)
            while not self._ending.wait(INTERVAL_S):
                began_s = time.monotonic()
                self._ask("query-status", answers)
                self._longest_s = max(self._longest_s, time.monotonic() - began_s)

    def _ask(self, command: str, answers: BinaryIO) -> None:
        self._socket.sendall(json.dumps({"execute": command}).encode())
        while "return" not in json.loads(answers.readline()):  # events come in between
            pass
