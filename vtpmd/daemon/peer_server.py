"""Wait for sources: accept, shake hands, and give each to the vTPM.

A peer is whoever has a certificate of our CA and a name on the allow-list; until that is known
nothing of what it sends is read.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Final

from vtpmd.daemon import tls
from vtpmd.daemon.mobility import Mobility
from vtpmd.errors import VtpmdError
from vtpmd.wire import peer

log = logging.getLogger(__name__)

# Handshakes and sessions at once; one session is served, others are told so.
PEERS_MAX: Final = 8
# From the handshake to the first message.
HELLO_TIMEOUT_S: Final = 10.0


class PeerServer:
    """Serves sources on one listening socket."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        credentials: Path,
        allowed: tuple[str, ...],
        mobility: Mobility,
    ) -> None:
        """Take a socket that listens; it stays the caller's. Raises VtpmdError."""
        self._listening = listening
        self._context = tls.server_context(credentials)
        self._allowed = allowed
        self._mobility = mobility
        self._slots = asyncio.Semaphore(PEERS_MAX)

    async def serve(self) -> None:
        """Serve peers until cancelled; their connections are closed then."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listening)
                task = group.create_task(self._serve(connection))
                task.add_done_callback(lambda _: self._slots.release())

    async def _serve(self, accepted: socket.socket) -> None:
        try:
            connection = await tls.accept(accepted, self._context)
            try:
                await self._serve_peer(connection)
            finally:
                connection.stream.close()
        except VtpmdError as error:
            log.warning("%s", error)
        except (OSError, EOFError, TimeoutError, peer.StreamError) as error:
            log.warning("a peer's connection ended: %s", str(error) or type(error).__name__)
        except Exception:  # a mistake of ours must not keep other peers out
            log.exception("a peer could not be served")

    async def _serve_peer(self, connection: tls.Connection) -> None:
        try:
            tls.check_allowed(connection.name, self._allowed)
        except tls.PeerNotAllowed as error:
            # The text names the peer, whom it tells nothing that it does not know.
            refusal = peer.Refuse(peer.Reason.NOT_ALLOWED, str(error))
            connection.stream.write(peer.encode(refusal))
            await connection.stream.drain()
            raise
        decoder = peer.Decoder()
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await _first_message(connection, decoder)
        match first:
            case peer.Hello():
                log.info("a source has connected: %s", connection.name)
                await self._mobility.welcome(connection, decoder, first)
            case peer.Reclaim() | peer.Ask():
                await self._mobility.answer(connection, first)
                await connection.stream.drain()
            case _:
                raise peer.StreamError(f"it began with {type(first).__name__}")


async def _first_message(connection: tls.Connection, decoder: peer.Decoder) -> peer.Message:
    while (message := decoder.next_message()) is None:
        data = await connection.stream.read()
        if not data:
            raise EOFError("it closed the connection without a word")
        decoder.receive_data(data)
    return message
