"""What can go wrong in the model, at any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

from tests.model.actions import (
    FAILURES,
    KEEP,
    PREPARE,
    RECORDS,
    destination_acts,
    is_keeping,
    source_acts,
    source_fails,
    takes_tail,
)
from tests.model.engine import close_lane, engine_takes
from tests.model.moves import Move, destination_engine_moves, source_engine_moves, took
from tests.model.world import (
    BROKEN,
    FOREIGN,
    NOTHING,
    OFFER,
    SESSION,
    THIRD,
    Project,
    SourceHost,
    World,
    destination_can,
    destination_closes,
    destination_takes,
    source_closes,
    source_takes,
    tag,
    third_is_refused,
)
from vtpmd.core.handover import WITHOUT_GRANT, Handover, HandoverEvent
from vtpmd.migration import destination, events
from vtpmd.migration.destination import Do
from vtpmd.migration.states import BEFORE_ACK, GIVEN_AWAY, State
from vtpmd.wire import peer
from vtpmd.wire.peer import Reason

T = TypeVar("T")


def cuts(world: World) -> Iterator[Move]:
    """Yield what can go wrong between the two.

    The link breaks, and what was said last is lost: also of what a closed end had said."""
    if (world.s_link and world.d_link) or world.to_d or world.to_s:
        cut = world._replace(
            s_link=world.s_link and BROKEN,
            d_link=world.d_link and BROKEN,
        )
        for to_d in _beginnings(world.to_d):
            for to_s in _beginnings(world.to_s):
                yield "CUT", cut._replace(to_d=to_d, to_s=to_s)
    if (world.s_lane and world.d_lane) or world.lane_to_d or world.lane_to_s:
        cut = world._replace(
            s_lane=world.s_lane and BROKEN,
            d_lane=world.d_lane and BROKEN,
        )
        for lane_to_d in _beginnings(world.lane_to_d):
            for lane_to_s in _beginnings(world.lane_to_s):
                yield "CUT of the lane", cut._replace(lane_to_d=lane_to_d, lane_to_s=lane_to_s)
    if world.question is not None:
        yield "QUESTION LOST", world._replace(question=None)
    if world.answer is not None:
        yield "ANSWER LOST", world._replace(answer=None)
    if world.asked:
        yield "CUT of the connection that asks", world._replace(asked=False)


def _beginnings(said: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    return (said[:n] for n in range(len(said) + 1))


def source_faults(project: Project, world: World) -> Iterator[Move]:
    """Yield what can go wrong at the source."""
    yield from _source_crashes(world)
    if world.s.records == "writes":
        yield from _offer_fails(project, world)
    if is_source_writing(world.s):
        yield from _source_disk(project, world)
    if not world.s.todo:
        yield from _at_source(project, world)


def destination_faults(project: Project, world: World) -> Iterator[Move]:
    """Yield what can go wrong at the destination, but for its disk."""
    yield from _destination_crashes(world)
    if not world.d.todo:
        yield from _at_destination(project, world)


def _source_crashes(world: World) -> Iterator[Move]:
    """A host dies; what it said last is lost, or is not."""
    if world.s.up:
        dead = close_lane(source_closes(world.source(up=False, todo=())), "s")
        dead = dead._replace(question=None, answer=None, asked=False)
        for to_d in _beginnings(world.to_d):
            for lane_to_d in _beginnings(world.lane_to_d):
                yield "CRASH of the source", dead._replace(to_d=to_d, lane_to_d=lane_to_d)
    if world.s.qemu != "dead":
        # Its vtpmd goes on, and its TPM is as it was until the next QEMU's STOP.
        yield "QEMU at the source dies", world.source(qemu="dead", resumed=False)


def _destination_crashes(world: World) -> Iterator[Move]:
    if world.d.up:
        qemu = "wait" if world.d.qemu == "wait" else "dead"
        dead = world.destination(up=False, state=None, qemu=qemu, todo=(), tpm="off")
        dead = dead.destination(settles=False, engine=Handover.NONE, news=(), is_late=False)
        dead = close_lane(destination_closes(dead.destination(resumed=False, command="")), "d")
        dead = dead._replace(question=None, asked=False)
        for to_s in _beginnings(world.to_s):
            for lane_to_s in _beginnings(world.lane_to_s):
                for answer in {world.answer, None}:
                    yield (
                        "CRASH of the destination",
                        dead._replace(to_s=to_s, lane_to_s=lane_to_s, answer=answer),
                    )
    if world.d.qemu not in ("dead", "wait") or world.tail != NOTHING:
        yield "QEMU at the destination dies", world.destination(qemu="dead", resumed=False)


def source_is_late(project: Project, world: World) -> Iterator[Move]:
    """Yield what its engine tells the source, that takes it when other things have come."""
    if not world.s.is_late:
        assert not world.s.news  # it has taken all, unless it had something to do
        for label, after in source_engine_moves(project, world.source(is_late=True)):
            if after.s.news:
                yield f"{label}, and it is told LATE", after


def destination_is_late(project: Project, world: World) -> Iterator[Move]:
    """Likewise, the destination."""
    if not world.d.is_late:
        assert not world.d.news
        for label, after in destination_engine_moves(project, world.destination(is_late=True)):
            if after.d.news:
                yield f"{label}, and it is told LATE", after


def _offer_fails(project: Project, world: World) -> Iterator[Move]:
    failed = world.source(records="failed")
    written = failed.source(record=project.transition(world.s.record, OFFER, SESSION))
    for label, after in _with_and_without(failed, written):
        yield f"DISK of the source's engine, {label}", after


def is_source_writing(host: SourceHost) -> bool:
    """Return whether the source's disk is at its record; other disks fail before or after."""
    return bool(host.todo) and host.todo[0].value in RECORDS


def _source_disk(project: Project, world: World) -> Iterator[Move]:
    """A disk says that it failed: what was to be written is there, or is not."""
    action = world.s.todo[0].value
    for label, done in _with_and_without(
        world.source(todo=world.s.todo[1:]), source_acts(project, world)
    ):
        yield f"DISK of the source, {label}", source_fails(project, done, action)


def destination_disk(project: Project, world: World) -> Iterator[Move]:
    """Likewise, the destination's."""
    if world.d.todo and isinstance(world.d.todo[0].value, str):
        steps = [each.value for each in world.d.todo]
        end = next((i for i, step in enumerate(steps) if not isinstance(step, str)), len(steps))
        conclusion = steps[end] if end < len(steps) else None
        failure = _STORAGE if steps[0] in (*PREPARE, KEEP) else FAILURES.get(type(conclusion))
        if failure is None:
            return
        rest = (*world.d.todo[end + 1 :], tag(failure))
        written = destination_acts(project, world)
        for label, done in _with_and_without(world, written):
            retries = isinstance(failure, events.AdmitFailed)
            failed = done.destination(todo=rest, retries=retries)
            yield f"DISK of the destination, {label}", failed


_STORAGE: Final = events.StageFailed(Reason.STORAGE, "")


def _with_and_without(before: World, after: World) -> Iterator[Move]:
    yield "not written", before
    yield "written after all", after


def _at_source(project: Project, world: World) -> Iterator[Move]:
    """What operators and clocks do at the wrong moment."""
    host = world.s
    if not host.up:
        return
    if host.state in (None, *GIVEN_AWAY, State.ENDED) and not host.records:
        # Another session is armed, and falls back: nobody is there.
        record = project.transition(host.record, "reserve", b"x" * 16, "c:1", 0)
        armed = record.value._replace(sessions=host.record.value.sessions)
        yield "MIGRATE-ARM at the source", world.source(record=tag(armed))
    if host.qemu == "saved" and host.engine in WITHOUT_GRANT:
        # It does not know LOCK_STORAGE.
        yield "QEMU at the source runs on without a word", world.source(qemu="run", resumed=True)
    if host.state not in (None, State.ENDED):
        ended = source_takes(project, world, events.Disarmed(""))
        yield from took("DISARM at the source", ended)


def _at_destination(project: Project, world: World) -> Iterator[Move]:
    """What operators, other hosts and clocks do."""
    host = world.d
    if not host.up:
        return
    if host.qemu == "wait" and world.tail != NOTHING:
        brought = world.destination(qemu="tail")
        refused = takes_tail(project, brought, is_refused=True)
        yield from took("REFUSED by libtpms: the tail", refused)
    if host.engine is Handover.WAITING:
        late = engine_takes(project, world, "d", HandoverEvent.TIMED_OUT)
        yield from took("SILENCE: no Grant in time", late)
    if is_keeping(host):
        return  # its vtpmd hears of nothing else before that is done
    if host.state not in (None, State.ENDED):
        aside = destination_takes(project, world, events.SetAside(""))
        yield from took("QEMU at the destination boots, or brings whole blobs", aside)
    if world.d_link and world.to_d and host.session == SESSION:
        yield from _refused(project, world)
    yield from _third(project, world)
    if destination_can(host) and host.served:
        served = "served" not in project.without
        yield "LOADVM at the destination", world.destination(served=served)


def _refused(project: Project, world: World) -> Iterator[Move]:
    """libtpms does not take a round, or does not start from it."""
    message = world.to_d[0].value
    taken = destination_takes(project, world._replace(to_d=world.to_d[1:]), message)
    actions = () if taken is None else [each.value for each in taken.d.todo]
    if taken is not None and any(
        each is Do.START or isinstance(each, destination.Stage) for each in actions
    ):
        refused = tag(events.StageFailed(Reason.STATE, ""))
        yield "REFUSED by libtpms", taken.destination(todo=(refused,))


def _third(project: Project, world: World) -> Iterator[Move]:
    """Another host's source begins, or ends, a session of another vTPM."""
    host = world.d
    if host.session == THIRD and host.state not in (None, State.ENDED):
        gone = destination_takes(project, world, peer.Disarm(THIRD))
        yield from took("the third host goes", gone)
        return
    welcome = (None, State.ENDED, *BEFORE_ACK, State.SETTLED)
    silent = (State.HOLDING, State.STANDBY)
    if third_is_refused(world):
        return
    first = host.record.value.find(THIRD.hex()) is None
    over = (None, State.ENDED, State.SETTLED)
    if host.own != NOTHING and host.qemu == "dead" and host.state in over:
        # For a canary: its guest comes, is served for a while, and stops.
        taken = destination_closes(world).destination(
            state=None, session=SESSION, own=FOREIGN, file="none", tpm="off", qemu="dead"
        )
        yield "ANOTHER vTPM in place of this one", taken
    if not first or host.qemu == "run" or host.state not in (*welcome, *silent):
        return
    aside = world
    if "orphan" not in project.without:
        aside = destination_takes(project, world, events.SetAside("")) or world
    began = aside.destination(todo=(*aside.d.todo, tag("third")))
    yield "HELLO of another host", began
