"""Everything that can happen next in the model: what ordinarily does, and faults."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.actions import destination_acts, source_acts
from tests.model.world import (
    SESSION,
    UP,
    Tagged,
    World,
    destination_can,
    destination_closes,
    destination_takes,
    may_serve,
    source_can,
    source_closes,
    source_machine,
    source_takes,
    tag,
    transition,
)
from vtpmd.migration import events
from vtpmd.migration.source import Source
from vtpmd.migration.states import GIVEN_AWAY, OWNING, ImpossibleEvent, State
from vtpmd.store.incoming import Found
from vtpmd.store.moving import is_ours
from vtpmd.store.owner import Outcome, OwnerRecordError, Whose
from vtpmd.wire import peer

Move = tuple[str, World]


def moves(world: World, without: frozenset[str]) -> Iterator[Move]:
    """Yield what can happen without a fault.

    What a side has to do by itself comes before what others do: nobody else sees how far it is, and
    a crash may come at each step.
    """
    if world.s.todo:
        action = world.s.todo[0].value
        yield f"source: {_name(action)}", source_acts(world, without)
        return
    if world.d.todo:
        action = world.d.todo[0].value
        yield f"destination: {_name(action)}", destination_acts(world, without)
        return
    yield from _source_moves(world, without)
    yield from _destination_moves(world, without)
    yield from _commands(world)
    if world.d.settles:
        # The canary's: settling that is not part of the session, and so not stopped by its end.
        settled = world.destination(
            settles=False,
            own=world.d.value,
            file="none",
            record=world.d.record._replace(whose=Whose.OURS, session=""),
        )
        yield "destination: settles in its own time", settled


def _name(action: object) -> str:
    message = getattr(action, "message", None)
    if message is not None:
        return f"sends {type(message).__name__}"
    return str(getattr(action, "name", None) or (action if isinstance(action, str) else "")) or (
        type(action).__name__
    )


def _took(label: str, world: World | None) -> Iterator[Move]:
    if world is not None:
        yield label, world


# The source.


def _source_moves(world: World, without: frozenset[str]) -> Iterator[Move]:
    host = world.s
    if not host.up:
        yield "source's vtpmd starts", _source_starts(world, without)
        return
    if host.state is not None:
        yield from _source_session(world)
    if host.withdraws:
        yield "source withdraws its offer", _withdraw(world)
    if host.resumed:
        heard = world.source(resumed=False)
        yield (
            "source hears that the guest runs",
            source_takes(heard, events.GuestResumed()) or (heard),
        )
    yield from _source_qemu(world)


def _source_session(world: World) -> Iterator[Move]:
    host = world.s
    if world.s_link and world.to_s:
        message, rest = world.to_s[0].value, world.to_s[1:]
        yield from _message_to_source(f"source: {type(message).__name__}", message, world, rest)
    if world.s_link == 2 and not world.to_s:
        lost = world._replace(s_link=0)
        taken = source_takes(lost, events.LinkLost("")) or lost
        yield "source notices the loss", taken
    machine = source_machine(host)
    if host.asks and host.state in GIVEN_AWAY and not _is_asking(world):
        question = peer.Reclaim(SESSION) if host.state is State.RECLAIMING else peer.Ask(SESSION)
        yield f"source asks: {type(question).__name__}", world._replace(question=tag(question))
    if world.answer is not None:
        answered = world._replace(answer=None)
        label = f"source is answered {world.answer.kind}"
        yield label, _or_dropped(answered, world.answer.value)
    if host.qemu == "run" and host.on and world.stops:
        standing = world._replace(stops=world.stops - 1).source(qemu="stop")
        stopped = source_takes(standing, events.GuestStopped())
        yield from _took("QEMU stops the guest", stopped)
    if host.qemu == "stop" and host.on and machine.why_no_tail(0) is None:
        yield from _took("QEMU takes the tail", source_takes(world, events.Freeze()))


def _is_asking(world: World) -> bool:
    return world.question is not None or world.answer is not None or world.asked


def _message_to_source(
    label: str, message: peer.Message, world: World, rest: tuple[Tagged, ...]
) -> Iterator[Move]:
    world = world._replace(to_s=rest)
    try:
        yield label, source_takes(world, message) or world
    except ImpossibleEvent:
        lost = source_closes(world)
        yield f"{label}, which it must not say", source_takes(lost, events.LinkLost("")) or lost


def _or_dropped(world: World, message: peer.Message) -> World:
    try:
        return source_takes(world, message) or world
    except ImpossibleEvent:
        return world


def _withdraw(world: World) -> World:
    host = world.s
    if host.state is None or not source_machine(host).may_withdraw:
        return world.source(withdraws=False)
    record = transition(host.record, "withdraw", SESSION)
    return world.source(withdraws=False, record=record)


def _source_starts(world: World, without: frozenset[str]) -> World:
    host = world.s
    world = world.source(up=True, fenced=False, on=False, state=None, asks=False)
    if may_serve(host.record):
        return world
    found = Source.found(SESSION)
    return world.source(fenced=True, state=found.state, asks="ask" not in without)


def _source_qemu(world: World) -> Iterator[Move]:
    host = world.s
    if host.qemu == "stop" and host.on:
        yield "the guest runs at the source after all", world.source(qemu="run", resumed=True)
    if host.qemu == "stop" and host.state in (State.GRANTED, State.MOVED):
        ended = world.source(up=False, on=False, qemu="dead", resumed=False, withdraws=False)
        yield "QEMU at the source ends, and its vtpmd", source_closes(ended)
    if not host.on and host.qemu != "run":
        # Offered, in a session that was not granted: as Mobility has it.
        goes_on = host.record.whose is Whose.OFFERED and host.state not in (None, *GIVEN_AWAY)
        if (may_serve(host.record) or goes_on) and not host.fenced:
            resumed = host.state is not None
            yield "a guest boots at the source", world.source(on=True, qemu="run", resumed=resumed)
        elif host.state in (State.GRANTED, State.MOVED, State.RECLAIMING):
            left = source_takes(world, events.QemuLeft())
            yield from _took("another QEMU would boot at the source", left)


# The destination.


def _destination_moves(world: World, without: frozenset[str]) -> Iterator[Move]:
    host = world.d
    if not host.up:
        yield "destination's vtpmd starts", _destination_starts(world, without)
        return
    if world.d_link and world.to_d:
        message, rest = world.to_d[0].value, world.to_d[1:]
        yield _destination_hears(world._replace(to_d=rest), message)
    if world.d_link == 2 and not world.to_d:
        lost = world._replace(d_link=0)
        yield "destination notices the loss", destination_takes(lost, events.LinkLost("")) or lost
    if world.question is not None:
        yield from _answer(world, world.question.value, without)
    yield from _destination_qemu(world)


def _destination_hears(world: World, message: peer.Message) -> Move:
    label = f"destination: {type(message).__name__}"
    try:
        return label, destination_takes(world, message) or world
    except ImpossibleEvent:
        lost = destination_closes(world)
        return f"{label}, impossible", destination_takes(lost, events.LinkLost("")) or lost


def _answer(world: World, question: peer.Message, without: frozenset[str]) -> Iterator[Move]:
    """As Mobility.answer() does, and what the answer then is."""
    label = f"destination is asked: {type(question).__name__}"
    host = world.d
    if host.state not in (None, State.ENDED):
        if isinstance(question, peer.Reclaim):
            yield label, _reclaimed(destination_closes(world)._replace(question=None, asked=True))
            return
        if host.state not in (*OWNING, State.RELEASING):
            over = destination_takes(destination_closes(world), events.LinkLost(""))
            yield label, over or world
            return
    line = host.record.find(SESSION.hex())
    outcome = None if line is None else line.outcome
    asked = world._replace(question=None)
    if outcome is Outcome.OPEN and host.state not in OWNING and "remember" not in without:
        remembered = asked.destination(record=transition(host.record, "decline", SESSION))
        yield label, remembered._replace(answer=tag(peer.Released(SESSION)))
    elif outcome in (Outcome.DECLINED, Outcome.RELEASED):
        yield f"{label}: Released", asked._replace(answer=tag(peer.Released(SESSION)))
    else:
        yield f"{label}: Kept", asked._replace(answer=tag(peer.Kept(SESSION)))


def _reclaimed(world: World) -> World:
    """The session takes a Reclaim; its answer goes over the connection that brought it."""
    try:
        taken = destination_takes(world, peer.Reclaim(SESSION))
    except ImpossibleEvent:
        taken = destination_takes(world, events.LinkLost(""))
    return taken or world


def _destination_starts(world: World, without: frozenset[str]) -> World:
    host = world.d
    world = world.destination(
        up=True, state=None, engine="off", served=False, settles=False, file="none"
    )
    if host.file == "none":
        return world
    found = Found(SESSION, host.file == "granted", 0, b"")
    if host.file == "granted" and ("recover" in without or is_ours(found, host.record)):
        record = (
            transition(host.record, "take", SESSION, 0)
            if "recover" not in without
            else (host.record._replace(whose=Whose.OURS, session=""))
        )
        own = host.staged if host.own < 0 else host.own
        return world.destination(record=record, own=own)
    line = host.record.find(SESSION.hex())
    if "remember" in without or line is None or line.outcome is not Outcome.OPEN:
        return world
    return world.destination(record=transition(host.record, "decline", SESSION))


def _destination_qemu(world: World) -> Iterator[Move]:
    host = world.d
    if host.qemu == "wait" and world.tail >= 0:
        taken = destination_takes(world.destination(qemu="tail"), events.TailCame(b""))
        ready = host.state in (State.HOLDING, State.STANDBY)
        if ready and taken is not None:
            yield "SET_STATEBLOB", taken
        else:
            yield "the tail is refused", world.destination(qemu="dead")
    if host.qemu == "tail":
        came = destination_takes(world.destination(qemu="init"), events.InitCame())
        yield "INIT", came or world.destination(qemu="dead")
    if host.qemu in ("init", "dead") and host.state is State.STARTED:
        # Also when QEMU has died over it: vtpmd has done what INIT asks for.
        qemu = "run" if host.qemu == "init" else "dead"
        answered = destination_takes(world.destination(qemu=qemu), events.InitAnswered())
        yield from _took("INIT is answered", answered)
    if host.qemu == "init" and host.state is not State.WAITING and host.state is not State.STARTED:
        yield "INIT is refused", world.destination(qemu="dead")
    if host.qemu == "dead":
        yield from _boots(world)


def _boots(world: World) -> Iterator[Move]:
    """A QEMU without a stream starts at the destination."""
    host = world.d
    adopted = destination_takes(world, events.Adopt()) if host.state is State.ENTITLED else None
    if adopted is not None:
        yield "a boot at the destination takes up what was granted", adopted
    is_ready = host.state in (None, State.ENDED, State.SETTLED)
    if is_ready and may_serve(host.record) and host.own >= 0 and host.engine != "fenced":
        running = world.destination(qemu="run", engine="active", value=host.own)
        yield "a guest boots at the destination", running


def _commands(world: World) -> Iterator[Move]:
    """The guest's commands; each is durable where it is executed."""
    if not world.commands:
        return
    done = world._replace(last=world.last + 1, commands=world.commands - 1)
    if source_can(world) and world.s.value == world.last:
        yield "source executes a command", done.source(value=done.last, worked=True)
    if destination_can(world) and world.d.value == world.last:
        own = done.last if world.d.own >= 0 or world.d.state is State.SETTLED else -1
        staged = done.last if own < 0 else world.d.staged
        executed = done.destination(value=done.last, served=True, own=own, staged=staged)
        yield "destination executes a command", executed


# Faults.


def faults(world: World, without: frozenset[str]) -> Iterator[Move]:
    """Yield what can go wrong."""
    if not world.faults:
        return
    less = world._replace(faults=world.faults - 1)
    yield from _cuts(less)
    if world.question is not None:
        yield "QUESTION LOST", less._replace(question=None)
    if world.answer is not None:
        yield "ANSWER LOST", less._replace(answer=None)
    if world.asked:
        yield "CUT of the connection that asks", less._replace(asked=False, answer=None)
    if world.s.up:
        dead = less.source(
            up=False, on=False, qemu="dead", todo=(), resumed=False, withdraws=False, worked=False
        )
        yield (
            "CRASH of the source",
            source_closes(dead)._replace(question=None, answer=None, asked=False),
        )
    if world.d.up:
        qemu = "wait" if world.d.qemu == "wait" else "dead"
        dead = less.destination(up=False, qemu=qemu, todo=(), engine="off", settles=False)
        yield (
            "CRASH of the destination",
            destination_closes(dead)._replace(question=None, asked=False),
        )
    if world.d.qemu in ("tail", "init", "run"):
        yield "QEMU at the destination dies", less.destination(qemu="dead")
    if world.s.qemu in ("run", "stop") and world.s.on:
        yield "QEMU at the source dies", _source_qemu_dies(less)
    yield from _people(less, without)


def _source_qemu_dies(world: World) -> World:
    """Its vtpmd goes on, and its TPM is as it was until the next QEMU's INIT."""
    return world.source(qemu="dead", on=False, resumed=False)


def _cuts(world: World) -> Iterator[Move]:
    if world.s_link != UP or world.d_link != UP:
        return
    for i in range(len(world.to_d) + 1):
        for j in range(len(world.to_s) + 1):
            cut = world._replace(s_link=2, d_link=2, to_d=world.to_d[:i], to_s=world.to_s[:j])
            yield "CUT", cut


def _people(world: World, without: frozenset[str]) -> Iterator[Move]:
    """What operators, other hosts and clocks do at the wrong moment."""
    if world.d.up and not world.d.todo and world.d.state is State.WAITING:
        late = destination_takes(world, events.GrantTimedOut())
        yield from _took("SILENCE: no Grant in time", late)
    if world.s.up and not world.s.todo and world.s.state in (None, *GIVEN_AWAY, State.ENDED):
        yield "MIGRATE-ARM at the source", _arm(world, without)
    if world.d.up and not world.d.todo and world.d.state is not None:
        aside = destination_takes(destination_closes(world), events.SetAside("another Hello"))
        yield from _took("HELLO of another host", aside)
    if destination_can(world) and world.d.served and not world.loaded:
        served = "served" not in without
        yield "LOADVM at the destination", world.destination(served=served)._replace(loaded=True)


def _arm(world: World, without: frozenset[str]) -> World:
    """Another session is armed, and falls back: nobody is there."""
    if "arm" in without:
        blind = world.s.record._replace(whose=Whose.OURS, session="")
        return world.source(record=blind)
    try:
        transition(world.s.record, "reserve", b"t" * 16, "c:1", 0)
    except OwnerRecordError:
        return world
    return world
