"""Ask another host what became of a vTPM: each time over a new connection, until there is an end.

A connection that a firewall has forgotten, or that a crash has left, answers nothing: none is used
twice.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from vtpmd.daemon import tls
from vtpmd.daemon.limited_log import NewsLog
from vtpmd.errors import VtpmdError
from vtpmd.migration.states import ImpossibleEvent
from vtpmd.wire import peer

if TYPE_CHECKING:
    from vtpmd.daemon.outgoing import Peer

log = logging.getLogger(__name__)

# Connection, handshake, question and answer.
ANSWER_TIMEOUT_S: Final = 2.0
# The first waits are short, as a guest may wait; a host that is down stays down for minutes.
PAUSE_MIN_S: Final = 0.1
PAUSE_MAX_S: Final = 30.0

ANSWERS: Final = (peer.Released, peer.Kept, peer.Unknown, peer.Refuse)


async def ask(to: Peer, question: peer.Message) -> peer.Message:
    """Ask once; return the answer, one of ANSWERS. Raises VtpmdError, in one line."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            connection = await to.connect()
            try:
                connection.stream.write(peer.encode(question))
                return await _answer(connection)
            finally:
                connection.stream.close()
    except TimeoutError as error:
        raise VtpmdError(f"{to} does not answer within {ANSWER_TIMEOUT_S:.0f} s") from error
    except ssl.SSLError as error:
        raise VtpmdError(str(tls.explain(error, str(to)))) from error
    except (OSError, EOFError, peer.StreamError) as error:
        raise VtpmdError(f"{to} cannot be asked: {error}") from error


async def _answer(connection: tls.Connection) -> peer.Message:
    decoder = peer.Decoder()
    while True:
        data = await connection.stream.read()
        if not data:
            raise EOFError("it closed the connection without an answer")
        decoder.receive_data(data)
        while (message := decoder.next_message()) is not None:
            if isinstance(message, ANSWERS):
                return message


class Asking:
    """Asks on behalf of one session, again and again, for as long as that has a question."""

    def __init__(
        self,
        to: Peer,
        question: Callable[[], peer.Message | None],
        answered: Callable[[peer.Message], Awaitable[None]],
    ) -> None:
        self._to = to
        self._question = question
        self._answered = answered
        self._task: asyncio.Task[None] | None = None
        self._pause_s = PAUSE_MIN_S
        self._hurry = asyncio.Event()
        self._is_over = False
        self._news = NewsLog(log.warning)

    def begin(self) -> None:
        """Ask from now on, if that is not done already."""
        if self._task is None or self._task.done():
            self._pause_s = PAUSE_MIN_S
            self._task = asyncio.create_task(self._ask_again_and_again())

    def hurry(self) -> None:
        """Somebody waits for the answer: ask now."""
        self._pause_s = PAUSE_MIN_S
        self._hurry.set()

    def end(self) -> None:
        """Ask no more; what has been answered is carried out. May be repeated."""
        self._is_over = True
        self._hurry.set()

    def abandon(self) -> None:
        """Ask no more, and carry out nothing."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()

    async def finished(self) -> None:
        """Wait until there is nothing more to ask; cancelled, no more is asked."""
        if self._task is None:
            return
        try:
            await self._task
        finally:
            self._task.cancel()

    async def _ask_again_and_again(self) -> None:
        while not self._is_over and (question := self._question()) is not None:
            self._hurry.clear()
            try:
                answer = await ask(self._to, question)
                if isinstance(answer, peer.Kept) and type(self._question()) is not type(question):
                    continue  # something else is to be asked by now
                self._news.write(
                    f"the host that the vTPM went to, {self._to}, says {_words(answer)}",
                )
                # Whoever has it will not give it back soon.
                if isinstance(answer, peer.Kept):
                    self._pause_s = PAUSE_MAX_S
                await self._answered(answer)
            except (VtpmdError, ImpossibleEvent) as error:
                self._news.write(f"whose the vTPM is, is not known: {error}; asking again")
            except Exception as error:  # a mistake of ours must not leave the vTPM with nobody
                self._news.write(f"the answer could not be taken: {error!r}; asking again")
                log.debug("the error was raised here", exc_info=error)
            if self._question() is None:
                return
            await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._pause_s):
                await self._hurry.wait()
        except TimeoutError:
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)


def _words(answer: peer.Message) -> str:
    match answer:
        case peer.Released():
            return "that it has let go of it"
        case peer.Kept():
            return "that it has it"
        case peer.Refuse(text=text):
            return f"nothing: {text}"
    return "that it does not know of it"
