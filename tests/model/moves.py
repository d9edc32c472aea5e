"""What ordinarily happens next in the model. What goes wrong is in ``faults``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.model.actions import blind, destination_acts, is_open, source_acts
from tests.model.world import (
    LINEAGE,
    NOTHING,
    SESSION,
    THIRD,
    Project,
    World,
    destination_can,
    destination_closes,
    destination_takes,
    executed,
    may_serve,
    source_can,
    source_closes,
    source_machine,
    source_takes,
    tag,
)
from vtpmd.migration import events
from vtpmd.migration.source import Source
from vtpmd.migration.states import GIVEN_AWAY, ON_APPROVAL, OWNING, State
from vtpmd.store import moving
from vtpmd.store.incoming import Found
from vtpmd.store.owner import Outcome, Whose
from vtpmd.wire import peer

Move = tuple[str, World]


def moves(project: Project, world: World) -> Iterator[Move]:
    """Yield what can happen without a fault.

    What a side has to do by itself comes before what others do, the source's first: the two change
    nothing of each other, what is said only arrives, and a fault may come before each step. So any
    other order ends in the same worlds.
    """
    if world.s.todo:
        action = world.s.todo[0].value
        yield f"source: {_name(action)}", source_acts(project, world)
        return
    if world.d.todo:
        action = world.d.todo[0].value
        yield f"destination: {_name(action)}", destination_acts(project, world)
        return
    yield from _source_moves(project, world)
    yield from _destination_moves(project, world)
    yield from _commands(world)
    if world.d.settles:
        # The canary's: settling that is not part of the session, and so not stopped by its end.
        settled = world.destination(
            settles=False, own=world.d.value, file="none", record=blind(world.d.record)
        )
        yield "destination: settles in its own time", settled


def _name(action: object) -> str:
    message = getattr(action, "message", None)
    if message is not None:
        return f"sends {type(message).__name__}"
    return action if isinstance(action, str) else str(getattr(action, "name", action))


def took(label: str, world: World | None) -> Iterator[Move]:
    """Yield a move, if it is one."""
    if world is not None:
        yield label, world


# The source.


def _source_moves(project: Project, world: World) -> Iterator[Move]:
    host = world.s
    if not host.up:
        yield "source's vtpmd starts", _source_starts(project, world)
        return
    if host.state is not None:
        yield from _source_session(project, world)
    if host.withdraws:
        yield "source withdraws its offer", _withdraw(project, world)
    if host.resumed:
        heard = world.source(resumed=False)
        label = "source hears that the guest runs"
        yield label, source_takes(project, heard, events.GuestResumed()) or heard
    yield from _source_qemu(project, world)


def _source_session(project: Project, world: World) -> Iterator[Move]:
    host = world.s
    if host.state is State.CONNECTING:
        yield from took("source connects", source_takes(project, world, events.Connected()))
    if world.s_link and world.to_s:
        yield _source_hears(project, world)
    if world.s_link == 2 and not world.to_s:
        lost = world._replace(s_link=0)
        taken = source_takes(project, lost, events.LinkLost("")) or lost
        yield "source notices the loss", taken
    if host.asks and host.state in GIVEN_AWAY and not _is_asking(world):
        question = peer.Reclaim(SESSION) if host.state is State.RECLAIMING else peer.Ask(SESSION)
        yield f"source asks: {type(question).__name__}", world._replace(question=tag(question))
    if world.answer is not None:
        answered = world._replace(answer=None)
        label = f"source is answered {world.answer.kind}"
        yield label, source_takes(project, answered, world.answer.value) or answered
    if host.state is State.ARMED:
        yield from took("a round is due", source_takes(project, world, events.RoundDue()))
    yield from _source_guest(project, world)


def _source_guest(project: Project, world: World) -> Iterator[Move]:
    host = world.s
    assert host.state is not None
    if host.qemu == "run" and host.on and world.stops:
        standing = world._replace(stops=world.stops - 1).source(qemu="stop")
        stopped = source_takes(project, standing, events.GuestStopped())
        yield from took("QEMU stops the guest", stopped)
    if host.qemu == "stop" and host.on and source_machine(host.state).why_no_tail(0) is None:
        yield from took("QEMU takes the tail", source_takes(project, world, events.Freeze()))


def _is_asking(world: World) -> bool:
    return world.question is not None or world.answer is not None or world.asked


def _source_hears(project: Project, world: World) -> Move:
    message, rest = world.to_s[0], world.to_s[1:]
    world = world._replace(to_s=rest)
    taken = source_takes(project, world, message.value)
    if taken is not None:
        return f"source: {message.kind}", taken
    lost = source_closes(world)
    taken = source_takes(project, lost, events.LinkLost("")) or lost
    return f"source: {message.kind}, which it must not say", taken


def _withdraw(project: Project, world: World) -> World:
    host = world.s
    if host.state is None or not source_machine(host.state).may_withdraw:
        return world.source(withdraws=False)
    record = project.transition(host.record, "withdraw", SESSION)
    return world.source(withdraws=False, record=record)


def _source_starts(project: Project, world: World) -> World:
    host = world.s
    world = world.source(up=True)
    if may_serve(host.record):
        return world
    found = Source.found(SESSION, State.LEFT)
    return world.source(fenced=True, state=found.state, asks="ask" not in project.without)


def _source_qemu(project: Project, world: World) -> Iterator[Move]:
    host = world.s
    if host.qemu == "stop" and host.on:
        yield "the guest runs at the source after all", world.source(qemu="run", resumed=True)
    if host.qemu == "stop" and host.state in (State.GRANTED, State.MOVED):
        ended = world.source(up=False, todo=())
        yield "QEMU at the source ends, and its vtpmd", source_closes(ended)
    if not host.on and host.qemu != "run":
        # Offered, in a session that was not granted: as Mobility has it.
        goes_on = host.record.value.whose is Whose.OFFERED and host.state not in (None, *GIVEN_AWAY)
        if (may_serve(host.record) or goes_on) and not host.fenced:
            resumed = host.state is not None
            yield "a guest boots at the source", world.source(on=True, qemu="run", resumed=resumed)
        elif host.state in (State.GRANTED, State.MOVED, State.RECLAIMING):
            left = source_takes(project, world, events.QemuLeft())
            yield from took("another QEMU would boot at the source", left)


# The destination.


def _destination_moves(project: Project, world: World) -> Iterator[Move]:
    host = world.d
    if not host.up:
        yield "destination's vtpmd starts", _destination_starts(project, world)
        return
    if world.d_link and world.to_d:
        yield _destination_hears(project, world)
    if world.d_link == 2 and not world.to_d:
        lost = world._replace(d_link=0)
        taken = destination_takes(project, lost, events.LinkLost("")) if _is_its(world) else None
        yield "destination notices the loss", taken or lost
    if world.question is not None:
        yield _answer(project, world, world.question.value)
    if host.session == THIRD and host.state is State.HOLDING:
        stopped = destination_takes(project, world, peer.Stopped(THIRD))
        yield from took("the third host's guest stops", stopped)
    yield from _destination_tries_again(project, world)
    yield from _destination_qemu(project, world)


def _is_its(world: World) -> bool:
    return world.d.session == SESSION


def _destination_hears(project: Project, world: World) -> Move:
    message, rest = world.to_d[0], world.to_d[1:]
    world = world._replace(to_d=rest)
    taken = destination_takes(project, world, message.value) if _is_its(world) else None
    if taken is not None:
        return f"destination: {message.kind}", taken
    lost = destination_closes(world)
    taken = destination_takes(project, lost, events.LinkLost("")) if _is_its(world) else None
    return f"destination: {message.kind}, impossible", taken or lost


def _destination_tries_again(project: Project, world: World) -> Iterator[Move]:
    """What its disk did not take is tried again, after a while."""
    host = world.d
    if host.state is State.ADMITTED:
        yield from took("it settles", destination_takes(project, world, events.SettleDue()))
    if host.state is State.STARTED and host.qemu == "run":
        yield from took("it admits", destination_takes(project, world, events.InitAnswered()))


def _answer(project: Project, world: World, question: Any) -> Move:
    """As Mobility.answer() does, and what the answer then is."""
    label = f"destination is asked: {type(question).__name__}"
    host = world.d
    asked = world._replace(question=None)
    if _is_its(world) and host.state is not None:
        is_due = isinstance(question, peer.Reclaim) or (
            host.state is State.RELEASING and "releasing" not in project.without
        )
        if is_due and host.state is not State.ENDED:
            return label, _reclaimed(project, destination_closes(asked)._replace(asked=True))
        if host.state not in (*OWNING, State.RELEASING, State.ENDED):
            over = destination_takes(project, world, events.LinkLost(""))
            return label, destination_closes(over or world)
    line = host.record.value.find(SESSION.hex())
    outcome = None if line is None else line.outcome
    answer: peer.Message = peer.Kept(SESSION)
    if line is None:
        answer = peer.Unknown(SESSION)
    elif outcome is Outcome.OPEN and (not _is_its(world) or host.state in (None, State.ENDED)):
        record = project.transition(host.record, "decline", SESSION)
        asked = asked.destination(record=record)
        answer = peer.Released(SESSION)
    elif outcome in (Outcome.DECLINED, Outcome.RELEASED):
        answer = peer.Released(SESSION)
    return f"{label}: {type(answer).__name__}", asked._replace(answer=tag(answer))


def _reclaimed(project: Project, world: World) -> World:
    """The session takes a Reclaim; its answer goes over the connection that brought it."""
    taken = destination_takes(project, world, peer.Reclaim(SESSION))
    return taken or destination_takes(project, world, events.LinkLost("")) or world


def _destination_starts(project: Project, world: World) -> World:
    """As vtpmd.store.moving.take_up() does."""
    host = world.d
    world = world.destination(up=True, file="none")
    if host.file == "none":
        return world
    granted = host.file in ("granted", "written")
    found = Found(host.file_of, LINEAGE, granted, 0, 0, b"")
    if moving.is_ours(found, host.record.value):
        record = project.transition(host.record, "take", host.file_of, 0)
        own = host.staged if host.file == "granted" else host.own
        return world.destination(record=record, own=own)
    if is_open(host.record, host.file_of):
        record = project.transition(host.record, "decline", host.file_of)
        return world.destination(record=record)
    return world


def _destination_qemu(project: Project, world: World) -> Iterator[Move]:
    host = world.d
    if host.qemu == "wait" and world.tail != NOTHING:
        came = world.destination(qemu="tail")
        taken = destination_takes(project, came, events.TailCame(b""))
        if taken is not None and host.state is not State.ENDED:
            yield "SET_STATEBLOB", taken
        else:
            yield "the tail is refused", world.destination(qemu="dead")
    if host.qemu == "tail":
        came = world.destination(qemu="init")
        awaited = host.state in (State.TAKING, State.ENTITLED)
        taken = destination_takes(project, came, events.InitCame()) if awaited else None
        yield "INIT", taken or world.destination(qemu="dead")
    if host.qemu in ("init", "dead") and host.state is State.STARTED:
        # Also when QEMU has died over it: vtpmd has done what INIT asks for.
        qemu = "run" if host.qemu == "init" else "dead"
        answered = world.destination(qemu=qemu)
        taken = destination_takes(project, answered, events.InitAnswered())
        yield from took("INIT is answered", taken)
    if host.qemu == "init" and host.state is not State.WAITING and host.state is not State.STARTED:
        yield "INIT is refused", world.destination(qemu="dead")
    if host.qemu == "dead":
        yield from _boots(project, world)


def _boots(project: Project, world: World) -> Iterator[Move]:
    """A QEMU without a stream starts at the destination."""
    host = world.d
    adopted = None
    if host.state is State.ENTITLED:
        adopted = destination_takes(project, world, events.Adopt())
    yield from took("a boot at the destination takes up what was granted", adopted)
    if host.state in (State.RECEIVING, *ON_APPROVAL):
        aside = destination_takes(project, world, events.SetAside(""))
        yield from took("a boot at the destination sets aside what came", aside)
    is_ready = host.state in (None, State.ENDED, State.SETTLED)
    if is_ready and may_serve(host.record) and host.own != NOTHING and host.engine != "fenced":
        running = world.destination(qemu="run", engine="active", value=host.own)
        yield "a guest boots at the destination", running


def _commands(world: World) -> Iterator[Move]:
    """The guest's commands; each is durable where it is executed."""
    if source_can(world):
        yield "source executes a command", executed(world, at_source=True)
    if destination_can(world):
        yield "destination executes a command", executed(world, at_source=False)
