"""What the engine asks of QEMU's commands: where a session makes something else of one.

The engine carries out all other commands, and all of these where there is no session, by itself
(``csrc/engine/commands.h``).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from vtpmd.core.handover import Handover
from vtpmd.core.link import (
    LinkAskedInit,
    LinkQuestion,
    TailRefusal,
    unpack_link_handover,
    unpack_link_restored,
)
from vtpmd.daemon.engine import Answer, EngineDied, Question
from vtpmd.daemon.mobility import Mobility, NotOurs
from vtpmd.errors import VtpmdError
from vtpmd.wire.tpm import Result

log = logging.getLogger(__name__)

DONE: Final = Answer()

# What QEMU calls what is asked.
COMMANDS: Final = {
    LinkQuestion.ASK_INIT: "INIT",
    LinkQuestion.ASK_STOP: "STOP",
    LinkQuestion.ASK_STATE: "GET_STATEBLOB",
    LinkQuestion.ASK_BLOB: "SET_STATEBLOB",
    LinkQuestion.ASK_TAIL: "SET_STATEBLOB",
    LinkQuestion.ASK_CONNECTED: "SET_DATAFD",
    LinkQuestion.ASK_RUNS: "LOCK_STORAGE",
}


class Asked:
    """Answers what the engine asks."""

    def __init__(self, mobility: Mobility, on_shutdown: Callable[[], None]) -> None:
        self._mobility = mobility
        self._on_shutdown = on_shutdown
        self._answers: dict[LinkQuestion, Callable[[Question], Awaitable[Answer]]] = {
            LinkQuestion.ASK_INIT: self._init,
            LinkQuestion.ASK_STOP: self._stop,
            LinkQuestion.ASK_STATE: self._state,
            LinkQuestion.ASK_BLOB: self._blob,
            LinkQuestion.ASK_TAIL: self._tail,
            LinkQuestion.ASK_CONNECTED: self._connected,
            LinkQuestion.ASK_RUNS: self._runs,
        }

    async def answer(self, question: Question) -> Answer:
        """Return the answer to a question, whatever happens: QEMU waits for it."""
        try:
            return await self._answers[question.number](question)
        except EngineDied:
            return Answer(Result.FAIL)
        except NotOurs as error:
            log.error("%s is refused: %s", COMMANDS[question.number], error)
        except Exception as error:  # QEMU, and who asks next, must be served on
            _log_failure(question, error)
        is_tail = question.number is LinkQuestion.ASK_TAIL
        return Answer(Result.BAD_PARAMETER if is_tail else Result.FAIL)

    def hear(self, news: Question) -> None:
        """Take what needs no answer. Whatever happens, the engine is heard on."""
        try:
            self._take(news)
        except Exception as error:  # as above
            _log_failure(news, error)

    def _take(self, news: Question) -> None:
        if news.number is LinkQuestion.TELL_INIT:
            self._mobility.init_answered()
        elif news.number is LinkQuestion.TELL_RUNNING:
            self._mobility.runs = bool(news.argument)
        elif news.number is LinkQuestion.TELL_HANDOVER:
            self._mobility.handed_over(Handover(news.argument), unpack_link_handover(news.payload))
        elif news.number is LinkQuestion.TELL_GIVEN:
            self._mobility.gave_whole_state()
        elif news.number is LinkQuestion.TELL_RESTORED:
            generations = unpack_link_restored(news.payload)
            self._mobility.lineages.has_restored(*generations, epoch=news.argument)
        elif news.number in (LinkQuestion.TELL_SHUTDOWN, LinkQuestion.TELL_SIGNAL):
            self._on_shutdown()

    async def _init(self, question: Question) -> Answer:
        asked = LinkAskedInit(question.argument)
        return Answer(await self._mobility.init(asked))

    async def _stop(self, _: Question) -> Answer:
        # QEMU stops the TPM before it loads a state, with the guest standing still.
        await self._mobility.stopping()
        return DONE

    async def _state(self, _: Question) -> Answer:
        await self._mobility.give_tail()
        return DONE

    async def _blob(self, _: Question) -> Answer:
        return Answer(await self._mobility.take_blob())

    async def _tail(self, question: Question) -> Answer:
        await self._mobility.refuse_tail(TailRefusal(question.argument))
        return Answer(Result.BAD_PARAMETER)

    async def _connected(self, _: Question) -> Answer:
        await self._mobility.qemu_connected()
        return DONE

    async def _runs(self, _: Question) -> Answer:
        # The lock itself is held from start to end. QEMU's guest runs here again.
        await self._mobility.guest_runs()
        return DONE


def _log_failure(question: Question, error: Exception) -> None:
    if isinstance(error, VtpmdError):
        log.error("%s", error)
        return
    # Only our own errors are known to hold nothing of the TPM's state.
    log.error("%s failed: %s", question.number.name, type(error).__name__)
    log.debug("the error was raised here", exc_info=error)
