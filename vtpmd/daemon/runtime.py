"""The process around the vTPM: event loop, signals, log, start and stop in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Mapping

from vtpmd.core import LinkLocked
from vtpmd.daemon.control_server import ControlServer
from vtpmd.daemon.engine import Engine
from vtpmd.daemon.engine_process import EngineProcess
from vtpmd.daemon.instance import Instance
from vtpmd.wire.control import StateType

log = logging.getLogger("vtpmd")

EXIT_STOPPED = 0
EXIT_ENGINE_DIED = 1


def serve(
    *,
    process: EngineProcess,
    states: Mapping[StateType, bytes],
    control: socket.socket,
    name: str | None,
    log_level: str,
) -> int:
    """Serve one vTPM until QEMU or a signal ends it; return the exit status.

    ``control`` listens already and stays the caller's, as does the state directory, whose content
    is ``states``. The engine is gone when this returns. Raises VtpmdError if it cannot serve.
    """
    configure_logging(name, log_level)
    return asyncio.run(_serve(process, states, control))


def configure_logging(name: str | None, level: str) -> None:
    """Write log lines to standard error, one a message, with the guest's name."""
    prefix = "vtpmd" if name is None else f"vtpmd[{name}]"
    logging.basicConfig(format=f"{prefix}: %(message)s", level=level.upper())
    # asyncio's own debug lines say nothing about a vTPM.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


async def _serve(
    process: EngineProcess, states: Mapping[StateType, bytes], control: socket.socket
) -> int:
    engine = Engine(process)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await engine.attach(on_death=log.error)
        _warn_of_unlocked_memory(engine.locked)
        instance = Instance(engine)
        await instance.load(states)
        await _serve_control(ControlServer(control, instance), stop)
    finally:
        await engine.stop()
    return EXIT_STOPPED if engine.death is None else EXIT_ENGINE_DIED


async def _serve_control(server: ControlServer, stop: asyncio.Event) -> None:
    """Serve until the control channel's SHUTDOWN or a signal, whichever comes first."""
    serving = asyncio.create_task(server.serve())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        for task in (serving, stopping):
            task.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)


def _warn_of_unlocked_memory(locked: LinkLocked) -> None:
    if locked is LinkLocked.ALL:
        return
    what = "all" if locked is LinkLocked.NOTHING else "part"
    log.warning(
        "%s of the TPM's memory may be swapped out: RLIMIT_MEMLOCK is too low; raise it to 64 MiB "
        "(LimitMEMLOCK=64M in a service, ulimit -l 65536 in a shell)",
        what,
    )
