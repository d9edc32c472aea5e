"""A world of two hosts that hand one vTPM over, small enough to be searched whole.

Both sides' decisions are the project's own: ``Source``, ``Destination``, their TABLE, and the
transitions of ``OwnerRecord``. What is modelled here is what they act upon: an engine that executes
or does not, a file, QEMU, a link that loses things. An action that is durable in two steps is two
steps here, so that a crash comes between them.

A state of the vTPM is known as the newest one, as one that a command has made old, or as one of
another vTPM's lineage: a state that is old stays so, and nothing asks how old it is. So the guest
may execute any number of commands.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from vtpmd.migration import destination, events, source
from vtpmd.migration.destination import Destination
from vtpmd.migration.source import Source
from vtpmd.migration.states import BEFORE_BASE, GIVEN_AWAY, WITH_BASE, ImpossibleEvent, State
from vtpmd.store.owner import Outcome, OwnerRecord, OwnerRecordError, Record, Session, Whose
from vtpmd.wire import peer

SESSION: Final = b"s" * peer.SESSION_BYTES
THIRD: Final = b"t" * peer.SESSION_BYTES  # another host's, of another vTPM
LINEAGE: Final = b"l" * peer.LINEAGE_BYTES
EARLIER: Final = b"r" * peer.SESSION_BYTES  # by which the vTPM once went the other way
HELLO: Final = peer.Hello(peer.VERSION, peer.VERSION_MINIMUM, SESSION, b"u" * 16, LINEAGE, 2, 0, 0)
ROUND: Final = events.Round(1, 1, 1, 0)
DIGESTS: Final = (b"p", b"v")  # of the state that the tail was made of
UP, BROKEN = 1, 2  # an end of the link; 0: none
NOTHING, OLD, NEWEST, FOREIGN = -1, 0, 1, 2  # what a place holds of the vTPM


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
    worked: bool = False  # a command ran since the tail was made
    qemu: str = "run"
    resumed: bool = False  # QEMU's word that the guest runs is under way
    withdraws: bool = False
    asks: bool = False


class DestinationHost(NamedTuple):
    """The destination, likewise."""

    record: Tagged
    up: bool = True
    state: State | None = State.WELCOMING
    session: bytes = SESSION  # that it is in: the source's, or another host's
    todo: tuple[Tagged, ...] = ()
    # tpm2-00.incoming: none, staged, granted, written (granted, and its own file is newer)
    file: str = "none"
    file_of: bytes = SESSION
    staged: int = NOTHING  # the state in it
    own: int = NOTHING  # the state in the vTPM's own file
    engine: str = "off"  # off, held, active, fenced
    value: int = NOTHING  # of the engine
    served: bool = False
    qemu: str = "wait"
    settles: bool = False  # for a canary: settling that is not part of the session


class World(NamedTuple):
    """All of it. The faults that are left are not part of it: more of them only add to it."""

    s: SourceHost
    d: DestinationHost
    s_link: int = UP
    d_link: int = UP
    to_d: tuple[Tagged, ...] = ()
    to_s: tuple[Tagged, ...] = ()
    question: Tagged | None = None  # over a connection of its own
    answer: Tagged | None = None
    asked: bool = False  # the destination speaks over that connection
    tail: int = NOTHING
    rounds: int = 2  # how many more may find that something has changed
    stops: int = 2  # how often QEMU may still stop the guest at the source

    def source(self, **changes: Any) -> World:
        """Return the world with another source."""
        return self._replace(s=self.s._replace(**changes))

    def destination(self, **changes: Any) -> World:
        """Return the world with another destination."""
        return self._replace(d=self.d._replace(**changes))


class _Nowhere:
    """A disk that takes everything; the record is part of the world."""

    def read(self, name: str, bytes_max: int) -> bytes | None:
        raise AssertionError((name, bytes_max))

    def replace(self, name: str, content: bytes) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def overwrite(self, name: str, offset: int, content: bytes) -> None:
        pass

    def keep_open(self, name: str) -> None:
        pass

    def forget(self, name: str) -> None:
        pass


class Project:
    """The project's own code, which is asked each question once in a search.

    ``rows`` are the rows of the sessions' TABLE that it was asked for, ``without`` the repairs that
    the model leaves out.
    """

    def __init__(self, without: frozenset[str] = frozenset()) -> None:
        self.without = without
        self.rows: set[tuple[State, type]] = set()
        self._steps: dict[Any, tuple[State, tuple[Tagged, ...]] | None] = {}
        self._transitions: dict[Any, Tagged] = {}

    def transition(self, record: Tagged, name: str, *arguments: Any) -> Tagged:
        """Return a record after one of OwnerRecord's transitions; as it was, if that is refused."""
        key = (record, name, arguments)
        found = self._transitions.get(key)
        if found is None:
            found = self._transitions[key] = tag(_transition(record.value, name, *arguments))
        return found

    def source(self, state: State, event: source.Event) -> tuple[State, tuple[Tagged, ...]] | None:
        """Return what a source's session becomes by an event, and does; None: it is impossible."""
        key = ("source", state, tag(event))
        if key not in self._steps:
            self._steps[key] = self._step(source_machine(state), event)
        return self._steps[key]

    def destination(
        self, state: State, session: bytes, event: destination.Event
    ) -> tuple[State, tuple[Tagged, ...]] | None:
        """Likewise, a destination's."""
        key = (session, state, tag(event))
        if key not in self._steps:
            self._steps[key] = self._step(destination_machine(state, session), event)
        return self._steps[key]

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


def _transition(record: Record, name: str, *arguments: Any) -> Record:
    owner = OwnerRecord(_Nowhere(), _Nowhere(), now=lambda: "then")
    owner._record = record
    try:
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
    machine.final_digests = DIGESTS
    machine.peer_following = peer.Following.NOT_ASKED_FOR
    return machine


OWN: Final = destination.Own(None, b"u" * 16, None, 2, 0, 0, peer.Following.NOT_ASKED_FOR)
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
    machine._commit = peer.Commit(*ROUND)
    return machine


def began(project: Project, *, came_from_there: bool) -> World:
    """Return the world in which the source is about to connect.

    ``came_from_there``: the destination had the vTPM before, and has given it away.
    """
    sent = project.transition(tag(Record()), "reserve", SESSION, "b:1", 0)
    theirs, own = Record(), NOTHING
    if came_from_there:
        line = Session(EARLIER.hex(), Outcome.SENT, "a:1", "then")
        theirs, own = Record(Whose.MOVED, EARLIER.hex(), sessions=(line,)), OLD
    return World(SourceHost(sent), DestinationHost(tag(theirs), own=own))


def source_takes(project: Project, world: World, event: source.Event) -> World | None:
    """Have the source's session take an event, if that is possible now; its actions are to do."""
    if world.s.state is None:
        return None
    taken = project.source(world.s.state, event)
    if taken is None:
        return None
    return world.source(state=taken[0], todo=(*taken[1], *world.s.todo))


def destination_takes(project: Project, world: World, event: destination.Event) -> World | None:
    """Likewise, the destination's."""
    if world.d.state is None:
        return None
    taken = project.destination(world.d.state, world.d.session, event)
    if taken is None:
        return None
    return world.destination(state=taken[0], todo=(*taken[1], *world.d.todo))


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


def source_can(world: World) -> bool:
    """Return whether the source would execute a command."""
    host = world.s
    return host.up and host.on and not host.fenced and host.qemu == "run"


def destination_can(world: World) -> bool:
    """Return whether the destination would."""
    return world.d.up and world.d.qemu == "run" and world.d.engine == "active"


def may_serve(record: Tagged) -> bool:
    """Return whether a start from this record serves without asking."""
    return bool(record.value.whose is Whose.OURS)


def executed(world: World, *, at_source: bool) -> World:
    """A guest's command makes a newer state: what was the newest is old everywhere else."""

    def old(value: int) -> int:
        return OLD if value == NEWEST else value

    s, d = world.s, world.d
    s = s._replace(value=NEWEST if at_source else old(s.value), worked=at_source or s.worked)
    d = d._replace(own=old(d.own), staged=old(d.staged), value=old(d.value))
    if not at_source:
        # Durable in its own file, which is newer from then on than what was granted.
        file = "written" if d.file == "granted" else d.file
        d = d._replace(own=NEWEST, value=NEWEST, served=True, file=file)
    return world._replace(s=s, d=d, tail=old(world.tail))


_BEFORE_FREEZE: Final = (*BEFORE_BASE, *WITH_BASE, State.FREEZING)


def forget(world: World) -> World:
    """Forget what nothing will ever ask for again, so that worlds are equal that behave equally.

    Each line says of something that no move reads it before it is written anew.
    """
    s, d = world.s, world.d
    if not s.up:
        # A start makes all of it anew, from record and state.
        s = SourceHost(s.record, up=False, state=None, on=False, value=s.value, qemu="dead")
    elif s.worked and s.state not in (State.FREEZING, State.FROZEN, State.RETIRING):
        s = s._replace(worked=False)  # only retiring asks, and making the tail resets it
    if s.state not in GIVEN_AWAY:
        s = s._replace(asks=False) if s.asks else s
        world = world._replace(answer=None) if world.answer is not None else world
    if (world.stops or world.rounds) and s.state not in _BEFORE_FREEZE:
        world = world._replace(stops=0, rounds=0)  # no tail is made any more
    if s.withdraws and s.record.value.whose is not Whose.OFFERED:
        # Nothing to withdraw. If an offer comes before that is found out: a stop, a resume and a
        # stop lead there, too.
        s = s._replace(withdraws=False)
    if d.file == "none" and (d.staged != NOTHING or d.file_of != SESSION):
        d = d._replace(staged=NOTHING, file_of=SESSION)
    if d.engine in ("off", "fenced") and (d.value != NOTHING or d.served):
        d = d._replace(value=NOTHING, served=False)
    if d.state in (None, State.ENDED):
        if d.session != SESSION:
            d = d._replace(session=SESSION)
        if d.qemu in ("tail", "init"):
            d = d._replace(qemu="dead")  # its INIT will be refused, and nobody waits for it
    if world.tail != NOTHING and d.qemu != "wait" and not d.todo:
        world = world._replace(tail=NOTHING)  # a QEMU takes one stream
    return world._replace(s=s, d=d)
