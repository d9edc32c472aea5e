"""A TLS connection in the event loop: what one side writes, and what the other has said.

Not asyncio's streams: a message costs them several times what it takes OpenSSL, and that is what
the guest waits for between Take and Grant. They also close a connection whose handshake failed
without the alert that tells the peer why (CPython's issue 98078); OpenSSL by itself sends it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from contextlib import suppress
from typing import Final, Self

from vtpmd.daemon.readiness import Readiness
from vtpmd.wire import peer

# Two of the largest images in records: the first round. More is under way at no time.
UNSENT_BYTES_MAX: Final = 4 * peer.FRAME_BYTES_MAX
# For the other side to read the last word, and to close: a round trip, with a base under way.
LINGER_S: Final = 1.0

# A flow that a firewall has forgotten, or whose other end has lost its power, ends without a word.
# The kernel asks an idle peer after KEEPALIVE_IDLE_S and then each KEEPALIVE_INTERVAL_S, and gives
# up after KEEPALIVE_COUNT questions; what was sent must be acknowledged within USER_TIMEOUT_S. The
# latter counts for both (tcp_keepalive_timer() in net/ipv4/tcp_timer.c), hence the same five
# seconds: two lost packets are no dead flow, and a migration that stalls for longer falls back.
KEEPALIVE_IDLE_S: Final = 2
KEEPALIVE_INTERVAL_S: Final = 1
KEEPALIVE_COUNT: Final = 3
USER_TIMEOUT_S: Final = 5

# How long one peer may keep the event loop to itself, with messages that come faster than they are
# taken: QEMU's commands wait for the same loop.
TURN_NS: Final = 10_000_000

_WOULD_BLOCK: Final = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


def find_dead_flow(sock: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other end is gone; also while it connects.

    A read fails with TimeoutError then, or ends: CPython before 3.12.3 takes an error beneath TLS
    for an end (its issue 115627). Raises OSError.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_S * 1000)


class TlsStream:
    """A connection whose handshake is done. It belongs to one event loop; one task reads.

    ``heard_ns`` is when the peer was last heard of: the clock of ``time.monotonic_ns()`` at the end
    of the last read that brought something, or of the handshake.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.socket = sock
        self._loop = asyncio.get_running_loop()
        self._readiness = Readiness(sock)
        self._unsent = bytearray()
        self._drained = asyncio.Event()
        self._drained.set()
        self._failure: OSError | None = None
        self._closed = False
        self._turn_began_ns = time.monotonic_ns()
        self.heard_ns = 0

    @classmethod
    async def handshake(
        cls, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None
    ) -> Self:
        """Shake hands over a connected, non-blocking socket, which this takes over.

        ``server_hostname`` is None on the side that listens. Raises OSError, ssl.SSLError among
        them, or ValueError for a name that is none; the socket is closed then.
        """
        tls = None
        try:
            # asyncio does this only for sockets that it has made: a Take must not wait for an ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = context.wrap_socket(
                sock,
                server_side=server_hostname is None,
                server_hostname=server_hostname,
                do_handshake_on_connect=False,
            )
            stream = cls(tls)
            await stream._shake_hands()
            stream.heard_ns = time.monotonic_ns()
        except BaseException:
            (tls or sock).close()
            raise
        return stream

    async def _shake_hands(self) -> None:
        try:
            while True:
                try:
                    return self.socket.do_handshake()
                except ssl.SSLWantReadError:
                    await self._readiness.wait()
                except ssl.SSLWantWriteError:
                    await self._writable()
        except BaseException:
            self._readiness.close()
            _forget_failure(self.socket)
            raise

    async def read(self) -> bytes:
        """Wait for bytes and return them; none when the other side has closed. Raises OSError."""
        await self.give_way()
        while not self._closed:
            if self._failure is not None:
                raise self._failure
            try:
                data = self.socket.recv(peer.READ_BYTES_MAX)
            except ssl.SSLWantReadError:
                await self._readiness.wait()
                self._turn_began_ns = time.monotonic_ns()
            except ssl.SSLWantWriteError:
                await self._writable()
            except OSError:
                _forget_failure(self.socket)
                raise
            else:
                if data:
                    self.heard_ns = time.monotonic_ns()
                return data
        return b""

    async def give_way(self) -> None:
        """Let all else have its turn if the peer has had the event loop for TURN_NS.

        To be called between two messages: what these lead to may all be done without a wait.
        """
        if time.monotonic_ns() - self._turn_began_ns > TURN_NS:
            await asyncio.sleep(0)
            self._turn_began_ns = time.monotonic_ns()

    def write(self, data: bytes) -> None:
        """Send, and keep what there is no room for until there is; a failure shows in read()."""
        if self._closed or self._failure is not None:
            return
        sent = 0 if self._unsent else self._send(data)
        if sent < len(data):
            self._keep(data[sent:])

    async def drain(self) -> None:
        """Wait until all is on its way that was written. Raises OSError."""
        await self._drained.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the connection. May be repeated."""
        if not self._leave_loop():
            return
        try:
            self.socket.unwrap()  # says so; raises, as the other side has not said so yet
        except OSError:
            _forget_failure(self.socket)
        with suppress(OSError), socket.socket(fileno=self.socket.detach()) as plain:
            plain.shutdown(socket.SHUT_WR)
            _linger(self._loop, plain.detach())

    def abort(self) -> None:
        """End the connection at once, as a crash would. May be repeated."""
        if self._leave_loop():
            self.socket.close()

    def _leave_loop(self) -> bool:
        """Return True the first time: then the socket is not watched any more."""
        if self._closed:
            return False
        self._closed = True
        self._readiness.close()
        self._loop.remove_writer(self.socket)
        self._drained.set()
        return True

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self.socket.send(data)
        except _WOULD_BLOCK:
            return 0
        except OSError as error:
            _forget_failure(self.socket)
            self._fail(error)
            return len(data)

    def _keep(self, data: bytes) -> None:
        if len(self._unsent) + len(data) > UNSENT_BYTES_MAX:
            self._fail(ConnectionError("it does not read what it is sent"))
            return
        self._unsent += data
        self._drained.clear()
        self._loop.add_writer(self.socket, self._send_kept)

    def _send_kept(self) -> None:
        del self._unsent[: self._send(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self.socket)
            self._drained.set()

    def _fail(self, error: OSError) -> None:
        self._failure = error
        self._unsent.clear()
        self._loop.remove_writer(self.socket)
        self._drained.set()
        self._readiness.close()  # who reads hears of it

    async def _writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self.socket, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(self.socket)


def _forget_failure(failed: ssl.SSLSocket) -> None:
    """Keep a connection's failure from being another one's.

    OpenSSL has one queue of errors for a thread, and CPython does not look whether it is empty
    before it reads or writes (its issue 148594); since 3.13 a reset leaves its error there. To make
    a TLS object clears it.
    """
    with suppress(ssl.SSLError, ValueError):
        failed.context.wrap_bio(
            ssl.MemoryBIO(),
            ssl.MemoryBIO(),
            server_side=failed.server_side,
            server_hostname=failed.server_hostname,
        )


def _linger(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    """Close a socket when the other side has; until then, drop what it still sends.

    TCP takes back what is on its way to the other side if something is left unread here, or comes
    afterwards: a refusal would be lost to a source that is sending its base.
    """

    def end() -> None:
        loop.remove_reader(descriptor)
        timer.cancel()
        os.close(descriptor)

    def drop() -> None:
        try:
            if os.read(descriptor, peer.READ_BYTES_MAX):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # it is gone
        end()

    timer = loop.call_later(LINGER_S, end)
    loop.add_reader(descriptor, drop)
