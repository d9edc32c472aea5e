"""The lane's connection, until it is the engines': docs/lane-format.md.

Beside the stream the two vtpmd of a session have a second connection. What it begins with, a
greeting, names the session, and a frame of each side shows that it has the session's key, which
only the stream has carried. Then the sockets are handed down.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final

from vtpmd.core.lane import LANE_FRAME_BYTES, Lane, LaneError, LaneFrame, LaneKeying, LaneKind
from vtpmd.daemon import tls
from vtpmd.daemon.tls_stream import find_dead_flow
from vtpmd.errors import VtpmdError
from vtpmd.wire import greeting
from vtpmd.wire.greeting import Greeting, GreetingError

if TYPE_CHECKING:
    from vtpmd.daemon.outgoing import Peer

_HELLO: Final = LaneFrame(LaneKind.HELLO)
# Connection, greeting and answer.
OPEN_TIMEOUT_S: Final = 5.0


async def connect(to: Peer, keying: LaneKeying) -> socket.socket:
    """Open the lane of a session, as its source; return its socket. Raises VtpmdError.

    To be called once for a session: its key makes one lane.
    """
    lane = Lane(keying, is_source=True)
    greets = greeting.encode(Greeting(keying.session, lane.seal(_HELLO)))
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            sock = await tls.connect_without(to.host, to.port)
            try:
                _prepare(sock)
                await asyncio.get_running_loop().sock_sendall(sock, greets)
                lane.open(await _read(sock, LANE_FRAME_BYTES))
            except BaseException:
                sock.close()
                raise
    except (OSError, LaneError) as error:
        why = error if isinstance(error, LaneError) else tls.explain(error, str(to))
        raise VtpmdError(f"there is no lane to the destination: {why}") from error
    return sock


async def read_greeting(accepted: socket.socket) -> Greeting:
    """Return what a connection begins with, and read no further.

    Raises OSError, or VtpmdError for what is no greeting.
    """
    find_dead_flow(accepted)
    _prepare(accepted)
    try:
        return greeting.decode(await _read(accepted, greeting.GREETING_BYTES))
    except GreetingError as error:
        raise VtpmdError(f"a lane is refused: {error}") from error


def greet_back(keying: LaneKeying, hello: bytes) -> bytes:
    """Check a source's first frame; return the one that answers it. Raises VtpmdError."""
    lane = Lane(keying, is_source=False)
    try:
        lane.open(hello)  # of no other kind: none has its number
    except LaneError as error:
        raise VtpmdError(f"a lane is refused: {error}") from error
    return lane.seal(_HELLO)


def _prepare(sock: socket.socket) -> None:
    """Have no frame wait for another one's acknowledgement."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _read(sock: socket.socket, n_bytes: int) -> bytes:
    """Return so many bytes: what comes after them is the engine's to read. Raises OSError."""
    data = bytearray()
    while len(data) < n_bytes:
        more = await asyncio.get_running_loop().sock_recv(sock, n_bytes - len(data))
        if not more:
            raise ConnectionError("it closed the connection without a word")
        data += more
    return bytes(data)
