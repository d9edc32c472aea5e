"""An engine whose vtpmd is the test: it speaks on the link, and answers what the engine asks."""

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from vtpmd.core import LinkDescriptor, LinkOperation, LinkQuestion, Store, pack_link_serving
from vtpmd.daemon import engine_process, listener
from vtpmd.daemon.engine import Answer, Engine, Question
from vtpmd.front.boot import boot_record
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import start

SERVING = pack_link_serving("vtpmd")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class NoSessions:
    """Answers as a vtpmd that moves nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def answer(self, question: Question) -> Answer:
        """Have the engine do it."""
        if question.number is LinkQuestion.ASK_INIT:
            return Answer((await self._engine.request(LinkOperation.INIT)).result)
        return Answer()

    def hear(self, news: Question) -> None:
        """Forget it."""


class BareEngine:
    """An engine that was started, its store, and its control socket."""

    def __init__(self, engine: Engine, store: Store, control_path: Path) -> None:
        self.engine = engine
        self.store = store
        self.control_path = control_path
        self.deaths: list[str] = []  # what it was heard of; nothing, when the test is done


def descriptors_for(
    stack: ExitStack, path: Path, boot_fd: Callable[[StateDirectory], int]
) -> tuple[dict[LinkDescriptor, int], Store]:
    """Return what an engine on a state directory is started with."""
    directory = stack.enter_context(StateDirectory.open(path))
    store = stack.enter_context(Store.create())
    control = stack.enter_context(listener.listen(path / "control"))
    return {
        LinkDescriptor.DIRECTORY: directory.directory_fd,
        LinkDescriptor.LOCK: directory.lock_fd,
        LinkDescriptor.STORE: store.fd,
        LinkDescriptor.CONTROL: control.fileno(),
        LinkDescriptor.BOOT: boot_fd(directory),
    }, store


def with_engine(path: Path, test: Callable[[BareEngine], Awaitable[None]]) -> None:
    """Run a test with an engine on a state directory; stop it in order."""

    async def run(process: engine_process.EngineProcess, store: Store) -> None:
        engine = Engine(process)
        bare = BareEngine(engine, store, path / "control")
        await engine.attach(bare.deaths.append)
        await test(bare)
        await engine.stop()
        assert bare.deaths == []

    with ExitStack() as stack:

        def boot_fd(directory: StateDirectory) -> int:
            begun = start(directory, MovingFiles(directory), None, None)
            return stack.enter_context(boot_record(begun, None, None, SERVING))

        descriptors, store = descriptors_for(stack, path, boot_fd)
        asyncio.run(run(engine_process.spawn(descriptors), store))


def sealed(record: bytes, seals: int = SEALS) -> int:
    """Return a memfd with a boot record."""
    fd = os.memfd_create("boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, record)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
