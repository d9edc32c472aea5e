"""The engine of a simulated host: custody, images and files, as csrc/engine/tpm.c and durable.c.

What it executes is a counter. All else is as the link has it: who may execute, what is captured,
when the state's file is written, and what a start begins with. ``server.py`` has its control
channel, ``blackout.py`` the hand-over, ``link.py`` the link to a vtpmd, which may come and go.
"""

from __future__ import annotations

import asyncio
import errno
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from tests.sim import state
from tests.sim.blackout import Blackout, Digests
from tests.sim.disk import SimDirectory
from tests.sim.loop import Process
from tests.sim.network import Stream
from tests.sim.server import Arrived, ControlServer
from tests.sim.state import Permanent, Volatile
from tests.support.image_digest import whole_digest
from vtpmd.core import Image, LinkOperation
from vtpmd.core.handover import Handover, HandoverEvent
from vtpmd.core.lane import LaneKeying
from vtpmd.core.link import (
    LinkAdmit,
    LinkCapture,
    LinkCapturing,
    LinkCondition,
    LinkCustody,
    LinkQuestion,
    pack_link_lineage,
    unpack_link_lineage,
)
from vtpmd.daemon.engine import Answer, Question, Reply
from vtpmd.errors import VtpmdError
from vtpmd.store.directory import StateDirectoryError
from vtpmd.store.start import Start
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import Result, StateType

if TYPE_CHECKING:
    from tests.sim.link import SimLink

_RECORDED: Final = struct.Struct("=II")  # struct link_recorded
_COPY: Final = struct.Struct("=Q16s4I")  # struct link_copy
SILENCE_MAX_S: Final = 5.0  # ASKER_SILENCE_MAX_MS
CUSTODY_SHIFT: Final = 8  # LINK_CUSTODY_SHIFT
# How often an answer lets the event loop do something else first, and for how long.
LATE: Final = 0.15
LATENCY_S: Final = (0.0001, 0.001, 0.01)
# How long a disk takes for a sector, beside what others do meanwhile.
DISK_S: Final = (0.0, 0.001, 0.05)
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

    def copied(self, permanent: Permanent) -> None:
        """A person gets a copy."""

    def new_bytes(self) -> bytes:
        """Return 16 bytes that nothing else has."""

    def take_descriptor(self, descriptor: int) -> Stream:
        """Return the connection that vtpmd hands down; it is the engine's, too, then."""


class SimEngine:
    """One vTPM's engine."""

    is_alone = False  # each is started with options for moving

    def __init__(
        self,
        process: Process,
        directory: SimDirectory,
        begun: Start,
        watcher: Watcher,
    ) -> None:
        self.server = ControlServer(self)
        self.link: SimLink | None = None
        self.is_recording = False
        self._coming: asyncio.Future[None] | None = None  # of a vtpmd
        self._process = process
        self._rng = process._scheduler.rng
        self._directory = directory
        self._identity = begun.identity
        self._watcher = watcher
        self.blackout = Blackout(self)
        # tpm.c
        self.running = False
        self.custody = Custody.FENCED if begun.fenced else Custody.ACTIVE
        self._before = Custody.ACTIVE  # of one on standby: what it goes back to
        self.worked = self.served = self.failed = self._is_untouched = False
        self.permanent: Permanent | None = None  # libtpms'
        self.volatile: Volatile | None = None
        self._set_permanent: bytes | None = None  # what set_state() gave
        self._set_volatile: bytes | None = None
        # durable.c
        self._current = begun.states.get(StateType.PERMANENT)
        self._is_known = begun.is_known  # whose that is
        self._is_in_file = self._current is not None
        self._must_be_written = False
        self._brought: tuple[int, bytes | None] | None = None  # what keeps its generation
        self._generation = begun.loaded  # of what is durable
        self._held_image = b""
        self._held_has_changed = False
        self.held_digests: Digests = (b"", b"")
        self._is_adopting = False
        # the store
        self._last = {StateType.PERMANENT: begun.generation, StateType.VOLATILE: begun.generation}
        self._images: dict[StateType, Image] = {}

    @property
    def now_s(self) -> float:
        """The time."""
        return self._process.time()

    @property
    def is_busy(self) -> bool:
        """True while it decides, or writes, something that a vtpmd which attaches is to find."""
        return self.server.is_deciding or self.is_recording

    def note(self, what: str) -> None:
        """Something happens that counts as a step."""
        self._watcher.note(what)

    # vtpmd comes and goes.

    def attached(self, link: SimLink) -> None:
        """A vtpmd is there."""
        self.link = link
        if self._coming is not None and not self._coming.done():
            self._coming.set_result(None)

    def detach(self, link: SimLink) -> None:
        """It is not any more."""
        if self.link is link:
            self.link = None
            link.close()
            self.blackout.say(HandoverEvent.DETACHED)

    async def wait_for_vtpmd(self, until_s: float) -> bool:
        """asker_wait()."""
        if self.link is None:
            self._coming = self._process.create_future()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until_s - self.now_s)):
                    await self._coming
        return self.link is not None

    async def ask(self, question: Question, *, may_decide: bool) -> Answer | None:
        """asker_ask(): None without a vtpmd that answers, or that has to be asked."""
        if self.link is not None and self.link.is_quiet and may_decide:
            return None
        self.note(f"engine asks: {question.number.name}")
        await self.late()
        link = self.link
        if link is None:
            return None
        waiting: asyncio.Future[Answer | None] = self._process.create_future()
        link.ask(question, waiting)
        while not waiting.done():
            left_s = link.heard_s + SILENCE_MAX_S - self.now_s
            if left_s <= 0:
                self.note("engine: vtpmd is silent")
                self.detach(link)
                break
            await asyncio.wait({waiting}, timeout=left_s)
        answer = waiting.result()
        await self.late()
        return answer

    def set_lane(self, lane: int, keying: LaneKeying, *, is_source: bool) -> None:
        """LINK_SET_LANE."""
        stream = self._watcher.take_descriptor(lane)
        self.blackout.set_lane(stream, keying, is_source=is_source)

    def tell(self, news: Question) -> None:
        """asker_tell()."""
        if self.link is not None:
            self.link.tell(news)

    # What vtpmd asks.

    async def late(self) -> None:
        """Let others do something first, now and then."""
        if self._rng.random() < LATE:
            await asyncio.sleep(self._rng.choice(LATENCY_S))

    def stop(self) -> None:
        """End it, in order."""
        self.server.end()
        if self.custody in AHEAD:
            self._let_go()
        if self.running:
            self.power_off()

    def raise_generations(self, floor: int) -> None:
        """LINK_RAISE_GENERATION."""
        for kind in self._last:
            self._last[kind] = max(self._last[kind], floor)

    def generation(self, kind: StateType) -> int:
        image = self._images.get(kind)
        return 0 if image is None else image.generation

    def read(self, kind: StateType) -> Image:
        return self._images[kind]

    def do(
        self, operation: LinkOperation, argument: int, payload: bytes, descriptor: int | None
    ) -> Reply:
        match operation:
            case LinkOperation.INIT:
                return self._init()
            case LinkOperation.STAGE:
                return self.server.stage(argument, payload)
            case LinkOperation.GET_LINEAGE:
                lineage, _ = self.get_lineage()
                return Reply(0, 0, bytearray(pack_link_lineage(*lineage[:2])))
            case LinkOperation.GET_INFO:
                return Reply(0, 0, bytearray(b"{}"))
            case LinkOperation.GET_CONDITION:
                return Reply(0, self._condition(), bytearray())
            case LinkOperation.COPY:
                return self._copy()
            case LinkOperation.CAPTURE:
                return self._capture(LinkCapturing(argument), payload, descriptor)
            case LinkOperation.RECORD:
                return Reply(self._record(payload, descriptor), 0, bytearray())
            case LinkOperation.WITHDRAW:
                before = self.blackout.state
                return Reply(self.blackout.withdraw(), before, bytearray())
            case LinkOperation.GET_STAGED:
                staged = self.server.staged()
                generation = staged.generation.to_bytes(8, sys.byteorder)
                return Reply(0, 0, bytearray(generation + staged.data))
        done = _OPERATIONS[operation](self, argument, payload)
        return Reply(int(done), 0, bytearray())

    def captured(self) -> tuple[Image, Image]:
        """What was captured last."""
        nothing = Image(StateType.PERMANENT, 0, b"")
        return (
            self._images.get(StateType.PERMANENT, nothing),
            self._images.get(StateType.VOLATILE, nothing),
        )

    def _condition(self) -> int:
        has_blobs = self.server.arrival.what is Arrived.BLOBS
        found = LinkCondition.RUNNING if self.is_running else LinkCondition(0)
        found |= LinkCondition.BLOBS if has_blobs else LinkCondition(0)
        found |= LinkCondition.ON if self.running else LinkCondition(0)
        found |= LinkCondition.STARTED if self.server.arrival.has_started else LinkCondition(0)
        return found | LinkCustody[self.custody.name] << CUSTODY_SHIFT

    # Custody.

    @property
    def is_running(self) -> bool:
        """tpm_is_running()."""
        return self.running and self.custody is not Custody.STANDBY

    @property
    def is_held(self) -> bool:
        """incoming.c, is_on_standby()."""
        return self.running and self.custody is Custody.STANDBY

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
        self.run_on()
        self.worked = self.served = True
        self._is_untouched = False
        self.permanent = self.permanent._replace(value=value)
        if not self._commit(self.permanent.encode()):
            self.failed = True
            return Response.FAILURE
        self.volatile = self.volatile._replace(extends=self.volatile.extends + 1)
        self._process.call_soon(self.blackout.worked)  # the response is on its way by then
        return Response.DONE

    @property
    def has_state(self) -> bool:
        """tpm_has_state()."""
        return self._current is not None

    def run_on(self) -> None:
        """tpm_run_on()."""
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
        is_shut_down = not self.failed and not self._is_untouched
        if self.custody is Custody.ACTIVE and is_shut_down and self.permanent:
            self._commit(self.permanent._replace(clock=self.permanent.clock + 1).encode())
        self.running = self.failed = False
        if self.custody is Custody.RECLAIMING:
            self.custody = Custody.FENCED

    def _init(self) -> Reply:
        result = self.server.start()
        if result == Result.SUCCESS:
            self.blackout.say(HandoverEvent.OWNED)
        return Reply(result, 0, bytearray())

    def _undo_init(self, before: Custody) -> None:
        if before in AWAY:
            self.custody = Custody.FENCED

    def _begin_init(self, *, has_come: bool) -> bool:
        if self.custody in AHEAD:
            self._let_go()
        if self.custody in AWAY and not has_come:
            return False
        self.run_on()
        if self.running:
            self.power_off()
        self.custody = Custody.ACTIVE
        return True

    def init(self, *, has_come: bool) -> int:
        """tpm_init()."""
        before = self.custody
        if not self._begin_init(has_come=has_come):
            return Result.FAIL
        result = self._power_on()
        if result:
            self._undo_init(before)
        return result

    def init_come(self, lineage: Lineage) -> int:
        """tpm_init_come()."""
        custody = self.custody
        self._begin_init(has_come=True)
        before, self._identity = self._identity, lineage.identity
        is_newer = lineage.generation > self._generation
        self._must_be_written = is_newer or before != self._identity
        is_no_snapshot = not self._is_known or (is_newer and before == self._identity)
        self._brought = (lineage.generation, self._set_permanent) if is_no_snapshot else None
        result = self._power_on()
        self._must_be_written, self._brought = False, None
        self._is_untouched = not result and self._generation == lineage.generation
        if result:
            self._identity = before
            self._undo_init(custody)
        return result

    def get_lineage(self) -> tuple[Lineage, bool]:
        """tpm_get_lineage(): of which vTPM the state is, and whether that is known."""
        is_known = self._current is not None and self._is_known
        return Lineage(self._identity, self._generation), is_known

    def raise_generation(self, floor: int) -> None:
        """tpm_raise_generation(), of the permanent state."""
        last = self._last[StateType.PERMANENT]
        self._last[StateType.PERMANENT] = max(last, floor)

    def init_standby(self, given: tuple[bytes, bytes]) -> int:
        """tpm_init_standby()."""
        if self.custody in AHEAD:
            self._let_go()
        if self.running:
            self.power_off()
        self._set_permanent, self._set_volatile = given
        self._before, self.custody = self.custody, Custody.STANDBY
        self._held_has_changed, self._held_image = False, given[0]
        result = self._power_on()
        if result == Result.SUCCESS:
            self.held_digests = whole_digest(given[0]), whole_digest(given[1])
        return result

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
        self._is_untouched = False
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

    def _copy(self) -> Reply:
        """tpm_copy()."""
        if not self.running or self.custody not in EXECUTING:
            return Reply(Result.BAD_ORDINAL, 0, bytearray())
        if self.failed:
            return Reply(Result.IOERROR, 0, bytearray())
        assert self._current is not None and self.volatile is not None
        volatile, (lineage, is_known) = self.volatile.encode(), self.get_lineage()
        identity, generation = lineage[:2] if is_known else (bytes(16), 0)
        head = _COPY.pack(generation, identity, len(self._current), len(volatile), 0, 0)
        self._watcher.copied(state.permanent(self._current))
        return Reply(0, 0, bytearray(head + self._current + volatile))

    def _capture(self, how: LinkCapturing, sector: bytes, descriptor: int | None) -> Reply:
        """do_capture()."""
        if descriptor is None:
            return self._capture_now(how)
        refusal = self._record(sector, descriptor)
        if refusal:
            return Reply(refusal, 0, bytearray())
        reply = self._capture_now(how)
        return reply._replace(argument=reply.argument | LinkCapture.RECORDS)

    def _record(self, sector: bytes, descriptor: int | None) -> int:
        """blackout_record()."""
        assert descriptor is not None
        if self.is_recording:
            return Result.BAD_ORDINAL
        self.is_recording = True
        write = partial(self._write_record, self.blackout.session, sector, descriptor)
        self._process.call_later(self._rng.choice(DISK_S), write)
        return Result.SUCCESS

    def _write_record(self, session: bytes, sector: bytes, descriptor: int) -> None:
        """recorder.c, and blackout.c's recorded()."""
        error = 0
        try:
            self._directory.write_sector(descriptor, sector)
        except StateDirectoryError:
            error = errno.EIO
        self.is_recording = False
        if not error and session == self.blackout.session:
            self.blackout.say(HandoverEvent.RECORDED)
        self.tell(Question(LinkQuestion.TELL_RECORDED, 0, _RECORDED.pack(error, 0)))

    def _capture_now(self, how: LinkCapturing) -> Reply:
        if not self.running or self.custody not in EXECUTING:
            return Reply(Result.BAD_ORDINAL, 0, bytearray())
        if self.failed:
            return Reply(Result.FAIL, 0, bytearray())
        found = self._capture_new() if self.worked else LinkCapture(0)
        digests = self.blackout.offer() if LinkCapturing.OFFERS in how else None
        if digests is not None and LinkCapturing.RECORDED in how:
            self.blackout.say(HandoverEvent.RECORDED)
        if digests is not None:
            found |= LinkCapture.OFFERED
            if self.link is not None:
                self.link.settle(LinkQuestion.ASK_STATE)
        return Reply(0, found, bytearray(b"".join(digests or ())))

    def _capture_new(self) -> LinkCapture:
        self.blackout.captures()
        assert self.permanent is not None and self.volatile is not None
        self._store(StateType.PERMANENT, self.permanent.encode())
        self._store(StateType.VOLATILE, self.volatile.encode())
        self.worked = False
        return LinkCapture.CHANGED

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

    def _number(self, image: bytes) -> int:
        """number_both()."""
        if self._brought is not None and image == self._brought[1]:
            self.raise_generation(self._brought[0])
            return self._brought[0]
        self._last[StateType.PERMANENT] += 1
        return self._last[StateType.PERMANENT]

    def _write(self, image: bytes) -> bool:
        lineage = Lineage(self._identity, self._number(image))
        self._is_in_file = False
        try:
            self._directory.write_state(StateType.PERMANENT, image, None, lineage)
        except VtpmdError:
            return False
        self._is_in_file, self._generation = True, lineage.generation
        self._is_adopting = False
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

    def stop_tpm(self, *, fenced: bool = False) -> int:
        """tpm_stop(), or tpm_stop_fenced()."""
        if self.running:
            self.power_off()
        if fenced:
            self.custody = Custody.FENCED
        return Result.SUCCESS

    def forget_state(self) -> int:
        """tpm_forget_state()."""
        if self.custody in AHEAD:
            self._let_go()
        if self.running:
            return Result.BAD_ORDINAL
        self._set_permanent = self._set_volatile = None
        return Result.SUCCESS

    def _forget_state(self, argument: int, _: bytes) -> int:
        return self.server.forget(goes_on=argument == 1)

    def _end_control(self) -> int:
        self.server.end()
        return Result.SUCCESS

    def expect(self) -> None:
        """tpm_expect(), by the hand-over."""
        assert self.custody in AHEAD
        self.custody = Custody.PENDING

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
        self.blackout.say(HandoverEvent.OWNED)
        self.server.unstage()
        return Result.SUCCESS

    def retire(self, *, unserved: bool) -> int:
        """tpm_retire()."""
        ahead = self.custody in AHEAD
        served = self.served and not ahead
        if served if unserved else (not self.running or ahead or self.worked):
            return Result.FAIL
        self.served = served
        self.custody = Custody.FENCED
        return Result.SUCCESS

    def _retire(self, *_: Any) -> int:
        result = self.retire(unserved=True)
        if result == Result.SUCCESS:
            self.blackout.say(HandoverEvent.OWNED)
        return result

    def _unretire(self, argument: int, _: bytes) -> int:
        may_be_theirs = self.blackout.state is Handover.GRANTED
        if may_be_theirs and argument != 1:
            return Result.BAD_ORDINAL
        if self.custody in AHEAD:
            self._before = Custody.ACTIVE
        else:
            self.custody = Custody.ACTIVE
        if may_be_theirs:
            self.blackout.say(HandoverEvent.OWNED)
        return Result.SUCCESS

    def await_(self, *, is_so: bool) -> int:
        """tpm_await()."""
        if self.custody not in AWAY:
            return Result.BAD_ORDINAL
        if self.running:
            self.custody = Custody.RECLAIMING if is_so else Custody.FENCED
        return Result.SUCCESS

    def _store_permanent(self, *_: Any) -> int:
        if self.custody is not Custody.ACTIVE:
            return Result.FAIL
        if self._current is None or self._is_in_file:
            return Result.SUCCESS
        return Result.SUCCESS if self._write(self._current) else Result.FAIL


_OPERATIONS: Final[dict[LinkOperation, Callable[[SimEngine, int, bytes], int]]] = {
    LinkOperation.TAKE_BLOB: lambda engine, *_: engine.server.take_blob(),
    LinkOperation.BE_ASKED: lambda *_: Result.SUCCESS,  # the link sees to it
    LinkOperation.END_CONTROL: lambda engine, *_: engine._end_control(),
    LinkOperation.STOP: lambda engine, argument, _: engine.server.stop(fenced=bool(argument)),
    LinkOperation.FORGET_STATE: lambda engine, argument, _: engine.server.forget(
        goes_on=argument == 1
    ),
    LinkOperation.KEEP_BASE: lambda engine, _, payload: engine.blackout.keep_base(
        struct.unpack("=QQ", payload)
    ),
    LinkOperation.STORE_PERMANENT: SimEngine._store_permanent,
    LinkOperation.RETIRE: SimEngine._retire,
    LinkOperation.UNRETIRE: SimEngine._unretire,
    LinkOperation.AWAIT: lambda engine, argument, _: engine.await_(is_so=bool(argument)),
    LinkOperation.RECORDED: lambda engine, *_: engine.blackout.say(HandoverEvent.RECORDED),
    LinkOperation.LET_GO: lambda engine, *_: engine.blackout.say(HandoverEvent.LET_GO),
    LinkOperation.ADMIT: SimEngine._admit,
    # No command of a simulated guest is long.
    LinkOperation.ARM: lambda *_: Result.SUCCESS,
}
