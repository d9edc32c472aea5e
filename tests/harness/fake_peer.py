"""Peers that have a good certificate and say whatever a test makes them say."""

import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tests.support.emulator_client import receive_exactly
from vtpmd import core
from vtpmd.core.lane import LANE_FRAME_BYTES, Lane, LaneFrame, LaneKeying, LaneKind
from vtpmd.testing.credentials import HOST
from vtpmd.wire import greeting, peer
from vtpmd.wire.greeting import Greeting
from vtpmd.wire.state_level import UNKNOWN, Needs

TIMEOUT_S = 20.0
RECEIVE_BYTES_MAX = 1 << 16
WELCOME = peer.Welcome(peer.VERSION, peer.Following.NOT_ASKED_FOR)
NO_UUID = bytes(peer.UUID_BYTES)
HELLO = LaneFrame(LaneKind.HELLO)
LINEAGE = b"of a fake peer's"  # its vTPM's identity

Wanted = TypeVar("Wanted", bound=peer.Message)


def hello(
    needs: Needs = UNKNOWN, session: bytes | None = None, lineage: bytes = LINEAGE
) -> peer.Hello:
    """Return a Hello that a destination welcomes."""
    return peer.Hello(
        version=peer.VERSION,
        version_minimum=peer.VERSION_MINIMUM,
        session=os.urandom(peer.SESSION_BYTES) if session is None else session,
        uuid=NO_UUID,
        lineage=lineage,
        tpm_version=2,
        format_level=needs.level,
        profile=needs.profile.encode(),
        image_bytes_max=core.IMAGE_BYTES_MAX,
    )


class FakeLane:
    """One side of a lane, which is a vtpmd's; it says what a test makes it say."""

    def __init__(self, sock: socket.socket, keying: LaneKeying, *, is_source: bool) -> None:
        sock.settimeout(TIMEOUT_S)
        self.socket = sock
        self.key = keying.key
        self._lane = Lane(keying, is_source=is_source)

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def seal(self, frame: LaneFrame) -> bytes:
        """Return the next frame's bytes, to be sent or not."""
        return self._lane.seal(frame)

    def send(self, frame: LaneFrame) -> None:
        """Say something, under the right seal."""
        self.socket.sendall(self.seal(frame))

    def greet(self, session: bytes) -> None:
        """Begin as a source."""
        self.socket.sendall(greeting.encode(Greeting(session, self.seal(HELLO))))

    def open(self, data: bytes) -> LaneFrame:
        """Return the frame that has come as these bytes."""
        return self._lane.open(data)

    def receive(self) -> LaneFrame:
        """Return the next frame. ConnectionError when the other side closes instead."""
        return self.open(receive_exactly(self.socket, LANE_FRAME_BYTES))

    def has_ended(self) -> bool:
        """Wait for the next byte; return whether the other side has closed instead."""
        with suppress(ConnectionResetError):
            return self.socket.recv(1) == b""
        return True


def open_lane(port: int, keying: LaneKeying) -> FakeLane:
    """Connect the lane of a session that a destination has welcomed."""
    lane = FakeLane(socket.create_connection((HOST, port), TIMEOUT_S), keying, is_source=True)
    lane.greet(keying.session)
    assert lane.receive() == HELLO
    return lane


class Stream:
    """One connection to a vtpmd under test, over TLS."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        tls.settimeout(TIMEOUT_S)
        self._tls = tls
        self._decoder = peer.Decoder()
        self.lane: FakeLane | None = None  # of this side's, as a source

    def close(self) -> None:
        """Hang up."""
        self._tls.close()
        if self.lane is not None:
            self.lane.close()

    def send(self, *messages: peer.Message) -> None:
        """Send messages, one after the other."""
        self.send_bytes(b"".join(map(peer.encode, messages)))

    def send_bytes(self, data: bytes) -> None:
        """Send what may be no message."""
        self._tls.sendall(data)

    def receive(self, kind: type[Wanted]) -> Wanted:
        """Return the next message, which has to be of this kind."""
        message = self.next_message()
        assert isinstance(message, kind), f"{message} came, not a {kind.__name__}"
        return message

    def receive_round(self) -> peer.Commit:
        """Take the records of a round, and return what it ends with."""
        while not isinstance(message := self.next_message(), peer.Commit):
            assert isinstance(message, peer.Record), f"{message} came, not a Record or a Commit"
        return message

    def open_lane(self, hello: peer.Hello, key: bytes) -> FakeLane:
        """Give the destination of a session its key and its lane."""
        self.send(peer.Key(key))
        keying = LaneKeying(hello.session, key, hello.uuid, hello.lineage)
        self.lane = open_lane(self._tls.getpeername()[1], keying)
        return self.lane

    def acknowledge(self, commit: peer.Commit) -> None:
        """Say that a round is durable."""
        self.send(peer.Ack(commit.round, commit.permanent_generation, commit.volatile_generation))

    def acknowledge_until_stopped(self) -> None:
        """Acknowledge rounds until the source says that its guest stands still."""
        while not isinstance(message := self.next_message(), peer.Stopped):
            assert isinstance(message, peer.Record | peer.Commit), f"{message} came"
            if isinstance(message, peer.Commit):
                self.acknowledge(message)

    def wait_for_end(self) -> list[peer.Message]:
        """Wait until the other side closes; return what it said before."""
        said = []
        while (message := self.next_message()) is not None:
            said.append(message)
        return said

    def next_message(self) -> peer.Message | None:
        """Return the next message, or None at the end; a Ping is answered."""
        while isinstance(message := self._any_message(), peer.Ping):
            self.send(peer.Pong(message.session))
        return message

    def discard(self) -> None:
        """Throw away what has come, if anything has."""
        self._tls.setblocking(False)
        with suppress(ssl.SSLWantReadError):
            while self._tls.recv(RECEIVE_BYTES_MAX):
                pass
        self._tls.settimeout(TIMEOUT_S)

    def _any_message(self) -> peer.Message | None:
        while (message := self._decoder.next_message()) is None:
            try:
                data = self._tls.recv(RECEIVE_BYTES_MAX)
            except (ConnectionResetError, ssl.SSLEOFError):
                return None
            if not data:
                return None
            self._decoder.receive_data(data)
        return message


def connect(port: int, credentials: Path) -> Stream:
    """Connect as a source to a vtpmd that waits for vTPMs."""
    context = ssl.create_default_context(cafile=credentials / "ca-cert.pem")
    context.load_cert_chain(credentials / "client-cert.pem", credentials / "client-key.pem")
    plain = socket.create_connection((HOST, port), TIMEOUT_S)
    return Stream(context.wrap_socket(plain, server_hostname=HOST))


class FakeDestination:
    """Waits for one source at a time."""

    def __init__(self, credentials: Path) -> None:
        """Listen on a free port."""
        self._context = ssl.create_default_context(
            ssl.Purpose.CLIENT_AUTH, cafile=credentials / "ca-cert.pem"
        )
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_cert_chain(
            credentials / "server-cert.pem", credentials / "server-key.pem"
        )
        self._listener = socket.create_server((HOST, 0))
        self._listener.settimeout(TIMEOUT_S)
        self._streams: list[Stream] = []
        self.lanes: list[FakeLane] = []

    @property
    def address(self) -> str:
        """Where a source finds it, for migrate-arm."""
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def accept_plain(self) -> socket.socket:
        """Take the next connection, whatever it is to be."""
        plain, _ = self._listener.accept()
        plain.settimeout(TIMEOUT_S)
        return plain

    def accept(self) -> Stream:
        """Take the next source's connection, and shake hands."""
        stream = Stream(self._context.wrap_socket(self.accept_plain(), server_side=True))
        self._streams.append(stream)
        return stream

    def accept_lane(self, stream: Stream, hello: peer.Hello) -> FakeLane:
        """Take the lane of a source that was welcomed, with the key that it sends."""
        key = stream.receive(peer.Key).key
        plain = self.accept_plain()
        keying = LaneKeying(hello.session, key, hello.uuid, hello.lineage)
        lane = FakeLane(plain, keying, is_source=False)
        greets = greeting.decode(receive_exactly(plain, greeting.GREETING_BYTES))
        assert greets.session == hello.session
        assert lane.open(greets.hello) == HELLO
        lane.send(HELLO)
        self.lanes.append(lane)
        return lane

    def hold_base(self) -> tuple[Stream, bytes]:
        """Take the next source's lane and base; return the session's name, too.

        The lane is the last of ``lanes``.
        """
        stream = self.accept()
        hello = stream.receive(peer.Hello)
        stream.send(WELCOME)
        self.accept_lane(stream, hello)
        stream.acknowledge(stream.receive_round())
        return stream, hello.session

    def close(self) -> None:
        """Listen no more, and hang up on every source."""
        self._listener.close()
        for stream in self._streams:
            stream.close()
        for lane in self.lanes:
            lane.close()
