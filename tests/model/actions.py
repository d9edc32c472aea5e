"""What the actions of both sides do in the model.

Steps that nothing can be told apart by are done in one go (``go_on``). A host that crashes leaves
what it would have left before a step that changed no disk; nobody else sees such a step, but for
what is said. What was said a moment ago may be lost with the host, or with the link: that is part
of a crash and of a cut, and so sending, too, is such a step. What is left, and comes one by one, is
what is *durable*: a record or a file that is written. No run of steps begins and ends serving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tests.model.world import (
    DIGESTS,
    FOREIGN,
    OLD,
    SESSION,
    THIRD,
    Project,
    Tagged,
    World,
    destination_closes,
    destination_takes,
    send_to_d,
    send_to_s,
    source_closes,
    source_takes,
    tag,
)
from vtpmd.migration import destination, events, source
from vtpmd.migration.destination import Do as Theirs
from vtpmd.migration.source import Do
from vtpmd.migration.states import BEFORE_BASE, State
from vtpmd.migration.tail import Header, Tail, TailCipher, TailError
from vtpmd.store.owner import Outcome, Whose
from vtpmd.wire import peer
from vtpmd.wire.peer import Reason

# What the source writes down, and with which transition of the owner record.
RECORDS: Final = {
    Do.OFFER: "offer",
    Do.RECORD_MOVED: "confirm",
    Do.RECORD_RELEASED: "release",
}
PREPARE: Final = ("expect", "make file")
# Of the destination's actions that are made of steps. "decline" comes with a reason.
STEPS: Final[dict[Theirs, tuple[Any, ...]]] = {
    Theirs.PREPARE: (*PREPARE, events.Prepared()),
    Theirs.ADMIT: ("grant", "admit", events.Admitted(0, 0)),
    Theirs.SETTLE: ("own file", "take", "remove file", events.Settled()),
}
DECLINE: Final = ("decline", "remove file", events.Remembered())
RELEASE: Final = ("give back", "remove file", events.Remembered())


def go_on(project: Project, world: World) -> World:
    """Have both sides do what they have to, up to what is durable."""
    while world.s.todo and not _is_durable(world, world.s.todo[0].value):
        world = source_acts(project, world)
    while world.d.todo and not _is_durable(world, world.d.todo[0].value):
        world = destination_acts(project, world)
    return world


def _is_durable(world: World, action: object) -> bool:
    """A file that was not granted is removed by the next start in any case."""
    if action == "remove file":
        return world.d.file != "staged"
    return action in RECORDS or (isinstance(action, str) and action not in ("admit", "third"))


def source_acts(project: Project, world: World) -> World:
    """Do the first thing that the source has to do."""
    action, *rest = world.s.todo
    world = world.source(todo=tuple(rest))
    value = action.value
    if isinstance(value, events.LocalEvent):
        return source_takes(project, world, value) or world
    match value:
        case source.Send(message=message):
            return send_to_d(world, message)
        case source.Do():
            return _source_does(project, world, value)
    return world


def _later(world: World, event: events.LocalEvent) -> World:
    return world.source(todo=(*world.s.todo, tag(event)))


def _source_does(project: Project, world: World, action: Do) -> World:
    host = world.s
    if action in RECORDS:
        record = project.transition(host.record, RECORDS[action], SESSION)
        world = world.source(record=record)
    match action:
        case Do.START_ROUND:
            return _starts_round(world)
        case Do.WITHDRAW:
            return world.source(withdraws=True)
        case Do.MAKE_TAIL:
            made = world.source(worked=False)._replace(tail=host.value)
            if world.rounds:
                made = _starts_round(made)
            return _later(made, events.TailMade(DIGESTS, was_sent=True))
        case Do.RETIRE:
            if host.worked or not host.on:
                return _later(world, events.RetireFailed())
            return _later(world.source(fenced=True), events.Retired())
        case Do.ASK:
            return world.source(asks=True)
        case Do.RECORD_RELEASED:
            return _later(world, events.Remembered())
        case Do.SERVE:
            return world.source(fenced=False)
        case Do.CLOSE:
            return source_closes(world)
    return world


def _starts_round(world: World) -> World:
    """Send a round if that may be; else nothing has changed."""
    if world.s.state in BEFORE_BASE or world.rounds:
        rounds = world.rounds - (world.s.state not in BEFORE_BASE)
        # Its records change images in memory alone: they are not in the model.
        todo = (_COMMIT, *world.s.todo, tag(events.RoundSent(_ROUND)))
        return world.source(todo=todo)._replace(rounds=rounds)
    return _later(world, events.NothingChanged())


_ROUND: Final = events.Round(1, 1, 1, 0)
_COMMIT: Final = tag(source.Send(peer.Commit(*_ROUND)))


def destination_acts(project: Project, world: World) -> World:
    """Do the first thing that the destination has to do."""
    action, *rest = world.d.todo
    world = world.destination(todo=tuple(rest))
    value = action.value
    if isinstance(value, events.LocalEvent):
        return destination_takes(project, world, value) or world
    match value:
        case str():
            return _STEPS[value](project, world)
        case destination.Send(message=message):
            return send_to_s(world, message)
        case destination.Stage():
            staged = FOREIGN if world.d.session == THIRD else OLD
            held = world.destination(file="staged", file_of=world.d.session, staged=staged)
            return _afterwards(held, events.Staged())
        case destination.UseTail():
            return _use_tail(project, world)
        case destination.Decline():
            engine = "fenced" if world.d.engine == "fenced" else "off"
            return _next(world.destination(engine=engine), *DECLINE)
        case destination.Discard():
            return _next(world, *DECLINE[:2])
        case Theirs():
            return _destination_does(project, world, value)
    return world


def _next(world: World, *steps: Any) -> World:
    return world.destination(todo=(*map(tag, steps), *world.d.todo))


def _afterwards(world: World, *steps: Any) -> World:
    return world.destination(todo=(*world.d.todo, *map(tag, steps)))


def _use_tail(project: Project, world: World) -> World:
    host = world.d
    if not _opens(host.session):
        return _afterwards(world, events.TailRefused(Reason.STATE, ""))
    # A session that is not the current one, for a canary, has left its images in the engine; the
    # tail finds nothing new in those of its own.
    value = FOREIGN if host.staged == FOREIGN else world.tail
    from_engine = "digests" not in project.without
    digests = (b"of", b"another") if value == FOREIGN and from_engine else DIGESTS
    held = world.destination(file="staged", staged=value, engine="held", value=value)
    return _afterwards(held, events.TailApplied(digests, 0, 0, 0))


_TAIL_CIPHER: Final = TailCipher(key=bytes(32), uuid=bytes(16), lineage=bytes(16))
_TAIL: Final = _TAIL_CIPHER.seal(Tail(Header(SESSION, 0, 0, 0, 0), 0, b"", b""), bytes(12))


def _opens(session: bytes) -> bool:
    """Return whether the source's tail opens in a session, even with the same key."""
    try:
        _TAIL_CIPHER.open(_TAIL, session)
    except TailError:
        return False
    return True


def _destination_does(project: Project, world: World, action: Theirs) -> World:
    host = world.d
    match action:
        case Theirs.START:
            held = world.destination(engine="held", value=host.staged)
            return _afterwards(held, events.HeldStarted())
        case Theirs.LET_GO:
            return world.destination(engine="off")
        case Theirs.SETTLE if "settle" in project.without:
            return _afterwards(world.destination(settles=True), events.Settled())
        case Theirs.RELEASE:
            if host.served:
                return _afterwards(world, events.Served())
            return _next(world.destination(engine="fenced"), *RELEASE)
        case Theirs.CLOSE:
            return world._replace(asked=False) if world.asked else destination_closes(world)
    return _next(world, *STEPS.get(action, ()))


def _writes(name: str, *arguments: Any) -> Callable[[Project, World], World]:
    def write(project: Project, world: World) -> World:
        host = world.d
        record = project.transition(host.record, name, host.session, *arguments)
        return world.destination(record=record)

    return write


def _makes_file(_: Project, world: World) -> World:
    return world.destination(file="staged", file_of=world.d.session, staged=OLD)


def _removes_file(_: Project, world: World) -> World:
    return world.destination(file="none")


def _grants(_: Project, world: World) -> World:
    return world.destination(file="granted")


def _admits(_: Project, world: World) -> World:
    return world.destination(engine="active", served=False)


def _writes_own_file(_: Project, world: World) -> World:
    return world.destination(own=world.d.value, file="written")


def _third_begins(project: Project, world: World) -> World:
    """Another host's session is armed here, with a base of its own vTPM."""
    host = world.d
    record = project.transition(host.record, "expect", THIRD, "third")
    if "orphan" in project.without and host.state not in (None, State.ENDED):
        # As it was: the session before goes on, and both stage into one engine and one file.
        return world.destination(record=record, file_of=THIRD, staged=FOREIGN)
    began = destination_closes(world).destination(record=record, engine="off", served=False)
    return began.destination(
        state=State.HOLDING, session=THIRD, file="staged", file_of=THIRD, staged=FOREIGN
    )


_STEPS: Final[dict[str, Callable[[Project, World], World]]] = {
    "expect": _writes("expect", "a"),
    "make file": _makes_file,
    "decline": _writes("decline"),
    "remove file": _removes_file,
    "grant": _grants,
    "admit": _admits,
    "own file": _writes_own_file,
    "take": _writes("take", 0),
    "give back": _writes("give_back"),
    "third": _third_begins,
}
# What the last of some steps leads to, and what to if a disk does not take one of them.
FAILURES: Final[dict[type, events.LocalEvent]] = {
    events.Admitted: events.AdmitFailed(),
    events.Settled: events.SettleFailed(),
    events.Remembered: events.RecordFailed(""),
}


def blind(record: Tagged) -> Tagged:
    """Return the record after what once struck out, by reserving numbers, whose the vTPM is."""
    return tag(record.value._replace(whose=Whose.OURS, session=""))


def is_open(record: Tagged, session: bytes) -> bool:
    """Return whether a session is remembered without what became of it."""
    line = record.value.find(session.hex())
    return line is not None and line.outcome is Outcome.OPEN
