"""Faults on purpose: each takes out one thing that the hand-over rests on. All must be found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final, NamedTuple

import pytest

from tests.sim import blackout, engine, schedule
from tests.sim.blackout import Blackout
from tests.sim.disk import SimDirectory
from tests.sim.engine import SimEngine
from tests.sim.server import Arrival, ControlServer
from vtpmd.core import LinkOperation
from vtpmd.core.handover import Handover, HandoverEvent, HandoverStep, handover_step
from vtpmd.core.lane import LaneFrame
from vtpmd.core.link import LinkAskedInit, LinkCondition
from vtpmd.daemon import incoming, outgoing, settling
from vtpmd.daemon.engine import Reply
from vtpmd.daemon.incoming import Incoming
from vtpmd.daemon.mobility import Mobility
from vtpmd.daemon.settling import Come, File, Own
from vtpmd.migration import destination, events
from vtpmd.store import moving, owner
from vtpmd.store.incoming import IncomingStates
from vtpmd.store.moving import MovingFiles
from vtpmd.store.owner import Outcome, OwnerRecord, Transition, Whose

Patch = pytest.MonkeyPatch

# So many schedules must be enough to find one, as a rule.
SEEDS: Final = range(1000)


class Canary(NamedTuple):
    """One thing taken out, and what has to go wrong for that to matter."""

    apply: Callable[[Patch], None]
    faults: tuple[schedule.Fault, ...] = schedule.FAULTS
    steps: range = schedule.STEPS
    seeds: range = SEEDS
    numbers: bool = False  # it is about generations
    exports: bool = False  # somebody exports the vTPM meanwhile


async def _nothing(*_: object) -> None:
    """Do not do it."""


def _offers_nothing(patch: Patch) -> None:
    patch.setattr(SimDirectory, "write_sector", lambda *_: None)


def _grants_before_the_record(patch: Patch) -> None:
    def early(state: Handover, event: HandoverEvent) -> HandoverStep | None:
        is_early = (state, event) == (Handover.GIVEN, HandoverEvent.TAKE)
        return handover_step(Handover.FROZEN if is_early else state, event)

    patch.setattr(blackout, "handover_step", early)


def _remembers_no_session(patch: Patch) -> None:
    patch.setattr(OwnerRecord, "expect", lambda *_: None)
    patch.setattr(OwnerRecord, "decline", lambda *_: None)


def _settles_in_its_own_time(patch: Patch) -> None:
    async def later(session: Incoming) -> None:
        await asyncio.sleep(0.5)
        session._owner.files.owner.take(session.session, session._generation)
        session._owner.files.incoming.remove()

    async def apart(session: Incoming) -> None:
        await session._owner.engine.request(LinkOperation.STORE_PERMANENT)
        session._settling = asyncio.create_task(later(session))  # type: ignore[attr-defined]
        session._events.put(events.Settled())

    patch.setitem(incoming._DO, destination.Do.SETTLE, apart)
    patch.setitem(owner._ENDS_FROM, Outcome.TAKEN, tuple(Outcome))


def _arming_strikes_out(patch: Patch) -> None:
    arm = Mobility.arm

    async def blindly(self: Mobility, to: Any) -> Any:
        if self._files.owner.read().whose is not Whose.OURS:
            self._files.owner._go(Transition.CLAIM, session="")
        return await arm(self, to)

    patch.setattr(Mobility, "arm", blindly)


def _loadvm_undoes_that_commands_were_served(patch: Patch) -> None:
    start = Arrival.start

    def forgetting(arrival: Arrival) -> int:
        arrival._tpm.served = False
        return start(arrival)

    patch.setattr(Arrival, "start", forgetting)


def _granted_file_wins(patch: Patch) -> None:
    patch.setattr(moving, "is_ours", lambda found, _: found.granted)


def _restarted_source_does_not_ask(patch: Patch) -> None:
    patch.setitem(settling._OWN, Own.ASK, _nothing)


def _fenced_vtpm_is_taken_back_unasked(patch: Patch) -> None:
    """What the engine knows of the Grant does not count."""

    async def take_back(_: Mobility, engine: Any, files: MovingFiles, __: object) -> None:
        files.owner._go(Transition.CLAIM, session="")
        await engine.request(LinkOperation.UNRETIRE)

    patch.setitem(settling._OWN, Own.ASK, take_back)


def _what_was_granted_is_left(patch: Patch) -> None:
    """A vtpmd that attaches finds what another has left half done, and leaves it so."""
    for key in list(settling.COME):
        if key[0] in (File.OPEN, File.GRANTED):
            patch.setitem(settling.COME, key, Come.NOTHING)


def _qemu_that_the_guest_has_left_is_not_known(patch: Patch) -> None:
    """After a restart of vtpmd it is taken for another one."""
    condition = SimEngine._condition
    started = LinkCondition.STARTED
    patch.setattr(SimEngine, "_condition", lambda self: condition(self) & ~started)


def _grant_is_not_durable(patch: Patch) -> None:
    patch.setattr(IncomingStates, "grant", lambda *_: None)


def _orphan_goes_on(patch: Patch) -> None:
    """A session that another took the place of still stages, and digests are not compared."""
    patch.setattr(Incoming, "set_aside", _nothing)
    patch.setattr(Mobility, "_why_busy", lambda *_: None)
    event_of = Blackout._event_of

    def believing(self: Blackout, frame: LaneFrame) -> HandoverEvent:
        event = event_of(self, frame)
        return HandoverEvent.TAKE if event is HandoverEvent.TAKE_OTHER else event

    patch.setattr(Blackout, "_event_of", believing)


def _generations_are_not_raised(patch: Patch) -> None:
    patch.setattr(SimEngine, "raise_generations", lambda *_: None)


def _retires_in_vain(patch: Patch) -> None:
    """The source's engine goes on serving."""
    retire = SimEngine.retire

    def in_vain(self: SimEngine, *, unserved: bool) -> int:
        custody = self.custody
        result = retire(self, unserved=unserved)
        self.custody = custody
        return result

    patch.setattr(SimEngine, "retire", in_vain)


def _blobs_outlive_their_qemu(patch: Patch) -> None:
    """As it was: the next QEMU boots from what another has brought."""
    patch.setattr(Arrival, "forget", lambda *_: None)


def _welcomes_at_any_time(patch: Patch) -> None:
    """As it was: a source's state takes the place of what QEMU brings, or starts.

    vtpmd does not look, nor does the engine, which would not take it either.
    """
    begins, why_busy = Mobility.__init__, Mobility._why_busy

    def without_lock(self: Mobility, *arguments: Any, **named: Any) -> None:
        begins(self, *arguments, **named)
        self._starting = nullcontext()  # type: ignore[assignment]

    def blind(self: Mobility, name: Any, condition: LinkCondition) -> str | None:
        return why_busy(self, name, condition & ~LinkCondition.BLOBS)

    patch.setattr(Mobility, "__init__", without_lock)
    patch.setattr(Mobility, "_why_busy", blind)
    stage, forget = ControlServer.stage, ControlServer.forget_state

    def without_blobs(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: ControlServer, *arguments: Any) -> Any:
            has_given, self.arrival.has_given = self.arrival.has_given, False
            result = method(self, *arguments)
            self.arrival.has_given = has_given
            return result

        return call

    patch.setattr(ControlServer, "stage", without_blobs(stage))
    patch.setattr(ControlServer, "forget_state", without_blobs(forget))


def _engine_serves_what_it_has_granted(patch: Patch) -> None:
    """vtpmd has it serve on, whatever the record says, and it does not refuse."""

    def unretire(self: SimEngine, *_: object) -> int:
        return self._unretire(1, b"")

    patch.setitem(engine._OPERATIONS, LinkOperation.UNRETIRE, unretire)
    patch.setattr(Mobility, "_is_fenced", False)


def _sessions_end_without_their_engines(patch: Patch) -> None:
    """As if nothing were granted yet, the source ends a session by itself."""

    async def ask(*_: object) -> Reply:
        return Reply(0, Handover.NONE, bytearray())

    patch.setattr(outgoing.Outgoing, "_ask_engine", ask)


def _end_is_taken_for_a_grant(patch: Patch) -> None:
    event_of = Blackout._event_of

    def granting(self: Blackout, frame: LaneFrame) -> HandoverEvent:
        event = event_of(self, frame)
        is_granted = event is HandoverEvent.END and not self.is_source
        return HandoverEvent.GRANT if is_granted else event

    patch.setattr(Blackout, "_event_of", granting)


def _snapshot_brings_it_back(patch: Patch) -> None:
    """As it was: a snapshot starts a vTPM that was given back."""
    patch.setattr(Mobility, "_check_not_given_back", lambda _: None)


def _tail_without_a_session_starts(patch: Patch) -> None:
    """As it was: a guest whose session has ended starts from what the directory holds."""
    init = Mobility.init
    patch.setattr(Mobility, "init", lambda self, asked: init(self, asked & ~LinkAskedInit.TAIL))


def _daemon_stumbles(patch: Patch) -> None:
    """What it survives, and only logs, counts too."""
    patch.setattr(Mobility, "_check_not_releasing", lambda: None)  # it is given itself


def _session_outlives_its_vtpm(patch: Patch) -> None:
    """As it was after some boots: what went out is asked for, though it has come again."""
    patch.setattr(Mobility, "_end_outgoing", _nothing)


def _directory_is_anybodys(patch: Patch) -> None:
    """As it was: nobody looks of which vTPM the state is that a source would replace."""
    patch.setattr(MovingFiles, "lineage", lambda _: None)


def _copy_is_taken_for_captured(patch: Patch) -> None:
    copy = SimEngine._copy

    def as_capture(engine: SimEngine) -> Reply:
        reply = copy(engine)
        engine.worked = False
        return reply

    patch.setattr(SimEngine, "_copy", as_capture)


CANARIES: Final[dict[str, Canary]] = {
    "the record never says offered": Canary(_offers_nothing),
    "it is granted before the record says offered": Canary(
        _grants_before_the_record, (schedule.crash,), schedule.HAND_OVER
    ),
    "no session is remembered": Canary(_remembers_no_session),
    "settling is not part of the session": Canary(_settles_in_its_own_time),
    "arming strikes out": Canary(
        _arming_strikes_out, (schedule.arm_again, schedule.crash, schedule.qemu_dies)
    ),
    "loadvm undoes that commands were served": Canary(
        _loadvm_undoes_that_commands_were_served,
        (schedule.go_back, schedule.go_back, schedule.cont),
        seeds=range(1600, 8000),  # one in a thousand
    ),
    "a granted file wins over the record": Canary(
        _granted_file_wins,
        (schedule.disk_fails, schedule.stream_cut, schedule.crash_in_write),
        schedule.HAND_OVER,
        range(5000, 12_000),  # one in some thousands
    ),
    "a restarted source does not ask": Canary(
        _restarted_source_does_not_ask, seeds=range(350, 1350)
    ),
    "a fenced vTPM is taken back unasked": Canary(
        _fenced_vtpm_is_taken_back_unasked, (schedule.vtpmd_dies, schedule.vtpmd_detaches)
    ),
    "what was granted is not settled": Canary(
        _what_was_granted_is_left,
        (schedule.vtpmd_dies,),
        schedule.HAND_OVER,
        range(4000),
    ),
    "the QEMU that the guest has left is not known": Canary(
        _qemu_that_the_guest_has_left_is_not_known,
        (schedule.vtpmd_dies, schedule.go_back, schedule.go_back, schedule.cont),
        seeds=range(4000),
    ),
    "commands run before the grant is durable": Canary(_grant_is_not_durable),
    "an orphan session goes on, and digests are not compared": Canary(
        _orphan_goes_on, (schedule.other_host,), schedule.HAND_OVER
    ),
    "generations are not raised": Canary(_generations_are_not_raised, numbers=True),
    "the source goes on serving": Canary(_retires_in_vain),
    "a source is welcomed while QEMU brings its guest": Canary(
        _welcomes_at_any_time, (schedule.arm_again,), schedule.HAND_OVER, range(4000)
    ),
    "another vTPM is welcomed in place of the one that is there": Canary(
        _directory_is_anybodys, (schedule.other_host,)
    ),
    "a state outlives the QEMU that brought it": Canary(
        _blobs_outlive_their_qemu, (schedule.qemu_dies, schedule.restart, schedule.disk_fails)
    ),
    "a snapshot starts a vTPM that was given back": Canary(
        _snapshot_brings_it_back,
        (schedule.go_back, schedule.go_back, schedule.cont),
        range(50, 100),
        range(10_500, 16_500),  # one in ten thousand
    ),
    "a tail whose session has ended starts an older state": Canary(
        _tail_without_a_session_starts,
        (schedule.go_back, schedule.cut, schedule.cut, schedule.cont),
        seeds=range(2700, 6700),  # one in a thousand
    ),
    "an engine serves on what it has granted": Canary(_engine_serves_what_it_has_granted),
    "a source ends what its engine has granted": Canary(_sessions_end_without_their_engines),
    "an end of the lane is taken for a Grant": Canary(
        _end_is_taken_for_a_grant,
        (schedule.silence, schedule.cut, schedule.cont, schedule.lane_cut),
        schedule.HAND_OVER,
        range(4000),
    ),
    "a daemon makes a mistake of its own": Canary(_daemon_stumbles),
    "a session outlives that its vTPM has come again": Canary(_session_outlives_its_vtpm),
    "an export is taken for a capture": Canary(_copy_is_taken_for_captured, exports=True),
}
