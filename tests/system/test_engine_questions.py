"""What the engine asks vtpmd, of QEMU's commands: those that come before anybody can answer wait.

A client of the control socket stands for QEMU, which may connect before vtpmd is ready.
"""

import asyncio
from pathlib import Path

from tests.harness.bare_engine import BareEngine, Late, NoSessions, with_engine
from tests.support.emulator_client import ControlClient
from vtpmd.core.link import LinkQuestion
from vtpmd.daemon.engine import Answer, Engine, Question
from vtpmd.wire.tpm import Result

A_MOMENT_S = 0.2  # in which an answer would have come


class Noting(NoSessions):
    """Notes what it is asked."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.asked: list[LinkQuestion] = []

    async def answer(self, question: Question) -> Answer:
        """Note it."""
        self.asked.append(question.number)
        return await super().answer(question)


def test_question_that_comes_before_anybody_can_answer_waits(tmp_path: Path) -> None:
    """Else QEMU would be told that its TPM runs."""

    async def test(bare: BareEngine) -> None:
        noting = Noting(bare.engine)
        with ControlClient(bare.control_path) as client:
            starting = asyncio.create_task(asyncio.to_thread(client.init))
            done, _ = await asyncio.wait({starting}, timeout=A_MOMENT_S)
            assert not done
            bare.engine.answer_by(noting)
            await starting
            assert noting.asked == [LinkQuestion.ASK_INIT]
            await asyncio.to_thread(client.get_established)  # which only a TPM that is on answers

    with_engine(tmp_path / "state", test)


def test_answer_that_comes_when_the_engine_ends_leaves_it_to_end_in_order(tmp_path: Path) -> None:
    """QEMU is told that its command has failed."""

    async def test(bare: BareEngine) -> None:
        late = Late(bare.engine)
        bare.engine.answer_by(late)
        with ControlClient(bare.control_path) as client:
            starting = asyncio.create_task(asyncio.to_thread(client.request, 2, bytes(4)))
            await late.asked.wait()
            stopping = asyncio.create_task(bare.engine.stop())
            await asyncio.sleep(0)  # it is told to end
            late.ending.set()
            await stopping
            assert await starting == Result.FAIL

    with_engine(tmp_path / "state", test)
