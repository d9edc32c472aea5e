"""The engine, asked over its link as vtpmd asks it: what is about whose the vTPM is.

Invariant 3: a TPM that is held or retired executes and writes nothing. Invariant 12: what the guest
said of power travels. What each operation does to the TPM is tested in C (``tests/c/test_tpm.c``).
"""

import asyncio
import fcntl
import hashlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.tpm2 import ReturnCode, StartupType, shutdown, startup
from vtpmd import core
from vtpmd.core import LinkCapture, LinkInit, LinkOperation, LinkRetire, LinkShutdown, Store
from vtpmd.daemon import engine_process
from vtpmd.daemon.engine import Engine, EngineDied, Reply
from vtpmd.front.boot import boot_record
from vtpmd.store.directory import StateDirectory
from vtpmd.store.moving import MovingFiles
from vtpmd.store.start import start
from vtpmd.wire.tpm import Result, StateType

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Vtpm:
    """An engine, and the guest's end of its data socket."""

    def __init__(self, engine: Engine, guest: socket.socket) -> None:
        self._engine = engine
        self._guest = guest

    async def ask(self, operation: LinkOperation, argument: int = 0, payload: bytes = b"") -> Reply:
        """Ask the engine for something that it does."""
        reply = await self._engine.request(operation, argument, payload)
        assert reply.result == Result.SUCCESS, operation
        return reply

    async def refused(self, operation: LinkOperation, argument: int = 0) -> int:
        """Ask the engine for something that it refuses; return its result."""
        reply = await self._engine.request(operation, argument)
        assert reply.result != Result.SUCCESS, operation
        return reply.result

    async def command(self, command: bytes) -> int:
        """Send a guest's command; return the response code."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._guest, command)
        return int.from_bytes((await loop.sock_recv(self._guest, 4096))[6:10], "big")


def with_engine(path: Path, test: Callable[[Vtpm], Awaitable[None]]) -> None:
    """Run a test with an engine on a state directory; stop it in order."""

    async def run(directory: StateDirectory, store: Store) -> None:
        begun = start(directory, MovingFiles(directory), None, None)
        with boot_record(begun, None, None) as boot_fd:
            process = engine_process.spawn(
                directory_fd=directory.directory_fd,
                lock_fd=directory.lock_fd,
                store_fd=store.fd,
                boot_fd=boot_fd,
            )
        engine = Engine(process)
        deaths: list[str] = []
        await engine.attach(deaths.append)
        guest, theirs = socket.socketpair()
        guest.setblocking(False)
        with guest, theirs:
            await engine.request(LinkOperation.SET_DATA_SOCKET, descriptor=theirs.fileno())
            await test(Vtpm(engine, guest))
            await engine.stop()
        assert deaths == []

    with StateDirectory.open(path) as directory, Store.create() as store:
        asyncio.run(run(directory, store))


async def start_held(vtpm: Vtpm, said: LinkShutdown) -> None:
    """Start a sleeping guest's TPM, held, from its own state; check what the engine tells."""
    await vtpm.ask(LinkOperation.INIT)
    assert await vtpm.command(startup(StartupType.CLEAR)) == 0
    assert await vtpm.command(shutdown(StartupType.STATE)) == 0
    reply = await vtpm.ask(LinkOperation.CAPTURE)
    assert reply.argument & LinkCapture.CHANGED
    assert core.link_said(reply.argument) is LinkShutdown.STATE
    permanent, volatile = [
        bytes((await vtpm.ask(LinkOperation.GET_STATE, kind)).payload)
        for kind in (StateType.PERMANENT, StateType.VOLATILE)
    ]
    await vtpm.ask(LinkOperation.STOP)
    await vtpm.ask(LinkOperation.SET_BOTH_STATES, len(permanent), permanent + volatile)
    reply = await vtpm.ask(LinkOperation.INIT, core.link_held(said))
    digests = tuple(hashlib.sha256(state).digest() for state in (permanent, volatile))
    assert core.unpack_link_digests(reply.payload) == digests


def test_held_start_tells_its_digests_and_takes_up_that_the_guest_sleeps(tmp_path: Path) -> None:
    """The next capture says so again, and nothing else."""

    async def test(vtpm: Vtpm) -> None:
        await start_held(vtpm, LinkShutdown.STATE)
        lineage = core.pack_link_lineage(bytes(16), 1)
        await vtpm.ask(LinkOperation.ADMIT, payload=lineage)
        reply = await vtpm.ask(LinkOperation.CAPTURE)
        assert core.link_said(reply.argument) is LinkShutdown.STATE
        reply = await vtpm.ask(LinkOperation.CAPTURE)
        assert reply.argument == LinkShutdown.STATE << 8

    with_engine(tmp_path / "state", test)


def test_what_a_guest_cannot_have_said_is_refused(tmp_path: Path) -> None:
    """A kind that is none, and a kind for a start that is not held."""

    async def test(vtpm: Vtpm) -> None:
        for argument in (core.link_held(LinkShutdown.NONE) | 3 << 8, LinkInit.CAME | 1 << 8):
            assert await vtpm.refused(LinkOperation.INIT, argument) == Result.BAD_PARAMETER

    with_engine(tmp_path / "state", test)


def test_invariant_3_vtpm_of_another_host_does_not_start_until_it_is_ours(tmp_path: Path) -> None:
    """What vtpmd does at a start when the owner record says so. Nothing is written meanwhile."""
    state = tmp_path / "state"

    async def test(vtpm: Vtpm) -> None:
        await vtpm.ask(LinkOperation.RETIRE, LinkRetire.UNSERVED)
        assert await vtpm.refused(LinkOperation.INIT) == Result.FAIL
        assert await vtpm.command(startup(StartupType.CLEAR)) == ReturnCode.FAILURE
        assert [file.name for file in state.iterdir()] == [".lock"]
        await vtpm.ask(LinkOperation.UNRETIRE)
        await vtpm.ask(LinkOperation.INIT)
        assert await vtpm.command(startup(StartupType.CLEAR)) == 0

    with_engine(state, test)


def test_command_waits_while_a_vtpm_is_asked_back(tmp_path: Path) -> None:
    """It is told to come again when that takes long, and fails when it is not asked for."""

    async def test(vtpm: Vtpm) -> None:
        assert await vtpm.refused(LinkOperation.AWAIT, 1) == Result.BAD_ORDINAL
        await start_held(vtpm, LinkShutdown.NONE)
        await vtpm.ask(LinkOperation.RETIRE, LinkRetire.UNSERVED)
        await vtpm.ask(LinkOperation.AWAIT, 1)
        assert await vtpm.command(startup(StartupType.CLEAR)) == ReturnCode.RETRY
        await vtpm.ask(LinkOperation.AWAIT, 0)
        assert await vtpm.command(startup(StartupType.CLEAR)) == ReturnCode.FAILURE
        await vtpm.ask(LinkOperation.UNRETIRE)
        assert await vtpm.command(startup(StartupType.CLEAR)) not in (
            ReturnCode.RETRY,
            ReturnCode.FAILURE,
        )

    with_engine(tmp_path / "state", test)


def boots(path: Path, record: bytes, seals: int) -> str:
    """Start an engine from a boot record; return why it has ended, or nothing."""

    async def attach(process: engine_process.EngineProcess) -> str:
        engine = Engine(process)
        try:
            await engine.attach(lambda _: None)
        except EngineDied as error:
            return str(error)
        finally:
            await engine.stop()
        return ""

    fd = os.memfd_create("boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, record)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with StateDirectory.open(path) as directory, Store.create() as store:
        process = engine_process.spawn(
            directory_fd=directory.directory_fd,
            lock_fd=directory.lock_fd,
            store_fd=store.fd,
            boot_fd=fd,
        )
        os.close(fd)
        return asyncio.run(attach(process))


def message(operation: int, payload: bytes = b"", payload_bytes: int | None = None) -> bytes:
    """Return a message of a boot record; its header may lie about the length."""
    n_bytes = len(payload) if payload_bytes is None else payload_bytes
    return core.pack_link_header(core.LinkHeader(operation, payload_bytes=n_bytes)) + payload


KEY_MESSAGE = message(LinkOperation.SET_KEY, bytes(32))
WRONG_RECORDS = {
    "not sealed": (KEY_MESSAGE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    "cut": (KEY_MESSAGE[:-1], SEALS),
    "cut in a header": (KEY_MESSAGE + KEY_MESSAGE[:5], SEALS),
    "no request": (message(99), SEALS),
    "a request that is refused": (message(LinkOperation.SET_KEY, bytes(5)), SEALS),
    "an anchor that is not there": (message(LinkOperation.SET_ANCHOR, bytes(88)), SEALS),
    "longer than a message may be": (
        message(LinkOperation.SET_KEY, payload_bytes=core.LINK_PAYLOAD_BYTES_MAX + 1),
        SEALS,
    ),
}


def test_engine_starts_from_a_sealed_boot_record(tmp_path: Path) -> None:
    assert boots(tmp_path, KEY_MESSAGE, SEALS) == ""


@pytest.mark.parametrize("wrong", WRONG_RECORDS.values(), ids=WRONG_RECORDS)
def test_engine_does_not_start_from_a_boot_record_that_is_wrong(
    tmp_path: Path, wrong: tuple[bytes, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """It says so in one line, and nothing is written."""
    assert "exited with status 1" in boots(tmp_path, *wrong)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vtpmd-engine: cannot start from the boot record: ")
    assert [each.name for each in tmp_path.iterdir()] == [".lock"]
