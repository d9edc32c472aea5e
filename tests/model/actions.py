"""What the actions of both sides do in the model; each step that can be crashed after is one."""

from __future__ import annotations

from typing import Any

from tests.model.world import (
    SESSION,
    World,
    destination_closes,
    destination_takes,
    send_to_d,
    send_to_s,
    source_closes,
    source_takes,
    tag,
    transition,
)
from vtpmd.migration import destination, events, source
from vtpmd.store.owner import Outcome

DIGESTS = (b"p", b"v")


def source_acts(world: World, without: frozenset[str]) -> World:
    """Do the first thing that the source has to do."""
    (_, action), *rest = world.s.todo
    world = world.source(todo=tuple(rest))
    if isinstance(action, events.LocalEvent):
        return source_takes(world, action) or world
    match action:
        case source.Send(message=message):
            return send_to_d(world, message)
        case source.Do():
            return _source_does(world, action, without)
    return world


def _later_s(world: World, event: events.LocalEvent) -> World:
    return world.source(todo=(*world.s.todo, tag(event)))


def _source_record(world: World, name: str) -> World:
    return world.source(record=transition(world.s.record, name, SESSION))


def _source_does(world: World, action: source.Do, without: frozenset[str]) -> World:
    host = world.s
    match action:
        case source.Do.START_ROUND:
            return _later_s(world, events.NothingChanged())
        case source.Do.OFFER if "offer" not in without:
            return _source_record(world, "offer")
        case source.Do.WITHDRAW:
            return world.source(withdraws=True)
        case source.Do.MAKE_TAIL:
            made = world.source(worked=False)._replace(tail=host.value)
            return _later_s(made, events.TailMade(DIGESTS, was_sent=True))
        case source.Do.RETIRE:
            if host.worked or not host.on:
                return _later_s(world, events.RetireFailed())
            return _later_s(world.source(fenced=True), events.Retired())
        case source.Do.RECORD_MOVED if "offer" not in without:
            return _source_record(world, "confirm")
        case source.Do.ASK:
            return world.source(asks=True)
        case source.Do.RECORD_RELEASED:
            if "offer" not in without:
                world = _source_record(world, "release")
            return _later_s(world, events.Remembered())
        case source.Do.SERVE:
            return world.source(fenced=False)
        case source.Do.FAIL_COMMANDS:
            return world.source(kept=True)
        case source.Do.CLOSE:
            return source_closes(world)
    return world


def destination_acts(world: World, without: frozenset[str]) -> World:
    """Do the first thing that the destination has to do."""
    (_, action), *rest = world.d.todo
    world = world.destination(todo=tuple(rest))
    if isinstance(action, events.LocalEvent):
        return destination_takes(world, action) or world
    match action:
        case str():
            return _destination_step(world, action, without)
        case destination.Send(message=message):
            return send_to_s(world, message)
        case destination.UseTail():
            return _use_tail(world)
        case destination.Decline():
            steps = ["decline: record", "file removed", events.Remembered()]
            if "remember" in without:
                del steps[0]
            off = "fenced" if world.d.engine == "fenced" else "off"
            return _next(world.destination(engine=off), *steps)
        case destination.Do():
            return _destination_does(world, action, without)
    return world


def _next(world: World, *steps: Any) -> World:
    return world.destination(todo=(*map(tag, steps), *world.d.todo))


def _use_tail(world: World) -> World:
    host = world.d
    held = world.destination(file="staged", staged=world.tail, engine="held", value=world.tail)
    assert host.file != "granted"
    return held.destination(todo=(*host.todo, tag(events.TailApplied(DIGESTS, 0, 0, 0))))


def _destination_does(world: World, action: destination.Do, without: frozenset[str]) -> World:
    host = world.d
    match action:
        case destination.Do.START:
            held = world.destination(engine="held", value=host.staged)
            return held.destination(todo=(*host.todo, tag(events.HeldStarted())))
        case destination.Do.ADMIT:
            return _next(world, "grant: file", "grant: engine", events.Admitted(0, 0))
        case destination.Do.SETTLE if "settle" in without:
            return world.destination(settles=True, todo=(*host.todo, tag(events.Settled())))
        case destination.Do.SETTLE:
            settled = events.Settled()
            return _next(world, "settle: own file", "settle: record", "file removed", settled)
        case destination.Do.RELEASE:
            if host.served:
                return world.destination(todo=(*host.todo, tag(events.Served())))
            steps: list[Any] = ["release: record", "file removed", events.Remembered()]
            return _next(world.destination(engine="fenced"), *steps)
        case destination.Do.CLOSE:
            return destination_closes(world)
    return world


def _destination_step(world: World, step: str, without: frozenset[str]) -> World:
    host = world.d
    match step:
        case "decline: record":
            return world.destination(record=transition(host.record, "decline", SESSION))
        case "file removed":
            return world.destination(file="none")
        case "grant: file":
            return world.destination(file="granted")
        case "grant: engine":
            return world.destination(engine="active", served=False)
        case "settle: own file":
            return world.destination(own=host.value)
        case "settle: record":
            if "settle" in without:
                # As it was: numbers were reserved, and that struck out whose the vTPM is.
                blind = host.record._replace(whose=type(host.record.whose)("ours"), session="")
                return world.destination(record=blind)
            return world.destination(record=transition(host.record, "take", SESSION, 0))
        case "release: record":
            if "remember" in without:
                forgotten = transition(host.record, "give_back", SESSION)
                lines = tuple(each._replace(outcome=Outcome.OPEN) for each in forgotten.sessions)
                return world.destination(record=forgotten._replace(sessions=lines))
            return world.destination(record=transition(host.record, "give_back", SESSION))
    raise AssertionError(step)
