"""The stream on its own: what is written arrives whole, and nobody waits for a closed one."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable

import pytest

from vtpmd.daemon import tls, tls_stream
from vtpmd.daemon.tls_stream import TlsStream
from vtpmd.testing.credentials import credentials
from vtpmd.wire import peer

HOST = "localhost"
TIMEOUT_S = 30.0
WRITES_MAX = 100  # 30 MiB: TCP's buffers grow to 6 MiB and 4 MiB
LARGE = bytes(range(256)) * 8192  # with what is kept, more than the sockets' buffers hold


async def connected() -> tuple[TlsStream, TlsStream]:
    """Return both ends of a connection over loopback."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        accepting = asyncio.create_task(loop.sock_accept(listening))
        ours = socket.create_connection(listening.getsockname())
        ours.setblocking(False)
        theirs, _ = await accepting
    return await asyncio.gather(
        TlsStream.handshake(ours, tls.client_context(credentials()), HOST),
        TlsStream.handshake(theirs, tls.server_context(credentials()), None),
    )


def run(test: Callable[[TlsStream, TlsStream], Awaitable[None]]) -> None:
    """Run a test with both ends of a connection."""

    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            one, other = await connected()
            try:
                await test(one, other)
            finally:
                one.abort()
                other.abort()

    asyncio.run(main())


async def read_exactly(stream: TlsStream, n_bytes: int) -> bytes:
    """Read that much."""
    data = bytearray()
    while len(data) < n_bytes:
        piece = await stream.read()
        assert piece
        data += piece
    return bytes(data)


async def read_all(stream: TlsStream) -> bytes:
    """Read until the other side closes."""
    data = bytearray()
    while piece := await stream.read():
        data += piece
    return bytes(data)


def test_what_has_no_room_is_sent_when_there_is() -> None:
    """In pieces, both ways at once."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        sent = LARGE[: tls_stream.UNSENT_BYTES_MAX - 1] + b"!"
        for stream in (one, other):
            stream.write(sent[:-1])
            stream.write(sent[-1:])
        received = await asyncio.gather(*(read_exactly(each, len(sent)) for each in (one, other)))
        await asyncio.gather(one.drain(), other.drain())
        assert received == [sent, sent]

    run(test)


def test_close_is_the_end_for_the_other_side_and_loses_nothing() -> None:
    """Also when there is something unread: TCP would take back what was sent last."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        other.write(b"never read")
        one.write(b"the last words")
        one.close()
        assert await read_all(other) == b"the last words"
        one.close()
        one.write(b"nobody gets this")
        assert await one.read() == b""

    run(test)


def test_who_reads_hears_of_a_close() -> None:
    """A session that is ended by another task must not wait for ever."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        reading = asyncio.create_task(one.read())
        await asyncio.sleep(0)
        one.close()
        assert await reading == b""
        assert await other.read() == b""

    run(test)


def test_peer_that_does_not_read_is_given_up() -> None:
    """What is kept for it has a limit."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        del other
        for _ in range(WRITES_MAX):
            one.write(LARGE[: peer.FRAME_BYTES_MAX])
        with pytest.raises(ConnectionError):
            await one.drain()
        with pytest.raises(ConnectionError):
            await one.read()

    run(test)


def test_altered_record_ends_the_connection() -> None:
    """What TLS does not believe is an error, not an end."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        with socket.socket(fileno=os.dup(one.socket.fileno())) as beneath:
            beneath.send(b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises(ssl.SSLError):
                await other.read()

    run(test)


def test_when_the_peer_was_last_heard_of() -> None:
    """By what came, not by what was sent, nor by an end."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        first_ns = one.heard_ns
        assert 0 < first_ns <= time.monotonic_ns()
        one.write(b"?")
        assert await other.read() == b"?"
        assert other.heard_ns > first_ns
        assert one.heard_ns == first_ns
        before_ns = time.monotonic_ns()
        other.write(b"!")
        assert await one.read() == b"!"
        heard_ns = one.heard_ns
        assert before_ns < heard_ns <= time.monotonic_ns()
        other.close()
        assert await one.read() == b""
        assert one.heard_ns == heard_ns

    run(test)


def test_failed_connection_is_no_other_ones_failure() -> None:
    """Neither when it is written to, nor when it is closed."""

    async def test(one: TlsStream, other: TlsStream) -> None:
        for fails in (lambda stream: stream.write(b"lost"), TlsStream.close):
            ours, theirs = await connected()
            theirs.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.abort()
            with pytest.raises(OSError):
                while await ours.read():
                    pass
                raise ConnectionError  # CPython before 3.12.3 takes a reset for an end
            fails(ours)
            reading = asyncio.create_task(one.read())
            await asyncio.sleep(0)  # there is nothing to read yet
            other.write(b"well")
            assert await reading == b"well"
            ours.close()

    run(test)
