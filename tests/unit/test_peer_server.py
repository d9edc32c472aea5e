"""The listener: who gets a slot, who goes when there is no room, and what it survives.

Connections are real ones, over loopback; only what a peer is given to in the end is the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fake_peer import hello
from vtpmd.core.lane import LaneKeying
from vtpmd.daemon import acceptor, handshakes, lane, limited_log, outgoing, peer_server, tls
from vtpmd.daemon.acceptor import Acceptor
from vtpmd.daemon.handshakes import Handshakes, network
from vtpmd.daemon.limited_log import LimitedLog
from vtpmd.daemon.peer_server import PeerServer
from vtpmd.daemon.tls_stream import (
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE_S,
    KEEPALIVE_INTERVAL_S,
    USER_TIMEOUT_S,
    TlsStream,
)
from vtpmd.errors import VtpmdError
from vtpmd.testing.credentials import (
    HOST,
    credentials,
    foreign_credentials,
    stranger_credentials,
)
from vtpmd.wire import peer
from vtpmd.wire.greeting import MAGIC, Greeting

TIMEOUT_S = 60.0
SESSION = bytes(range(peer.SESSION_BYTES))
KEYING = LaneKeying(SESSION, bytes(range(peer.KEY_BYTES)), bytes(16), bytes(16))
N_HOPS = 100
POLL_S = 0.005


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have connections that say nothing stay for longer than a test: only others make them go."""
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 10 * TIMEOUT_S)
    monkeypatch.setattr(peer_server, "HELLO_TIMEOUT_S", 10 * TIMEOUT_S)


class FakeSessions:
    """Welcomes sources until they leave, and answers Reclaims when it may."""

    def __init__(self) -> None:
        self.n_welcomed = 0
        self.lane_options: list[tuple[int, ...]] = []
        self.reclaims_may_go_on = asyncio.Event()
        self.reclaims_may_go_on.set()

    async def welcome(
        self, connection: tls.Connection, decoder: peer.Decoder, hello: peer.Hello
    ) -> None:
        """Say Welcome to whatever the source says, until it leaves."""
        del decoder
        self.n_welcomed += 1
        connection.stream.write(peer.encode(peer.Welcome(hello.version, 0)))
        while await connection.stream.read():
            connection.stream.write(peer.encode(peer.Welcome(hello.version, 0)))

    async def take_lane(self, accepted: socket.socket, greets: Greeting) -> None:
        """Answer whoever has the key."""
        hello = lane.greet_back(KEYING, greets.hello)
        self.lane_options.append(options(accepted))
        accepted.send(hello)

    async def answer(self, connection: tls.Connection, question: peer.Ask | peer.Reclaim) -> None:
        """Say Kept."""
        await self.reclaims_may_go_on.wait()
        connection.stream.write(peer.encode(peer.Kept(question.session)))


def options(sock: socket.socket) -> tuple[int, ...]:
    """Return what a connection has that finds a dead flow, and that lets no frame wait."""
    of_tcp = (
        socket.TCP_NODELAY,
        socket.TCP_KEEPIDLE,
        socket.TCP_KEEPINTVL,
        socket.TCP_KEEPCNT,
        socket.TCP_USER_TIMEOUT,
    )
    is_kept_alive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return (is_kept_alive, *(sock.getsockopt(socket.IPPROTO_TCP, each) for each in of_tcp))


class Site:
    """A listener, and who connects to it."""

    def __init__(self, listening: socket.socket, sessions: FakeSessions) -> None:
        self.sessions = sessions
        self.port: int = listening.getsockname()[1]
        self._idle: list[socket.socket] = []
        self._streams: list[TlsStream] = []

    async def open_idle(self, n: int, address: str = "127.0.0.1") -> list[socket.socket]:
        """Open connections that say nothing."""
        opened = []
        for _ in range(n):
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((address, 0))
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            opened.append(sock)
        self._idle += opened
        return opened

    async def connect(self, *first: peer.Message, context: Any = None) -> tls.Connection:
        """Connect as a source, and say something."""
        context = context or tls.client_context(credentials())
        connection = await tls.connect(HOST, self.port, context)
        self._streams.append(connection.stream)
        connection.stream.write(b"".join(map(peer.encode, first)))
        return connection

    async def ask(self, *first: peer.Message, context: Any = None) -> peer.Message | None:
        """Connect, say something, and return the answer."""
        return await answer(await self.connect(*first, context=context))

    def close(self) -> None:
        """Leave."""
        for sock in self._idle:
            sock.close()
        for stream in self._streams:
            stream.abort()


async def answer(connection: tls.Connection) -> peer.Message | None:
    """Return the next message, or None at the end."""
    decoder = peer.Decoder()
    while (message := decoder.next_message()) is None:
        data = await connection.stream.read()
        if not data:
            return None
        decoder.receive_data(data)
    return message


async def has_ended(sock: socket.socket) -> None:
    """Wait until the listener has closed a connection."""
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""


def run(
    test: Callable[[Site], Awaitable[None]],
    listening: socket.socket | None = None,
    directory: Path | None = None,
) -> None:
    """Run a test with a listener, which has to be serving still at the end."""

    async def main() -> None:
        sessions = FakeSessions()
        with listening or socket.create_server(("127.0.0.1", 0), backlog=128) as listens:
            listens.setblocking(False)
            server = PeerServer(
                listens,
                credentials=directory or credentials(),
                allowed=(HOST,),
                mobility=sessions,
            )
            site = Site(listens, sessions)
            serving = asyncio.create_task(server.serve())
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await test(site)
                assert not serving.done()
            finally:
                site.close()
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(main())


# -- lanes


def test_a_lane_is_no_handshake_of_tls() -> None:
    """It is told by its first byte; beside it, TLS goes on. Both ends find a dead flow."""

    async def test(site: Site) -> None:
        to = outgoing.Peer(HOST, site.port, credentials(), ())
        with await lane.connect(to, KEYING) as sock:
            waits = (KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            wanted = (1, 1, *waits, 1000 * USER_TIMEOUT_S)
            assert options(sock) == wanted
            assert site.sessions.lane_options == [wanted]
            assert isinstance(await site.ask(hello()), peer.Welcome)

    run(test)


def test_a_lane_without_the_key_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def test(site: Site) -> None:
        to = outgoing.Peer(HOST, site.port, credentials(), ())
        with pytest.raises(VtpmdError, match=r"^there is no lane to the destination: .*closed"):
            await lane.connect(to, KEYING._replace(key=bytes(32)))
        assert site.sessions.lane_options == []
        (await lane.connect(to, KEYING)).close()

    run(test)
    assert "a lane is refused: " in caplog.text


@pytest.mark.parametrize("said", [b"", MAGIC[:1], MAGIC + bytes(10), b"\x16", b"\x16\x03\x01"])
def test_who_begins_and_does_not_go_on_is_not_waited_for(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it begins; a lane is a handshake as any."""

    async def test(site: Site) -> None:
        monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.1)
        (sock,) = await site.open_idle(1)
        await asyncio.get_running_loop().sock_sendall(sock, said)
        await has_ended(sock)
        monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", TIMEOUT_S)
        assert isinstance(await site.ask(hello()), peer.Welcome)

    run(test)


def test_the_time_to_begin_is_a_part_of_the_time_to_shake_hands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who begins at the last moment has no more of it than who begins at once."""
    asked: list[float] = []

    async def first_byte(connection: socket.socket, until_s: float) -> bytes:
        asked.append(until_s)
        return await real_first_byte(connection, until_s)

    async def accept(connection: socket.socket, context: Any, until_s: float) -> tls.Connection:
        asked.append(until_s)
        return await real_accept(connection, context, until_s)

    real_first_byte, real_accept = tls.first_byte, tls.accept
    monkeypatch.setattr(tls, "first_byte", first_byte)
    monkeypatch.setattr(tls, "accept", accept)

    async def test(site: Site) -> None:
        assert isinstance(await site.ask(hello()), peer.Welcome)

    run(test)
    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_lanes_that_say_no_more_keep_no_peer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKES_PER_NETWORK_MAX", 3)

    async def test(site: Site) -> None:
        idle = await site.open_idle(3)
        for sock in idle:
            await asyncio.get_running_loop().sock_sendall(sock, MAGIC)
        assert isinstance(await site.ask(hello()), peer.Welcome)
        await has_ended(idle[0])

    run(test)


# -- handshakes


def test_connections_that_say_nothing_keep_no_peer_out() -> None:
    """Neither before TLS nor after it."""

    async def test(site: Site) -> None:
        await site.open_idle(2 * peer_server.PEERS_MAX)
        for _ in range(peer_server.PEERS_MAX):
            await site.connect()
        assert isinstance(await site.ask(hello()), peer.Welcome)
        assert isinstance(await site.ask(peer.Reclaim(SESSION)), peer.Kept)

    run(test)


def test_oldest_handshake_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKES_PER_NETWORK_MAX", 3)

    async def test(site: Site) -> None:
        first, second, *_ = await site.open_idle(3)
        silent = await site.connect()
        await has_ended(first)
        third = await site.open_idle(1)
        await has_ended(second)
        assert third
        # One of another address has room of its own.
        await site.open_idle(1, "127.0.0.2")
        assert isinstance(await site.ask(hello()), peer.Welcome)
        silent.stream.abort()

    run(test)


def test_address_with_the_most_handshakes_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKES_MAX", 4)

    async def test(site: Site) -> None:
        single = await site.open_idle(1, "127.0.0.2")
        many = await site.open_idle(3, "127.0.0.3")
        late = await site.open_idle(1, "127.0.0.4")
        await has_ended(many[0])
        for sock in (*single, *many[1:], *late):
            with pytest.raises(BlockingIOError):
                sock.recv(1)

    run(test)


def test_peer_that_has_said_what_it_wants_makes_room_for_nobody() -> None:
    async def test(site: Site) -> None:
        session = await site.connect(hello())
        assert isinstance(await answer(session), peer.Welcome)
        idle = await site.open_idle(handshakes.HANDSHAKES_PER_NETWORK_MAX + 2)
        await has_ended(idle[0])
        await has_ended(idle[1])
        assert site.sessions.n_welcomed == 1
        session.stream.write(b"still there?")
        assert isinstance(await answer(session), peer.Welcome)

    run(test)


def test_peer_that_says_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_server, "HELLO_TIMEOUT_S", 0.1)

    async def test(site: Site) -> None:
        assert await site.ask() is None

    run(test)
    assert "did not say in time what it wants" in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_addresses_of_one_host_are_counted_together(one: str, other: str, same: bool) -> None:
    assert (network(one) == network(other)) is same


def test_task_that_has_left_is_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKES_MAX", 1)

    async def main() -> None:
        counted = Handshakes()
        go_on = asyncio.Event()

        async def known() -> str:
            counted.enter("192.0.2.1")
            counted.leave()
            await go_on.wait()
            return "served"

        serving = asyncio.create_task(known())
        await asyncio.sleep(0)
        assert not counted.enter("192.0.2.1")
        go_on.set()
        assert await serving == "served"

    asyncio.run(main())


# -- slots


def test_peer_without_a_slot_is_told_so_and_a_reclaim_has_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(site: Site) -> None:
        sources = [await site.connect(hello()) for _ in range(peer_server.PEERS_MAX)]
        for source in sources:
            assert isinstance(await answer(source), peer.Welcome)
        refusal = await site.ask(hello())
        assert isinstance(refusal, peer.Refuse)
        assert refusal.reason == peer.Reason.BUSY
        assert refusal.text == "8 peers are served already; try again later"
        assert isinstance(await site.ask(peer.Reclaim(SESSION)), peer.Kept)
        sources[0].stream.close()
        while not isinstance(await site.ask(hello()), peer.Welcome):
            pass

    run(test)
    assert "peer localhost is refused: 8 peers are served already" in caplog.text


def test_reclaims_have_a_bound_of_their_own() -> None:
    async def test(site: Site) -> None:
        site.sessions.reclaims_may_go_on.clear()
        asking = [
            await site.connect(peer.Reclaim(SESSION)) for _ in range(peer_server.RECLAIMS_MAX + 1)
        ]
        answers = [asyncio.create_task(answer(each)) for each in asking]
        done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        refusal = done.pop().result()
        assert isinstance(refusal, peer.Refuse)
        assert refusal.reason == peer.Reason.BUSY
        assert isinstance(await site.ask(hello()), peer.Welcome)
        site.sessions.reclaims_may_go_on.set()
        kinds = [type(each) for each in await asyncio.gather(*answers)]
        assert kinds.count(peer.Kept) == peer_server.RECLAIMS_MAX

    run(test)


def test_session_outlives_the_credentials_that_it_began_with(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(credentials(), tmp_path / "credentials"))

    async def test(site: Site) -> None:
        session = await site.connect(hello())
        assert isinstance(await answer(session), peer.Welcome)
        shutil.copy(foreign_credentials() / "ca-cert.pem", directory)
        with pytest.raises(tls.HandshakeError, match="closed the connection"):
            await site.ask(hello())
        session.stream.write(b"still there?")
        assert isinstance(await answer(session), peer.Welcome)

    run(test, directory=directory)


def test_peers_that_come_and_go_leave_nothing_behind() -> None:
    """Neither descriptors nor tasks nor slots, whether they were served or refused."""

    async def test(site: Site) -> None:
        context = tls.client_context(credentials())
        foreign = tls.client_context(foreign_credentials())

        async def hop(*first: peer.Message) -> None:
            connection = await site.connect(*first, context=context)
            if first:
                assert await answer(connection) is not None
            connection.stream.close()

        before = counts()
        for _ in range(N_HOPS):
            await hop(hello())
            await hop(peer.Reclaim(SESSION))
            await hop()
            with pytest.raises(tls.HandshakeError):
                await site.connect(context=foreign)
        while counts() != before:  # noqa: ASYNC110 - no event says that a connection is gone
            await asyncio.sleep(POLL_S)

    run(test)


def counts() -> tuple[int, int]:
    """Return how many descriptors and tasks this process has."""
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


# -- who is not allowed, and what is written of it


@pytest.mark.parametrize(
    "first", [b"", peer.encode(hello()), b"\xff" * 64], ids=["", "hello", "garbage"]
)
def test_nothing_of_a_peer_that_is_not_allowed_is_read(first: bytes) -> None:
    async def test(site: Site) -> None:
        context = tls.client_context(stranger_credentials())
        connection = await tls.connect(HOST, site.port, context)
        connection.stream.write(first)
        refusal = await answer(connection)
        assert isinstance(refusal, peer.Refuse)
        assert refusal.reason == peer.Reason.NOT_ALLOWED
        assert not site.sessions.n_welcomed
        connection.stream.abort()

    run(test)


def test_flood_of_strangers_fills_no_log_and_hides_no_peer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(site: Site) -> None:
        loop = asyncio.get_running_loop()
        for sock in await site.open_idle(3 * peer_server.LOG_LINES_MAX):
            await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\n\r\n")
            await has_ended(sock)
        await site.ask(hello(), context=tls.client_context(stranger_credentials()))

    run(test)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "TLS 1.3" in line]) == peer_server.LOG_LINES_MAX
    assert len([line for line in lines if "peer stranger.example is not allowed" in line]) == 1


def test_what_was_left_out_is_said_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    limited = LimitedLog(logging.getLogger("test"), lines_max=2)
    for number in range(5):
        limited.write(logging.WARNING, f"line {number}")
    now_s += limited_log.INTERVAL_S
    for number in range(5, 7):
        limited.write(logging.WARNING, f"line {number}")
    now_s += limited_log.INTERVAL_S
    limited.write(logging.WARNING, "line 7")
    assert [record.getMessage() for record in caplog.records] == [
        "line 0",
        "line 1",
        "3 more lines such as the next were left out",
        "line 5",
        "line 6",
        "line 7",
    ]


# -- a failing accept()


class FailingSocket(socket.socket):
    """A listening socket whose accept() fails as often as it is told to."""

    failures: Sequence[int] = ()

    def accept(self) -> tuple[socket.socket, Any]:
        """Fail, or accept."""
        if self.failures:
            number, *self.failures = self.failures
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.mark.parametrize(
    "name",
    ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "ECONNABORTED", "EPROTO", "EPERM", "ETIMEDOUT"],
)
def test_listener_survives_a_failing_accept(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so once, unless it is only the connection that is gone."""
    monkeypatch.setattr(acceptor, "RETRY_S", 0.0)
    number = getattr(errno, name)
    listening = FailingSocket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()

    async def test(site: Site) -> None:
        listening.failures = [number] * 3
        assert isinstance(await site.ask(hello()), peer.Welcome)
        assert not listening.failures

    run(test, listening)
    lines = re.findall("cannot accept on the peers' socket: (.+); trying again", caplog.text)
    assert lines == ([] if name == "ECONNABORTED" else [os.strerror(number)])


def test_cancelled_acceptor_takes_no_connection() -> None:
    """The next one gets it."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            waiting = asyncio.create_task(Acceptor(listening, "a socket").accept())
            await asyncio.sleep(0)
            with socket.create_connection(listening.getsockname()) as connecting:
                waiting.cancel()
                await asyncio.wait([waiting])
                accepted, address = await Acceptor(listening, "a socket").accept()
                with accepted:
                    assert address == connecting.getsockname()

    asyncio.run(main())
