"""The engine of a simulated host: custody, images and files, as csrc/engine/tpm.c and durable.c.

What it executes is a counter. All else is as the link has it: who may execute, what is captured,
when the state's file is written, and what a start begins with. ``server.py`` has its control
channel. It dies together with its vtpmd.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from enum import Enum
from hashlib import sha256
from typing import Any, Final, Protocol

from tests.sim import state
from tests.sim.disk import SimDirectory
from tests.sim.loop import Process
from tests.sim.server import Arrived, ControlServer
from tests.sim.state import Permanent, Volatile
from vtpmd.core import (
    Image,
    LinkAdmit,
    LinkCapture,
    LinkCondition,
    LinkOperation,
    LinkRetire,
    pack_link_lineage,
    unpack_link_lineage,
)
from vtpmd.daemon.engine import Answer, Answerer, EngineDied, Meanwhile, Question, Reply
from vtpmd.errors import VtpmdError
from vtpmd.store.start import Start
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import Result, StateType

LIBTPMS_VERSION: Final = 0x000902
# How often an answer lets the event loop do something else first, and for how long.
LATE: Final = 0.15
LATENCY_S: Final = (0.0001, 0.001, 0.01)
# What is asked for at any time, and changes nothing: no step that a fault comes with.
_QUIET: Final = frozenset(
    {
        LinkOperation.CAPTURE,
        LinkOperation.GET_CONDITION,
        LinkOperation.ARM,
        LinkOperation.ABANDON,
    }
)
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
        self.server = ControlServer(self)
        self._answerer: Answerer | None = None
        self._can_be_answered = asyncio.Event()
        self._answering: set[asyncio.Task[Answer]] = set()
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
        self._set_permanent: bytes | None = None  # what set_state() gave
        self._set_volatile: bytes | None = None
        # durable.c
        self._current = begun.states.get(StateType.PERMANENT)
        self._is_known = begun.is_known  # whose that is
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
        meanwhile: Meanwhile | None = None,
        *,
        soon: bool = True,
    ) -> Reply:
        del soon
        async with self._lock:
            self._process.check_alive()
            if self.death is not None:
                raise EngineDied(self.death)
            if meanwhile is not None:
                meanwhile.run()
            if operation not in _QUIET:
                self._watcher.note(f"engine: {operation.name}")
            await self.late()
            return self._do(operation, int(argument), bytes(payload))

    async def late(self) -> None:
        """Let others do something first, now and then."""
        if self._rng.random() < LATE:
            await asyncio.sleep(self._rng.choice(LATENCY_S))

    async def condition(self) -> LinkCondition:
        return LinkCondition((await self.request(LinkOperation.GET_CONDITION)).argument)

    async def end_control(self) -> None:
        await self.request(LinkOperation.END_CONTROL)
        await asyncio.gather(*self._answering)

    def stop(self) -> None:
        """End it, in order."""
        self.server.end()
        if self.custody in AHEAD:
            self._let_go()
        if self.running:
            self.power_off()

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
                return self._init(argument)
            case LinkOperation.GET_LINEAGE:
                lineage, _ = self.get_lineage()
                return Reply(0, 0, bytearray(pack_link_lineage(*lineage[:2])))
            case LinkOperation.GET_CONDITION:
                return Reply(0, self._condition(), bytearray())
            case LinkOperation.CAPTURE:
                return self._capture()
        done = _OPERATIONS[operation](self, argument, payload)
        return Reply(int(done), 0, bytearray())

    def _condition(self) -> LinkCondition:
        has_blobs = self.server.arrival.what is Arrived.BLOBS
        running = LinkCondition.RUNNING if self.is_running else LinkCondition(0)
        return running | (LinkCondition.BLOBS if has_blobs else LinkCondition(0))

    # What it asks vtpmd, and tells it.

    def answer_by(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._can_be_answered.set()

    async def ask(self, question: Question) -> Answer:
        """asker_ask()."""
        self._watcher.note(f"engine asks: {question.number.name}")
        await self.late()
        await self._can_be_answered.wait()
        assert self._answerer is not None
        answering = self._process.create_task(self._answerer.answer(question))
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        answer: Answer = await answering
        await self.late()
        return answer

    def tell(self, news: Question) -> None:
        """asker_tell()."""
        assert self._answerer is not None  # nothing is news before something was asked
        self._answerer.hear(news)

    # Custody.

    @property
    def is_running(self) -> bool:
        """tpm_is_running()."""
        return self.running and self.custody is not Custody.STANDBY

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

    def _init(self, argument: int) -> Reply:
        if argument:
            return self._init_standby()
        return Reply(self.server.arrival.start(), 0, bytearray())

    def _begin_init(self, *, has_come: bool) -> bool:
        if self.custody in AHEAD:
            self._let_go()
        if self.custody in AWAY and not has_come:
            return False
        self._run_on()
        if self.running:
            self.power_off()
        self.custody = Custody.ACTIVE
        return True

    def init(self, *, has_come: bool) -> int:
        """tpm_init()."""
        return self._power_on() if self._begin_init(has_come=has_come) else Result.FAIL

    def init_come(self, lineage: Lineage) -> int:
        """tpm_init_come()."""
        self._begin_init(has_come=True)
        before, self._identity = self._identity, lineage.identity
        is_newer = lineage.generation > self._generation
        self._must_be_written = is_newer or before != self._identity
        result = self._power_on()
        self._must_be_written = False
        if result:
            self._identity = before
        return result

    def get_lineage(self) -> tuple[Lineage, bool]:
        """tpm_get_lineage(): of which vTPM the state is, and whether that is known."""
        is_known = self._current is not None and self._is_known
        return Lineage(self._identity, self._generation), is_known

    def raise_generation(self, floor: int) -> None:
        """tpm_raise_generation(), of the permanent state."""
        last = self._last[StateType.PERMANENT]
        self._last[StateType.PERMANENT] = max(last, floor)

    def _init_standby(self) -> Reply:
        if self.custody in AHEAD:
            self._let_go()
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

    def get_state(self, kind: StateType) -> tuple[int, bytes]:
        """tpm_get_state()."""
        if not self.running or self.custody in AHEAD:
            return Result.BAD_ORDINAL, b""
        if self.custody in AWAY or self.failed:
            return Result.FAIL, b""
        assert self.permanent is not None and self.volatile is not None
        if kind is not StateType.PERMANENT:
            return Result.SUCCESS, self.volatile.encode()
        self.custody = Custody.GIVEN
        return Result.SUCCESS, self.permanent.encode()

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
            self._current, self._is_known = image, True
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

    def set_state(self, kind: StateType, image: bytes) -> int:
        """tpm_set_state(): libtpms drops all that it was given when it refuses a state."""
        if self.running:
            return Result.BAD_ORDINAL
        try:
            if kind is StateType.PERMANENT:
                state.permanent(image)
                self._set_permanent = image
            else:
                state.volatile(image)
                self._set_volatile = image
        except (ValueError, struct.error):
            self._set_permanent = self._set_volatile = None
            return Result.FAIL
        return Result.SUCCESS

    def _set_both(self, permanent_bytes: int, payload: bytes) -> int:
        result = self.set_state(StateType.PERMANENT, payload[:permanent_bytes])
        if result != Result.SUCCESS:
            return result
        return self.set_state(StateType.VOLATILE, payload[permanent_bytes:])

    def stop_tpm(self) -> int:
        """tpm_stop()."""
        if self.running:
            self.power_off()
        return Result.SUCCESS

    def forget_state(self) -> int:
        """tpm_forget_state()."""
        if self.custody in AHEAD:
            self._let_go()
        if self.running:
            return Result.BAD_ORDINAL
        self._set_permanent = self._set_volatile = None
        return Result.SUCCESS

    def _end_control(self) -> int:
        self.server.end()
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
        before, (self._identity, _) = self._identity, unpack_link_lineage(payload)
        is_to_be_written = goes_back or self._held_has_changed
        self._is_adopting = True
        if is_to_be_written and not self._write(image):
            self._identity = before
            return Result.FAIL
        if not is_to_be_written:
            self._is_in_file = False  # it is in tpm2-00.incoming
            self._last[StateType.PERMANENT] += 1
            self._generation = self._last[StateType.PERMANENT]
        self._current, self._is_known, self._is_adopting = image, True, False
        if goes_back:
            return Result.SUCCESS
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
    LinkOperation.TAKE_BLOB: lambda engine, *_: engine.server.take_blob(),
    LinkOperation.END_CONTROL: lambda engine, *_: engine._end_control(),
    LinkOperation.STOP: lambda engine, *_: engine.stop_tpm(),
    LinkOperation.SET_BOTH_STATES: SimEngine._set_both,
    LinkOperation.FORGET_STATE: lambda engine, *_: engine.forget_state(),
    LinkOperation.STORE_PERMANENT: SimEngine._store_permanent,
    LinkOperation.RETIRE: SimEngine._retire,
    LinkOperation.UNRETIRE: SimEngine._unretire,
    LinkOperation.AWAIT: SimEngine._await,
    LinkOperation.EXPECT: SimEngine._expect,
    LinkOperation.ADMIT: SimEngine._admit,
    # No command of a simulated guest is long.
    LinkOperation.ARM: lambda *_: Result.SUCCESS,
    LinkOperation.ABANDON: lambda *_: Result.SUCCESS,
}
