"""A TCP link between two vtpmd that can be cut, or held up, at any record of TLS.

TLS hides the messages, not the records that they are in: a record begins with a type, a version and
the length of what follows (RFC 8446, 5.1). Nothing here goes by the clock.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

from tests.harness.credentials import HOST

RECORD_HEADER_BYTES = 5
CONNECT_TIMEOUT_S = 10.0
NO_LINGERING = struct.pack("ii", 1, 0)  # struct linger: closing resets the connection


class Direction(Enum):
    """Which way a record goes."""

    TO_DESTINATION = "from the side that has connected"
    TO_SOURCE = "from the side that listens"


class Ending(Enum):
    """How a link ends."""

    RESET = "before a record; both sides are told by a reset, as when a host is gone"
    HALFWAY = "within a record; both sides are told by an orderly end"
    SILENCE = "before a record; nobody is told, and no later connection gets through"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Cut the link once `records` more records have been forwarded, both ways together."""

    records: int
    ending: Ending = Ending.RESET


class Link:
    """Forward connections to a port of this machine, record by record.

    A connection after a cut is forwarded again, unless the link has fallen silent.
    """

    def __init__(self, port: int) -> None:
        """Listen on a free port, for connections that are meant for `port`."""
        self._port = port
        self._listener = socket.create_server((HOST, 0))
        self._changed = threading.Condition()
        self._cut: Cut | None = None
        self._held: Direction | None = None
        self._silent = self._closing = False
        self._connections: list[_Connection] = []
        self._forgotten: set[_Connection] = set()
        self._thread = threading.Thread(target=self._accept)
        self.forwarded = 0  # records, since cut_after() was called last
        self.was_cut = threading.Event()
        self._thread.start()

    @property
    def address(self) -> str:
        """Where the source has to connect to, for migrate-arm."""
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def cut_after(self, cut: Cut | None) -> None:
        """Plan a cut, or none, in place of one that has not come."""
        with self._changed:
            self._cut = cut
            self.forwarded = 0
            self.was_cut.clear()

    def hold(self, direction: Direction | None) -> None:
        """Keep records that go one way until this is called again; None forwards them all."""
        with self._changed:
            self._held = direction
            self._changed.notify_all()

    def heal(self) -> None:
        """Forward again after a silence: what was dropped is lost."""
        with self._changed:
            self._silent = False

    def forget(self) -> None:
        """Drop all that comes on the connections that there are, as a firewall does; tell nobody.

        New ones are forwarded.
        """
        with self._changed:
            self._forgotten.update(self._connections)

    def close(self) -> None:
        """Cut what is open, and end; nothing happens if that was done."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() ends
        self._thread.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # close() has ended it
            while True:
                source, _ = self._listener.accept()
                try:
                    destination = socket.create_connection((HOST, self._port), CONNECT_TIMEOUT_S)
                except OSError:
                    source.close()  # what the source sees when nobody is there
                    continue
                destination.settimeout(None)
                for sock in (source, destination):
                    # A record at a time, as vtpmd's own sockets send them.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(_Connection(self, source, destination))

    def before_record(self, connection: _Connection, direction: Direction) -> Ending | None:
        """Wait while records are held; say whether to cut before the next one, and how."""
        with self._changed:
            self._changed.wait_for(lambda: self._held is not direction or self._closing)
            if self._silent or connection in self._forgotten:
                return Ending.SILENCE
            if self._closing or self._cut is None or self.forwarded < self._cut.records:
                self.forwarded += 1
                return None
            ending = self._cut.ending
            self._silent = ending is Ending.SILENCE
            self._cut = None
            self.was_cut.set()
            return ending

    def before_end(self, connection: _Connection) -> None:
        """Wait while the other side must not be told that this one has ended."""
        with self._changed:
            self._changed.wait_for(lambda: connection not in self._forgotten or self._closing)


class _Connection:
    """Two sockets, and a thread for each direction; both end when one does."""

    def __init__(self, link: Link, source: socket.socket, destination: socket.socket) -> None:
        self._link = link
        self._sockets = (source, destination)
        self._lock = threading.Lock()
        self._n_running = 2
        self._threads = [
            threading.Thread(target=self._forward, args=arguments)
            for arguments in (
                (source, destination, Direction.TO_DESTINATION),
                (destination, source, Direction.TO_SOURCE),
            )
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Cut the connection, and wait until it is."""
        self._end()
        for thread in self._threads:
            thread.join()

    def _forward(self, source: socket.socket, target: socket.socket, way: Direction) -> None:
        # A reset by one side is passed on as an end.
        with contextlib.suppress(OSError), source.makefile("rb") as stream:
            while (record := _read_record(stream)) and self._pass_on(record, target, way):
                pass
        self._link.before_end(self)
        self._end()
        with self._lock:
            self._n_running -= 1
            is_last = self._n_running == 0
        if is_last:
            for sock in self._sockets:
                sock.close()

    def _pass_on(self, record: bytes, target: socket.socket, way: Direction) -> bool:
        """Forward a record, if it is not the one to cut at; return False after a cut."""
        match self._link.before_record(self, way):
            case None:
                target.sendall(record)
            case Ending.RESET:
                for sock in self._sockets:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGERING)
                return False
            case Ending.HALFWAY:
                target.sendall(record[: len(record) // 2])
                return False
        return True

    def _end(self) -> None:
        """Have both threads read the end; the other sides see nothing of it yet."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)


def _read_record(stream: BinaryIO) -> bytes | None:
    """Return the next whole record, or None at the end."""
    header = stream.read(RECORD_HEADER_BYTES)
    if len(header) < RECORD_HEADER_BYTES:
        return None
    n_bytes = int.from_bytes(header[3:], "big")
    body = stream.read(n_bytes)
    return header + body if len(body) == n_bytes else None
