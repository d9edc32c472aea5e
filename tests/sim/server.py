"""The control channel of a simulated host, as csrc/engine/server.c, commands.c and arrival.c.

Each function does what the one of its name does there, in the same order, of those commands that
have to do with whose the vTPM is. What vtpmd is asked goes to its own code.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.sim.link import SETTLED
from tests.support.tail import Tail, is_tail
from vtpmd._core import lib
from vtpmd.core import Image
from vtpmd.core.delta import DeltaError, delta_apply, delta_inspect
from vtpmd.core.handover import WITHOUT_GRANT, Handover
from vtpmd.core.link import LinkAskedInit, LinkCustody, LinkQuestion
from vtpmd.daemon.engine import Answer, Question, Reply
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import FormatError, Lineage
from vtpmd.wire.tpm import Result, StateType

if TYPE_CHECKING:
    from tests.sim.engine import SimEngine

_STAGED: Final = (StateType.PERMANENT, StateType.VOLATILE)
# struct link_restored
_RESTORED: Final = Struct("=QQ")


class Number(Enum):
    """What QEMU asks of its TPM."""

    INIT = auto()
    SHUTDOWN = auto()
    STOP = auto()
    GET_STATEBLOB = auto()
    SET_STATEBLOB = auto()
    SET_DATAFD = auto()
    LOCK_STORAGE = auto()


class Command(NamedTuple):
    """A command of QEMU's."""

    number: Number
    kind: StateType = StateType.PERMANENT  # of a blob
    blob: bytes = b""  # that is set
    is_incoming: bool = False  # INIT, of a guest that came with a stream


class Said(NamedTuple):
    """What it is answered."""

    result: int
    blob: bytes = b""


class Content(NamedTuple):
    """What a blob holds: struct blob_content."""

    state: bytes
    lineage: Lineage | None


class Restored(NamedTuple):
    """A state that runs, and the newest that there was of the same vTPM."""

    generation: int
    newest: int


class Verdict(Enum):
    """Who has decided on a command, and how: commands.c, unasked.h."""

    ANSWERED = "vtpmd"
    SETTLED = "vtpmd, before it answers"
    GO_ON = chr(lib.UNASKED_GO_ON)
    DONE = chr(lib.UNASKED_DONE)
    AWAIT = chr(lib.UNASKED_AWAIT)
    WAIT = chr(lib.UNASKED_WAIT)
    REFUSE = chr(lib.UNASKED_REFUSE)


WAIT_S: Final = lib.UNASKED_WAIT_MS / 1000


class Arrived(Enum):
    """What the QEMU that uses the TPM has brought for its next INIT: enum arrived."""

    NOTHING = "the TPM starts from what the directory holds"
    BLOBS = "it starts from the permanent state that QEMU has set, whoever's the vTPM was"
    TAIL = "it starts from what a peer's session and the tail made, or not at all"
    UNUSABLE = "what it has brought was refused: it does not start for a guest that came so"


class Arrival:
    """arrival.c."""

    def __init__(self, tpm: SimEngine) -> None:
        self.what = Arrived.NOTHING
        self._tpm = tpm
        self.has_given = False  # libtpms has states from QEMU for the next INIT
        self._lineage: Lineage | None = None  # of the blobs
        self._newest = 0
        self.has_started = False  # the TPM, for the QEMU that uses it

    def _set(self, what: Arrived) -> None:
        self.what, self.has_given = what, False
        self._lineage, self._newest = None, 0

    def forget(self, then: Arrived) -> None:
        if self.has_given:
            self._tpm.forget_state()
        self._set(then)

    def begin(self) -> None:
        self.forget(Arrived.NOTHING)
        self.has_started = False

    def take_tail(self) -> bool:
        if self.what is not Arrived.NOTHING or self.has_given:
            self.forget(Arrived.UNUSABLE)
            return False
        self.what = Arrived.TAIL
        return True

    def _take_lineage(self, lineage: Lineage | None) -> bool:
        own, is_known = self._tpm.get_lineage()
        self._lineage, self._newest = lineage, 0
        if lineage is None or not is_known:
            return True
        if lineage.identity == own.identity:
            if lineage.generation < own.generation:
                self._newest = own.generation
            return True
        return self.has_started

    def take_blob(self, kind: StateType, content: Content) -> int:
        is_permanent = kind is StateType.PERMANENT
        result: int = Result.FAIL
        if not is_permanent or self._take_lineage(content.lineage):
            result = self._tpm.set_state(kind, content.state)
        if result != Result.SUCCESS:
            self.forget(Arrived.UNUSABLE)
            return result
        self.has_given = True
        if is_permanent:
            self.what = Arrived.BLOBS
        return Result.SUCCESS

    def start(self) -> int:
        has_come = self.what is Arrived.BLOBS
        if not has_come or self._lineage is None:
            return self._tpm.init(has_come=has_come)
        self._tpm.raise_generation(self._lineage.generation)
        return self._tpm.init_come(self._lineage)

    def end(self, result: int, *, is_incoming: bool) -> Restored | None:
        was_brought = self.what is Arrived.BLOBS
        if result != Result.SUCCESS:
            if was_brought:
                self.forget(Arrived.UNUSABLE)
            return None
        self.has_started = True
        if not was_brought and not is_incoming:
            return None
        generation = 0 if self._lineage is None else self._lineage.generation
        restored = Restored(generation, self._newest)
        self._set(Arrived.NOTHING)
        return restored if restored.newest > 0 else None


class ControlServer:
    """server.c and commands.c."""

    def __init__(self, tpm: SimEngine) -> None:
        self.arrival = Arrival(tpm)
        self._tpm = tpm
        self._staged: dict[StateType, Image] = {}
        self._staged_before: dict[StateType, Image] = {}
        self._coming: tuple[StateType, Content] | None = None  # while vtpmd is asked about it
        self._gave_tail = self._gave_whole = False
        self._done: int | None = None  # what vtpmd has done of what it is asked about
        self.is_deciding = False  # without vtpmd
        self._told_running = False
        self.has_ended = False
        self._sent: asyncio.Queue[tuple[Command, Callable[[Said], None]]] = asyncio.Queue()
        self._woken = asyncio.Event()
        self._carry_out: dict[Number, Callable[[Command], Awaitable[Said]]] = {
            Number.INIT: self._init,
            Number.SHUTDOWN: self._shutdown,
            Number.STOP: self._stop,
            Number.GET_STATEBLOB: self._get_state_blob,
            Number.SET_STATEBLOB: self._set_state_blob,
            Number.SET_DATAFD: self._set_data_socket,
            Number.LOCK_STORAGE: self._lock_storage,
        }

    def send(self, command: Command, answered: Callable[[Said], None]) -> None:
        """QEMU sends a command; it is told the answer."""
        self._sent.put_nowait((command, answered))
        self._woken.set()

    def end(self) -> None:
        """Take no more commands; one that is carried out goes on."""
        self.has_ended = True
        self._woken.set()

    async def run(self) -> None:
        """server_run()."""
        while not self.has_ended:
            if self._sent.empty():
                self._woken.clear()
                await self._woken.wait()
                continue
            await self._serve(*self._sent.get_nowait())

    async def _serve(self, command: Command, answered: Callable[[Said], None]) -> None:
        await self._tpm.late()
        if not self._is_allowed(command):
            answered(Said(Result.BAD_ORDINAL))
            return
        said = await self._carry_out[command.number](command)
        self.is_deciding = False
        answered(said)
        await self._tpm.late()
        self._answered(command)

    def _answered(self, command: Command) -> None:
        runs = self._tpm.is_running
        if runs is not self._told_running:
            self._tpm.tell(Question(LinkQuestion.TELL_RUNNING, int(runs), b""))
        self._told_running = runs
        if self._gave_whole:
            self._tpm.tell(Question(LinkQuestion.TELL_GIVEN, 0, b""))
        self._gave_whole = False
        if command.number is Number.INIT:
            self._tpm.tell(Question(LinkQuestion.TELL_INIT, 0, b""))
        if command.number is Number.SHUTDOWN:
            self._tpm.tell(Question(LinkQuestion.TELL_SHUTDOWN, 0, b""))
            self.has_ended = True

    def _is_allowed(self, command: Command) -> bool:
        """Return whether the TPM's power is right for it: control.c."""
        if command.number is Number.GET_STATEBLOB:
            return self._tpm.is_running
        return command.number is not Number.SET_STATEBLOB or not self._tpm.is_running

    async def _ask(
        self, command: int, number: LinkQuestion, argument: int = 0
    ) -> tuple[Verdict, Answer]:
        """ask(): of vtpmd, if one is there, or of the table."""
        self._done = None
        until_s = self._tpm.now_s + WAIT_S
        while True:
            may_decide = self._verdict(command) is Verdict.GO_ON
            answer = await self._tpm.ask(Question(number, argument, b""), may_decide=may_decide)
            if answer is None and self._done is not None:
                answer = Answer(self._done)
            if answer is not None:
                return Verdict.SETTLED if answer is SETTLED else Verdict.ANSWERED, answer
            self.is_deciding = True
            if not self._tpm.running:
                self.forget(goes_on=False)
            verdict = self._verdict(command)
            if verdict is Verdict.WAIT:
                self.is_deciding = False
                if await self._tpm.wait_for_vtpmd(until_s):
                    continue
                verdict = Verdict.REFUSE
            is_refused = verdict is Verdict.REFUSE
            return verdict, Answer(Result.FAIL if is_refused else Result.SUCCESS)

    def _verdict(self, command: int) -> Verdict:
        """unasked_verdict()."""
        custody = LinkCustody[self._tpm.custody.name]
        return Verdict(chr(lib.unasked_verdict(command, self._tpm.running, custody)))

    async def _init(self, command: Command) -> Said:
        result = await self._start(is_incoming=command.is_incoming)
        restored = self.arrival.end(result, is_incoming=command.is_incoming)
        if restored is not None:
            payload = _RESTORED.pack(*restored)
            self._tpm.tell(Question(LinkQuestion.TELL_RESTORED, 0, payload))
        return Said(result)

    async def _start(self, *, is_incoming: bool) -> int:
        self._gave_tail = False
        says = LinkAskedInit.INCOMING if is_incoming else LinkAskedInit(0)
        if self.arrival.what is Arrived.BLOBS:
            says |= LinkAskedInit.BLOBS
        if self.arrival.what is Arrived.TAIL:
            says |= LinkAskedInit.TAIL
        if is_incoming and self.arrival.what is Arrived.TAIL:
            result = await self._tpm.blackout.init()
            if result is not None:
                return result
        if is_incoming and self.arrival.what is Arrived.UNUSABLE:
            return Result.FAIL
        command = self._init_command(is_incoming=is_incoming)
        verdict, answer = await self._ask(command, LinkQuestion.ASK_INIT, says)
        return self.arrival.start() if verdict is Verdict.GO_ON else answer.result

    def _init_command(self, *, is_incoming: bool) -> int:
        if is_incoming and self.arrival.what is Arrived.TAIL:
            return int(lib.UNASKED_INIT_TAIL)
        if self.arrival.what is Arrived.BLOBS or self._tpm.has_state or self._tpm.is_alone:
            return int(lib.UNASKED_INIT)
        return int(lib.UNASKED_INIT_NEW)

    def stage(self, argument: int, payload: bytes) -> Reply:
        """LINK_STAGE."""
        if self.arrival.has_given:
            return Reply(Result.BAD_ORDINAL, 0, bytearray())
        if self._tpm.blackout.has_taken:
            return Reply(Result.BAD_ORDINAL, self._tpm.blackout.state, bytearray())
        permanent_bytes, both = int.from_bytes(payload[:4], sys.byteorder), payload[4:]
        records = both[:permanent_bytes], both[permanent_bytes:]
        return Reply(self._stage(records, is_held=bool(argument)), 0, bytearray())

    def _stage(self, records: tuple[bytes, bytes], *, is_held: bool) -> int:
        """incoming_stage()."""
        try:
            staged = {
                kind: self._follow(kind, record)
                for kind, record in zip(_STAGED, records, strict=True)
            }
        except DeltaError:
            return Result.BAD_PARAMETER
        self._staged_before, self._staged = self._staged, staged
        permanent, volatile = (image.data for image in staged.values())
        if is_held:
            return self._tpm.init_standby((permanent, volatile))
        result = self._tpm.set_state(StateType.PERMANENT, permanent)
        if result == Result.SUCCESS:
            result = self._tpm.set_state(StateType.VOLATILE, volatile)
        return result

    def follow(self, tail: Tail) -> bool:
        """incoming_follow()."""
        header, records = tail.header, (tail.permanent, tail.volatile)
        if self._tpm.running and not self._tpm.is_held:
            return False
        if self._is_staged(self._staged, header.permanent_to, header.volatile_to):
            if self._tpm.is_held:
                return True
            records = b"", b""
        elif not self._is_staged(self._staged, header.permanent_from, header.volatile_from):
            if not self._is_staged(
                self._staged_before, header.permanent_from, header.volatile_from
            ):
                return False
            self._staged = self._staged_before
        return self._stage(records, is_held=True) == Result.SUCCESS

    def _is_staged(self, staged: dict[StateType, Image], *generations: int) -> bool:
        return tuple(staged[kind].generation for kind in staged) == generations

    def _follow(self, kind: StateType, record: bytes) -> Image:
        nothing = Image(kind, 0, b"")
        image = self._staged.get(kind, nothing)
        if not record:
            return image
        return delta_apply(image if delta_inspect(record).from_generation else nothing, record)

    def staged(self) -> Image:
        """LINK_GET_STAGED."""
        return self._staged[StateType.PERMANENT]

    def unstage(self) -> None:
        """blackout_unstage()."""
        self._staged, self._staged_before = {}, {}

    def forget(self, *, goes_on: bool) -> int:
        """LINK_FORGET_STATE, blackout_forget()."""
        if self._tpm.blackout.has_taken:
            return Result.BAD_ORDINAL
        if not goes_on:
            self.unstage()
            self._tpm.blackout.unstaged()
        return self.forget_state()

    def forget_state(self) -> int:
        """commands_forget_state()."""
        return Result.SUCCESS if self.arrival.has_given else self._tpm.forget_state()

    def start(self) -> int:
        """commands_start(), by LINK_INIT."""
        self._done = self.arrival.start()
        return self._done

    def stop(self, *, fenced: bool) -> int:
        """commands_stop(), by LINK_STOP."""
        self._done = None
        return self._tpm.stop_tpm(fenced=fenced)

    async def _shutdown(self, _: Command) -> Said:
        return await self._stop_tpm(is_shutdown=True)

    async def _stop(self, _: Command) -> Said:
        return await self._stop_tpm(is_shutdown=False)

    async def _stop_tpm(self, *, is_shutdown: bool) -> Said:
        self.arrival.forget(Arrived.NOTHING)
        if is_shutdown and self._tpm.blackout.state in WITHOUT_GRANT:
            return Said(Result.SUCCESS)
        self._run_on()
        result = int(Result.SUCCESS)
        if self._tpm.blackout.state in (Handover.ENTITLED, Handover.STARTED):
            question = LinkQuestion.ASK_STOP
            result = (await self._ask(lib.UNASKED_STOP, question, int(is_shutdown)))[1].result
        if result != Result.SUCCESS or not self._tpm.is_running:
            return Said(result)
        return Said(self._tpm.stop_tpm())

    def _run_on(self) -> None:
        self._gave_tail = False
        self._tpm.blackout.runs()

    async def _set_data_socket(self, _: Command) -> Said:
        self.arrival.begin()
        answer = (await self._ask(lib.UNASKED_CONNECTED, LinkQuestion.ASK_CONNECTED))[1]
        return Said(answer.result)

    async def _lock_storage(self, _: Command) -> Said:
        self._run_on()
        verdict, answer = await self._ask(lib.UNASKED_RUNS, LinkQuestion.ASK_RUNS)
        if verdict is Verdict.GO_ON:
            self._tpm.run_on()
        if verdict is Verdict.AWAIT:
            return Said(self._tpm.await_(is_so=True))
        return Said(answer.result)

    async def _get_state_blob(self, command: Command) -> Said:
        if command.kind is StateType.PERMANENT:
            return await self._permanent_state()
        if not self._gave_tail:
            return self._own_state(command.kind)
        is_frozen = self._tpm.blackout.state in WITHOUT_GRANT
        return Said(Result.SUCCESS if is_frozen else Result.FAIL)

    async def _permanent_state(self) -> Said:
        result, tail = await self._give_tail()
        self._gave_tail = tail is not None
        if result != Result.SUCCESS:
            return Said(result)
        if tail is not None:
            return Said(Result.SUCCESS, tail)
        self._gave_whole = True
        return self._own_state(StateType.PERMANENT)

    async def _give_tail(self) -> tuple[int, bytes | None]:
        blackout = self._tpm.blackout
        if not blackout.is_armed:
            return Result.SUCCESS, None
        tail, verdict = blackout.give_tail(), Verdict.SETTLED
        while tail is None and verdict is Verdict.SETTLED:
            verdict, answer = await self._ask(lib.UNASKED_STATE, LinkQuestion.ASK_STATE)
            if answer.result != Result.SUCCESS:
                return answer.result, None
            tail = blackout.give_tail()
        return Result.SUCCESS, tail

    def _own_state(self, kind: StateType) -> Said:
        result, state = self._tpm.get_state(kind)
        if result != Result.SUCCESS:
            return Said(result)
        lineage, _ = self._tpm.get_lineage()
        has_lineage = kind is StateType.PERMANENT
        return Said(
            Result.SUCCESS, swtpm_format.encode_blob(state, lineage if has_lineage else None)
        )

    async def _set_state_blob(self, command: Command) -> Said:
        if is_tail(command.blob):
            return Said(await self._set_tail(command.blob))
        return Said(await self._set_blob(command))

    async def _set_tail(self, blob: bytes) -> int:
        if not self.arrival.take_tail():
            return Result.BAD_PARAMETER
        refusal = self._tpm.blackout.take_tail(blob)
        if refusal is None:
            self._tpm.blackout.start_tail()
            return Result.SUCCESS
        _, answer = await self._ask(lib.UNASKED_TAIL, LinkQuestion.ASK_TAIL, refusal)
        return answer.result or Result.BAD_PARAMETER

    async def _set_blob(self, command: Command) -> int:
        if self.arrival.what is Arrived.TAIL:
            return Result.FAIL
        result = await self._unwrap_and_take(command)
        if result != Result.SUCCESS:
            self.arrival.forget(Arrived.UNUSABLE)
        return result

    async def _unwrap_and_take(self, command: Command) -> int:
        try:
            state = swtpm_format.decode_blob(command.blob)
            content = Content(state, swtpm_format.read_blob_lineage(command.blob))
        except FormatError as error:
            return error.result
        self._coming = command.kind, content
        verdict, answer = await self._ask(lib.UNASKED_BLOB, LinkQuestion.ASK_BLOB, command.kind)
        result = self.take_blob() if verdict is Verdict.GO_ON else answer.result
        self._coming = None
        return result

    def take_blob(self) -> int:
        """commands_take_blob(), by LINK_TAKE_BLOB."""
        if self._coming is None:
            return Result.BAD_ORDINAL
        self._done = self.arrival.take_blob(*self._coming)
        return self._done
