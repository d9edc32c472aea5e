"""One vtpmd's attachment to a simulated engine: the link, ask.c, and vtpmd's own end of it.

It belongs to vtpmd's process, and ends with it; or with the engine, or by that, where vtpmd is
silent for too long.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from tests.sim.loop import Process
from vtpmd.core import Image, LinkCondition, LinkCustody, LinkOperation, link_condition
from vtpmd.daemon.engine import (
    Answer,
    Answerer,
    EngineDetached,
    EngineDied,
    Meanwhile,
    Question,
    Reply,
)
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine

LIBTPMS_VERSION: Final = 0x000902
# What is asked for at any time, and changes nothing: no step that a fault comes with.
_QUIET: Final = frozenset({LinkOperation.CAPTURE, LinkOperation.GET_CONDITION})
DECIDES_S: Final = 0.001


class SimLink:
    """In a daemon's place of ``vtpmd.daemon.engine.Engine``, and its store."""

    libtpms_version = LIBTPMS_VERSION

    def __init__(self, engine: SimEngine, process: Process) -> None:
        self.death: str | None = None
        self.closed = process.create_future()  # by the engine
        self.heard_s = process.time()
        self.waiting: asyncio.Future[Answer | None] | None = None  # the engine's
        self._engine = engine
        self._process = process
        self._lock = asyncio.Lock()
        self._answerer: Answerer | None = None
        self._asked: list[Question] = []  # before there was who answers
        self._answering: set[asyncio.Task[None]] = set()

    @classmethod
    async def attach(cls, engine: SimEngine, process: Process) -> SimLink:
        """asker_attach(): what is decided without vtpmd is done first."""
        while engine.server.is_deciding or engine.link is not None:  # noqa: ASYNC110
            await asyncio.sleep(DECIDES_S)
        link = cls(engine, process)
        engine.attached(link)
        return link

    @property
    def is_open(self) -> bool:
        """True while the engine takes what vtpmd says, and says something itself."""
        return self._process.alive and self._engine.link is self

    def close(self) -> None:
        """The engine closes it, or the process is gone: who waits for an answer gets none."""
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)
        if self._process.alive and not self.closed.done():
            self.closed.set_result(None)

    # vtpmd's end.

    async def request(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        meanwhile: Meanwhile | None = None,
        *,
        soon: bool = True,
    ) -> Reply:
        del soon
        async with self._lock:
            self._check()
            if meanwhile is not None:
                meanwhile.run()
            if operation not in _QUIET:
                self._engine.note(f"engine: {operation.name}")
            await self._engine.late()
            self._check()
            self.heard_s = self._process.time()
            return self._engine.do(operation, int(argument), bytes(payload))

    def _check(self) -> None:
        self._process.check_alive()
        if self.death is not None:
            raise EngineDied(self.death)
        if not self.is_open:
            raise EngineDetached("the link is closed")

    async def condition(self) -> tuple[LinkCondition, LinkCustody]:
        reply = await self.request(LinkOperation.GET_CONDITION)
        return link_condition(reply.argument)

    async def end_control(self) -> None:
        await self.request(LinkOperation.END_CONTROL)
        await asyncio.gather(*self._answering)

    async def raise_generations(self, floor: int) -> None:
        self._check()
        self._engine.note("engine: RAISE_GENERATION")
        self._engine.raise_generations(floor)

    def generation(self, kind: StateType) -> int:
        return self._engine.generation(kind)

    def read(self, kind: StateType) -> Image:
        return self._engine.read(kind)

    def answer_by(self, answerer: Answerer) -> None:
        self._answerer = answerer
        asked, self._asked = self._asked, []
        for question in asked:
            self._take(question)

    # The engine's end.

    def ask(self, question: Question, waiting: asyncio.Future[Answer | None]) -> None:
        """Have the question come, and its answer go where the engine waits for it."""
        self.heard_s = self._process.time()
        self.waiting = waiting
        self._process.call_soon(self._take, question)

    def tell(self, news: Question) -> None:
        """Have the news come."""
        self._process.call_soon(self._take, news)

    def _take(self, question: Question) -> None:
        if self._answerer is None:
            self._asked.append(question)
        elif question.number.is_news:
            self._answerer.hear(question)
        else:
            task = self._process.create_task(self._answer(self._answerer, question))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, answerer: Answerer, question: Question) -> None:
        answer = await answerer.answer(question)
        if self.is_open and self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(answer)
