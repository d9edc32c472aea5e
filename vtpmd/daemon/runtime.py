"""The process around the vTPM: event loop, signals, log, start and stop in order."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

from vtpmd.config import RunConfig
from vtpmd.core import Store
from vtpmd.daemon import signals
from vtpmd.daemon.asked import Asked
from vtpmd.daemon.engine import EXIT_JOURNAL, Engine
from vtpmd.daemon.engine_process import EngineProcess
from vtpmd.daemon.mobility import NO_UUID, Mobility
from vtpmd.daemon.qemu import follow
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Record

log = logging.getLogger("vtpmd")

EXIT_STOPPED = 0
EXIT_ENGINE_DIED = 1


class Resources(NamedTuple):
    """What the process has opened before the event loop runs; it stays the caller's."""

    process: EngineProcess
    store: Store
    files: MovingFiles
    peers: socket.socket | None
    management: socket.socket | None


def serve(resources: Resources, config: RunConfig) -> int:
    """Serve one vTPM until QEMU or a signal ends it; return the exit status.

    The engine is gone when this returns. Raises VtpmdError if it cannot serve.
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
    engine = Engine(resources.process)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals.ends():
        loop.add_signal_handler(number, stop.set)
    signals.release()
    try:
        await engine.attach(on_death=log.error)
        uuid = NO_UUID if config.uuid is None else bytes.fromhex(config.uuid.replace("-", ""))
        mobility = Mobility(
            engine,
            resources.store,
            resources.files,
            uuid,
            follows_qemu=config.qmp is not None,
        )
        await mobility.begin(config.credentials(), config.allowed)
        engine.answer_by(Asked(mobility, stop.set))
        _warn_of_forks(mobility.owner_record())
        async with AsyncExitStack() as stack:
            stack.push_async_callback(mobility.close)
            _start_services(stack, resources, config, mobility, stop)
            # While there is somebody to tell.
            stack.callback(mobility.tell_now)
            stack.push_async_callback(mobility.conclude)
            stack.push_async_callback(engine.end_control)
            await stop.wait()
    finally:
        await engine.stop()
        signals.hold()  # it has stopped: nothing takes them any more, and the status is true
    if engine.death is not None:
        return EXIT_ENGINE_DIED
    return EXIT_JOURNAL if engine.left_journal else EXIT_STOPPED


def _start_services(
    stack: AsyncExitStack,
    resources: Resources,
    config: RunConfig,
    mobility: Mobility,
    stop: asyncio.Event,
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
        _run_beside(stack, follow(Path(config.qmp), mobility.qemu))
    if resources.management is not None:
        from vtpmd.daemon.commands import serve_management

        _run_beside(stack, serve_management(resources.management, mobility, config, stop))


def _run_beside(stack: AsyncExitStack, work: Coroutine[object, object, None]) -> None:
    """Run a service until the stack ends. Its failure is logged: the guest is served on."""
    task = asyncio.create_task(work)

    def done(finished: asyncio.Task[None]) -> None:
        if not finished.cancelled() and (error := finished.exception()) is not None:
            log.error("a service has failed, the guest is served on: %s", error, exc_info=error)

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    task.add_done_callback(done)
    stack.push_async_callback(end)


def _warn_of_forks(record: Record) -> None:
    for fork in record.forks:
        log.warning(
            "possible fork: the vTPM was claimed at %s without the word of %s, which may have "
            "served it, too; vtpmd owner DIR has more",
            *(fork.at, fork.peer or "the other host"),
        )
