"""The lane's connection, until it is the engines': docs/lane-format.md.

Beside the stream the two vtpmd of a session have a second connection. Its first bytes, a greeting,
name the session, and a frame of each side shows that it has the session's key, which only the
stream has carried. Then the sockets are handed down.
"""

from __future__ import annotations

import asyncio
import socket
from struct import Struct
from typing import TYPE_CHECKING, Final

from vtpmd.core.lane import (
    LANE_FRAME_BYTES,
    LANE_SESSION_BYTES,
    Lane,
    LaneError,
    LaneFrame,
    LaneKeying,
    LaneKind,
)
from vtpmd.daemon import tls
from vtpmd.daemon.readiness import Readiness
from vtpmd.daemon.tls_stream import find_dead_flow
from vtpmd.errors import VtpmdError

if TYPE_CHECKING:
    from vtpmd.daemon.outgoing import Peer

MAGIC: Final = b"VTPMLANE"
_GREETING: Final = Struct(f">{len(MAGIC)}s{LANE_SESSION_BYTES}s{LANE_FRAME_BYTES}s")
GREETING_BYTES: Final = _GREETING.size
_HELLO: Final = LaneFrame(LaneKind.HELLO)
# Connection, greeting and answer.
OPEN_TIMEOUT_S: Final = 5.0


async def connect(to: Peer, keying: LaneKeying) -> socket.socket:
    """Open the lane of a session, as its source; return its socket. Raises VtpmdError."""
    lane = Lane(keying, is_source=True)
    greeting = _GREETING.pack(MAGIC, keying.session, lane.seal(_HELLO))
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            sock = await tls.connect_without(to.host, to.port)
            try:
                await asyncio.get_running_loop().sock_sendall(sock, greeting)
                _check_hello(lane, await _read(sock, LANE_FRAME_BYTES))
            except BaseException:
                sock.close()
                raise
    except (OSError, EOFError) as error:  # a timeout is an OSError
        text = str(error) or type(error).__name__
        raise VtpmdError(f"the lane to {to} cannot be opened: {text}") from error
    except LaneError as error:
        raise VtpmdError(f"the lane to {to} cannot be opened: {error}") from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def is_greeted(accepted: socket.socket) -> bool:
    """Wait for what a connection begins with; return whether that is a lane's greeting.

    Nothing of it is taken. Raises OSError.
    """
    readiness = Readiness(accepted)
    try:
        async with asyncio.timeout(tls.HANDSHAKE_TIMEOUT_S):
            while True:
                try:
                    return accepted.recv(1, socket.MSG_PEEK) == MAGIC[:1]
                except BlockingIOError:
                    await readiness.wait()
    finally:
        readiness.close()


async def read_greeting(accepted: socket.socket) -> tuple[bytes, bytes]:
    """Return the session that a lane is of, and its first frame.

    Raises EOFError, OSError, or VtpmdError for what is no greeting.
    """
    find_dead_flow(accepted)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    async with asyncio.timeout(tls.HANDSHAKE_TIMEOUT_S):
        magic, session, frame = _GREETING.unpack(await _read(accepted, GREETING_BYTES))
    if magic != MAGIC:
        raise VtpmdError("a connection began as a lane, and is none")
    return session, frame


def greet_back(keying: LaneKeying, frame: bytes) -> bytes:
    """Check a source's first frame; return the one that answers it. Raises VtpmdError."""
    lane = Lane(keying, is_source=False)
    try:
        _check_hello(lane, frame)
    except LaneError as error:
        raise VtpmdError(f"a lane is refused: {error}") from error
    return lane.seal(_HELLO)


def _check_hello(lane: Lane, frame: bytes) -> None:
    lane.open(frame)  # no other kind has its number


async def _read(sock: socket.socket, n_bytes: int) -> bytes:
    data = bytearray()
    loop = asyncio.get_running_loop()
    while len(data) < n_bytes:
        more = await loop.sock_recv(sock, n_bytes - len(data))
        if not more:
            raise EOFError("it was closed")
        data += more
    return bytes(data)
