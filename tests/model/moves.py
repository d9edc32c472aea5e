"""What ordinarily happens next in the model. What goes wrong is in ``faults``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tests.model.actions import (
    blind,
    declines_for_ever,
    destination_acts,
    destination_is_told,
    gives_tail,
    is_keeping,
    is_open,
    is_waiting,
    source_acts,
    source_is_told,
    takes_tail,
    writes_record,
)
from tests.model.engine import (
    close_lane,
    engine_may,
    engine_takes,
    hears_lane,
    open_lane,
    tell,
)
from tests.model.world import (
    LINEAGE,
    NOTHING,
    SESSION,
    THIRD,
    DestinationHost,
    Project,
    SourceHost,
    World,
    destination_closes,
    destination_takes,
    may_serve,
    source_closes,
    source_machine,
    source_takes,
    tag,
)
from vtpmd.core.handover import WITH_TAIL, WITHOUT_GRANT, Handover, HandoverEvent
from vtpmd.migration import events
from vtpmd.migration.source import Source
from vtpmd.migration.states import BEFORE_ACK, GIVEN_AWAY, ON_APPROVAL, OWNING, State
from vtpmd.store import moving
from vtpmd.store.incoming import Found
from vtpmd.store.owner import Outcome, Whose
from vtpmd.wire import peer

Move = tuple[str, World]
IMPOSSIBLE: Final = ", which must not be said now"


# What a side has to do by itself comes before what others do, the source's first: the two change
# nothing of each other, what is said only arrives, and a fault may come before each step. So any
# other order ends in the same worlds; but for the record of an offer, which is written while the
# engine and QEMU have the tail, and for what a destination has to keep, whose engine goes on.


def source_steps(project: Project, world: World) -> Iterator[Move]:
    """Yield what the source does next of what it has to do."""
    if world.s.todo and not is_waiting(world.s):
        yield f"source: {_name(world.s.todo[0].value)}", source_acts(project, world)


def is_source_busy(host: SourceHost) -> bool:
    """Return whether all else waits for what the source has to do."""
    return bool(host.todo) and host.records != "writes"


def source_moves(project: Project, world: World) -> Iterator[Move]:
    """Yield what else can happen at the source without a fault."""
    yield from source_engine_moves(project, world)
    if not world.s.todo:
        yield from _source_moves(project, world)


def destination_steps(project: Project, world: World) -> Iterator[Move]:
    """Yield what the destination does next of what it has to do."""
    if world.d.todo:
        yield f"destination: {_name(world.d.todo[0].value)}", destination_acts(project, world)


def is_destination_busy(host: DestinationHost) -> bool:
    """Return whether all else waits for what the destination has to do."""
    return bool(host.todo) and not is_keeping(host)


def destination_moves(project: Project, world: World) -> Iterator[Move]:
    """Yield what else can happen at the destination without a fault."""
    yield from destination_engine_moves(project, world)
    if not is_keeping(world.d):
        yield from _destination_moves(project, world)
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


# The engines, by themselves.


def source_engine_moves(project: Project, world: World) -> Iterator[Move]:
    """Yield what the source's engine does by what it hears from the other, from QEMU and a disk."""
    heard = hears_lane(project, world, "s")
    if heard is not None:
        yield f"source's engine hears {heard[0]}", heard[1]
    if world.s.records == "writes":
        yield "source's engine has written the record", writes_record(project, world)
    if world.s.worked and world.s.engine in (*WITH_TAIL, *WITHOUT_GRANT):
        ended = engine_takes(project, world, "s", HandoverEvent.RUNS)
        yield from took("source's engine has executed a command", ended)
    if world.s.up and world.s.qemu in ("stop", "saved"):
        yield "the guest runs at the source after all", _runs_on(project, world)
        if world.s_lane and world.s.engine is not Handover.GRANTED:
            yield from _asks_for_state(project, world)


def destination_engine_moves(project: Project, world: World) -> Iterator[Move]:
    """Likewise, the destination's."""
    heard = hears_lane(project, world, "d")
    if heard is not None:
        yield f"destination's engine hears {heard[0]}", heard[1]
    if world.d.up:
        yield from _destination_qemu(project, world)


# The source.


def _source_moves(project: Project, world: World) -> Iterator[Move]:
    host = world.s
    if not host.up:
        yield "source's vtpmd starts", _source_starts(project, world)
        return
    if host.news:
        yield f"source is told {host.news[0]}", source_is_told(project, world)
    if host.state is not None:
        yield from _source_session(project, world)
    if host.withdraws and host.records != "writes":
        yield "source withdraws its offer", _withdraw(project, world)
    if host.resumed:
        heard = world.source(resumed=False)
        heard = source_takes(project, heard, events.GuestResumed()) or heard
        yield "source hears that the guest runs", _then(heard, "serve on")
    yield from _source_qemu(project, world)


def _then(world: World, last: str) -> World:
    """Have the source do something once all else that it has to is done."""
    return world.source(todo=(*world.s.todo, tag(last)))


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
    if host.state in (State.ARMED, State.ROUND):
        yield from _hears_of_stream(project, world)
    if host.state is State.ARMED:
        yield from took("a round is due", source_takes(project, world, events.RoundDue()))


def _hears_of_stream(project: Project, world: World) -> Iterator[Move]:
    """A stream begins, or ends, of which the record does not say so already."""
    if not world.s_link or world.s.records == "writes" or world.s.withdraws:
        return
    if world.s.record.value.whose is Whose.OFFERED:
        ended = source_takes(project, world, events.MigrationEnded())
        yield from took("QEMU's migration ends", ended)
    else:
        heard = source_takes(project, world, peer.Receiving(SESSION, 1))
        yield from took("source: Receiving", heard)


def lane_opens(project: Project, world: World) -> Iterator[Move]:
    """Yield what both sides do at once, if the one waits for it and the other is ready."""
    if world.s.up and world.s.state is State.OPENING and _knows_key(world):
        came = destination_takes(project, open_lane(world), events.LaneCame(-1))
        assert came is not None
        yield from took("the lane opens", source_takes(project, came, events.LaneOpened()))


def _knows_key(world: World) -> bool:
    return world.d.up and world.d.state is State.WELCOMED and _is_its(world) and not world.to_d


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
    return f"source: {message.kind}{IMPOSSIBLE}", taken


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


# Its QEMU.


def _source_qemu(project: Project, world: World) -> Iterator[Move]:
    host = world.s
    if host.qemu == "run" and host.state is not None and world.stops:
        standing = world._replace(stops=world.stops - 1).source(qemu="stop")
        stopped = source_takes(project, standing, events.GuestStopped())
        yield from took("QEMU stops the guest", stopped)
    if host.news:
        return  # what the engine asks comes after what it has told
    if host.qemu == "asks":
        yield from _asked_for_state(project, world)
    if host.qemu == "saved" or (host.qemu == "stop" and host.engine is Handover.GRANTED):
        yield "QEMU at the source ends, and its vtpmd", _source_ends(project, world)
    if host.qemu == "dead":
        yield "another QEMU at the source", _another_connects(project, world)


def _runs_on(project: Project, world: World) -> World:
    """QEMU says LOCK_STORAGE, if it has got the state, and its monitor that the guest runs."""
    if world.s.qemu == "saved":
        world = engine_takes(project, world, "s", HandoverEvent.RUNS) or world
    return world.source(qemu="run", resumed=True)


def _asks_for_state(project: Project, world: World) -> Iterator[Move]:
    """GET_STATEBLOB of an armed engine, which gives the tail, or asks vtpmd to have it do so."""
    asks = world.source(qemu="asks")
    engine = world.s.engine
    if engine in WITH_TAIL:
        yield "QEMU asks, once the offer is old", asks
    if not engine_may(project, world, "s", HandoverEvent.ASKED):
        yield "QEMU asks for the state", asks
        return
    asked = gives_tail(project, asks)
    given = asked.s.qemu == "saved"
    # It has worked, or the tail was taken before: it is vtpmd's to say.
    yield "QEMU takes the tail", asked if given else asked.source(qemu="asks")


def _asked_for_state(project: Project, world: World) -> Iterator[Move]:
    """ASK_STATE: as Mobility.give_tail() does."""
    host = world.s
    if host.state in (None, State.ENDED, *GIVEN_AWAY, State.RELEASED):
        yield "QEMU gets no tail", world.source(qemu="stop")
        return
    assert host.state is not None
    no_tail = source_machine(host.state).why_no_tail(0)
    event = events.Freeze() if no_tail is None else events.Disarmed(no_tail)
    taken = source_takes(project, world, event) or world
    yield f"source is asked for the state: {type(event).__name__}", _then(taken, "answer")


def _source_ends(project: Project, world: World) -> World:
    """SHUTDOWN: as Outgoing.close(), which ends what can be ended, and has all of it written."""
    ended = source_takes(project, world, events.Disarmed("")) or world
    if ended.s.records == "writes":
        ended = writes_record(project, ended)
    while ended.s.todo:
        ended = source_acts(project, ended)
    if ended.s.withdraws:
        ended = _withdraw(project, ended)
    return close_lane(source_closes(ended.source(up=False)), "s")


def _another_connects(project: Project, world: World) -> World:
    """SET_DATAFD, STOP and INIT of another QEMU."""
    left = source_takes(project, world, events.QemuLeft()) or world
    stopped = engine_takes(project, left, "s", HandoverEvent.RUNS) or left
    off = stopped.source(on=False)
    return _then(source_takes(project, off, events.GuestResumed()) or off, "boot")


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
    if host.news:
        yield f"destination is told {host.news[0]}", destination_is_told(project, world)
    if host.resumed:
        yield "destination hears that its guest runs", _destination_serves_on(project, world)
    if host.session == THIRD and host.state is State.HOLDING:
        stopped = destination_takes(project, world, peer.Stopped(THIRD))
        yield from took("the third host's guest stops", stopped)
    yield from _destination_tries_again(project, world)


def _is_its(world: World) -> bool:
    return world.d.session == SESSION


def _destination_serves_on(project: Project, world: World) -> World:
    """Mobility._serve_on(): UNRETIRE without a word of what was granted; standby stays that."""
    host = world.d
    heard = world.destination(resumed=False)
    if host.state is State.RELEASING or not may_serve(host.record):
        return heard
    if "unretire ends" in project.without:
        heard = engine_takes(project, heard, "d", HandoverEvent.OWNED) or heard
    return heard.destination(tpm="active") if host.tpm == "fenced" else heard


def _destination_hears(project: Project, world: World) -> Move:
    message, rest = world.to_d[0], world.to_d[1:]
    world = world._replace(to_d=rest)
    taken = destination_takes(project, world, message.value) if _is_its(world) else None
    if taken is not None:
        return f"destination: {message.kind}", taken
    lost = destination_closes(world)
    taken = destination_takes(project, lost, events.LinkLost("")) if _is_its(world) else None
    return f"destination: {message.kind}{IMPOSSIBLE}", taken or lost


def _destination_tries_again(project: Project, world: World) -> Iterator[Move]:
    """What its disk did not take is tried again, after a while."""
    host = world.d
    if host.state is State.ADMITTED:
        yield from took("it settles", destination_takes(project, world, events.SettleDue()))
    if host.retries:
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
        asked = declines_for_ever(project, asked)
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
        yield from took("SET_STATEBLOB", _tail_comes(project, world))
    if host.qemu == "tail" and not host.command:
        yield "INIT", _init_comes(project, world)
    if host.command == "init" and host.engine is not Handover.WAITING:
        yield _init_is_answered(project, world)
    if host.qemu == "dead" and not host.command and not host.news and not is_keeping(host):
        yield from _boots(project, world)  # of which its vtpmd is asked


def _tail_comes(project: Project, world: World) -> World | None:
    """The engine takes the tail, or asks vtpmd with what it is refused."""
    came = world.destination(qemu="tail")
    taken = takes_tail(project, came)
    if taken is not None:
        return taken
    if world.d.news:
        return None  # it asks once that is told
    asked = None
    if world.d.state is not State.ENDED:
        refused = events.TailRefused(peer.Reason.STATE, "")
        asked = destination_takes(project, came, refused)
    if asked is None:
        return world.destination(qemu="dead")
    return asked.destination(command="tail", todo=(*asked.d.todo, tag("answer")))


def _init_comes(project: Project, world: World) -> World:
    """INIT of a guest that came: refused unless the engine has taken its tail."""
    taken = engine_takes(project, world, "d", HandoverEvent.INIT)
    if taken is None:
        return world.destination(qemu="dead")
    return taken.destination(qemu="init", command="init")


def _init_is_answered(project: Project, world: World) -> Move:
    """Also of a QEMU that has died over it."""
    host = world.d
    answered = world.destination(command="")
    is_there = host.qemu == "init"
    if host.engine is not Handover.STARTED:
        refused = answered.destination(qemu="dead" if is_there else host.qemu)
        return "INIT is refused", refused
    if is_there:
        # That its guest runs changes nothing, but for a canary.
        resumed = "unretire ends" in project.without
        answered = answered.destination(qemu="run", resumed=resumed)
    return "INIT is answered", tell(answered, "d", "INIT")


def _boots(project: Project, world: World) -> Iterator[Move]:
    """A QEMU without a stream starts at the destination."""
    host = world.d
    adopted = None
    if host.state is State.ENTITLED:
        adopted = destination_takes(project, world, events.Adopt())
    yield from took("a boot at the destination takes up what was granted", adopted)
    if host.state in (*BEFORE_ACK[1:], *ON_APPROVAL):
        aside = destination_takes(project, world, events.SetAside(""))
        yield from took("a boot at the destination sets aside what came", aside)
    is_ready = host.state in (None, State.ENDED, State.SETTLED)
    if is_ready and may_serve(host.record) and host.own != NOTHING and host.tpm != "fenced":
        running = world.destination(qemu="run", tpm="active", value=host.own)
        yield "a guest boots at the destination", running
