"""The engine of a simulated host: custody, images and files, as csrc/engine/tpm.c and durable.c.

What it executes is a counter. All else is as the link has it: who may execute, what is captured,
when the state's file is written, and what a start begins with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from hashlib import sha256
from typing import Any, Final, Protocol

from tests.sim import state
from tests.sim.disk import SimDirectory
from tests.sim.loop import Process
from tests.sim.state import Permanent, Volatile
from vtpmd.core import (
    Image,
    LinkAdmit,
    LinkCapture,
    LinkInit,
    LinkOperation,
    LinkRetire,
    pack_link_lineage,
    unpack_link_lineage,
)
from vtpmd.daemon.engine import EngineDied, Meanwhile, Reply
from vtpmd.errors import VtpmdError
from vtpmd.store.start import Start
from vtpmd.wire.control import Result, StateType
from vtpmd.wire.swtpm_format import Lineage

LIBTPMS_VERSION: Final = 0x000902
# How often an answer lets the event loop do something else first, and for how long.
LATE: Final = 0.15
LATENCY_S: Final = (0.0001, 0.001, 0.01)
# How often libtpms commits something when it starts.
CHANGES: Final = 0.2


class Custody(Enum):
    """Whose the vTPM is, as its engine knows it: csrc/engine/custody.h."""

    ACTIVE = "this host's: commands are executed, files are written"
    GIVEN = "QEMU has the state: no file is written until the guest is seen to run on"
    FENCED = "another host's: nothing is executed, and nothing written"
    RECLAIMING = "fenced, on, and asked back: commands wait"
    STANDBY = "on ahead of time: it executes and writes nothing"
    PENDING = "standby, and QEMU has been told that it is on: commands wait"


AHEAD: Final = frozenset({Custody.STANDBY, Custody.PENDING})
WAITING: Final = frozenset({Custody.RECLAIMING, Custody.PENDING})
AWAY: Final = frozenset({Custody.FENCED, Custody.RECLAIMING})
EXECUTING: Final = frozenset({Custody.ACTIVE, Custody.GIVEN})


class Response(Enum):
    """What a guest gets for a command."""

    DONE = "TPM_RC_SUCCESS"
    WAIT = "nothing yet"
    FAILURE = "TPM_RC_FAILURE"


class Watcher(Protocol):
    """Who sees what the engine does."""

    def note(self, what: str) -> None:
        """Something happens at the host that counts as a step."""

    def captured(self, kind: StateType, generation: int) -> None:
        """A generation is used for what a peer gets."""

    def new_bytes(self) -> bytes:
        """Return 16 bytes that nothing else has."""


class SimEngine:
    """One vTPM's engine; in a daemon's place of ``vtpmd.daemon.engine.Engine``, and its store."""

    libtpms_version = LIBTPMS_VERSION

    def __init__(
        self,
        process: Process,
        directory: SimDirectory,
        begun: Start,
        watcher: Watcher,
    ) -> None:
        self.death: str | None = None
        self._process = process
        self._rng = process._scheduler.rng
        self._directory = directory
        self._identity = begun.identity
        self._watcher = watcher
        self._lock = asyncio.Lock()
        # tpm.c
        self.running = False
        self.custody = Custody.FENCED if begun.fenced else Custody.ACTIVE
        self._before = Custody.ACTIVE  # of one on standby: what it goes back to
        self.worked = self.served = self.failed = False
        self.permanent: Permanent | None = None  # libtpms'
        self.volatile: Volatile | None = None
        self._set_permanent: bytes | None = None  # what SET_STATE gave
        self._set_volatile: bytes | None = None
        # durable.c
        self._current = begun.states.get(StateType.PERMANENT)
        self._is_in_file = self._current is not None
        self._must_be_written = False
        self._generation = begun.loaded  # of what is durable
        self._held_image = b""
        self._held_has_changed = False
        self._is_adopting = False
        # the store
        self._last = {StateType.PERMANENT: begun.generation, StateType.VOLATILE: begun.generation}
        self._images: dict[StateType, Image] = {}

    # What vtpmd asks.

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
        del descriptor, soon
        async with self._lock:
            self._process.check_alive()
            if self.death is not None:
                raise EngineDied(self.death)
            if meanwhile is not None:
                meanwhile.run()
            if operation is not LinkOperation.CAPTURE:
                self._watcher.note(f"engine: {operation.name}")
            if self._rng.random() < LATE:
                await asyncio.sleep(self._rng.choice(LATENCY_S))
            return self._do(operation, int(argument), bytes(payload))

    async def raise_generations(self, floor: int) -> None:
        self._watcher.note("engine: RAISE_GENERATION")
        for kind in self._last:
            self._last[kind] = max(self._last[kind], floor)

    def generation(self, kind: StateType) -> int:
        image = self._images.get(kind)
        return 0 if image is None else image.generation

    def read(self, kind: StateType) -> Image:
        return self._images[kind]

    def _do(self, operation: LinkOperation, argument: int, payload: bytes) -> Reply:
        match operation:
            case LinkOperation.INIT:
                return self._init(argument, payload)
            case LinkOperation.GET_LINEAGE:
                return self._get_lineage()
            case LinkOperation.GET_STATE:
                return self._get_state(StateType(argument))
            case LinkOperation.CAPTURE:
                return self._capture()
            case LinkOperation.SET_BUFFER_SIZE:
                return Reply(0, 4096, bytearray(8))
        done = _OPERATIONS[operation](self, argument, payload)
        return Reply(int(done), 0, bytearray())

    # Custody.

    @property
    def must_wait(self) -> bool:
        """True while a command gets no answer yet."""
        return self.running and self.custody in WAITING

    @property
    def executes(self) -> bool:
        """True if a command would be executed now."""
        able = self.custody in EXECUTING and not self.failed
        return self._process.alive and self.running and able

    def execute(self, value: int, check: Callable[[int, Permanent, Volatile], None]) -> Response:
        """Execute a command, which leaves a value; ``check`` sees that, and what it finds."""
        self._process.check_alive()
        if self.must_wait:
            return Response.WAIT
        if not self.executes:
            return Response.FAILURE
        assert self.permanent is not None and self.volatile is not None
        check(value, self.permanent, self.volatile)
        self._run_on()
        self.worked = self.served = True
        self.permanent = self.permanent._replace(value=value)
        if not self._commit(self.permanent.encode()):
            self.failed = True
            return Response.FAILURE
        self.volatile = self.volatile._replace(extends=self.volatile.extends + 1)
        return Response.DONE

    def _run_on(self) -> None:
        if self.custody is Custody.GIVEN:
            self.custody = Custody.ACTIVE

    def _let_go(self) -> None:
        self.running = self.failed = False
        self.custody = self._before

    def power_off(self) -> None:
        """As an orderly stop does, which changes the state if that is ours."""
        if self.custody in AHEAD:
            self._let_go()
            return
        if self.custody is Custody.ACTIVE and not self.failed and self.permanent:
            self._commit(self.permanent._replace(clock=self.permanent.clock + 1).encode())
        self.running = self.failed = False
        if self.custody is Custody.RECLAIMING:
            self.custody = Custody.FENCED

    def _init(self, argument: int, payload: bytes) -> Reply:
        has_come = bool(argument & LinkInit.CAME)
        own = self._before if self.custody in AHEAD else self.custody
        if own in AWAY and not has_come:
            return Reply(Result.FAIL, 0, bytearray())
        if self.custody in AHEAD:
            self._let_go()
        if argument & LinkInit.HELD:
            return self._init_standby()
        self._run_on()
        if self.running:
            self.power_off()
        self.custody = Custody.ACTIVE
        if not payload:
            return Reply(self._power_on(), 0, bytearray())
        before, (self._identity, generation) = self._identity, unpack_link_lineage(payload)
        newer = generation > self._generation
        self._must_be_written = newer or before != self._identity
        self._last[StateType.PERMANENT] = max(self._last[StateType.PERMANENT], generation)
        result = self._power_on()
        self._must_be_written = False
        if result:
            self._identity = before
        return Reply(result, 0, bytearray())

    def _get_lineage(self) -> Reply:
        lineage = pack_link_lineage(self._identity, self._generation)
        return Reply(0, 0, bytearray(lineage))

    def _init_standby(self) -> Reply:
        if self.running:
            self.power_off()
        if self._set_permanent is None or self._set_volatile is None:
            return Reply(Result.FAIL, 0, bytearray())
        given = (self._set_permanent, self._set_volatile)
        self._before, self.custody = self.custody, Custody.STANDBY
        self._held_has_changed, self._held_image = False, given[0]
        result = self._power_on()
        digests = b"".join(sha256(each).digest() for each in given)
        return Reply(result, 0, bytearray(digests))

    def _power_on(self) -> int:
        image = self._set_permanent or self._current
        if image is None:  # manufactured
            image = Permanent(self._watcher.new_bytes(), 0, 0).encode()
        fresh = Volatile(self._watcher.new_bytes(), 0)
        came = self._set_volatile
        self._set_permanent = self._set_volatile = None
        self.permanent = state.permanent(image)
        if self._rng.random() < CHANGES:
            self.permanent = self.permanent._replace(clock=self.permanent.clock + 1)
        self.volatile = fresh if came is None else state.volatile(came)
        self.running, self.worked, self.failed = True, True, False
        if not self._commit(self.permanent.encode()):
            self.running = False
            return Result.FAIL
        return Result.SUCCESS

    def _get_state(self, kind: StateType) -> Reply:
        if not self.running or self.custody in AHEAD:
            return Reply(Result.BAD_ORDINAL, 0, bytearray())
        if self.custody in AWAY or self.failed:
            return Reply(Result.FAIL, 0, bytearray())
        assert self.permanent is not None and self.volatile is not None
        if kind is StateType.PERMANENT:
            self.custody = Custody.GIVEN
            return Reply(0, 0, bytearray(self.permanent.encode()))
        return Reply(0, 0, bytearray(self.volatile.encode()))

    def _capture(self) -> Reply:
        if not self.running or self.custody not in EXECUTING:
            return Reply(Result.BAD_ORDINAL, 0, bytearray())
        if self.failed:
            return Reply(Result.FAIL, 0, bytearray())
        if not self.worked:
            return Reply(0, 0, bytearray())
        assert self.permanent is not None and self.volatile is not None
        self._store(StateType.PERMANENT, self.permanent.encode())
        self._store(StateType.VOLATILE, self.volatile.encode())
        self.worked = False
        return Reply(0, LinkCapture.CHANGED, bytearray())

    def _store(self, kind: StateType, data: bytes) -> None:
        before = self._images.get(kind)
        if before is not None and before.data == data and before.generation == self._last[kind]:
            return
        self._last[kind] += 1
        self._watcher.captured(kind, self._last[kind])
        self._images[kind] = Image(kind, self._last[kind], data)

    # Files.

    def _commit(self, image: bytes) -> bool:
        if self.custody in AHEAD:
            self._held_has_changed |= image != self._held_image
            return True
        if self.custody is not Custody.ACTIVE:
            return False
        if image == self._current and not self._must_be_written:
            return True
        written = self._write(image)
        if written:
            self._current = image
        return written

    def _write(self, image: bytes) -> bool:
        self._last[StateType.PERMANENT] += 1
        lineage = Lineage(self._identity, self._last[StateType.PERMANENT])
        self._is_in_file = False
        try:
            self._directory.write_state(StateType.PERMANENT, image, None, lineage)
        except VtpmdError:
            return False
        self._is_in_file, self._generation = True, lineage.generation
        return True

    def _set_state(self, kind: int, payload: bytes) -> int:
        if self.running:
            return Result.BAD_ORDINAL
        if kind == StateType.PERMANENT:
            self._set_permanent = payload
        else:
            self._set_volatile = payload
        return Result.SUCCESS

    def _set_both(self, permanent_bytes: int, payload: bytes) -> int:
        parts = payload[:permanent_bytes], payload[permanent_bytes:]
        try:
            state.permanent(parts[0])
            state.volatile(parts[1])
        except ValueError:
            return Result.FAIL
        results = map(self._set_state, (StateType.PERMANENT, StateType.VOLATILE), parts)
        return max(results)

    def _stop(self, *_: Any) -> int:
        if self.running:
            self.power_off()
        return Result.SUCCESS

    def _forget(self, *_: Any) -> int:
        if self.custody in AHEAD:
            self._let_go()
        if self.running:
            return Result.BAD_ORDINAL
        self._set_permanent = self._set_volatile = None
        return Result.SUCCESS

    def _expect(self, *_: Any) -> int:
        if self.custody not in AHEAD:
            return Result.BAD_ORDINAL
        self.custody = Custody.PENDING
        return Result.SUCCESS

    def _admit(self, argument: int, payload: bytes) -> int:
        goes_back = argument == LinkAdmit.GOES_BACK
        if goes_back and not self._is_adopting:
            return Result.SUCCESS
        if self.custody not in AHEAD:
            return Result.BAD_ORDINAL
        assert self.permanent is not None
        image = self.permanent.encode()
        self._identity, _ = unpack_link_lineage(payload)
        if goes_back:
            self._is_adopting = not self._write(image)
            return Result.FAIL if self._is_adopting else Result.SUCCESS
        self._is_adopting = True
        if self._held_has_changed and not self._write(image):
            return Result.FAIL
        if not self._held_has_changed:
            self._is_in_file = False  # it is in tpm2-00.incoming
            self._last[StateType.PERMANENT] += 1
            self._generation = self._last[StateType.PERMANENT]
        self._current, self._is_adopting = image, False
        self.served = False
        self.custody = Custody.ACTIVE
        return Result.SUCCESS

    def _retire(self, argument: int, _: bytes) -> int:
        ahead = self.custody in AHEAD
        served = self.served and not ahead
        unserved = argument == LinkRetire.UNSERVED
        if served if unserved else (not self.running or ahead or self.worked):
            return Result.FAIL
        self.served = served
        self.custody = Custody.FENCED
        return Result.SUCCESS

    def _unretire(self, *_: Any) -> int:
        if self.custody in AHEAD:
            self._before = Custody.ACTIVE
        else:
            self.custody = Custody.ACTIVE
        return Result.SUCCESS

    def _await(self, argument: int, _: bytes) -> int:
        if self.custody not in AWAY:
            return Result.BAD_ORDINAL
        if self.running:
            self.custody = Custody.RECLAIMING if argument else Custody.FENCED
        return Result.SUCCESS

    def _store_permanent(self, *_: Any) -> int:
        if self.custody is not Custody.ACTIVE:
            return Result.FAIL
        if self._current is None or self._is_in_file:
            return Result.SUCCESS
        return Result.SUCCESS if self._write(self._current) else Result.FAIL


_OPERATIONS: Final[dict[LinkOperation, Callable[[SimEngine, int, bytes], int]]] = {
    LinkOperation.SET_STATE: SimEngine._set_state,
    LinkOperation.SET_BOTH_STATES: SimEngine._set_both,
    LinkOperation.SET_DATA_SOCKET: lambda *_: 0,
    LinkOperation.STOP: SimEngine._stop,
    LinkOperation.FORGET_STATE: SimEngine._forget,
    LinkOperation.EXPECT: SimEngine._expect,
    LinkOperation.ADMIT: SimEngine._admit,
    LinkOperation.RETIRE: SimEngine._retire,
    LinkOperation.UNRETIRE: SimEngine._unretire,
    LinkOperation.AWAIT: SimEngine._await,
    LinkOperation.STORE_PERMANENT: SimEngine._store_permanent,
}
