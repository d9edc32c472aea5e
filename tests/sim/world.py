"""Two hosts that hand a vTPM to and fro, a third with another one, and what must always hold."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests.sim.host import Host, NoWakefulness
from tests.sim.loop import PowerLoss, Process, Scheduler
from tests.sim.network import Connection, Network, PlainSocket, Stream, frames
from tests.sim.qemu import Qemu, Saved
from tests.sim.state import Permanent
from vtpmd import moment
from vtpmd.daemon import incoming, mobility, outgoing, tls
from vtpmd.daemon.tls import HandshakeError
from vtpmd.errors import VtpmdError
from vtpmd.store import incoming as incoming_states
from vtpmd.store.owner import Whose
from vtpmd.wire import peer
from vtpmd.wire.tpm import StateType

UUID: Final = b"u" * 16
OTHER_UUID: Final = b"v" * 16
NO_UUID: Final = bytes(16)
# Room for some rounds only: then the file is made anew.
INCOMING_BYTES: Final = incoming_states.ENTRIES_OFFSET + 8 * incoming_states.ENTRY_ALIGNMENT


class Violation(AssertionError):
    """Something that must hold does not."""


class Vm:
    """A guest, as its operator knows it."""

    def __init__(self, world: World, home: Host) -> None:
        self.world = world
        self.lineage: bytes | None = None
        self.acceptable = {0}  # what the last command left, and such as were not acknowledged
        self.snapshot: Saved | None = None
        # Where it has come to, and so may be. Of a guest that moved with whole blobs no owner
        # record says where it is: its operator must know.
        self.places = {home}
        self._before: set[Host] = set()
        self._whole_at: Host | None = None  # where it has come to in that way, the last time
        self._value = 0
        self.executed = 0

    def next_value(self) -> int:
        """Return what the next command leaves."""
        self._value += 1
        return self._value

    def acknowledged(self, value: int) -> None:
        """The guest has the response to a command."""
        self.executed += 1
        self.acceptable = {value}

    def loaded(self, acceptable: frozenset[int]) -> None:
        """The guest is as it was; a command since then decides."""
        self.acceptable |= acceptable

    def may_run_at(self, host: Host) -> bool:
        """Return whether its operator would have it run there."""
        return host in self.places

    def may_boot_at(self, host: Host) -> bool:
        """Return whether they would try to boot it there, rightly or wrongly.

        Where nobody ever had a vTPM a new one is made, where whole blobs left an old one, that.
        """
        if host.is_entitled:
            return True
        if host.record.whose is Whose.MOVED:
            # Of whole blobs that came elsewhere that record knows nothing: its operator does.
            return self._whole_at in (None, host)
        if self.lineage is not None and not host.has_state:
            return host.knows_sessions
        return host in self.places

    def comes_whole(self, host: Host) -> None:
        """Its stream with all of the state is at a host, which starts from it."""
        self._before = self.places
        self.places = {host}
        self._whole_at = host
        self.world.numbering_begins()

    def comes_not(self) -> None:
        """It did not start, or nobody heard that it did: it runs on where it was."""
        self.places = self._before - self.places
        self._whole_at = None


class World:
    """All of it, for one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(self.rng)
        self.network = Network(self.scheduler, self.sent)
        self.descriptors: dict[int, Stream] = {}
        self.transcript: list[str] = []
        self.step = 0
        self.slowness = 1.0
        self.stream_cut = False
        self.healing = False
        self.faults: dict[int, Any] = {}
        self.loses_power: set[str] = set()
        self._violation: str | None = None
        self._released: set[tuple[str, bytes]] = set()
        self._captured: dict[StateType, int] = {}
        self.exports = 0
        uuids = self.rng.choice(((UUID, UUID), (UUID, UUID), (UUID, NO_UUID), (NO_UUID, NO_UUID)))
        follows = self.rng.choice(((True, True), (True, True), (False, False), (True, False)))
        self.a = Host(self, "a", uuids[0], follows_qemu=follows[0])
        self.b = Host(self, "b", uuids[1], follows_qemu=follows[1])
        self.c = Host(self, "c", self.rng.choice((OTHER_UUID, NO_UUID)), follows_qemu=False)
        self.hosts = {"a": self.a, "b": self.b, "c": self.c}
        self.vm = Vm(self, self.a)
        self.other = Vm(self, self.c)
        self.operator = self.scheduler.process("operator")

    # What is told.

    def log(self, text: str) -> None:
        """Write a line of the transcript."""
        self.transcript.append(f"{self.scheduler.now_s - 1000:9.4f}  {text}")

    def note(self, text: str) -> None:
        """Something happens that counts as a step; a fault may come with it."""
        self.step += 1
        self.log(f"{self.step:4}  {text}")
        fault = self.faults.pop(self.step, None)
        if fault is not None:
            fault(self)

    def violated(self, what: str) -> None:
        """Something that must hold does not: the first is the one that counts."""
        if self._violation is None:
            self._violation = what
            self.log(f"VIOLATION: {what}")

    def granted(self, host: Host) -> None:
        """That a host was granted the vTPM is durable there."""
        if host is not self.c:
            self.vm.places.add(host)

    def start_failed(self, host: Host, error: VtpmdError) -> None:
        """A vtpmd has not started."""
        if self.scheduler.now_s >= host.disk_fails_until_s:
            self.violated(f"{host.name}: vtpmd does not start: {error}")

    def executes(self, host: Host, vm: Vm, permanent: Permanent) -> None:
        """A command of a guest is about to be executed."""
        if vm.lineage is None:
            vm.lineage = permanent.lineage
        if permanent.lineage != vm.lineage:
            self.violated(f"{host.name}: a command runs on another vTPM's state")
        elif permanent.value not in vm.acceptable:
            self.violated(
                f"{host.name}: LOST: a command runs on {permanent.value}, not on "
                f"{sorted(vm.acceptable)}"
            )

    def captured(self, host: Host, kind: StateType, generation: int) -> None:
        """A generation is used for what is sent."""
        if not self.vm.may_run_at(host):
            return
        if generation <= self._captured.get(kind, 0):
            self.violated(f"{host.name}: generation {generation} of {kind.name} is used again")
        self._captured[kind] = generation

    def copied(self, host: Host, permanent: Permanent) -> None:
        """An export has a state; that of a guest which runs there is what that was answered."""
        if host.executes:
            self.exports += 1
            self.executes(host, self.vm, permanent)

    def numbering_begins(self) -> None:
        """A vTPM that comes in whole blobs has no number: those of its new host count."""
        self._captured.clear()

    def sent(self, end: Stream, data: bytes) -> None:
        """A daemon says something to another."""
        host = end.process.host.host
        assert end.other is not None
        to = end.other.process.host.host
        if end.is_lane:
            return  # who says it notes what
        for message in frames(data):
            if isinstance(message, peer.Ping | peer.Pong):
                continue
            self._answered(host, message)
            self._welcomed(host, to, message)
            self.note(f"{host.name} → {to.name}: {type(message).__name__}")
            end.process.check_alive()

    def _welcomed(self, host: Host, to: Host, message: peer.Message) -> None:
        if isinstance(message, peer.Welcome) and to is self.c and host.has_state:
            self.violated(f"{host.name}: another vTPM is welcomed in place of the one there")

    def _answered(self, host: Host, message: peer.Message) -> None:
        if isinstance(message, peer.Released):
            self._released.add((host.name, message.session))
            return
        if not isinstance(message, peer.Kept | peer.Unknown):
            return
        if (host.name, message.session) in self._released:
            self.violated(f"{host.name}: {type(message).__name__}, after Released")

    # Disks.

    def write_outcome(self, host: Host) -> str:
        """Return what becomes of a write."""
        if host.name in self.loses_power:
            self.loses_power.discard(host.name)
            return "lost"
        if self.scheduler.now_s < host.disk_fails_until_s:
            return "fails"
        return "done"

    # Running.

    def run_until(self, done: Any, for_s: float) -> None:
        """Run until something is true, or for so long. Raises Violation."""
        until_s = self.scheduler.now_s + for_s
        while not done() and self.scheduler.now_s < until_s:
            if not self.scheduler.step():
                return
            self.check()

    def check(self) -> None:
        """Raise Violation unless all that must hold does."""
        if self.a.executes and self.b.executes:
            self.violated("TWO: both hosts would execute a command")
        for failure in self.scheduler.failures:
            self.violated(failure)
        if self._violation is not None:
            raise Violation(self._violation)

    async def connect(self, to: str, name: str, client: Process) -> Connection:
        """Connect one daemon to another, as ``tls.connect`` does. Raises VtpmdError."""
        await asyncio.sleep(self.network.handshake_s())
        client.check_alive()
        daemon = self.hosts[to].daemon
        if daemon is None or not daemon.is_ready or self.network.is_down:
            raise HandshakeError(f"cannot connect to {to}")
        here, there = self.network.connect(client, daemon.process)
        daemon.process.call_soon(lambda: daemon.process.spawn(daemon.serve_peer(there, name)))
        return Connection(here, to)

    async def connect_lane(self, to: str, client: Process) -> PlainSocket:
        """Connect one daemon to another, as ``tls.connect_without`` does. Raises OSError."""
        await asyncio.sleep(self.network.handshake_s() / 2)
        client.check_alive()
        daemon = self.hosts[to].daemon
        if daemon is None or not daemon.is_ready or self.network.is_down:
            raise ConnectionRefusedError(f"cannot connect to {to}")
        here, there = self.network.connect(client, daemon.process, is_lane=True)
        daemon.process.call_soon(lambda: daemon.process.spawn(daemon.serve_lane(there)))
        return PlainSocket(here, self.descriptors)


class _Time:
    """The world's clock, in place of the module ``time``."""

    def __init__(self, world: World) -> None:
        self.monotonic_ns = self.perf_counter_ns = world.network.now_ns
        self.time = lambda: world.scheduler.now_s
        self.gmtime, self.strftime = time.gmtime, time.strftime


class _Mistakes(logging.Handler):
    """Hears of mistakes of a daemon's own, which it survives."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Exception) and not isinstance(error, VtpmdError):
            self._world.violated(f"a daemon logs {type(error).__name__}: {error}")


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """Have all of the daemons' log heard by this alone."""
    log = logging.getLogger("vtpmd")
    level, propagates = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagates
        log.setLevel(level)


@contextmanager
def inside(world: World) -> Iterator[None]:
    """Have the daemons use this world's clock and network, and tell it of their mistakes."""

    async def connect(host: str, *_: object) -> Connection:
        process = asyncio.get_running_loop()
        assert isinstance(process, Process)
        return await world.connect(host, process.host.host.name, process)

    async def connect_lane(host: str, _: int) -> PlainSocket:
        process = asyncio.get_running_loop()
        assert isinstance(process, Process)
        return await world.connect_lane(host, process)

    with pytest.MonkeyPatch.context() as patch, _logging_to(_Mistakes(world)):
        patch.setattr(outgoing, "time", _Time(world))
        patch.setattr(incoming, "time", _Time(world))
        patch.setattr(moment, "time", _Time(world))
        # Each vtpmd that starts would have a thread find out what it may have.
        patch.setattr(mobility, "Wakefulness", NoWakefulness)
        patch.setattr(incoming_states, "INCOMING_BYTES", INCOMING_BYTES)
        patch.setattr(tls, "connect", connect)
        patch.setattr(tls, "connect_without", connect_lane)
        patch.setattr(tls, "client_context", lambda _: None)
        yield


__all__ = ["PowerLoss", "Qemu", "Violation", "Vm", "World", "inside"]
