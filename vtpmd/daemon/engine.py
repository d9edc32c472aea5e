"""vtpmd's end of the engine link: requests, answers, and the death of the process behind it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from vtpmd import core
from vtpmd.core import LinkHeader, LinkLocked, LinkOperation
from vtpmd.daemon.engine_process import EngineProcess
from vtpmd.errors import VtpmdError

# Beyond any command (the longest, an RSA key, takes a second or two under load) and any disk that
# is still going to answer.
REQUEST_TIMEOUT_S = 60.0
# How long an answer is waited for without looking elsewhere: a capture takes 0.05 ms, a start 0.2.
SOON_MS = 1
# What a clean stop may take: the command that runs, TPM2_Shutdown, one write of the state.
STOP_TIMEOUT_S = 20.0


class EngineDied(VtpmdError):
    """The engine process is gone; the vTPM's volatile state is lost with it."""


class EngineState(Enum):
    """Where an engine is in its life."""

    STARTING = "the process exists; it has not said that it can serve"
    SERVING = "requests are answered"
    STOPPING = "the link is closed; the process is on its way out"
    DEAD = "the process is gone"


class Reply(NamedTuple):
    """The engine's answer to one request."""

    result: int
    argument: int
    payload: bytearray


class Meanwhile:
    """Something that is done while the engine is busy: how long it took, or why it failed."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do
        self.took_us = 0
        self.error: VtpmdError | None = None

    def run(self) -> None:
        """Do it, and keep the VtpmdError that it raises."""
        began_ns = time.perf_counter_ns()
        try:
            self._do()
        except VtpmdError as error:
            self.error = error
        self.took_us = (time.perf_counter_ns() - began_ns) // 1000


class Engine:
    """One vTPM's engine.

    Its coroutines belong to one event loop and are cancelled only together with the engine: half a
    message on the link cannot be taken back. Requests are answered one at a time, in order. After
    :exc:`EngineDied` every further request raises it too.
    """

    def __init__(self, process: EngineProcess) -> None:
        self.pid = process.pid
        self.locked = LinkLocked.NOTHING
        self.libtpms_version = 0
        self.state = EngineState.STARTING
        self.death: str | None = None
        self._link = process.link
        self._link.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._link, select.POLLIN)
        self._pidfd = os.pidfd_open(process.pid)
        self._lock = asyncio.Lock()
        self._exited = asyncio.Event()
        self._on_death: Callable[[str], None] | None = None

    async def attach(self, on_death: Callable[[str], None]) -> None:
        """Wait until the engine can serve.

        From then on ``on_death`` is called once, with one line for a person, if the process ends
        before :meth:`stop`. Raises EngineDied if it does so right away.
        """
        self._on_death = on_death
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)
        async with self._lock:
            try:
                ready = await self._receive_reply(LinkOperation.READY)
            except (OSError, TimeoutError) as error:
                raise await self._broken(error) from error
            self.locked = LinkLocked(ready.argument)
            self.libtpms_version = int.from_bytes(ready.payload, sys.byteorder)
        self.state = EngineState.SERVING

    async def request(
        self,
        operation: LinkOperation,
        argument: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        descriptor: int | None = None,
        meanwhile: Meanwhile | None = None,
        *,
        soon: bool = True,
    ) -> Reply:
        """Send one request and return its answer.

        ``payload`` has at most LINK_PAYLOAD_BYTES_MAX bytes; ``descriptor`` stays the caller's, the
        engine gets a copy. ``meanwhile`` is run while the engine is at it. ``soon`` is false where
        the event loop has something to do until the answer comes. Raises EngineDied.
        """
        if len(payload) > core.LINK_PAYLOAD_BYTES_MAX:
            raise ValueError(f"a payload of {len(payload)} bytes on the engine link")
        async with self._lock:
            if self.state is not EngineState.SERVING:
                raise EngineDied(self.death or f"the engine is {self.state.name.lower()}")
            try:
                await self._send(operation, argument, payload, descriptor)
                if meanwhile is not None:
                    meanwhile.run()
                return await self._receive_reply(operation, SOON_MS if soon else 0)
            except (OSError, TimeoutError) as error:
                raise await self._broken(error) from error

    async def raise_generations(self, floor: int) -> None:
        """Make every generation that is still to come larger than ``floor``. Raises EngineDied."""
        floors = struct.pack("=QQ", floor, floor)
        await self.request(LinkOperation.RAISE_GENERATION, payload=floors)

    async def stop(self) -> None:
        """End the engine: it sends TPM2_Shutdown if the guest did not, and exits.

        Returns when the process is gone; one that hangs is killed after STOP_TIMEOUT_S.
        """
        if self.state is not EngineState.DEAD:
            self.state = EngineState.STOPPING
            self._link.close()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._exited.wait()
            except TimeoutError:
                await self._kill()
        self._link.close()

    async def _send(
        self,
        operation: LinkOperation,
        argument: int,
        payload: bytes | bytearray | memoryview,
        descriptor: int | None,
    ) -> None:
        header = LinkHeader(operation, argument=argument, payload_bytes=len(payload))
        packed = core.pack_link_header(header)
        descriptors = [] if descriptor is None else [descriptor]
        # Nothing else is in the socket's buffer: the header goes out whole, and most payloads.
        sent = socket.send_fds(self._link, [packed, payload], descriptors) - len(packed)
        if sent < 0:
            raise ConnectionError("short write")
        if sent < len(payload):
            rest = memoryview(payload)[sent:]
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await asyncio.get_running_loop().sock_sendall(self._link, rest)

    async def _receive_reply(self, operation: LinkOperation, poll_ms: int = SOON_MS) -> Reply:
        header = core.unpack_link_header(await self._receive(core.LINK_HEADER_BYTES, poll_ms))
        if header.operation != operation or header.payload_bytes > core.LINK_PAYLOAD_BYTES_MAX:
            raise ConnectionError("an answer to no request")
        payload = await self._receive(header.payload_bytes, poll_ms)
        return Reply(header.result, header.argument, payload)

    async def _receive(self, n_bytes: int, poll_ms: int) -> bytearray:
        data = bytearray(n_bytes)
        view = memoryview(data)
        while view:
            # Most answers come sooner than the event loop could look elsewhere and back.
            if self._poll.poll(poll_ms):
                n = self._link.recv_into(view)
            else:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    n = await asyncio.get_running_loop().sock_recv_into(self._link, view)
            if n == 0:
                raise ConnectionError("closed")
            view = view[n:]
        return data

    async def _broken(self, error: Exception) -> EngineDied:
        """Return what a failure of the link is raised as, once the process is surely gone."""
        # Half a message was sent or read: the two would never agree again.
        await self._kill()
        return EngineDied(self.death or f"the link to the engine broke: {error}")

    async def _kill(self) -> None:
        if not self._exited.is_set():
            os.kill(self.pid, signal.SIGKILL)
            await self._exited.wait()

    def _reap(self) -> None:
        """Take the exit status of the process, which has ended."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        unexpected = self.state is not EngineState.STOPPING
        self.state = EngineState.DEAD
        self._exited.set()
        if unexpected:
            self.death = _describe_death(self.pid, status)
            if self._on_death is not None:
                self._on_death(self.death)


def _describe_death(pid: int, status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = (
        f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    )
    if code == -signal.SIGSYS:
        how += (
            " for a system call that its sandbox forbids (its number is in the kernel's log, as "
            "syscall=; somebody may have broken into it)"
        )
    return (
        f"the engine (pid {pid}) {how}; the guest's TPM answers with errors until vtpmd and the "
        "guest are started again"
    )
