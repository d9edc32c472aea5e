"""Wait for sources: accept, shake hands, and give each to the vTPM.

A peer is whoever has a certificate of our CA and a name on the allow-list; until that is known
nothing of what it sends is read. Until it has said what it wants it has no slot: handshakes are
counted apart, so that connections that say nothing keep no peer out.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Final, Protocol

from vtpmd.daemon import lane, tls
from vtpmd.daemon.acceptor import Acceptor
from vtpmd.daemon.handshakes import Handshakes
from vtpmd.daemon.limited_log import LimitedLog
from vtpmd.errors import VtpmdError
from vtpmd.wire import greeting, peer

log = logging.getLogger(__name__)

# Sessions at once: one is served, others are told so, and some may be on their way out.
PEERS_MAX: Final = 8
# Reclaims at once, which find a place when all those are taken: a guest waits for each.
RECLAIMS_MAX: Final = 4
# From the handshake to the first message.
HELLO_TIMEOUT_S: Final = 10.0
# Of refused connections, in a minute; those of strangers and those of peers are counted apart.
LOG_LINES_MAX: Final = 20


class Sessions(Protocol):
    """What a peer is given to when it has said what it wants."""

    async def welcome(
        self, connection: tls.Connection, decoder: peer.Decoder, hello: peer.Hello
    ) -> None:
        """Serve a source; returns when its session no longer needs the connection."""

    async def take_lane(self, accepted: socket.socket, greets: greeting.Greeting) -> None:
        """Take the second connection of a session. Raises VtpmdError for one of none."""

    async def answer(self, connection: tls.Connection, question: peer.Ask | peer.Reclaim) -> None:
        """Answer a source that asks for its vTPM over a new connection."""


class Busy(VtpmdError):
    """There are as many peers as there may be."""


class PeerServer:
    """Serves sources on one listening socket."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        credentials: Path,
        allowed: tuple[str, ...],
        mobility: Sessions,
    ) -> None:
        """Take a non-blocking socket that listens; it stays the caller's. Raises VtpmdError."""
        self._acceptor = Acceptor(listening, "the peers' socket")
        self._credentials = tls.ServerCredentials(credentials)
        self._allowed = allowed
        self._mobility = mobility
        self._handshakes = Handshakes()
        self._peers = _Slots(PEERS_MAX)
        self._reclaims = _Slots(RECLAIMS_MAX)
        # Strangers must not use up the lines that say why a peer is refused.
        self._of_strangers = LimitedLog(log, LOG_LINES_MAX)
        self._of_peers = LimitedLog(log, LOG_LINES_MAX)

    async def serve(self) -> None:
        """Serve peers until cancelled; their connections are closed then."""
        async with asyncio.TaskGroup() as group:
            while True:
                accepted, address = await self._acceptor.accept()
                group.create_task(self._serve(accepted, address[0]))
                # Also while there is always another one, all else gets its turn.
                await asyncio.sleep(0)

    async def _serve(self, accepted: socket.socket, address: str) -> None:
        lines = self._of_strangers
        try:
            with accepted:  # nothing is left in it once tls.accept() has taken over
                if self._handshakes.enter(address):
                    lines.write(logging.WARNING, "too many handshakes: the oldest has made room")
                until_s = tls.accept_until_s()
                if greeting.begins(await tls.first_byte(accepted, until_s)):
                    await self._serve_lane(accepted, until_s)
                    return
                connection = await tls.accept(accepted, self._credentials.context(), until_s)
            lines = self._of_peers
            try:
                await self._serve_peer(connection)
            finally:
                connection.stream.close()
        except VtpmdError as error:
            lines.write(logging.WARNING, str(error))
        except (OSError, EOFError, peer.StreamError) as error:
            text = str(error) or type(error).__name__
            lines.write(logging.WARNING, f"a peer's connection ended: {text}")
        except Exception:  # a mistake of ours must not keep other peers out
            lines.write(logging.ERROR, "a peer could not be served", exc_info=True)
        finally:
            self._handshakes.leave()

    async def _serve_lane(self, accepted: socket.socket, until_s: float) -> None:
        """Give a session its lane. Who greets is told nothing before it has shown the key."""
        async with asyncio.timeout_at(until_s):
            await self._mobility.take_lane(accepted, await lane.read_greeting(accepted))

    async def _serve_peer(self, connection: tls.Connection) -> None:
        try:
            tls.check_allowed(connection.name, self._allowed)
            decoder = peer.Decoder()
            first = await _first_message(connection, decoder)
            self._handshakes.leave()
            await self._serve_first(connection, decoder, first)
        # The texts name the peer, whom they tell nothing that it does not know.
        except tls.PeerNotAllowed as error:
            await _refuse(connection, peer.Reason.NOT_ALLOWED, error)
            raise
        except Busy as error:
            await _refuse(connection, peer.Reason.BUSY, error)
            raise VtpmdError(f"peer {connection.name} is refused: {error}") from error

    async def _serve_first(
        self, connection: tls.Connection, decoder: peer.Decoder, first: peer.Message
    ) -> None:
        match first:
            case peer.Hello():
                with self._peers:
                    log.info("a source has connected: %s", connection.name)
                    await self._mobility.welcome(connection, decoder, first)
            case peer.Reclaim() | peer.Ask():
                with self._reclaims:
                    await self._mobility.answer(connection, first)
                    await connection.stream.drain()
            case _:
                raise peer.StreamError(f"it began with {type(first).__name__}")


class _Slots:
    """So many peers at once; entered by one more, it raises Busy."""

    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._n_taken = 0

    def __enter__(self) -> None:
        if self._n_taken == self._n_max:
            raise Busy(f"{self._n_max} peers are served already; try again later")
        self._n_taken += 1

    def __exit__(self, *_: object) -> None:
        self._n_taken -= 1


async def _first_message(connection: tls.Connection, decoder: peer.Decoder) -> peer.Message:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            while (message := decoder.next_message()) is None:
                data = await connection.stream.read()
                if not data:
                    raise EOFError("it closed the connection without a word")
                decoder.receive_data(data)
    except TimeoutError:
        raise VtpmdError(f"peer {connection.name} did not say in time what it wants") from None
    return message


async def _refuse(connection: tls.Connection, reason: peer.Reason, error: VtpmdError) -> None:
    connection.stream.write(peer.encode(peer.Refuse(reason, str(error))))
    await connection.stream.drain()
