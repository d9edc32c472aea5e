"""What the engine asks vtpmd, of QEMU's commands: those that come before anybody can answer wait.

A client of the control socket stands for QEMU, which may connect before vtpmd is ready.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support.emulator_client import ControlClient
from vtpmd.core import LinkDescriptor, LinkOperation, LinkQuestion, Store, pack_link_serving
from vtpmd.daemon import engine_process, listener
from vtpmd.daemon.engine import Answer, Engine, Question
from vtpmd.front.boot import boot_record
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import start
from vtpmd.wire.tpm import Result

A_MOMENT_S = 0.2  # in which an answer would have come


def with_engine(path: Path, test: Callable[[Engine, Path], Awaitable[None]]) -> None:
    """Run a test with an engine, beside its vtpmd, on a state directory; stop it in order."""

    async def run(process: engine_process.EngineProcess) -> None:
        engine = Engine(process)
        deaths: list[str] = []
        await engine.attach(deaths.append)
        await test(engine, path / "control")
        await engine.stop()
        assert deaths == []

    with ExitStack() as stack:
        directory = stack.enter_context(StateDirectory.open(path))
        store = stack.enter_context(Store.create())
        control = stack.enter_context(listener.listen(path / "control"))
        begun = start(directory, MovingFiles(directory), None, None)
        serving = pack_link_serving("vtpmd")
        descriptors = {
            LinkDescriptor.DIRECTORY: directory.directory_fd,
            LinkDescriptor.LOCK: directory.lock_fd,
            LinkDescriptor.STORE: store.fd,
            LinkDescriptor.CONTROL: control.fileno(),
            LinkDescriptor.BOOT: stack.enter_context(boot_record(begun, None, None, serving)),
        }
        asyncio.run(run(engine_process.spawn(descriptors)))


def test_question_that_comes_before_anybody_can_answer_waits(tmp_path: Path) -> None:
    """Else QEMU would be told that its TPM runs."""

    async def test(engine: Engine, path: Path) -> None:
        asked: list[LinkQuestion] = []

        async def answer(question: Question) -> Answer:
            asked.append(question.number)
            return Answer((await engine.request(LinkOperation.INIT)).result)

        with ControlClient(path) as client:
            starting = asyncio.create_task(asyncio.to_thread(client.init))
            done, _ = await asyncio.wait({starting}, timeout=A_MOMENT_S)
            assert not done
            engine.serve(answer, lambda _: None)
            await starting
            assert asked == [LinkQuestion.ASK_INIT]
            await asyncio.to_thread(client.get_established)  # which only a TPM that is on answers

    with_engine(tmp_path / "state", test)


def test_answer_that_comes_when_the_engine_ends_leaves_it_to_end_in_order(tmp_path: Path) -> None:
    """QEMU is told that its command has failed."""

    async def test(engine: Engine, path: Path) -> None:
        asked, ending = asyncio.Event(), asyncio.Event()

        async def answer(_: Question) -> Answer:
            asked.set()
            await ending.wait()
            return Answer()

        engine.serve(answer, lambda _: None)
        with ControlClient(path) as client:
            starting = asyncio.create_task(asyncio.to_thread(client.request, 2, bytes(4)))
            await asked.wait()
            stopping = asyncio.create_task(engine.stop())
            await asyncio.sleep(0)  # the link is closed
            ending.set()
            await stopping
            assert await starting == Result.FAIL

    with_engine(tmp_path / "state", test)
