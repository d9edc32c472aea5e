"""A QEMU: what it asks of its TPM, what its monitor says, its migration, and a guest that checks.

The guest remembers what its TPM did last. Each command compares that with what the TPM finds in its
own state: a state that is older, another vTPM's, or not the one that the guest's memory goes with,
is seen at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.sim.engine import Response
from tests.sim.host import Host
from tests.sim.server import Command, Number, Said
from tests.sim.state import Permanent, Volatile
from tests.support.tail import is_tail
from vtpmd.daemon.qemu_events import (
    Capabilities,
    GuestResumed,
    GuestStopped,
    MigrationState,
    MigrationStatus,
    QemuConnected,
    QemuDisconnected,
    QemuEvent,
)
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from tests.sim.world import Vm

LATENCY_S: Final = (0.0001, 0.001)
EVENT_LATENCY_S: Final = (0.0001, 0.0005, 0.003, 0.05)
COMMAND_INTERVAL_S: Final = (0.002, 0.02, 0.1, 0.4)
# The engine lets a command wait this long.
WAITS: Final = 20
WAIT_S: Final = 0.05
STREAM_TIMEOUT_S: Final = 15.0
# How often a migration is cancelled when the guest stands still already.
CANCELLED: Final = 0.05
TYPES: Final = (StateType.PERMANENT, StateType.VOLATILE)


class TpmLost(Exception):
    """The TPM does not answer, or answers with an error."""


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class Saved(NamedTuple):
    """A guest at one moment: in a stream, or in a snapshot."""

    blobs: tuple[bytes, ...]
    memory: Volatile | None
    acceptable: frozenset[int]  # values that its TPM may have

    @property
    def is_tail(self) -> bool:
        """True if only the destination can make a state of it."""
        return is_tail(self.blobs[0])


class Qemu:
    """One QEMU process, with one guest."""

    def __init__(self, host: Host, vm: Vm, *, incoming: bool = False) -> None:
        assert host.qemu is None
        host.qemu = self
        self.host, self.vm, self.world = host, vm, host.world
        self.rng = self.world.rng
        self.process = self.world.scheduler.process(f"qemu at {host.name}", self)
        self.vcpus = False
        self.memory: Volatile | None = None
        self.incoming = incoming
        self.busy = incoming
        self.saved = False  # since the guest ran last
        self.has_tpm = True
        self._waiting: asyncio.Future[Said] | None = None
        self.connecting: asyncio.Task[None] | None = None  # one that waits for a guest
        self._event_s = 0.0
        self._comes_whole = False
        self._answer: Callable[[bool], None] | None = None  # of a stream that is being loaded
        self._waiters: list[asyncio.Future[None]] = []
        self._status = "inmigrate" if incoming else "prelaunch"
        self._migration = MigrationState.NONE
        self.monitor_answers()

    def log(self, text: str) -> None:
        """Write a line of the transcript."""
        self.world.log(f"qemu at {self.host.name}: {text}")

    def monitor_answers(self) -> None:
        """A vtpmd connects to the monitor, and is told what is so."""
        self._emit(
            QemuConnected(
                uuid="",
                running=self.vcpus,
                status=self._status,
                migration_status=self._migration,
                capabilities=Capabilities(events=True, colo=False),
            )
        )

    # The process.

    def kill(self) -> None:
        """Die, without a word to the TPM."""
        self.log("killed")
        self._leave()

    async def does(self, work: Coroutine[Any, Any, bool | None]) -> bool:
        """Have it do something, for somebody else; return False if it dies meanwhile."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiters.append(waiting)
        doing = self.process.spawn(work)
        doing.add_done_callback(lambda _: _wake(waiting))
        if self.process.alive:
            await waiting
        return doing.done() and bool(doing.result())

    def gone(self) -> None:
        """The host died, or QEMU has ended."""
        self.process.kill()
        self.vcpus = False
        self._comes_not()
        if self._answer is not None:
            self._answer(False)
        for waiting in self._waiters:
            _wake(waiting)

    def _leave(self) -> None:
        self._emit(QemuDisconnected())
        self.gone()
        if self.host.qemu is self:
            self.host.qemu = None

    async def quit(self) -> None:
        """End, and say so."""
        self.vcpus = False
        self.log("quits")
        with suppress(TpmLost):
            await self.control(Command(Number.SHUTDOWN))
        self._leave()

    def lost_tpm(self) -> None:
        """The control channel has closed."""
        self.has_tpm = False
        if self._waiting is not None and not self._waiting.done() and self.process.alive:
            self._waiting.set_exception(TpmLost())

    def _emit(self, event: QemuEvent) -> None:
        """The monitor says something, in order."""
        if isinstance(event, MigrationStatus):
            self._migration = event.status
        if isinstance(event, GuestResumed):
            self._status = "running"
        scheduler = self.world.scheduler
        at_s = max(self._event_s, scheduler.now_s + self.rng.choice(EVENT_LATENCY_S))
        self._event_s = at_s
        daemon = self.host.daemon
        if daemon is not None:
            scheduler.after(at_s - scheduler.now_s, lambda: daemon.deliver(event))

    # The control channel.

    async def control(self, command: Command) -> bytes:
        """Send a command; return the answer's blob. Raises TpmLost for an error, too."""
        served = self.host.served
        if served is None or not self.has_tpm:
            raise TpmLost
        self._waiting = waiting = self.process.create_future()

        def answered(said: Said) -> None:
            self.world.scheduler.after(self.rng.choice(LATENCY_S), lambda: arrive(said))

        def arrive(said: Said) -> None:
            if self.process.alive and not waiting.done():
                waiting.set_result(said)

        served.engine.server.send(command, answered)
        said: Said = await waiting
        self.world.note(f"qemu at {self.host.name}: {command.number.name} → {said.result:#x}")
        if said.result:
            raise TpmLost
        return said.blob

    async def _connect(self) -> None:
        await self.control(Command(Number.SET_DATAFD))
        await self.control(Command(Number.STOP))

    async def boot(self) -> bool:
        """Start with a guest that boots; return whether its TPM works."""
        try:
            await self._connect()
            await self.control(Command(Number.INIT))
        except TpmLost:
            self.log("no boot")
            return False
        self.memory = None
        self._run()
        self.process.spawn(self.guest())
        return True

    async def reset(self) -> None:
        """Reset the machine."""
        self.vcpus = False
        try:
            await self.control(Command(Number.STOP))
            await self.control(Command(Number.INIT))
        except TpmLost:
            self.log("the TPM does not start again")
        self.memory = None
        self.vcpus = True

    def _run(self) -> None:
        self.vcpus = True
        self._emit(GuestResumed())

    def stop(self) -> None:
        """Stop the guest's processors."""
        self.vcpus = False
        self._emit(GuestStopped())

    async def cont(self) -> None:
        """Have the guest run, where it stood still."""
        self.log("cont")
        self._emit(GuestResumed())
        if self.saved:
            self.saved = False
            with suppress(TpmLost):
                await self.control(Command(Number.LOCK_STORAGE))
        self.vcpus = True

    async def save(self) -> Saved:
        """Take the guest's state. Raises TpmLost."""
        self.saved = True
        blobs = [await self.control(Command(Number.GET_STATEBLOB, kind)) for kind in TYPES]
        return Saved(tuple(blobs), self.memory, frozenset(self.vm.acceptable))

    async def _load(self, saved: Saved) -> bool:
        """Start the TPM from a state; return whether it has."""
        try:
            if self.connecting is not None:  # its main loop does one thing at a time
                await self.connecting
            await self.control(Command(Number.STOP))
            for kind, blob in zip(TYPES, saved.blobs, strict=True):
                if blob:
                    await self.control(Command(Number.SET_STATEBLOB, kind, blob))
            await self.control(Command(Number.INIT, is_incoming=True))
        except TpmLost:
            return False
        self.memory = saved.memory
        return True

    # The guest.

    async def guest(self) -> None:
        """Use the TPM for as long as there is one."""
        while True:
            await asyncio.sleep(self.rng.choice(COMMAND_INTERVAL_S) * self.world.slowness)
            if self.vcpus:
                await self.command()

    async def command(self) -> bool:
        """Have one command executed; return whether it was."""
        for _ in range(WAITS):
            served = self.host.served
            if not self.vcpus or served is None or not self.has_tpm:
                return False
            value = self.vm.next_value()
            response = served.engine.execute(value, self._check)
            if response is Response.DONE:
                self.vm.acknowledged(value)
                assert self.memory is not None
                self.memory = self.memory._replace(extends=self.memory.extends + 1)
                return True
            if response is Response.FAILURE:
                return False
            await asyncio.sleep(WAIT_S)
        return False

    def _check(self, value: int, permanent: Permanent, volatile: Volatile) -> None:
        """Compare what the TPM finds with what the guest knows, before a command leaves a value."""
        self.world.executes(self.host, self.vm, permanent)
        if self.memory is None:
            self.memory = volatile
        if volatile != self.memory:
            self.world.violated(f"{self.host.name}: PCRs are not those of the guest's memory")
        self.vm.acceptable.add(value)

    # Snapshots.

    async def savevm(self) -> None:
        """Keep a snapshot, unless it is of no use."""
        self.stop()
        try:
            saved = await self.save()
            if not saved.is_tail:
                self.vm.snapshot = saved
                self.log("savevm")
        except TpmLost:
            self.log("savevm fails")
        await self.cont()

    async def loadvm(self) -> None:
        """Go back to the snapshot."""
        saved = self.vm.snapshot
        assert saved is not None
        self.log("loadvm")
        self.stop()
        self.vm.acceptable |= saved.acceptable
        if await self._load(saved):
            self.vm.loaded(saved.acceptable)
            await self.cont()
        else:
            self.log("loadvm fails")

    # Migration.

    async def migrate(self, to: Qemu, *, return_path: bool) -> bool:
        """Migrate the guest; return whether that is said to be completed."""
        for status in (MigrationState.SETUP, MigrationState.ACTIVE):
            self._emit(MigrationStatus(status))
            to._emit(MigrationStatus(status))
        await asyncio.sleep(self.rng.choice((0.001, 0.01, 0.1)))
        await asyncio.sleep(self.rng.choice((0.001, 0.01)))
        self.stop()
        await asyncio.sleep(self.rng.choice((0.0, 0.001, 0.01)))
        if self.rng.random() < CANCELLED:
            self.log("the migration is cancelled")
            to.arrives(None, self.process.create_future())
            return await self._not_migrated()
        try:
            saved = await self.save()
        except TpmLost:
            return await self._not_migrated()
        what = "a tail" if saved.is_tail else "whole blobs"
        self.world.note(f"qemu at {self.host.name}: stream with {what}")
        came = self.process.create_future()
        await asyncio.sleep(self.rng.choice((0.0, 0.001, 0.02)))
        if self.world.stream_cut or not to.process.alive:
            self.world.stream_cut = False
            self.log("the stream is cut")
            to.arrives(None, came)
            return await self._not_migrated()
        to.arrives(saved, came)
        if return_path or not saved.is_tail:
            try:
                async with asyncio.timeout(STREAM_TIMEOUT_S):
                    succeeded = await came
            except TimeoutError:
                succeeded = False
            if self.world.stream_cut and saved.is_tail:
                self.world.stream_cut = succeeded = False
                self.log("the return path is cut")
            if not succeeded:
                return await self._not_migrated()
        self._emit(MigrationStatus(MigrationState.COMPLETED))
        self.log("completed")
        return True

    async def _not_migrated(self) -> bool:
        self._emit(MigrationStatus(MigrationState.FAILED))
        self.log("migration failed")
        if self.vm.may_run_at(self.host):
            await self.cont()
        return False

    def arrives(self, saved: Saved | None, came: asyncio.Future[bool]) -> None:
        """A stream arrives, or its end does."""

        def answer(succeeded: bool) -> None:
            if not came.done() and came.get_loop().alive:  # type: ignore[attr-defined]
                came.set_result(succeeded)

        if not self.process.alive or not self.incoming:
            answer(False)
            return
        self.incoming = False
        if saved is None:
            self.process.spawn(self._fail())
            return
        if not saved.is_tail:
            # Whoever migrates without a tail has but one QEMU's word for where the guest is.
            self._comes_whole = True
            self.vm.comes_whole(self.host)
        self.process.spawn(self._start(saved, answer))

    async def _fail(self) -> None:
        self.log("no guest comes")
        self._emit(MigrationStatus(MigrationState.FAILED))
        if self.rng.random() < 0.5:
            await self.quit()
        else:
            self.kill()

    def _comes_not(self) -> None:
        if self._comes_whole:
            self._comes_whole = False
            self.vm.comes_not()

    async def _start(self, saved: Saved, answer: Callable[[bool], None]) -> None:
        self._answer = answer
        if not await self._load(saved):
            self._comes_not()
            answer(False)
            await self._fail()
            return
        self._comes_whole = False
        self.busy = False
        answer(True)
        self._emit(MigrationStatus(MigrationState.COMPLETED))
        self.log("the guest has come")
        self._run()
        await self.guest()
