"""One vtpmd's attachment to a simulated engine: the link, ask.c, and vtpmd's own end of it.

It belongs to vtpmd's process, and ends with it; or with the engine, or by that, where vtpmd is
silent for too long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from tests.sim.loop import Process
from vtpmd.core import Image, LinkOperation
from vtpmd.core.lane import LaneKeying
from vtpmd.core.link import (
    LinkCondition,
    LinkCopy,
    LinkCustody,
    LinkQuestion,
    link_condition,
    unpack_link_copy,
    unpack_link_staged,
)
from vtpmd.daemon.engine import (
    Answer,
    Answerer,
    EngineDetached,
    EngineDied,
    Meanwhile,
    Question,
    Reply,
)
from vtpmd.errors import VtpmdError
from vtpmd.wire.state_level import Library
from vtpmd.wire.tpm import StateType, TpmVersion

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine

LIBRARY: Final = Library("0.9.2", {})
# What is asked for at any time, and changes nothing: no step that a fault comes with.
_QUIET: Final = frozenset({LinkOperation.CAPTURE, LinkOperation.COPY, LinkOperation.GET_CONDITION})
DECIDES_S: Final = 0.001
# What is answered to a question that needs no answer any more.
SETTLED: Final = Answer()
# How often what the engine says comes late, and how late.
LATE: Final = 0.15
LATENCY_S: Final = (0.0001, 0.001, 0.01)
# After the engine has done its part; 0: before. A disk may be slow.
MEANWHILE_S: Final = (0.0, 0.0, 0.001, 0.05)


class Way:
    """One way of the link: what is said arrives in order."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._under_way: deque[Callable[[], None]] = deque()
        self._is_late = False

    def say(self, arrives: Callable[[], None]) -> None:
        """Have something arrive."""
        self._under_way.append(arrives)
        if not self._is_late:
            self._let_come()

    def _let_come(self) -> None:
        self._is_late = True
        rng = self._process.rng
        delay_s = rng.choice(LATENCY_S) if rng.random() < LATE else 0.0
        self._process.call_later(delay_s, self._arrive)

    def _arrive(self) -> None:
        arrives = self._under_way.popleft()
        self._is_late = bool(self._under_way)
        if self._is_late:
            self._let_come()
        arrives()


class SimLink:
    """In a daemon's place of ``vtpmd.daemon.engine.Engine``, and its store."""

    library = LIBRARY
    tpm_version = TpmVersion.TPM_2_0

    def __init__(self, engine: SimEngine, process: Process) -> None:
        self.death: str | None = None
        self.closed = process.create_future()  # by the engine
        self.heard_s = process.time()
        self.is_quiet = False  # vtpmd has no session: it need not be asked
        self.waiting: asyncio.Future[Answer | None] | None = None  # the engine's
        self._engine = engine
        self._process = process
        self._way = Way(process)  # to vtpmd
        self._lock = asyncio.Lock()
        self._answerer: Answerer | None = None
        self._question: Question | None = None  # that it waits for the answer to
        # Before there was who answers.
        self._asked: list[tuple[Question, asyncio.Future[Answer | None] | None]] = []
        self._answering: set[asyncio.Task[None]] = set()
        self._promised: dict[LinkQuestion, asyncio.Future[bytes]] = {}

    @classmethod
    async def attach(cls, engine: SimEngine, process: Process) -> SimLink:
        """asker_attach(): what is decided, or written, without vtpmd is done first."""
        while engine.is_busy or engine.link is not None:  # noqa: ASYNC110
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
        for promised in self._promised.values():
            promised.set_exception(EngineDetached("the link is closed"))
            promised.exception()
        self._promised.clear()

    def promise(self, number: LinkQuestion) -> asyncio.Future[bytes]:
        promised: asyncio.Future[bytes] = self._process.create_future()
        self._promised[number] = promised
        return promised

    # vtpmd's end.

    async def request(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        meanwhile: Meanwhile | None = None,
        *,
        soon: bool = True,
        descriptor: int | None = None,
    ) -> Reply:
        del soon
        async with self._lock:
            self._check()
            later_s = self._process.rng.choice(MEANWHILE_S)
            if meanwhile is not None and not later_s:
                meanwhile.run()
            if operation not in _QUIET:
                self._engine.note(f"engine: {operation.name}")
            await self._engine.late()
            self._check()
            self.heard_s = self._process.time()
            if operation is LinkOperation.BE_ASKED:
                await self._be_asked(is_so=bool(argument))
            done = self._engine.do(operation, int(argument), bytes(payload), descriptor)
            if meanwhile is not None and later_s:
                await asyncio.sleep(later_s)
                meanwhile.run()
            return await self._come(done)

    async def _be_asked(self, *, is_so: bool) -> None:
        """asker_be_asked(): what is decided without vtpmd is done first."""
        while self._engine.server.is_deciding:  # noqa: ASYNC110
            await asyncio.sleep(DECIDES_S)
        self._check()
        self.is_quiet = not is_so

    async def set_lane(self, lane: int, keying: LaneKeying, *, is_source: bool) -> None:
        async with self._lock:
            self._check()
            self._engine.note("engine: SET_LANE")
            await self._engine.late()
            self._check()
            self._engine.set_lane(lane, keying, is_source=is_source)
            await self._come(Reply(0, 0, bytearray()))

    async def _come(self, reply: Reply) -> Reply:
        """Have a reply come behind what the engine has said before."""
        coming: asyncio.Future[Reply] = self._process.create_future()
        self._way.say(lambda: coming.set_result(reply))
        await asyncio.wait({coming, self.closed}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            self._check()
        return await coming

    def _check(self) -> None:
        self._process.check_alive()
        if self.death is not None:
            raise EngineDied(self.death)
        if not self.is_open:
            raise EngineDetached("the link is closed")

    async def condition(self) -> tuple[LinkCondition, LinkCustody]:
        reply = await self.request(LinkOperation.GET_CONDITION)
        return link_condition(reply.argument)

    async def copy(self) -> LinkCopy:
        reply = await self.request(LinkOperation.COPY)
        if reply.result:
            raise VtpmdError(f"the engine cannot copy: {reply.result:#x}")
        return unpack_link_copy(reply.payload)

    async def staged(self) -> Image:
        return unpack_link_staged((await self.request(LinkOperation.GET_STAGED)).payload)

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
        for question, waiting in asked:
            self._take(question, waiting)

    # The engine's end.

    def ask(self, question: Question, waiting: asyncio.Future[Answer | None]) -> None:
        """Have the question come, and its answer go where the engine waits for it."""
        self.heard_s = self._process.time()
        self.waiting, self._question = waiting, question
        self._way.say(partial(self._take, question, waiting))

    def settle(self, number: LinkQuestion) -> None:
        """asker_settle()."""
        if self.waiting is None or self.waiting.done() or self._question is None:
            return
        if self._question.number is number:
            self.waiting.set_result(SETTLED)

    def tell(self, news: Question) -> None:
        """Have the news come."""
        self._way.say(partial(self._take, news, None))

    def _take(self, question: Question, waiting: asyncio.Future[Answer | None] | None) -> None:
        if (promised := self._promised.pop(question.number, None)) is not None:
            promised.set_result(question.payload)
        elif self._answerer is None:
            self._asked.append((question, waiting))
        elif question.number.is_news:
            self._answerer.hear(question)
        else:
            task = self._process.create_task(self._answer(self._answerer, question, waiting))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(
        self,
        answerer: Answerer,
        question: Question,
        waiting: asyncio.Future[Answer | None] | None,
    ) -> None:
        answer = await answerer.answer(question)
        if self.is_open and waiting is not None and not waiting.done():
            waiting.set_result(answer)
