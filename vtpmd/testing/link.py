"""A TCP link between two vtpmd that can be cut, or held up, at any record of TLS or any message.

TLS hides the messages, not the records that they are in: a record begins with a type, a version and
the length of what follows (RFC 8446, 5.1). A MessageLink has the tests' certificates, is the other
end of TLS to both sides, and sees messages. Nothing here goes by the clock.
"""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from vtpmd.core.lane import LANE_FRAME_BYTES, Lane, LaneKeying, LaneKind
from vtpmd.daemon import tls
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.wire import greeting, peer

RECORD_HEADER_BYTES = 5
RECEIVE_BYTES_MAX = 1 << 16
CONNECT_TIMEOUT_S = 10.0
HELD_TIMEOUT_S = 20.0
NO_LINGERING = struct.pack("ii", 1, 0)  # struct linger: closing resets the connection


class Direction(Enum):
    """Which way a unit goes."""

    TO_DESTINATION = "from the side that has connected"
    TO_SOURCE = "from the side that listens"


class Ending(Enum):
    """How a link ends."""

    RESET = "before a unit; both sides are told by a reset, as when a host is gone"
    HALFWAY = "within a record; both sides are told by an orderly end"
    SILENCE = "before a unit; nobody is told, and no later connection gets through"


# A message of the stream, or a frame of the lane.
Kind = type[peer.Message] | LaneKind


class Unit(NamedTuple):
    """What is forwarded as a whole: a record, of which no more is known, or a message."""

    data: bytes
    kind: Kind | None = None

    @property
    def is_sign_of_life(self) -> bool:
        """True for what comes at any time, and is neither counted nor held."""
        return self.kind in (peer.Ping, peer.Pong)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Cut the link after so many units, both ways together, at the next one that is `before`."""

    after: int = 0
    before: Kind | None = None  # None: whatever it is
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
        self._thread = threading.Thread(target=self._accept)
        self._forwarded = 0  # units, since cut_at() was called last
        self.was_cut = threading.Event()
        self._thread.start()

    @property
    def address(self) -> str:
        """Where the source has to connect to, for migrate-arm."""
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def cut_at(self, cut: Cut) -> None:
        """Plan a cut, in place of one that has not come."""
        with self._changed:
            self._cut = cut
            self._forwarded = 0
            self.was_cut.clear()

    def spare(self) -> bool:
        """Take the planned cut back; return False if it has come."""
        with self._changed:
            is_spared = self._cut is not None
            self._cut = None
            return is_spared

    def hold(self, direction: Direction | None) -> None:
        """Keep what goes one way, but for signs of life, until this is called again.

        What was kept goes on then, in its order.
        """
        with self._changed:
            self._held = direction
            self._changed.notify_all()
        for connection in self._connections:
            connection.let_go()

    def is_held(self, direction: Direction) -> bool:
        """Return whether what goes this way is kept."""
        with self._changed:
            return self._held is direction

    def wait_for_held(self, kind: Kind) -> None:
        """Wait until a message of a kind is kept. TimeoutError when none comes."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._keeps(kind), HELD_TIMEOUT_S):
                raise TimeoutError(f"no {kind} has come")

    def was_kept(self) -> None:
        """Take note that a unit is kept."""
        with self._changed:
            self._changed.notify_all()

    def cut_all(self) -> None:
        """Cut the connections that there are, with what is kept of them; later ones are forwarded.

        Both sides are told by an orderly end.
        """
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    def heal(self) -> None:
        """Forward again after a silence: what was dropped is lost."""
        with self._changed:
            self._silent = False

    def forget(self) -> None:
        """Drop all that comes on the connections that there are, as a firewall does; tell nobody.

        New ones are forwarded.
        """
        for connection in self._connections:
            connection.forget()

    def wait_for_close(self) -> None:
        """Return when all connections are to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing)

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

    def before_unit(self, unit: Unit) -> Ending | None:
        """Say whether to cut before a unit, and how."""
        with self._changed:
            if self._silent:
                return Ending.SILENCE
            if self._closing or self._cut is None or not self._is_cut_at(unit, self._cut):
                self._forwarded += not unit.is_sign_of_life
                return None
            ending = self._cut.ending
            self._silent = ending is Ending.SILENCE
            self._cut = None
            self.was_cut.set()
            return ending

    def _is_cut_at(self, unit: Unit, cut: Cut) -> bool:
        if unit.is_sign_of_life or self._forwarded < cut.after:
            return False
        return cut.before in (None, unit.kind)

    def _keeps(self, kind: Kind) -> bool:
        return any(connection.keeps(kind) for connection in self._connections)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # close() has ended it
            while True:
                source, _ = self._listener.accept()
                try:
                    destination = socket.create_connection((HOST, self._port), CONNECT_TIMEOUT_S)
                except OSError:
                    source.close()  # what the source sees when nobody is there
                    continue
                self._connect(source, destination)

    def _connect(self, source: socket.socket, destination: socket.socket) -> None:
        """Forward between two sides, unless they do not shake hands with the link."""
        sockets = (source, destination)
        for sock in sockets:
            # A unit at a time, as vtpmd's own sockets send them.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            is_lane = greeting.begins(source.recv(1, socket.MSG_PEEK))
            ends = (self._lane_ends if is_lane else self._ends)(source, destination)
        except OSError:
            for sock in sockets:
                sock.close()
            return
        for sock in sockets:
            sock.settimeout(None)
        self._connections.append(_Connection(self, *ends))

    def _ends(self, source: socket.socket, destination: socket.socket) -> tuple["_End", "_End"]:
        return _RecordEnd(source), _RecordEnd(destination)

    def _lane_ends(
        self, source: socket.socket, destination: socket.socket
    ) -> tuple["_End", "_End"]:
        return _LaneEnd(source, greeting.GREETING_BYTES), _LaneEnd(destination)


class MessageLink(Link):
    """A link that forwards message by message.

    Each side sees the tests' certificate in place of the other side's. What it sees makes the
    lane's keys, too.
    """

    def __init__(self, port: int) -> None:
        """Listen on a free port, for connections that are meant for `port`."""
        super().__init__(port)
        self._hello: peer.Hello | None = None
        self._key = b""

    def before_unit(self, unit: Unit) -> Ending | None:
        """Say whether to cut before a unit, and how."""
        if unit.kind in (peer.Hello, peer.Key):
            decoder = peer.Decoder()
            decoder.receive_data(unit.data)
            message = decoder.next_message()
            with self._changed:
                if isinstance(message, peer.Hello):
                    self._hello, self._key = message, b""
                elif isinstance(message, peer.Key):
                    self._key = message.key
                    self._changed.notify_all()
        return super().before_unit(unit)

    def _lane_ends(
        self, source: socket.socket, destination: socket.socket
    ) -> tuple["_End", "_End"]:
        with self._changed:  # the stream's thread may not have got as far
            assert self._changed.wait_for(lambda: self._key, HELD_TIMEOUT_S)
            assert self._hello is not None
            hello = self._hello
        keying = LaneKeying(hello.session, self._key, hello.uuid, hello.lineage)
        return (
            _LaneEnd(source, greeting.GREETING_BYTES, Lane(keying, is_source=False)),
            _LaneEnd(destination, 0, Lane(keying, is_source=True)),
        )

    def _ends(self, source: socket.socket, destination: socket.socket) -> tuple["_End", "_End"]:
        directory = credentials()
        return (
            _MessageEnd(source, tls.server_context(directory), None),
            _MessageEnd(destination, tls.client_context(directory), HOST),
        )


class _End(Protocol):
    """A side of a connection; one thread reads, one writes."""

    socket: socket.socket

    def read(self) -> Unit | None:
        """Return the next unit, or None at the end."""

    def encode(self, unit: Unit) -> bytes:
        """Return what a unit is on the wire; it is sent next."""

    def close(self) -> None:
        """Close the socket."""


class _RecordEnd:
    """A side whose TLS ends at the other side."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._stream = sock.makefile("rb")

    def read(self) -> Unit | None:
        header = self._stream.read(RECORD_HEADER_BYTES)
        if len(header) < RECORD_HEADER_BYTES:
            return None
        n_bytes = int.from_bytes(header[3:], "big")
        body = self._stream.read(n_bytes)
        return Unit(header + body) if len(body) == n_bytes else None

    def encode(self, unit: Unit) -> bytes:
        return unit.data

    def close(self) -> None:
        self._stream.close()
        self.socket.close()


class _LaneEnd:
    """A side of a lane, whose frames are opened where the keys are known."""

    def __init__(
        self, sock: socket.socket, greeting_bytes: int = 0, opener: Lane | None = None
    ) -> None:
        self.socket = sock
        self._stream = sock.makefile("rb")
        self._greeting_bytes = greeting_bytes  # ends with the first frame
        self._opener = opener

    def read(self) -> Unit | None:
        n_bytes = self._greeting_bytes or LANE_FRAME_BYTES
        self._greeting_bytes = 0
        data = self._stream.read(n_bytes)
        if len(data) < n_bytes:
            return None
        if self._opener is None:
            return Unit(data)
        return Unit(data, self._opener.open(data[-LANE_FRAME_BYTES:]).kind)

    def encode(self, unit: Unit) -> bytes:
        return unit.data

    def close(self) -> None:
        self._stream.close()
        self.socket.close()


class _MessageEnd:
    """A side whose TLS ends here. OpenSSL's connections are not for two threads at a time."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None
    ) -> None:
        self.socket = sock
        self._decoder = peer.Decoder()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
        )
        self._lock = threading.Lock()
        self._shake_hands()

    def read(self) -> Unit | None:
        while (message := self._decoder.next_message()) is None:
            if not (data := self._decrypt()):
                return None
            self._decoder.receive_data(data)
        return Unit(peer.encode(message), type(message))

    def encode(self, unit: Unit) -> bytes:
        with self._lock:
            self._tls.write(unit.data)
            return self._outgoing.read()

    def close(self) -> None:
        self.socket.close()

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                pass
            finally:
                self.socket.sendall(self._outgoing.read())
            if not self._receive():
                raise ConnectionError("the other side has left")

    def _decrypt(self) -> bytes:
        while True:
            with self._lock, contextlib.suppress(ssl.SSLWantReadError):
                return self._tls.read(RECEIVE_BYTES_MAX)
            if not self._receive():
                return b""

    def _receive(self) -> bool:
        received = self.socket.recv(RECEIVE_BYTES_MAX)
        with self._lock:
            self._incoming.write(received)
        return bool(received)


class _Connection:
    """Two ends, and a thread for each direction; both finish when one does."""

    def __init__(self, link: Link, source: _End, destination: _End) -> None:
        self._link = link
        self._ends = (source, destination)
        self._forgotten = threading.Event()
        self._lock = threading.Lock()
        self._n_running = 2
        self._ways = (
            _Way(link, source, destination, Direction.TO_DESTINATION),
            _Way(link, destination, source, Direction.TO_SOURCE),
        )
        self._threads = [threading.Thread(target=self._run, args=(way,)) for way in self._ways]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Cut the connection, and wait until it is."""
        self._end()
        for thread in self._threads:
            thread.join()

    def forget(self) -> None:
        """Drop what comes from now on; no side is told of the other's end."""
        self._forgotten.set()

    def is_forgotten(self) -> bool:
        """Return whether what comes is dropped."""
        return self._forgotten.is_set()

    def let_go(self) -> None:
        """Forward what was kept, unless it is still to be, or a cut comes before it."""
        for way in self._ways:
            if not way.let_go():
                self._end()

    def keeps(self, kind: Kind) -> bool:
        """Return whether a message of a kind is kept."""
        return any(way.keeps(kind) for way in self._ways)

    def _run(self, way: "_Way") -> None:
        # A reset by one side is passed on as an end.
        with contextlib.suppress(OSError):
            way.forward(self.is_forgotten)
        if self.is_forgotten():
            self._link.wait_for_close()
        self._end()
        with self._lock:
            self._n_running -= 1
            is_last = self._n_running == 0
        if is_last:
            for end in self._ends:
                end.close()

    def _end(self) -> None:
        """Have both threads read the end; the other sides see nothing of it yet."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.socket.shutdown(socket.SHUT_RD)


class _Way:
    """One direction of a connection."""

    def __init__(self, link: Link, source: _End, target: _End, direction: Direction) -> None:
        self._link = link
        self._source = source
        self._target = target
        self._direction = direction
        self._lock = threading.Lock()
        self._kept: list[Unit] = []

    def forward(self, is_forgotten: Callable[[], bool]) -> None:
        """Forward, until the end or a cut. Raises OSError."""
        while (unit := self._source.read()) is not None:
            if is_forgotten():
                continue
            with self._lock:
                is_kept = bool(self._kept) or self._link.is_held(self._direction)
                if is_kept and not unit.is_sign_of_life:
                    self._kept.append(unit)
                elif not self._pass_on(unit):
                    return
            if is_kept:
                self._link.was_kept()

    def let_go(self) -> bool:
        """Forward what was kept, unless it is still to be; return False after a cut."""
        with self._lock, contextlib.suppress(OSError):
            while self._kept and not self._link.is_held(self._direction):
                if not self._pass_on(self._kept.pop(0)):
                    self._kept.clear()
                    return False
        return True

    def keeps(self, kind: Kind) -> bool:
        """Return whether a message of a kind is kept."""
        return any(unit.kind is kind for unit in self._kept)

    def _pass_on(self, unit: Unit) -> bool:
        """Forward a unit, if it is not the one to cut at; return False after a cut."""
        match self._link.before_unit(unit):
            case None:
                self._target.socket.sendall(self._target.encode(unit))
            case Ending.RESET:
                for end in (self._source, self._target):
                    end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGERING)
                return False
            case Ending.HALFWAY:
                data = self._target.encode(unit)
                self._target.socket.sendall(data[: len(data) // 2])
                return False
        return True
