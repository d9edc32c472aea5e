"""The process around the vTPM: event loop, signals, log, start and stop in order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpmd.config import RunConfig
from vtpmd.core import Store
from vtpmd.daemon import signals
from vtpmd.daemon.asked import Asked
from vtpmd.daemon.attachment import Attachment, NotAttached, attach
from vtpmd.daemon.child import EXIT_ENGINE_DIED, either, follow
from vtpmd.daemon.engine import EXIT_STOPPED, STOP_TIMEOUT_S, Engine, EngineDied
from vtpmd.daemon.limited_log import log_failure
from vtpmd.daemon.mobility import NO_UUID, Mobility
from vtpmd.daemon.qemu import follow as follow_qemu
from vtpmd.daemon.settling import settle
from vtpmd.errors import VtpmdError
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Record, fork_text
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from vtpmd.store.keys import Key

log = logging.getLogger("vtpmd")

# Before an engine that has closed the link is attached to again.
PAUSE_MIN_S: Final = 0.1
PAUSE_MAX_S: Final = 10.0
# What may be waited for once this is to end, and has not begun to serve: it takes milliseconds.
SETTLE_TIMEOUT_S: Final = 1.0


class Resources(NamedTuple):
    """What the process has opened before the event loop runs; it stays the caller's."""

    directory_fd: int  # the state directory, whose engine is looked after
    path: str  # of it, for people
    key: Key | None
    peers: socket.socket | None
    management: socket.socket | None
    # The engine's process number, where this process has started it: the vTPM ends with this then.
    child: int | None


class Stop:
    """That this vtpmd is to end, and perhaps its vTPM."""

    def __init__(self, *, ends_vtpm: bool) -> None:
        self.ends_vtpm = ends_vtpm
        self._event = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether it is to end."""
        return self._event.is_set()

    def leave(self) -> None:
        """This vtpmd is to end."""
        self._event.set()

    def end(self) -> None:
        """The vTPM ends, and so does its vtpmd."""
        self.ends_vtpm = True
        self._event.set()

    async def wait(self) -> None:
        """Wait until it is to end."""
        await self._event.wait()


def serve(resources: Resources, config: RunConfig) -> int:
    """Look after one vTPM until QEMU or a signal ends it; return the exit status.

    The engine is gone when this returns if this process has started it, or the vTPM has ended.
    Raises VtpmdError if it cannot serve.
    """
    configure_logging(config.name, config.log_level)
    return asyncio.run(_serve(resources, config))


def configure_logging(name: str | None, level: str) -> None:
    """Write log lines to standard error, one a message, with the guest's name."""
    prefix = "vtpmd" if name is None else f"vtpmd[{name}]"
    logging.basicConfig(format=f"{prefix}: %(message)s", level=level.upper())
    # asyncio's own debug lines say nothing about a vTPM.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


async def _serve(resources: Resources, config: RunConfig) -> int:
    stop = Stop(ends_vtpm=resources.child is not None)
    signals.take(stop.leave)
    try:
        return await _serve_until_stopped(resources, config, stop)
    except NotAttached as error:
        if resources.child is not None:
            return await follow(resources.child, error, stop.wait)
        if stop.is_set:
            return EXIT_STOPPED
        raise


async def _serve_until_stopped(resources: Resources, config: RunConfig, stop: Stop) -> int:
    """Attach, and again whenever the engine has closed the link; return the exit status."""
    engine = await _serve_attached(resources, config, stop, is_first=True)
    pause_s = PAUSE_MIN_S
    while not stop.is_set:
        log.warning("the engine has closed the link and serves on: attaching again")
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await stop.wait()
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
        if not stop.is_set:
            await engine.detach()
            engine = await _serve_attached(resources, config, stop, is_first=False)
    await (engine.stop() if stop.ends_vtpm else engine.detach())
    if engine.death is not None:
        return EXIT_ENGINE_DIED
    return engine.exit_status


async def _serve_attached(
    resources: Resources, config: RunConfig, stop: Stop, *, is_first: bool
) -> Engine:
    """Attach and serve until it is to stop, or the engine has closed the link.

    Raises VtpmdError if that cannot begin; later there is another try.
    """
    engine, attachment = await _attach(resources, stop)
    begun = asyncio.Event()
    leaving = asyncio.create_task(_leave_in_time(engine, begun, stop))
    try:
        await _serve_engine(engine, attachment, resources, config, stop, begun)
    except BaseException as error:
        if isinstance(error, EngineDied) and stop.is_set:
            return engine  # it was not waited for
        if isinstance(error, VtpmdError) and not is_first:
            log.error("%s", error)
            return engine
        await (engine.stop() if resources.child is not None else engine.detach())
        raise
    finally:
        leaving.cancel()
    return engine


async def _attach(resources: Resources, stop: Stop) -> tuple[Engine, Attachment]:
    """Attach, if the engine greets before this vtpmd is to end. Raises NotAttached."""
    attaching = asyncio.create_task(attach(resources.directory_fd))
    await either(asyncio.wait({attaching}), stop.wait())
    if not attaching.done():
        attaching.cancel()
        await asyncio.wait({attaching})
        raise NotAttached("it has not greeted yet")
    attachment = attaching.result()
    try:
        return Engine(attachment, is_child=attachment.pid == resources.child), attachment
    except EngineDied as error:
        raise NotAttached(str(error)) from error


async def _leave_in_time(engine: Engine, begun: asyncio.Event, stop: Stop) -> None:
    """Once this vtpmd is to end, give up its waits for an engine that does not answer.

    What is not settled then the next vtpmd finds as this one did.
    """
    await stop.wait()
    if not begun.is_set():
        await asyncio.sleep(SETTLE_TIMEOUT_S)
    elif stop.ends_vtpm:
        return  # as long as the engine is waited for to stop, and no longer: Engine.end_control()
    else:
        await asyncio.sleep(STOP_TIMEOUT_S)
    engine.leave()


async def _serve_engine(
    engine: Engine,
    attachment: Attachment,
    resources: Resources,
    config: RunConfig,
    stop: Stop,
    begun: asyncio.Event,
) -> None:
    async with AsyncExitStack() as stack:
        shared = attachment.directory_fd, attachment.lock_fd
        directory = stack.enter_context(StateDirectory(resources.path, *shared, engine.tpm_version))
        try:
            store = stack.enter_context(_map_store(attachment.store_fd))
        finally:
            os.close(attachment.store_fd)
        files = MovingFiles(directory, resources.key)
        stack.callback(files.close)
        engine.begin(on_death=log.error, on_end=stop.end)
        directory.read_state(StateType.PERMANENT, resources.key)  # which is the right one
        uuid = NO_UUID if config.uuid is None else bytes.fromhex(config.uuid.replace("-", ""))
        mobility = Mobility(engine, store, files, uuid, follows_qemu=config.qmp is not None)
        stack.push_async_callback(mobility.close)
        await settle(mobility, engine, files, config)
        engine.answer_by(Asked(mobility, stop.end))
        await mobility.rest()
        _warn_of_forks(mobility.owner_record())
        _start_services(stack, resources, config, mobility, stop)
        begun.set()
        log.info("vtpmd is attached to its engine (pid %d)", engine.pid)
        # While there is somebody to tell.
        stack.callback(mobility.tell_now)
        await either(stop.wait(), engine.detached.wait())
        if not stop.is_set:
            return
        if stop.ends_vtpm:
            await engine.end_control()
        await mobility.conclude()


def _map_store(fd: int) -> Store:
    if stat.S_ISCHR(os.fstat(fd).st_mode):
        raise VtpmdError(
            "the engine shares no store, as it was started under a limit on the size of files "
            "(RLIMIT_FSIZE): it serves on alone; start it again with 1 MiB or more to attach"
        )
    return Store.map(fd)


def _start_services(
    stack: AsyncExitStack,
    resources: Resources,
    config: RunConfig,
    mobility: Mobility,
    stop: Stop,
) -> None:
    """Start what was asked for; each is imported only then, and ends with the stack."""
    credentials = config.credentials()
    if resources.peers is not None and credentials is not None:
        from vtpmd.daemon.peer_server import PeerServer

        server = PeerServer(
            resources.peers,
            credentials=credentials,
            allowed=config.allowed,
            mobility=mobility,
        )
        log.info("waiting for vTPMs on %s port %d", *resources.peers.getsockname()[:2])
        _run_beside(stack, server.serve())
    if config.qmp is not None:
        _run_beside(stack, follow_qemu(Path(config.qmp), mobility.qemu))
    if resources.management is not None:
        from vtpmd.daemon.commands import serve_management

        listening, path = resources.management, str(Path(resources.path).absolute())
        _run_beside(stack, serve_management(listening, mobility, config, path, stop.leave))


def _run_beside(stack: AsyncExitStack, work: Coroutine[object, object, None]) -> None:
    """Run a service until the stack ends. Its failure is logged: the guest is served on."""
    task = asyncio.create_task(work)

    def done(finished: asyncio.Task[None]) -> None:
        if not finished.cancelled() and (error := finished.exception()) is not None:
            log_failure(log, "a service has failed, the guest is served on", error)

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    task.add_done_callback(done)
    stack.push_async_callback(end)


def _warn_of_forks(record: Record) -> None:
    for fork in record.forks:
        log.warning("possible fork: the vTPM was %s; vtpmd owner DIR has more", fork_text(fork))
