"""What the actions of both sides do in the model.

Steps that nothing can be told apart by are done in one go (``source_goes_on``). A host that
crashes leaves what it would have left before a step that changed no disk; nobody else sees such a
step, but for what is said. What was said a moment ago may be lost with the host, or with the link:
that is part of a crash and of a cut, and so sending, too, is such a step. What is left, and comes
one by one, is what is *durable*: a record or a file that is written. No run of steps begins and
ends serving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tests.model.engine import close_lane, engine_may, engine_takes
from tests.model.world import (
    COMMITS,
    FOREIGN,
    OFFER,
    OLD,
    ROUND,
    SESSION,
    THIRD,
    DestinationHost,
    Project,
    SourceHost,
    Tagged,
    World,
    destination_closes,
    destination_takes,
    may_serve,
    send_to_d,
    send_to_s,
    source_closes,
    source_takes,
    tag,
)
from vtpmd.core.handover import TAIL_TAKEN, WITH_TAIL, WITHOUT_GRANT, Handover, HandoverEvent
from vtpmd.migration import destination, events, source
from vtpmd.migration.destination import Do as Theirs
from vtpmd.migration.source import Do
from vtpmd.migration.states import BEFORE_BASE, GIVEN_AWAY, ON_OFFER, OWNING, PASSING, State
from vtpmd.store.owner import Outcome, Whose

# What the source writes down, and with which transition of the owner record.
RECORDS: Final = {
    Do.RECORD_MOVED: "confirm",
    Do.RECORD_RELEASED: "release",
}
# The disk takes what the TPM on standby was started from.
KEEP: Final = "keep"
PREPARE: Final = ("expect", "make file")
# Of the destination's actions that are made of steps. "decline" comes with a reason.
STEPS: Final[dict[Theirs, tuple[Any, ...]]] = {
    Theirs.PREPARE: (*PREPARE, events.Prepared()),
    Theirs.ADMIT: ("grant", "admit", events.Admitted(0, 0)),
    Theirs.SETTLE: ("own file", "take", "remove file", events.Settled()),
}
DECLINE: Final = ("decline", "remove file", events.Remembered())
RELEASE: Final = ("give back", "remove file", events.Remembered())


def source_goes_on(project: Project, world: World) -> World:
    """Have the source do what it has to, up to what is durable.

    It takes what its engine tells, too, unless that comes late.
    """
    while True:
        while world.s.todo and not _is_durable_here(world.s):
            world = source_acts(project, world)
        if world.s.todo or world.s.is_late or not world.s.news:
            return world
        world = source_is_told(project, world)


def destination_goes_on(project: Project, world: World) -> World:
    """Likewise, the destination."""
    while True:
        while world.d.todo and not _is_durable_there(world.d):
            world = destination_acts(project, world)
        if world.d.todo or world.d.is_late or not world.d.news:
            return world
        world = destination_is_told(project, world)


_NEWS: Final[dict[str, events.LocalEvent]] = {
    "GIVEN": events.Frozen(),
    "FROZEN": events.Frozen(),
    "GRANTED": events.Granted(),
    "TAKING": events.Took(),
    "ENTITLED": events.Entitled(),
    "STARTED": events.Started(),
    "NONE": events.LinkLost(""),
    "INIT": events.InitAnswered(),
}


def source_is_told(project: Project, world: World) -> World:
    """Have the source's vtpmd take what its engine has told it first."""
    news, *rest = world.s.news
    told = world.source(news=tuple(rest))
    return source_takes(project, told, _NEWS[news]) or told


def destination_is_told(project: Project, world: World) -> World:
    """Likewise, the destination's."""
    news, *rest = world.d.news
    told = world.destination(news=tuple(rest))
    if news == "INIT" and world.d.state is not State.STARTED:
        return told
    return destination_takes(project, told, _NEWS[news]) or told


# Of what is written as a word, what changes no disk.
_QUIET: Final = ("admit", "third", "answer", "serve on", "boot")


def _is_durable_here(host: SourceHost) -> bool:
    """Also what may come after the engine has written, or granted, by itself."""
    action = host.todo[0].value
    return (host.records == "writes" and isinstance(action, Do)) or _is_durable(action)


def _is_durable_there(host: DestinationHost) -> bool:
    """A file that was not granted is removed by the next start in any case."""
    action = host.todo[0].value
    return host.file != "staged" if action == "remove file" else _is_durable(action)


def _is_durable(action: object) -> bool:
    return action in RECORDS or (isinstance(action, str) and action not in _QUIET)


def source_acts(project: Project, world: World) -> World:
    """Do the first thing that the source has to do."""
    action, *rest = world.s.todo
    world = world.source(todo=tuple(rest))
    value = action.value
    if isinstance(value, events.LocalEvent):
        return source_takes(project, world, value) or world
    match value:
        case str() if rest:
            return world.source(todo=(*rest, action))  # once all that was asked for is done
        case "answer":
            return gives_tail(project, world)
        case "serve on":
            return _serves_on(project, world)
        case "boot":
            return _boots(world)
        case source.Send(message=message):
            return send_to_d(world, message)
        case source.Repeat(event=event):
            return _later(world, event)
        case source.Do():
            return _source_does(project, world, value)
    return world


def _later(world: World, event: Any) -> World:
    return world.source(todo=(*world.s.todo, tag(event)))


def _source_does(project: Project, world: World, action: Do) -> World:
    host = world.s
    if action in RECORDS:
        record = project.transition(host.record, RECORDS[action], SESSION)
        world = world.source(record=record)
    match action:
        case Do.OFFER:
            return _has_offered(project, world)
        case Do.WIND_UP:
            return _winds_up(project, world)
        case Do.RECORD_AHEAD:
            return _records_ahead(project, world)
        case Do.START_ROUND:
            return _starts_round(project, world)
        case Do.KEEP_BASE:
            return world.source(acked=True)
        case Do.WITHDRAW:
            return world.source(withdraws=True)
        case Do.MAKE_TAIL:
            return _makes_tail(project, world)
        case Do.END_OFFER:
            ended = events.OfferEnded() if host.acked else events.OfferEndedEarly()
            return _revokes(project, world, HandoverEvent.LET_GO, ended)
        case Do.REVOKE:
            return _withdraws(project, world)
        case Do.ASK:
            return world.source(asks=True)
        case Do.RECORD_RELEASED:
            return _later(world, events.Remembered())
        case Do.SERVE:
            return _unretires(project, world, as_recorded=True)
        case Do.CLOSE:
            return _closes(project, world)
    return world


def is_waiting(host: SourceHost) -> bool:
    """Return whether what the source has to do next waits for the disk."""
    return host.records == "writes" and bool(host.todo) and host.todo[0].value is Do.OFFER


def _records_ahead(project: Project, world: World) -> World:
    """In one go: if the guest stops meanwhile, that is as if it were written from then on."""
    begun = _begins_record(project, world)
    return writes_record(project, begun) if begun.s.records == "writes" else begun


def _begins_record(project: Project, world: World) -> World:
    """OwnerRecord.offering(): the engine writes it, unless it does, or it says so already."""
    if world.s.records == "writes":
        return world
    offered = project.transition(world.s.record, OFFER, SESSION)
    return world if offered == world.s.record else world.source(records="writes")


def writes_record(project: Project, world: World) -> World:
    """The disk has it: blackout.c takes that by itself."""
    record = project.transition(world.s.record, OFFER, SESSION)
    if "record" in project.without:
        record = world.s.record
    written = world.source(record=record, records="")
    return engine_takes(project, written, "s", HandoverEvent.RECORDED) or written


def _has_offered(project: Project, world: World) -> World:
    if world.s.records == "failed":
        return source_fails(project, world.source(records=""), Do.OFFER)
    if world.s.record.value.whose is not Whose.OFFERED:
        return world
    return engine_takes(project, world, "s", HandoverEvent.RECORDED) or world


def source_fails(project: Project, world: World, action: Do) -> World:
    """As Outgoing._take() does: what can be ended is, and nothing more is done of this event."""
    state = world.s.state
    assert state is not None
    if action is Do.RECORD_RELEASED:
        return world.source(todo=(tag(events.RecordFailed("")),))
    # What waits for the end of it, goes on waiting.
    waits = tuple(each for each in world.s.todo if isinstance(each.value, str))
    ended = source_takes(project, world.source(todo=waits), events.Disarmed(""))
    return world if ended is None or state is State.ENDED else ended


def _closes(project: Project, world: World) -> World:
    closed = source_closes(world)
    if world.s.state in (*GIVEN_AWAY, State.RELEASED):
        return closed
    return engine_takes(project, closed, "s", HandoverEvent.WITHDRAW) or closed


def _revokes(project: Project, world: World, how: HandoverEvent, then: events.LocalEvent) -> World:
    """Have the engine let be what it may do by itself; where it refuses, it has done it."""
    if "revoke" in project.without:
        return _later(world, then)
    taken = engine_takes(project, world, "s", how)
    if taken is not None:
        return _later(taken, then)
    if how is HandoverEvent.LET_GO:
        return _withdraws(project, world)
    return _later(world, events.Granted())


def _withdraws(project: Project, world: World) -> World:
    revoked = events.Revoked(world.s.engine in WITHOUT_GRANT)
    return _revokes(project, world, HandoverEvent.WITHDRAW, revoked)


def _unretires(project: Project, world: World, *, as_recorded: bool) -> World:
    """LINK_UNRETIRE: what was granted is served again only as the owner record says."""
    if world.s.engine is Handover.GRANTED:
        if not as_recorded and "unretire" not in project.without:
            return world
        world = engine_takes(project, world, "s", HandoverEvent.OWNED) or world
    return world.source(fenced=False)


def _serves_on(project: Project, world: World) -> World:
    """As Mobility._serve_on() does, once the guest is known to run here."""
    host = world.s
    whose = host.record.value.whose
    is_fenced = (
        host.state in (*GIVEN_AWAY, State.RELEASED)
        or whose is Whose.MOVED
        or (whose is Whose.OFFERED and host.state is None)
    )
    if is_fenced and "serve on" not in project.without:
        return world
    return _unretires(project, world, as_recorded=False)


def _boots(world: World) -> World:
    """INIT: as Mobility._check_ours() has it, also of what was offered in a session not granted."""
    host = world.s
    whose = host.record.value.whose
    goes_on = whose is Whose.OFFERED and host.state not in (None, *GIVEN_AWAY)
    if (may_serve(host.record) or goes_on) and not host.fenced:
        return world.source(on=True, qemu="run", worked=True, resumed=host.state is not None)
    return world


def _starts_round(project: Project, world: World) -> World:
    """Send a round if something ran since the last one, and the TPM is on."""
    is_first = world.s.state in BEFORE_BASE
    if not _captures(world):
        return _later(world, events.Disarmed("") if is_first else _NO_ROUND)
    if not is_first and not world.s.worked and not world.s.unsent:
        return _later(world, _NO_ROUND)
    return _sends_round(_captures_new(project, world) if world.s.worked else world)


def _captures(world: World) -> bool:
    return world.s.on and not world.s.fenced


_NO_ROUND: Final = events.NothingChanged()


def _captures_new(project: Project, world: World) -> World:
    """blackout_capture(), of what a command has changed: the tail that there was is void."""
    captured = world.source(worked=False, unsent=True)
    if "capture" in project.without:
        return captured
    how = HandoverEvent.RUNS if world.s.engine in WITHOUT_GRANT else HandoverEvent.LET_GO
    return engine_takes(project, captured, "s", how) or captured


def _sends_round(world: World) -> World:
    # Its records change images in memory alone: they are not in the model.
    is_last = world.s.state in PASSING
    sent = send_to_d(
        world.source(acked=False, unsent=False), COMMITS[world.s.value, int(is_last)].value
    )
    return _later(sent, events.RoundSent(ROUND))


def _winds_up(project: Project, world: World) -> World:
    """What the guest has left is captured, and offered if the destination has a base of it."""
    world = _begins_record(project, world)
    if world.s.state is not State.CAPTURING or not _captures(world):
        return world
    return _offers(project, world) or world


def _offers(project: Project, world: World) -> World | None:
    """Capture, and have the engine give QEMU the tail of it; None: the lane is gone."""
    if world.s.worked and _captures(world):
        world = _captures_new(project, world)
    if not world.s_lane:
        return None
    offered = engine_takes(project, world, "s", HandoverEvent.OFFER)
    return offered and offered.source(offer=offered.s.value)


def _makes_tail(project: Project, world: World) -> World:
    """Have the engine give what changed since the base, of what the guest has done since, too."""
    host = world.s
    is_early = host.state in ON_OFFER
    if is_early and host.engine in (*WITH_TAIL, *WITHOUT_GRANT):
        return _later(world, events.TailMade(not host.unsent))
    world = _begins_record(project, world)
    offered = _offers(project, world)
    if offered is None and not is_early:
        return _later(world, events.Disarmed("the lane is gone"))
    offered = offered or world
    return _later(offered, events.TailMade(not offered.s.unsent))


def gives_tail(project: Project, world: World) -> World:
    """blackout_give_tail(): QEMU has the tail then, or whole blobs, which are not in the model."""
    host = world.s
    own = world.source(qemu="stop" if host.qemu == "asks" else host.qemu)
    if not engine_may(project, world, "s", HandoverEvent.ASKED):
        return own
    if host.worked:
        return engine_takes(project, own, "s", HandoverEvent.RUNS) or own
    asked = engine_takes(project, own, "s", HandoverEvent.ASKED)
    assert asked is not None
    if asked.s.engine not in WITHOUT_GRANT:
        return asked
    given = asked._replace(tail=host.offer)
    return given.source(qemu="saved" if host.qemu == "asks" else host.qemu)


def destination_acts(project: Project, world: World) -> World:
    """Do the first thing that the destination has to do."""
    action, *rest = world.d.todo
    world = world.destination(todo=tuple(rest))
    value = action.value
    if isinstance(value, events.LocalEvent):
        return destination_takes(project, world, value) or world
    match value:
        case "answer" | "third" if rest:
            return world.destination(todo=(*rest, action))  # once all that it leads to is done
        case str():
            return _STEPS[value](project, world)
        case destination.Send(message=message):
            return send_to_s(world, message)
        case destination.Repeat(event=event):
            return _afterwards(world, event)
        case destination.Stage():
            return _stages(world, value)
        case destination.Decline():
            return _declines(project, world)
        case destination.Discard():
            return _next(world, *DECLINE[:2])
        case Theirs():
            return _destination_does(project, world, value)
    return world


def _stages(world: World, wanted: destination.Stage) -> World:
    staged = FOREIGN if world.d.session == THIRD else wanted.power
    if _is_taken(world):
        return _afterwards(world, events.Took())
    if not wanted.is_last:
        world = world.destination(file="staged", file_of=world.d.session, staged=staged)
        return _afterwards(world, events.Staged())
    held = world.destination(tpm="held", value=staged, file_of=world.d.session)
    # The engine may go on with the tail by then.
    return _afterwards(held, KEEP, events.HeldStarted())


def _is_taken(world: World) -> bool:
    """handover_has_taken(): of what was staged the engine has started what will be the vTPM."""
    return world.d.engine in TAIL_TAKEN


def _next(world: World, *steps: Any) -> World:
    return world.destination(todo=(*map(tag, steps), *world.d.todo))


def _afterwards(world: World, *steps: Any) -> World:
    return world.destination(todo=(*world.d.todo, *map(tag, steps)))


def _declines(project: Project, world: World) -> World:
    """Have the engine take nothing, unless it has; then forget what came."""
    withdrawn = engine_takes(project, world, "d", HandoverEvent.WITHDRAW)
    if world.d.engine is Handover.GRANTED:
        withdrawn = close_lane(world, "d")  # what was granted was another session's
    if "withdraw" in project.without:
        withdrawn = world
    granted = _GRANTED.get(world.d.engine)
    if withdrawn is None and granted is not None:
        return _afterwards(world, granted)
    return _next(_off(withdrawn or world), *DECLINE)


_GRANTED: Final[dict[Handover, events.LocalEvent]] = {
    Handover.ENTITLED: events.Entitled(),
    Handover.STARTED: events.Started(),
}


def _off(world: World) -> World:
    return world.destination(tpm="fenced" if world.d.tpm == "fenced" else "off")


def takes_tail(project: Project, world: World, *, is_refused: bool = False) -> World | None:
    """blackout_take_tail(), and blackout_start_tail(), where libtpms may refuse it.

    None for a tail that is not the next of the session's.
    """
    host = world.d
    if not world.d_lane or host.tpm not in ("off", "held"):
        return None
    value = world.tail
    if "tail" in project.without and host.tpm == "held":
        value = host.value  # it is taken for the one that says no more than this
    if host.staged == FOREIGN:
        value = FOREIGN  # for a canary: another session's images are the engine's
    taken = engine_takes(project, world.destination(value=value), "d", HandoverEvent.TAIL)
    if taken is None:
        return None
    started = taken.destination(tpm="off" if is_refused else "held")
    how = HandoverEvent.NOT_READY if is_refused else HandoverEvent.READY
    return engine_takes(project, started, "d", how) or started


def _answers_tail(_: Project, world: World) -> World:
    """ASK_TAIL is answered: the tail is refused."""
    after = world.destination(command="")
    return after.destination(qemu="dead") if world.d.qemu == "tail" else after


def _destination_does(project: Project, world: World, action: Theirs) -> World:
    host = world.d
    match action:
        case Theirs.START:
            if _is_taken(world):
                return _afterwards(world, events.Took())
            held = world.destination(tpm="held", value=host.staged)
            return _afterwards(held, events.HeldStarted())
        case Theirs.LET_GO:
            return _is_overtaken(world) if _is_taken(world) else _off(world)
        case Theirs.SETTLE if "settle" in project.without:
            return _afterwards(world.destination(settles=True), events.Settled())
        case Theirs.RELEASE:
            return _releases(project, world)
        case Theirs.CLOSE:
            return world._replace(asked=False) if world.asked else destination_closes(world)
    return _next(world, *STEPS.get(action, ()))


def _is_overtaken(world: World) -> World:
    """The freeze has overtaken the round that begins: nothing more is done of that event."""
    rest = world.d.todo
    while rest and not isinstance(rest[0].value, events.LocalEvent):
        rest = rest[1:]
    return _afterwards(world.destination(todo=rest), events.Took())


def _releases(project: Project, world: World) -> World:
    if world.d.served:
        return _afterwards(world, events.Served())
    fenced = world.destination(tpm="fenced")
    owned = engine_takes(project, fenced, "d", HandoverEvent.OWNED) or fenced
    return _next(owned, *RELEASE)


def _writes(name: str, *arguments: Any) -> Callable[[Project, World], World]:
    def write(project: Project, world: World) -> World:
        host = world.d
        record = project.transition(host.record, name, host.session, *arguments)
        return world.destination(record=record)

    return write


def declines_for_ever(project: Project, world: World, session: bytes = SESSION) -> World:
    """Remember that a session has ended without a Grant, of whatever QEMU was told."""
    host = world.d
    denied = host.qemu == "run" and host.tpm != "active" and session == SESSION
    record = project.transition(host.record, "decline", session)
    return world.destination(record=record, denied=denied)


def _makes_file(_: Project, world: World) -> World:
    return world.destination(file="staged", file_of=world.d.session, staged=OLD)


def _removes_file(_: Project, world: World) -> World:
    return world.destination(file="none")


def is_keeping(host: DestinationHost) -> bool:
    """Return whether the destination's disk is at what it has to keep; its vtpmd waits for it."""
    return bool(host.todo) and host.todo[0].value == KEEP


def _keeps(_: Project, world: World) -> World:
    return world.destination(file="staged", staged=world.d.value)


def _grants(project: Project, world: World) -> World:
    """Have the file say so, once it has what the TPM was started from."""
    if world.d.tpm == "held":
        world = _keeps(project, world)
    return world.destination(file="granted")


def _admits(project: Project, world: World) -> World:
    admitted = world.destination(tpm="active", served=False)
    return engine_takes(project, admitted, "d", HandoverEvent.OWNED) or admitted


def _writes_own_file(_: Project, world: World) -> World:
    return world.destination(own=world.d.value, file="written")


def _third_begins(project: Project, world: World) -> World:
    """Another host's session is armed here, with a base of its own vTPM."""
    host = world.d
    if host.state in (*OWNING, State.RELEASING) and "welcome" not in project.without:
        return world  # what it was to take the place of was granted by then: it is refused
    record = project.transition(host.record, "expect", THIRD, "third")
    if "orphan" in project.without and host.state not in (None, State.ENDED):
        # As it was: the session before goes on, and both stage into one engine and one file.
        return world.destination(record=record, file_of=THIRD, staged=FOREIGN)
    began = close_lane(destination_closes(world), "d")
    began = began.destination(record=record, tpm="off", served=False, news=())
    return began.destination(
        state=State.HOLDING, session=THIRD, file="staged", file_of=THIRD, staged=FOREIGN
    )


_STEPS: Final[dict[str, Callable[[Project, World], World]]] = {
    "expect": _writes("expect", "a"),
    "make file": _makes_file,
    "decline": lambda project, world: declines_for_ever(project, world, world.d.session),
    "remove file": _removes_file,
    KEEP: _keeps,
    "grant": _grants,
    "admit": _admits,
    "own file": _writes_own_file,
    "take": _writes("take", 0),
    "give back": _writes("give_back"),
    "third": _third_begins,
    "answer": _answers_tail,
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
