"""QEMU's monitor for vtpmd, where the bench is QEMU: what a migration says there, and no more."""

import json
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.bench.emulators import BenchError

CONNECT_TIMEOUT_S = 30.0
RECEIVE_BYTES_MAX = 1 << 16
GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": [],
    }
}


class Monitor:
    """A monitor that vtpmd follows: of a guest that runs, or of one that is to come in."""

    def __init__(self, path: Path, *, is_incoming: bool) -> None:
        """Listen where vtpmd looks for it."""
        self._answers = {
            "query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"},
            "query-status": {
                "status": "inmigrate" if is_incoming else "running",
                "running": not is_incoming,
            },
            "query-migrate-capabilities": [{"capability": "events", "state": True}],
        }
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._is_followed = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """Hang up."""
        for sock in (self._listener, self._connection):
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for sock in (self._listener, self._connection):
            if sock is not None:
                sock.close()

    def wait_until_followed(self) -> None:
        """Wait until vtpmd has asked all that it asks; BenchError when it does not."""
        if not self._is_followed.wait(CONNECT_TIMEOUT_S):
            raise BenchError("vtpmd does not follow QEMU's monitor")

    def migration(self, status: str) -> None:
        """Say how the migration goes."""
        self._event("MIGRATION", {"status": status})

    def stop(self) -> None:
        """Say that the guest stands still."""
        self._event("STOP", {})

    def resume(self) -> None:
        """Say that the guest runs on."""
        self._event("RESUME", {})

    def _event(self, name: str, data: dict[str, object]) -> None:
        now_us = time.time_ns() // 1000
        timestamp = {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}
        self._send({"event": name, "data": data, "timestamp": timestamp})

    def _send(self, message: object) -> None:
        assert self._connection is not None
        self._connection.sendall(json.dumps(message).encode() + b"\r\n")

    def _serve(self) -> None:
        with suppress(OSError):  # close() has ended it
            self._connection, _ = self._listener.accept()
            self._send(GREETING)
            said = ""
            while data := self._connection.recv(RECEIVE_BYTES_MAX):
                said += data.decode()
                with suppress(json.JSONDecodeError):  # there is more to come
                    while said:
                        request, end = json.JSONDecoder().raw_decode(said)
                        said = said[end:].lstrip()
                        self._answer(request)

    def _answer(self, request: dict[str, object]) -> None:
        command = str(request["execute"])
        answer = {"return": self._answers.get(command, {})}
        self._send(answer | {"id": request["id"]} if "id" in request else answer)
        if command == "query-status":
            self._is_followed.set()
