"""A world of two hosts that hand one vTPM over, small enough to be searched whole.

Both sides' decisions are the project's own: ``Source``, ``Destination``, their TABLE, and the
transitions of ``OwnerRecord``. What is modelled here is what they act upon: an engine that executes
or does not, a file, QEMU, a link that loses things. An action that is durable in two steps is two
steps here, so that a crash comes between them.

A state of the vTPM is the number of the last command that it has executed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vtpmd.migration import destination, events, source
from vtpmd.migration.destination import Destination
from vtpmd.migration.source import Source
from vtpmd.migration.states import State
from vtpmd.store.owner import OwnerRecord, Record, Whose
from vtpmd.wire import peer

SESSION = b"s" * peer.SESSION_BYTES
HELLO = peer.Hello(2, 2, SESSION, b"u" * 16, 2, 0, 0)
ROUND = events.Round(1, 1, 1, 0)
UP, BROKEN = 1, 2  # an end of the link; 0: none


class Tagged(NamedTuple):
    """A message, an event or an action, with its kind: tuples of two kinds may be equal."""

    kind: str
    value: Any


def tag(value: Any) -> Tagged:
    """Tell a value from those of other kinds."""
    return Tagged(type(value).__name__, value)


class SourceHost(NamedTuple):
    """The source: vtpmd, its engine, its QEMU, its disk."""

    up: bool = True
    state: State | None = State.ARMED  # of the session; None: there is none
    todo: tuple[Tagged, ...] = ()  # actions, and events that they led to
    record: Record = Record()
    on: bool = True
    fenced: bool = False
    value: int = 0
    worked: bool = False  # a command ran since the tail was made
    qemu: str = "run"
    resumed: bool = False  # QEMU's word that the guest runs is under way
    withdraws: bool = False
    asks: bool = False
    kept: bool = False


class DestinationHost(NamedTuple):
    """The destination, likewise."""

    up: bool = True
    state: State | None = State.HOLDING
    todo: tuple[Tagged, ...] = ()
    record: Record = Record()
    file: str = "staged"  # tpm2-00.incoming: none, staged, granted
    staged: int = 0
    own: int = -1  # the state in the vTPM's own file
    engine: str = "off"  # off, held, active, fenced
    value: int = 0  # of the engine
    served: bool = False
    qemu: str = "wait"
    settles: bool = False  # for a canary: settling that is not part of the session


class World(NamedTuple):
    """All of it."""

    s: SourceHost = SourceHost()
    d: DestinationHost = DestinationHost()
    s_link: int = UP
    d_link: int = UP
    to_d: tuple[Tagged, ...] = ()
    to_s: tuple[Tagged, ...] = ()
    question: Tagged | None = None  # over a connection of its own
    answer: Tagged | None = None
    asked: bool = False  # the destination speaks over that connection
    tail: int = -1
    last: int = 0
    commands: int = 2
    stops: int = 2  # how often QEMU may still stop the guest at the source
    faults: int = 0
    loaded: bool = False

    def source(self, **changes: Any) -> World:
        """Return the world with another source."""
        return self._replace(s=self.s._replace(**changes))

    def destination(self, **changes: Any) -> World:
        """Return the world with another destination."""
        return self._replace(d=self.d._replace(**changes))


class _Nowhere:
    """A disk that takes everything; the record is part of the world."""

    def read(self, name: str, bytes_max: int) -> bytes | None:
        raise AssertionError

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


def transition(record: Record, name: str, *arguments: Any) -> Record:
    """Return a record after one of OwnerRecord's transitions. Raises as that does."""
    owner = OwnerRecord(_Nowhere(), _Nowhere(), now=lambda: "then")
    owner._record = record
    getattr(owner, name)(*arguments)
    return owner.read()


def began() -> World:
    """Return the world with a session armed: both records know it."""
    sent = transition(Record(), "reserve", SESSION, "b:1", 0)
    expected = transition(Record(), "expect", SESSION, "a")
    return World().source(record=sent).destination(record=expected)


def source_machine(host: SourceHost) -> Source:
    """Return the session that a source is in."""
    machine = Source(hello=HELLO, key=b"")
    assert host.state is not None
    machine.state = host.state
    machine.round = ROUND
    machine.final_digests = (b"p", b"v")
    machine.peer_following = peer.Following.NOT_ASKED_FOR
    return machine


def destination_machine(host: DestinationHost) -> Destination:
    """Return the session that a destination is in."""
    own = destination.Own(None, b"u" * 16, 2, 0, 0, peer.Following.NOT_ASKED_FOR)
    machine = Destination(own)
    assert host.state is not None
    machine.state = host.state
    machine.session = SESSION
    machine.key = b"k"
    return machine


def source_takes(world: World, event: source.Event) -> World | None:
    """Have the source's session take an event, if that is possible now; its actions are to do."""
    if world.s.state is None:
        return None
    machine = source_machine(world.s)
    if isinstance(event, events.LocalEvent) and not machine.can_take(type(event)):
        return None
    actions = machine.step(event)
    return world.source(state=machine.state, todo=(*map(tag, actions), *world.s.todo))


def destination_takes(world: World, event: destination.Event) -> World | None:
    """Likewise, the destination's."""
    if world.d.state is None:
        return None
    machine = destination_machine(world.d)
    if isinstance(event, events.LocalEvent) and not machine.can_take(type(event)):
        return None
    actions = machine.step(event)
    return world.destination(state=machine.state, todo=(*map(tag, actions), *world.d.todo))


def send_to_d(world: World, message: peer.Message) -> World:
    """The source says something."""
    return world._replace(to_d=(*world.to_d, tag(message))) if world.s_link == UP else world


def send_to_s(world: World, message: peer.Message) -> World:
    """The destination says something, over the connection that is its session's now."""
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


def may_serve(record: Record) -> bool:
    """Return whether a start from this record serves without asking."""
    return record.whose is Whose.OURS
