"""An engine whose vtpmd is the test: it speaks on the link, and answers what the engine asks."""

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from vtpmd.core import LinkDescriptor, LinkNames, LinkOperation, Store, pack_link_serving
from vtpmd.core.link import LinkQuestion
from vtpmd.daemon import engine_process, listener
from vtpmd.daemon.attachment import attach
from vtpmd.daemon.engine import Answer, Engine, Question
from vtpmd.front.boot import boot_record
from vtpmd.store.directory import LINK_NAME, StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import start

SERVING = pack_link_serving("vtpmd", LinkNames(socket="control", link=LINK_NAME))
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


class Late(NoSessions):
    """Answers when it is told to."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.asked, self.ending = asyncio.Event(), asyncio.Event()

    async def answer(self, _: Question) -> Answer:
        """Wait."""
        self.asked.set()
        await self.ending.wait()
        return Answer()


class BareEngine:
    """An engine that was started, its store, and its control socket."""

    def __init__(self, engine: Engine, store: Store, control_path: Path, deaths: list[str]) -> None:
        self.engine = engine
        self.store = store
        self.control_path = control_path
        self.deaths = deaths  # what it was heard of; nothing, when the test is done

    def lose_vtpmd(self) -> None:
        """Close the link as a vtpmd that dies does; the engine is stopped by a signal then."""
        self.engine._close()


def descriptors_for(
    stack: ExitStack, path: Path, boot_fd: Callable[[StateDirectory], int]
) -> tuple[dict[LinkDescriptor, int], Store]:
    """Return what an engine on a state directory is started with."""
    directory = stack.enter_context(StateDirectory.open(path))
    store = stack.enter_context(Store.create())
    control = stack.enter_context(listener.listen(path / "control"))
    link = stack.enter_context(listener.listen_in(directory.directory_fd, LINK_NAME))
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, parent)
    return {
        LinkDescriptor.SOCKET: link.fileno(),
        LinkDescriptor.DIRECTORY: directory.directory_fd,
        LinkDescriptor.LOCK: directory.lock_fd,
        LinkDescriptor.STORE: store.fd,
        LinkDescriptor.CONTROL: control.fileno(),
        LinkDescriptor.CONTROL_DIRECTORY: parent,
        LinkDescriptor.BOOT: boot_fd(directory),
    }, store


async def attached(directory_fd: int, on_death: Callable[[str], None]) -> Engine:
    """Attach to the engine of a state directory, a child of this process."""
    attachment = await attach(directory_fd)
    for fd in (attachment.directory_fd, attachment.lock_fd, attachment.store_fd):
        os.close(fd)
    engine = Engine(attachment, is_child=True)
    engine.begin(on_death, on_end=lambda: None)
    return engine


def with_engine(path: Path, test: Callable[[BareEngine], Awaitable[None]]) -> None:
    """Run a test with an engine on a state directory; stop it in order."""

    async def run(directory_fd: int, store: Store) -> None:
        deaths: list[str] = []
        engine = await attached(directory_fd, deaths.append)
        bare = BareEngine(engine, store, path / "control", deaths)
        await test(bare)
        await bare.engine.stop()
        assert deaths == []

    with ExitStack() as stack:

        def boot_fd(directory: StateDirectory) -> int:
            begun = start(directory, MovingFiles(directory), None, None)
            return stack.enter_context(boot_record(begun, None, None, SERVING))

        descriptors, store = descriptors_for(stack, path, boot_fd)
        engine_process.spawn(descriptors)
        asyncio.run(run(descriptors[LinkDescriptor.DIRECTORY], store))


def sealed(record: bytes, seals: int = SEALS) -> int:
    """Return a memfd with a boot record."""
    fd = os.memfd_create("boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, record)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
