"""A world of two hosts that hand one vTPM over, small enough to be searched whole.

Both sides' decisions are the project's own: ``Source``, ``Destination``, their TABLE, the engines'
``handover_step()``, and the transitions of ``OwnerRecord``. What is modelled here is what they act
upon: a TPM that executes or does not, a file, QEMU, a link and a lane that lose things. An action
that is durable in two steps is two steps here, so that a crash comes between them.

A state of the vTPM is known as the newest one, as one that a command has made old, or as one of
another vTPM's lineage: a state that is old stays so, and nothing asks how old it is. So the guest
may execute any number of commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

from tests.support.file_names import NAMES
from vtpmd.core.handover import (
    WITH_TAIL,
    WITHOUT_GRANT,
    Handover,
    HandoverEvent,
    HandoverStep,
    handover_step,
)
from vtpmd.migration import destination, events, source
from vtpmd.migration.destination import Destination
from vtpmd.migration.source import Source
from vtpmd.migration.states import (
    BEFORE_BASE,
    GIVEN_AWAY,
    OWNING,
    PASSING,
    TABLE,
    WITH_BASE,
    ImpossibleEvent,
    State,
)
from vtpmd.store.owner import Outcome, OwnerRecord, OwnerRecordError, Record, Session, Whose
from vtpmd.wire import peer
from vtpmd.wire.state_level import Library

SESSION: Final = b"s" * peer.SESSION_BYTES
THIRD: Final = b"t" * peer.SESSION_BYTES  # another host's, of another vTPM
LINEAGE: Final = b"l" * peer.LINEAGE_BYTES
EARLIER: Final = b"r" * peer.SESSION_BYTES  # by which the vTPM once went the other way
LIBRARY: Final = Library("0.9.2", {})
HELLO: Final = peer.Hello(
    peer.VERSION, peer.VERSION_MINIMUM, SESSION, b"u" * 16, LINEAGE, 2, 0, b"", 0
)
ROUND: Final = events.Round(1, 1, 1, 0)
UP, BROKEN = 1, 2  # an end of the link; 0: none
NOTHING, OLD, NEWEST, FOREIGN = -1, 0, 1, 2  # what a place holds of the vTPM


Changes = dict[tuple[Handover, HandoverEvent], HandoverStep]


class Tagged:
    """A value of any kind, one object for all that are equal, which is fast to compare.

    Tuples of two kinds may be equal; two of these never are.
    """

    __slots__ = ("kind", "value")

    def __init__(self, value: Any) -> None:
        self.kind = type(value).__name__
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


_TAGS: Final[dict[Any, Tagged]] = {}


def tag(value: Any) -> Tagged:
    """Return the one object that stands for a value."""
    # Send(Grant(session)) and Send(Stopped(session)) are equal tuples.
    kinds = tuple(map(type, value)) if isinstance(value, tuple) else ()
    key = (type(value), kinds, value)
    found = _TAGS.get(key)
    if found is None:
        found = _TAGS[key] = Tagged(value)
    return found


class SourceHost(NamedTuple):
    """The source: vtpmd, its engine, its QEMU, its disk."""

    record: Tagged
    up: bool = True
    state: State | None = State.CONNECTING  # of the session; None: there is none
    todo: tuple[Tagged, ...] = ()  # actions, and events that they led to
    on: bool = True
    fenced: bool = False
    value: int = NEWEST
    worked: bool = False  # a command ran since the state was captured
    unsent: bool = False  # what was captured is to be sent
    acked: bool = False  # the destination holds what was sent last
    wanted: Tagged | None = None  # while something is revoked: what for
    engine: Handover = Handover.NONE
    news: tuple[str, ...] = ()  # of the engine, that vtpmd has not taken yet
    is_late: bool = False  # vtpmd takes other things first
    offer: int = NOTHING  # the state that the engine's tail ends at
    # run, stop, asks (for the state), saved (it has the tail), dead
    qemu: str = "run"
    resumed: bool = False  # QEMU's word that the guest runs is under way
    withdraws: bool = False
    asks: bool = False
    # Of the owner record's offer, which the engine writes: nothing, writes, failed
    records: str = ""


class DestinationHost(NamedTuple):
    """The destination, likewise."""

    record: Tagged
    up: bool = True
    state: State | None = State.WELCOMING
    session: bytes = SESSION  # that it is in: the source's, or another host's
    todo: tuple[Tagged, ...] = ()
    ended_by: Tagged | None = None  # while it is found out whether that was too late
    # tpm2-00.incoming: none, staged, granted, written (granted, and its own file is newer)
    file: str = "none"
    file_of: bytes = SESSION
    staged: int = NOTHING  # the state in it
    own: int = NOTHING  # the state in the vTPM's own file
    tpm: str = "off"  # off, held, active, fenced
    value: int = NOTHING  # of the TPM
    served: bool = False
    engine: Handover = Handover.NONE
    news: tuple[str, ...] = ()
    is_late: bool = False
    command: str = ""  # of QEMU's, that the engine is at: tail, init
    # wait, tail (it has brought that), init (it waits for the answer), run, dead
    qemu: str = "wait"
    resumed: bool = False
    denied: bool = False  # what QEMU was told has started
    retries: bool = False  # what its disk has not taken: that it was granted
    settles: bool = False  # for a canary: settling that is not part of the session


class World(NamedTuple):
    """All of it. The faults that are left are not part of it: more of them only add to it."""

    s: SourceHost
    d: DestinationHost
    s_link: int = UP
    d_link: int = UP
    s_lane: int = 0
    d_lane: int = 0
    lane_to_d: tuple[HandoverEvent, ...] = ()
    lane_to_s: tuple[HandoverEvent, ...] = ()
    to_d: tuple[Tagged, ...] = ()
    to_s: tuple[Tagged, ...] = ()
    question: Tagged | None = None  # over a connection of its own
    answer: Tagged | None = None
    asked: bool = False  # the destination speaks over that connection
    tail: int = NOTHING
    stops: int = 2  # how often QEMU may still stop the guest at the source

    def source(self, **changes: Any) -> World:
        """Return the world with another source."""
        return _with_host(self, 0, changes)

    def destination(self, **changes: Any) -> World:
        """Return the world with another destination."""
        return _with_host(self, 1, changes)


def _with_host(world: World, which: int, changes: dict[str, Any]) -> World:
    """Return the world with another of its two hosts; twice as fast as _replace() is."""
    host: Any = world[which]
    values = list(host)
    for name, value in changes.items():
        values[_PLACES[which][name]] = value
    hosts: list[Any] = list(world)
    hosts[which] = tuple.__new__(type(host), values)
    return tuple.__new__(World, hosts)


_PLACES: Final = tuple(
    {name: place for place, name in enumerate(host._fields)}
    for host in (SourceHost, DestinationHost)
)


class _Nowhere:
    """A disk that takes everything; the record is part of the world."""

    names = NAMES

    def read(self, name: str, bytes_max: int) -> bytes | None:
        raise AssertionError((name, bytes_max))

    def replace(self, name: str, content: bytes) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def overwrite(self, name: str, offset: int, content: bytes) -> None:
        pass

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        del name
        yield -1

    def keep_open(self, name: str) -> None:
        pass

    def forget(self, name: str) -> None:
        pass


class Project:
    """The project's own code, which is asked each question once in a search.

    ``rows`` are the rows of the sessions' TABLE that it was asked for, ``engine_rows`` those of the
    engines'; ``without`` are the repairs that the model leaves out, and ``table`` what the engines'
    says otherwise.
    """

    def __init__(self, without: frozenset[str] = frozenset(), table: Changes | None = None) -> None:
        self.without = without
        self.rows: set[tuple[State, type]] = set()
        self.engine_rows: set[tuple[Handover, HandoverEvent]] = set()
        self._table = table or {}
        self._steps: dict[Any, Any] = {}
        self._handovers: dict[tuple[Handover, HandoverEvent], HandoverStep | None] = {}
        self._transitions: dict[Any, Tagged] = {}

    def transition(self, record: Tagged, name: str, *arguments: Any) -> Tagged:
        """Return a record after one of OwnerRecord's transitions; as it was, if that is refused."""
        key = (record, name, arguments)
        found = self._transitions.get(key)
        if found is None:
            found = self._transitions[key] = tag(_transition(record.value, name, *arguments))
        return found

    def handover(self, state: Handover, event: HandoverEvent) -> HandoverStep | None:
        """Return what an engine's hand-over becomes by an event; None: it is impossible."""
        key = state, event
        if key not in self._handovers:
            self._handovers[key] = self._table.get(key) or handover_step(state, event)
        if self._handovers[key] is not None:
            self.engine_rows.add(key)
        return self._handovers[key]

    def source(
        self, state: State, wanted: Tagged | None, event: source.Event
    ) -> tuple[State, tuple[Tagged, ...], Tagged | None] | None:
        """Return what a source's session becomes by an event, and does; None: it is impossible.

        ``wanted`` is what it has something revoked for: it comes back as it is then.
        """
        key = ("source", state, wanted, tag(event))
        if key not in self._steps:
            machine = source_machine(state)
            machine._wanted = None if wanted is None else wanted.value
            taken = self._step(machine, event)
            after = machine._wanted if machine.state is State.REVOKING else None
            self._steps[key] = taken and (*taken, after and tag(after))
        found: tuple[State, tuple[Tagged, ...], Tagged | None] | None = self._steps[key]
        return found

    def destination(
        self, state: State, session: bytes, ended_by: Tagged | None, event: destination.Event
    ) -> tuple[State, tuple[Tagged, ...], Tagged | None] | None:
        """Likewise, a destination's; ``ended_by`` is what it would have ended by."""
        key = (session, state, ended_by, tag(event))
        if key not in self._steps:
            machine = destination_machine(state, session)
            if ended_by is not None:
                machine._ended_by = ended_by.value
            taken = self._step(machine, event)
            after = tag(machine._ended_by) if machine.state is State.DECLINING else None
            self._steps[key] = taken and (*taken, after)
        found: tuple[State, tuple[Tagged, ...], Tagged | None] | None = self._steps[key]
        return found

    def _step(
        self, machine: Source | Destination, event: Any
    ) -> tuple[State, tuple[Tagged, ...]] | None:
        before = machine.state
        if isinstance(event, events.LocalEvent) and not machine.can_take(type(event)):
            return None
        try:
            actions = machine.step(event)
        except ImpossibleEvent:
            return None
        self.rows.add((before, type(event)))
        return machine.state, tuple(map(tag, actions))


OFFER: Final = "offer"  # the transition that the engine writes


def _transition(record: Record, name: str, *arguments: Any) -> Record:
    owner = OwnerRecord(_Nowhere(), _Nowhere(), now=lambda: "then")
    owner._record = record
    try:
        if name == OFFER:
            with owner.offering(*arguments):
                pass
        else:
            getattr(owner, name)(*arguments)
    except OwnerRecordError:
        return record
    # Numbers that were used, which line comes first, and a line of a session that the vTPM went
    # out by, once it has come back by another, decide nothing.
    changed = owner.read()
    known = [line for line in changed.sessions if _counts(line, changed)]
    return changed._replace(since="", generation=0, sessions=tuple(sorted(known)))


def _counts(line: Session, record: Record) -> bool:
    return line.session != EARLIER.hex() or record.session == line.session


def source_machine(state: State) -> Source:
    """Return a source's session that is in a state."""
    machine = Source(hello=HELLO, key=b"k")
    machine.state = state
    machine.round = ROUND
    machine.peer_following = peer.Following.NOT_ASKED_FOR
    return machine


OWN: Final = destination.Own(None, b"u" * 16, None, 2, LIBRARY, 0, peer.Following.NOT_ASKED_FOR)
# A Hello of another host's, of a VM that was given no uuid.
THIRD_HELLO: Final = HELLO._replace(
    session=THIRD, uuid=bytes(peer.UUID_BYTES), lineage=b"m" * peer.LINEAGE_BYTES
)


def third_is_refused(world: World) -> bool:
    """Return whether the destination refuses another host's vTPM, as it holds a state."""
    own = OWN._replace(lineage=None if world.d.own == NOTHING else LINEAGE)
    return destination.why_refused(own, THIRD_HELLO) is not None


def destination_machine(state: State, session: bytes) -> Destination:
    """Return a destination's session that is in a state."""
    machine = Destination(OWN)
    machine.state = state
    machine.session = session
    machine.key = b"k"
    machine._commit = peer.Commit(*ROUND, 0)
    return machine


def began(project: Project, *, came_from_there: bool) -> World:
    """Return the world in which the source is about to connect.

    ``came_from_there``: the destination had the vTPM before, and has given it away.
    """
    sent = project.transition(tag(Record()), "reserve", SESSION, "b:1", 0)
    if not came_from_there:
        return World(SourceHost(sent), DestinationHost(tag(Record())))
    line = Session(EARLIER.hex(), Outcome.SENT, "a:1", "then")
    theirs = tag(Record(Whose.MOVED, EARLIER.hex(), sessions=(line,)))
    return World(SourceHost(sent), DestinationHost(theirs, own=OLD, engine=Handover.GRANTED))


def source_takes(project: Project, world: World, event: source.Event) -> World | None:
    """Have the source's session take an event, if that is possible now; its actions are to do."""
    if world.s.state is None:
        return None
    taken = project.source(world.s.state, world.s.wanted, event)
    if taken is None:
        return None
    state, actions, wanted = taken
    return world.source(state=state, todo=(*actions, *world.s.todo), wanted=wanted)


def destination_takes(project: Project, world: World, event: destination.Event) -> World | None:
    """Likewise, the destination's."""
    if world.d.state is None:
        return None
    taken = project.destination(world.d.state, world.d.session, world.d.ended_by, event)
    if taken is None:
        return None
    state, actions, ended_by = taken
    return world.destination(state=state, todo=(*actions, *world.d.todo), ended_by=ended_by)


def send_to_d(world: World, message: peer.Message) -> World:
    """The source says something."""
    return world._replace(to_d=(*world.to_d, tag(message))) if world.s_link == UP else world


def send_to_s(world: World, message: peer.Message) -> World:
    """The destination says something, over the connection that is its session's now."""
    if world.d.session != SESSION:
        return world  # another host hears it
    if world.asked:
        return world._replace(answer=tag(message), asked=False)
    return world._replace(to_s=(*world.to_s, tag(message))) if world.d_link == UP else world


def source_closes(world: World) -> World:
    """The source's end of the link is closed; what it has said arrives."""
    return world._replace(s_link=0, to_s=(), d_link=BROKEN if world.d_link else 0)


def destination_closes(world: World) -> World:
    """The destination's end is."""
    return world._replace(d_link=0, to_d=(), s_link=BROKEN if world.s_link else 0)


def source_can(host: SourceHost) -> bool:
    """Return whether the source would execute a command."""
    return host.up and host.on and not host.fenced and host.qemu == "run"


def destination_can(host: DestinationHost) -> bool:
    """Return whether the destination would."""
    return host.up and host.qemu == "run" and host.tpm == "active"


def may_serve(record: Tagged) -> bool:
    """Return whether a start from this record serves without asking."""
    return bool(record.value.whose is Whose.OURS)


# A guest's command makes a newer state: what was the newest is old everywhere else. It is durable
# where it is executed.


def _old(value: int) -> int:
    return OLD if value == NEWEST else value


def source_after_command(host: SourceHost, *, is_its: bool) -> SourceHost:
    """Return the source once it, or the destination, has executed a command."""
    value = NEWEST if is_its else _old(host.value)
    return host._replace(value=value, worked=is_its or host.worked, offer=_old(host.offer))


def destination_after_command(host: DestinationHost, *, is_its: bool) -> DestinationHost:
    """Return the destination once it, or the source, has executed a command."""
    staged = _old(host.staged)
    if not is_its:
        return host._replace(own=_old(host.own), staged=staged, value=_old(host.value))
    # Durable in its own file, which is newer from then on than what was granted.
    file = "written" if host.file == "granted" else host.file
    return host._replace(own=NEWEST, staged=staged, value=NEWEST, served=True, file=file)


def between_after_command(world: World) -> World:
    """Return the world with what is under way once a command was executed at either end."""
    to_d = tuple(_GONE_OLD.get(each, each) for each in world.to_d)
    return world._replace(tail=_old(world.tail), to_d=to_d)


# Of a round: what it is a round of is where the guest's TPM2_Shutdown would be.
COMMITS: Final = {
    (value, is_last): tag(peer.Commit(*ROUND[:3], value, is_last))
    for value in (OLD, NEWEST)
    for is_last in (0, 1)
}
_GONE_OLD: Final = {COMMITS[NEWEST, is_last]: COMMITS[OLD, is_last] for is_last in (0, 1)}
_BEFORE_FREEZE: Final = (*BEFORE_BASE, *WITH_BASE, *PASSING)
_OVER: Final = (None, State.ENDED)


# What nothing will ever ask for again is forgotten, so that worlds are equal that behave equally.
# Each line says of something that no move reads it before it is written anew.


class SourceSeen(NamedTuple):
    """What of the source tells whether something between the two is of no more use."""

    state: State | None
    engine: Handover


class DestinationSeen(NamedTuple):
    """Likewise, of the destination."""

    state: State | None
    engine: Handover
    qemu: str
    has_to_do: bool


def forget_between(world: World, s: SourceSeen, d: DestinationSeen) -> World:
    """Forget of what is between the two hosts, which have forgotten what they can."""
    if s.state not in GIVEN_AWAY and world.answer is not None:
        world = world._replace(answer=None)
    if world.stops and s.state not in _BEFORE_FREEZE:
        world = world._replace(stops=0)  # no tail is made any more
    if s.engine is Handover.GRANTED and d.engine not in (Handover.TAKING, Handover.WAITING):
        # Nothing more is said over the lane, and its loss is nothing to either.
        world = world._replace(s_lane=0, d_lane=0, lane_to_s=(), lane_to_d=())
    if world.tail != NOTHING and d.qemu != "wait" and not d.has_to_do:
        world = world._replace(tail=NOTHING)  # a QEMU takes one stream
    if world.to_s:
        world = world._replace(to_s=_without_idle(world.to_s, s.state))
    if world.to_d:
        world = world._replace(to_d=_without_idle(world.to_d, d.state))
    return world


# Messages that change nothing in these states, and never will.
_IDLE: Final[dict[State | None, tuple[type, ...]]] = {
    State.FROZEN: (peer.Ack,),
    **dict.fromkeys((*GIVEN_AWAY, State.RELEASED), (peer.Ack, peer.Refuse)),
    **dict.fromkeys((State.TAKING, *OWNING), (peer.Commit, peer.Stopped)),
}


def _without_idle(messages: tuple[Tagged, ...], state: State | None) -> tuple[Tagged, ...]:
    """Leave out what means nothing to a session any more, as its table has it, too."""
    if state in (State.ENDED, State.DECLINING):  # at rest in the latter, it is on its way there
        return ()
    idle, table = _IDLE.get(state, ()), cast(dict[Any, Any], TABLE)
    return tuple(
        each
        for each in messages
        if not isinstance(each.value, idle) or table.get((state, type(each.value))) is not state
    )


_SETTLING: Final = (State.ADMITTED, State.SETTLED, State.RELEASING)
# What is told means nothing to a session that has come to one of these.
_MEANS_NOTHING: Final[dict[str, tuple[State, ...]]] = {
    "GIVEN": (State.FROZEN, *GIVEN_AWAY, State.RELEASED),
    "FROZEN": (State.FROZEN, *GIVEN_AWAY, State.RELEASED),
    "GRANTED": (*GIVEN_AWAY, State.RELEASED),
    "TAKING": (State.TAKING, State.DECLINING, State.ENTITLED, State.STARTED, *_SETTLING),
    "ENTITLED": (State.ENTITLED, State.STARTED, *_SETTLING),
    "STARTED": (State.STARTED, *_SETTLING),
    "INIT": _SETTLING,
    "NONE": (),
}


def _may_mean(state: State | None, news: str) -> bool:
    return state not in (*_OVER, *_MEANS_NOTHING[news])


def forget_at_source(s: SourceHost) -> SourceHost:
    """Forget of the source."""
    if s.records == "failed" and s.state in _OVER and not s.todo:
        s = s._replace(records="")
    is_at_rest = not s.todo and not s.records
    if may_serve(s.record) and is_at_rest and (not s.up or (s.state in _OVER and not s.fenced)):
        # Up or soon up again, with a guest or soon with one: it serves, and that is all.
        return SourceHost(s.record, state=None, value=s.value)
    if not s.up:
        # A start makes all of it anew, from record and state.
        return SourceHost(s.record, up=False, state=None, on=False, value=s.value, qemu="dead")
    if s.state not in GIVEN_AWAY and s.asks:
        s = s._replace(asks=False)
    news = tuple(each for each in s.news if _may_mean(s.state, each))
    if news != s.news or (s.is_late and not news):
        s = s._replace(news=news, is_late=bool(news))
    if s.state in (State.RECLAIMING, State.LEFT, State.RELEASED) and s.resumed:
        s = s._replace(resumed=False)
    if s.engine is Handover.GRANTED and s.qemu == "saved":
        s = s._replace(qemu="stop")  # whether it says that its guest runs, makes nothing of it
    if s.state in _OVER and not s.fenced and s.engine not in WITHOUT_GRANT:
        # Its guest may run on, and that is all that it can do.
        s = s._replace(resumed=False, qemu="run" if s.qemu in ("stop", "saved") else s.qemu)
    if s.engine not in (*WITH_TAIL, *WITHOUT_GRANT) and s.offer != NOTHING:
        s = s._replace(offer=NOTHING)
    is_over = s.state in (*_OVER, *GIVEN_AWAY, State.RELEASED)
    if is_over and s.engine not in WITHOUT_GRANT and (s.worked or s.acked or s.unsent):
        s = s._replace(worked=False, acked=False, unsent=False)  # no round is sent any more
    if s.withdraws and s.record.value.whose is not Whose.OFFERED and not s.records:
        # Nothing to withdraw. If an offer comes before that is found out: a stop, a resume and a
        # stop lead there, too.
        s = s._replace(withdraws=False)
    return s


def forget_at_destination(d: DestinationHost) -> DestinationHost:
    """Forget of the destination."""
    if d.ended_by is not None:
        d = d._replace(ended_by=None)
    if d.file == "none" and (d.staged != NOTHING or d.file_of != SESSION):
        d = d._replace(staged=NOTHING, file_of=SESSION)
    if d.tpm in ("off", "fenced") and (d.value != NOTHING or d.served):
        d = d._replace(value=NOTHING, served=False)
    if d.state is not State.STARTED and d.retries:
        d = d._replace(retries=False)
    news = tuple(each for each in d.news if _may_mean(d.state, each))
    if news != d.news or (d.is_late and not news):
        d = d._replace(news=news, is_late=bool(news))
    if d.state in _OVER:
        if d.session != SESSION:
            d = d._replace(session=SESSION)
        if d.qemu in ("tail", "init") and d.engine in (Handover.NONE, Handover.GRANTED):
            # Its INIT will be refused, and nobody waits for it.
            d = d._replace(qemu="dead", command="")
    return d
