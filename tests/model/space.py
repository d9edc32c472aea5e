"""Worlds by number, and what follows from each, asked of each half of a world once.

Most worlds are the same few hundred hosts, and the same few things between them, in other
combinations. What one side may do depends on itself and on what is between, and changes nothing
else: so it is found out in a world without the other side, once, and holds for whatever is there.
That it is so, need not be believed: who reads or changes the side that is left out, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Final, Generic, NamedTuple, TypeVar

from tests.model import faults, moves
from tests.model.actions import destination_goes_on, source_goes_on
from tests.model.moves import Move
from tests.model.world import (
    DestinationHost,
    DestinationSeen,
    Project,
    SourceHost,
    SourceSeen,
    World,
    between_after_command,
    destination_after_command,
    destination_can,
    forget_at_destination,
    forget_at_source,
    forget_between,
    source_after_command,
    source_can,
)
from vtpmd.migration.states import State

# A world is the numbers of its source, its destination and what is between, in one.
BITS: Final = 20
MASK: Final = (1 << BITS) - 1
NOBODY: Final[Any] = None

T = TypeVar("T", bound=Hashable)
Following = Iterator[tuple[str, int]]
# A label, the host after it, what is seen of that, and what is between: each in its place.
Step = tuple[str, int, int, int]
Asked = Callable[[Project, World], Iterable[Move]]


class Memo(dict[int, T]):
    """What a function makes of a number, asked once."""

    def __init__(self, make: Callable[[int], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: int) -> T:
        value = self[key] = self._make(key)
        return value


class Numbers(Generic[T]):
    """Values, and a number for each."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self.values: list[T] = []

    def of(self, value: T) -> int:
        """Return the number of a value."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            assert number <= MASK
            self.values.append(value)
        return number


class SourceFacts(NamedTuple):
    """What a search asks of each source that it comes to."""

    # In its place in a world's number: what is left without what nothing will ask for.
    forgotten: int
    seen: int  # of that
    is_busy: bool
    is_idle: bool
    is_writing: bool
    is_opening: bool
    can: bool


class DestinationFacts(NamedTuple):
    """Likewise, of each destination."""

    forgotten: int
    seen: int
    is_busy: bool
    is_idle: bool
    can: bool


class Space:
    """The worlds of a project, and what follows from them."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.sources = Numbers[SourceHost]()
        self.destinations = Numbers[DestinationHost]()
        self.betweens = Numbers[tuple[Any, ...]]()
        self.source_facts = Memo(self._source_facts)
        self.destination_facts = Memo(self._destination_facts)
        self._sources_seen = Numbers[SourceSeen]()
        self._destinations_seen = Numbers[DestinationSeen]()
        self._between = Memo(self._forget_between)
        self._after_command = {
            at_source: self._command(at_source=at_source) for at_source in (True, False)
        }
        self._between_after = Memo(self._between_after_command)
        self.source_steps = self._of_source(moves.source_steps)
        self.source_moves = self._of_source(moves.source_moves)
        self.source_faults = self._of_source(faults.source_faults)
        self.source_late = self._of_source(faults.source_is_late)
        self.destination_steps = self._of_destination(moves.destination_steps)
        self.destination_moves = self._of_destination(moves.destination_moves)
        self.destination_faults = self._of_destination(faults.destination_faults)
        self.destination_disk = self._of_destination(faults.destination_disk)
        self.destination_late = self._of_destination(faults.destination_is_late)
        self.cuts = Memo(self._cuts)

    def number(self, world: World) -> int:
        """Return the number of a world."""
        s, d = self.sources.of(world.s), self.destinations.of(world.d)
        return (s << BITS | d) << BITS | self.betweens.of(world[2:])

    def hosts(self, number: int) -> tuple[SourceHost, DestinationHost]:
        """Return the two hosts of a world."""
        s, d = number >> 2 * BITS, number >> BITS & MASK
        return self.sources.values[s], self.destinations.values[d]

    def _world(self, s: SourceHost, d: DestinationHost, between: int) -> World:
        return World(s, d, *self.betweens.values[between])

    # Each side by itself.

    def _of_source(self, asked: Asked) -> Memo[tuple[Step, ...]]:
        def ask(half: int) -> tuple[Step, ...]:
            world = self._world(self.sources.values[half >> BITS], NOBODY, half & MASK)
            assert source_goes_on(self.project, world) is world
            return tuple(map(self._source_step, asked(self.project, world)))

        return Memo(ask)

    def _source_step(self, move: Move) -> Step:
        label, after = move
        after = source_goes_on(self.project, after)
        assert after.d is NOBODY
        facts = self.source_facts[self.sources.of(after.s)]
        return label, facts.forgotten, facts.seen, self.betweens.of(after[2:])

    def _of_destination(self, asked: Asked) -> Memo[tuple[Step, ...]]:
        def ask(half: int) -> tuple[Step, ...]:
            world = self._world(NOBODY, self.destinations.values[half >> BITS], half & MASK)
            assert destination_goes_on(self.project, world) is world
            return tuple(map(self._destination_step, asked(self.project, world)))

        return Memo(ask)

    def _destination_step(self, move: Move) -> Step:
        label, after = move
        after = destination_goes_on(self.project, after)
        assert after.s is NOBODY
        facts = self.destination_facts[self.destinations.of(after.d)]
        return label, facts.forgotten, facts.seen, self.betweens.of(after[2:])

    def _cuts(self, between: int) -> tuple[tuple[str, int], ...]:
        cuts = faults.cuts(self._world(NOBODY, NOBODY, between))
        return tuple((label, self.betweens.of(after[2:])) for label, after in cuts)

    def _source_facts(self, number: int) -> SourceFacts:
        host = self.sources.values[number]
        left = forget_at_source(host)
        seen = SourceSeen(left.state, left.engine)
        return SourceFacts(
            forgotten=self.sources.of(left) << 2 * BITS,
            seen=self._sources_seen.of(seen) << 2 * BITS,
            is_busy=moves.is_source_busy(host),
            is_idle=not host.todo,
            is_writing=faults.is_source_writing(host),
            is_opening=host.state is State.OPENING,
            can=source_can(host),
        )

    def _destination_facts(self, number: int) -> DestinationFacts:
        host = self.destinations.values[number]
        left = forget_at_destination(host)
        seen = DestinationSeen(left.state, left.engine, left.qemu, bool(left.todo))
        return DestinationFacts(
            forgotten=self.destinations.of(left) << BITS,
            seen=self._destinations_seen.of(seen) << BITS,
            is_busy=moves.is_destination_busy(host),
            is_idle=not host.todo,
            can=destination_can(host),
        )

    # Both.

    def _after(self, s: int, d: int, between: int) -> int:
        """Return the number of a world that has forgotten what nothing will ask for."""
        s_facts, d_facts = self.source_facts[s], self.destination_facts[d]
        between = self._between[s_facts.seen | d_facts.seen | between]
        return s_facts.forgotten | d_facts.forgotten | between

    def _forget_between(self, number: int) -> int:
        s = self._sources_seen.values[number >> 2 * BITS]
        d = self._destinations_seen.values[number >> BITS & MASK]
        world = forget_between(self._world(NOBODY, NOBODY, number & MASK), s, d)
        return self.betweens.of(world[2:])

    def following(self, number: int) -> Following:
        """Yield the worlds that a world becomes without a fault, each with how."""
        s, d, between = number >> 2 * BITS, number >> BITS & MASK, number & MASK
        s_facts, d_facts = self.source_facts[s], self.destination_facts[d]
        s_half, d_half = s << BITS | between, d << BITS | between
        yield from self._with_destination(self.source_steps[s_half], d_facts)
        if s_facts.is_busy:
            return
        yield from self._with_source(self.destination_steps[d_half], s_facts)
        if d_facts.is_busy:
            return
        yield from self._with_destination(self.source_moves[s_half], d_facts)
        yield from self._with_source(self.destination_moves[d_half], s_facts)
        if s_facts.is_opening:
            yield from self._together(moves.lane_opens, number)
        if s_facts.can:
            yield "source executes a command", self._executed(s, d, between, at_source=True)
        if d_facts.can:
            yield "destination executes a command", self._executed(s, d, between, at_source=False)

    def failing(self, number: int) -> Following:
        """Yield the worlds that one fault makes of a world, each with which."""
        s, d, between = number >> 2 * BITS, number >> BITS & MASK, number & MASK
        s_facts, d_facts = self.source_facts[s], self.destination_facts[d]
        s_half, d_half = s << BITS | between, d << BITS | between
        for label, between_after in self.cuts[between]:
            yield label, self._after(s, d, between_after)
        yield from self._with_destination(self.source_faults[s_half], d_facts)
        yield from self._with_source(self.destination_faults[d_half], s_facts)
        if not s_facts.is_writing:
            yield from self._with_source(self.destination_disk[d_half], s_facts)
        if s_facts.is_idle and d_facts.is_idle:
            yield from self._with_destination(self.source_late[s_half], d_facts)
            yield from self._with_source(self.destination_late[d_half], s_facts)

    def _with_destination(self, steps: tuple[Step, ...], d: DestinationFacts) -> Following:
        """Yield what the source's steps make of the world with a destination."""
        for label, s, s_seen, between in steps:
            yield label, s | d.forgotten | self._between[s_seen | d.seen | between]

    def _with_source(self, steps: tuple[Step, ...], s: SourceFacts) -> Following:
        for label, d, d_seen, between in steps:
            yield label, s.forgotten | d | self._between[s.seen | d_seen | between]

    def _together(self, asked: Asked, number: int) -> Following:
        for label, after in asked(self.project, self._world(*self.hosts(number), number & MASK)):
            gone_on = destination_goes_on(self.project, source_goes_on(self.project, after))
            s, d = self.sources.of(gone_on.s), self.destinations.of(gone_on.d)
            yield label, self._after(s, d, self.betweens.of(gone_on[2:]))

    def _executed(self, s: int, d: int, between: int, *, at_source: bool) -> int:
        source_after, destination_after = self._after_command[at_source]
        return self._after(source_after[s], destination_after[d], self._between_after[between])

    def _command(self, *, at_source: bool) -> tuple[Memo[int], Memo[int]]:
        def source_after(s: int) -> int:
            after = source_after_command(self.sources.values[s], is_its=at_source)
            return self.sources.of(after)

        def destination_after(d: int) -> int:
            after = destination_after_command(self.destinations.values[d], is_its=not at_source)
            return self.destinations.of(after)

        return Memo(source_after), Memo(destination_after)

    def _between_after_command(self, between: int) -> int:
        return self.betweens.of(between_after_command(self._world(NOBODY, NOBODY, between))[2:])
