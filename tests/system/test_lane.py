"""The lane's connection: how two vtpmd come by it, and what is refused until one has the key.

Invariants 3 and 8. Whose bytes come is not known before a frame opens: until then nothing is
answered, no session is harmed, and what is asked for is a handshake's room.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness.bare_engine import BareEngine, with_engine
from tests.harness.fake_peer import (
    HELLO,
    TIMEOUT_S,
    WELCOME,
    FakeDestination,
    FakeLane,
    Stream,
    connect,
    hello,
    open_lane,
)
from tests.harness.handover import Host, assert_whole, make_host
from tests.harness.lab import Lab
from tests.support.emulator_client import receive_exactly
from vtpmd.core import LinkOperation
from vtpmd.core.lane import LANE_FRAME_BYTES, Lane, LaneFrame, LaneKeying, LaneKind
from vtpmd.core.link import pack_link_lane
from vtpmd.testing.credentials import HOST, credentials
from vtpmd.testing.emulator import Peering
from vtpmd.wire import greeting, peer
from vtpmd.wire.greeting import GREETING_BYTES, Greeting
from vtpmd.wire.tpm import Result

QUIET = Peering(credentials=credentials(), log_level="info")
KEY = bytes(range(peer.KEY_BYTES))
GRANT = LaneFrame(LaneKind.GRANT)


@pytest.fixture
def host(lab: Lab) -> Host:
    """Give a test a destination."""
    return make_host(lab, QUIET)


@pytest.fixture
def fake(lab: Lab) -> FakeDestination:
    """Give a test a destination that says what the test says."""
    destination = FakeDestination(credentials())
    lab.close_at_end(destination)
    return destination


def keying_of(said: peer.Hello) -> LaneKeying:
    """Return what both sides of a session know, once the Key has come."""
    return LaneKeying(said.session, KEY, said.uuid, said.lineage)


@contextmanager
def welcomed(host: Host, *said: peer.Message) -> Iterator[tuple[Stream, LaneKeying]]:
    """Be a source that is welcome, and says something then."""
    stream = connect(host.vtpmd.port, credentials())
    try:
        first = hello()
        stream.send(first)
        stream.receive(peer.Welcome)
        stream.send(*said)
        yield stream, keying_of(first)
    finally:
        stream.close()


def plain(host: Host, data: bytes) -> socket.socket:
    """Connect without TLS, and say something."""
    sock = socket.create_connection((HOST, host.vtpmd.port), TIMEOUT_S)
    sock.sendall(data)
    return sock


def assert_closed_in_silence(sock: socket.socket) -> None:
    """Check that a connection ends, and that nothing was said on it."""
    with sock, suppress(ConnectionResetError):
        assert sock.recv(1) == b""


def greets(keying: LaneKeying, *, is_source: bool = True) -> bytes:
    """Return what a lane's connection begins with."""
    side = Lane(keying, is_source=is_source)
    return greeting.encode(Greeting(keying.session, side.seal(HELLO)))


def flipped(data: bytes, at: int) -> bytes:
    """Return bytes with one of them altered."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# -- the destination


def test_a_source_with_the_key_gets_the_lane(host: Host) -> None:
    with welcomed(host, peer.Key(KEY)) as (stream, keying):
        lane = open_lane(host.vtpmd.port, keying)
        stream.send(peer.Ping(keying.session))
        stream.receive(peer.Pong)
        lane.close()


def test_a_greeting_may_come_in_pieces(host: Host) -> None:
    with welcomed(host, peer.Key(KEY)) as (_, keying):
        sock = plain(host, b"")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in greets(keying):
            sock.sendall(bytes([byte]))
        assert len(receive_exactly(sock, LANE_FRAME_BYTES)) == LANE_FRAME_BYTES
        sock.close()


def test_a_lane_that_comes_before_its_key_waits_for_it(host: Host) -> None:
    """They come over two connections: either may be late."""
    with welcomed(host) as (stream, keying):
        sock = plain(host, greets(keying))
        other = plain(host, greeting.encode(Greeting(bytes(16), bytes(LANE_FRAME_BYTES))))
        assert_closed_in_silence(other)  # the first one's greeting has been read by now, too
        stream.send(peer.Key(KEY))
        assert len(receive_exactly(sock, LANE_FRAME_BYTES)) == LANE_FRAME_BYTES
        sock.close()


FORGERIES: dict[str, Callable[[LaneKeying], bytes]] = {
    "another key": lambda right: greets(right._replace(key=bytes(32))),
    "another uuid": lambda right: greets(right._replace(uuid=b"u" * 16)),
    "another lineage": lambda right: greets(right._replace(lineage=b"l" * 16)),
    "the other direction": lambda right: greets(right, is_source=False),
    "another number": lambda right: greeting.encode(
        Greeting(right.session, Lane(right._replace(is_greeted=True), is_source=True).seal(GRANT))
    ),
    "an altered frame": lambda right: flipped(greets(right), GREETING_BYTES - 1),
    "a session that there is not": lambda right: flipped(greets(right), 10),
    "another magic": lambda right: flipped(greets(right), 1),
    "another version": lambda right: flipped(greets(right), 9),
    "nothing": lambda _: greeting.encode(Greeting(bytes(16), bytes(LANE_FRAME_BYTES))),
}


def test_what_is_forged_is_told_nothing_and_harms_no_session(host: Host) -> None:
    with welcomed(host, peer.Key(KEY)) as (stream, keying):
        for forge in FORGERIES.values():
            assert_closed_in_silence(plain(host, forge(keying)))
        lane = open_lane(host.vtpmd.port, keying)
        stream.send(peer.Ping(keying.session))
        stream.receive(peer.Pong)
        lane.close()
    lines = [line for line in host.log if "a lane is refused: " in line]
    assert len(lines) == len(FORGERIES)
    assert KEY.hex() not in host.vtpmd.program.output


def test_a_greeting_that_is_cut_harms_no_session(host: Host) -> None:
    with welcomed(host, peer.Key(KEY)) as (_, keying):
        for length in (1, 8, GREETING_BYTES - 1):
            sock = plain(host, greets(keying)[:length])
            sock.shutdown(socket.SHUT_WR)
            assert_closed_in_silence(sock)
        open_lane(host.vtpmd.port, keying).close()


def test_a_session_has_one_lane(host: Host) -> None:
    """The same numbers under the same keys would be another one's. A replay comes too late."""
    with welcomed(host, peer.Key(KEY)) as (stream, keying):
        lane = open_lane(host.vtpmd.port, keying)
        assert_closed_in_silence(plain(host, greets(keying)))
        stream.send(peer.Ping(keying.session))
        stream.receive(peer.Pong)
        lane.close()


def test_of_a_replayed_greeting_one_connection_becomes_the_lane(host: Host) -> None:
    """Both come before the Key, and one of them is sent back what the other would be."""
    with welcomed(host) as (stream, keying):
        both = [plain(host, greets(keying)) for _ in range(2)]
        stream.send(peer.Key(KEY))
        answers = []
        for sock in both:
            with sock:
                try:
                    answers.append(receive_exactly(sock, LANE_FRAME_BYTES))
                except ConnectionError:
                    answers.append(b"")
        assert sorted(map(len, answers)) == [0, LANE_FRAME_BYTES]


def test_no_state_comes_before_the_lane(host: Host) -> None:
    for message in (peer.Record(b"record"), peer.Commit(1, 1, 1, 0, 0)):
        with welcomed(host, peer.Key(KEY), message) as (stream, _):
            assert stream.wait_for_end() == []


def test_a_session_that_is_over_has_no_lane(host: Host) -> None:
    with welcomed(host, peer.Key(KEY)) as (stream, keying):
        stream.send(peer.Disarm(keying.session))
        stream.wait_for_end()
        assert_closed_in_silence(plain(host, greets(keying)))


def test_a_lane_ends_with_its_session(host: Host) -> None:
    with welcomed(host, peer.Key(KEY)) as (stream, keying):
        lane = open_lane(host.vtpmd.port, keying)
        stream.send(peer.Disarm(keying.session))
        assert lane.has_ended()
        lane.close()


# -- the source


def answer(data: Callable[[FakeLane, bytes], bytes]) -> Callable[[FakeDestination, Stream], None]:
    """Answer a greeting with something else than a HELLO."""

    def take(fake: FakeDestination, stream: Stream) -> None:
        key = stream.receive(peer.Key).key
        sock = fake.accept_plain()
        with sock:
            came = receive_exactly(sock, GREETING_BYTES)
            session = greeting.decode(came).session
            side = FakeLane(sock, LaneKeying(session, key, bytes(16), bytes(16)), is_source=False)
            sock.sendall(data(side, came))

    return take


ANSWERS = {
    "nothing": answer(lambda *_: b""),
    "half a frame": answer(lambda *_: bytes(LANE_FRAME_BYTES // 2)),
    "what was said": answer(lambda _, came: came[-LANE_FRAME_BYTES:]),
    "zeros": answer(lambda *_: bytes(LANE_FRAME_BYTES)),
    "another vTPM's": answer(lambda side, _: side.seal(HELLO)),
}


@pytest.mark.parametrize("take", ANSWERS.values(), ids=ANSWERS)
def test_a_source_without_a_lane_falls_back(
    lab: Lab, fake: FakeDestination, take: Callable[[FakeDestination, Stream], None]
) -> None:
    source = make_host(lab, QUIET)
    source.guest.boot()
    source.manage.command("migrate-arm", to=fake.address)
    stream = fake.accept()
    stream.receive(peer.Hello)
    stream.send(WELCOME)
    take(fake, stream)
    reason = source.manage.wait_for("VTPM_FALL_BACK")["data"]["reason"]
    assert reason.startswith("there is no lane to the destination: ")
    assert "\n" not in reason
    assert_whole(source.guest.save())


def test_a_peer_of_an_earlier_version_is_refused(host: Host) -> None:
    """It has no lane, and would wait for a Take that nobody sends."""
    stream = connect(host.vtpmd.port, credentials())
    stream.send(hello()._replace(version=3, version_minimum=3))
    assert stream.receive(peer.Refuse).reason == peer.Reason.VERSION
    stream.close()


# -- the engine


def test_the_engine_takes_a_lane_only_whole(tmp_path: Path) -> None:
    keying = LaneKeying(bytes(16), KEY, bytes(16), bytes(16), is_greeted=True)
    payload = pack_link_lane(keying, is_source=True)

    async def test(bare: BareEngine) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for wrong, descriptor in (
                (payload, None),
                (payload[:-1], theirs.fileno()),
                (payload + b"\0", theirs.fileno()),
                (b"", theirs.fileno()),
            ):
                reply = await bare.engine.request(
                    LinkOperation.SET_LANE, payload=wrong, descriptor=descriptor
                )
                assert reply.result == Result.BAD_PARAMETER

    with_engine(tmp_path, test)


def test_the_next_lane_and_the_end_of_the_session_close_the_one_before(tmp_path: Path) -> None:
    async def test(bare: BareEngine) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        for number, (ours, theirs) in enumerate(pairs, 1):
            ours.settimeout(TIMEOUT_S)
            keying = LaneKeying(bytes([number] * 16), KEY, bytes(16), bytes(16), is_greeted=True)
            with theirs:
                await bare.engine.set_lane(theirs.fileno(), keying, is_source=True)
        assert await asyncio.to_thread(pairs[0][0].recv, 1) == b""
        await bare.engine.request(LinkOperation.WITHDRAW)
        assert await asyncio.to_thread(pairs[1][0].recv, 1) == b""
        for ours, _ in pairs:
            ours.close()

    with_engine(tmp_path, test)


def test_what_is_sent_behind_the_greeting_is_the_engines(host: Host) -> None:
    """vtpmd reads no further than the greeting: a frame that is forged ends the lane there."""
    with welcomed(host, peer.Key(KEY)) as (_, keying):
        sock = plain(host, greets(keying) + bytes(LANE_FRAME_BYTES))
        assert len(receive_exactly(sock, LANE_FRAME_BYTES)) == LANE_FRAME_BYTES
        assert_closed_in_silence(sock)


# -- an armed session


def armed(source: Host, fake: FakeDestination) -> tuple[Stream, FakeLane]:
    """Arm a session with a destination that says what the test says."""
    source.guest.boot()
    source.manage.command("migrate-arm", to=fake.address)
    stream, _ = fake.hold_base()
    source.manage.wait_for("VTPM_ARMED")
    return stream, fake.lanes[-1]


def test_the_reason_for_the_end_is_what_the_stream_says(lab: Lab, fake: FakeDestination) -> None:
    """It comes by another connection than the end of the lane, and may be the later one."""
    source = make_host(lab, QUIET)
    stream, lane = armed(source, fake)
    os.kill(source.vtpmd.program.pid, signal.SIGSTOP)
    lane.socket.shutdown(socket.SHUT_WR)
    assert lane.has_ended()  # the engine has seen it, and vtpmd will
    stream.send(peer.Refuse(peer.Reason.STATE, "a word that comes later"))
    os.kill(source.vtpmd.program.pid, signal.SIGCONT)
    event = source.manage.wait_for("VTPM_FALL_BACK")
    assert "a word that comes later" in event["data"]["reason"]
    assert_whole(source.guest.save())


def test_a_lane_that_ends_without_a_word_ends_the_session(lab: Lab, fake: FakeDestination) -> None:
    source = make_host(lab, QUIET)
    _, lane = armed(source, fake)
    lane.close()
    event = source.manage.wait_for("VTPM_FALL_BACK")
    assert event["data"]["reason"] == "the lane to the destination broke"
    assert_whole(source.guest.save())
