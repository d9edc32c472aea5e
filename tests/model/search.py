"""Search the model, fewest faults first, and say what it finds, by the shortest way to each kind.

A world is searched once, with as few faults as it can be come to: what follows from it with fewer
faults left follows with more, too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final, NamedTuple

from tests.model.moves import IMPOSSIBLE
from tests.model.space import Space
from tests.model.world import (
    FOREIGN,
    NEWEST,
    Changes,
    DestinationHost,
    Project,
    SourceHost,
    began,
    destination_can,
    source_can,
)
from vtpmd.core.handover import Handover, HandoverEvent
from vtpmd.migration.states import State

# Of a kind: enough to work with; the shortest come first.
WAYS_MAX: Final = 3


class Found(NamedTuple):
    """What a search has found."""

    n_worlds: int
    n_faults: int  # how many the search went up to
    ways: dict[str, list[str]]  # from a kind of fault to ways to it
    rows: frozenset[tuple[State, type]]  # of the sessions' TABLE, that were walked
    engine_rows: frozenset[tuple[Handover, HandoverEvent]]  # and of the engines'

    @property
    def kinds(self) -> set[str]:
        """The kinds of what is wrong; none, if the vTPM has one owner whatever happens."""
        return set(self.ways)


def search(
    n_faults: int,
    without: Iterable[str] = (),
    table: Changes | None = None,
    *,
    came_from_there: tuple[bool, ...] = (False, True),
    until_found: str | None = None,
) -> Found:
    """Search all that can happen with so many faults; ``without`` names repairs left out.

    ``table`` is what the engines' table says otherwise, ``came_from_there`` the kinds of worlds to
    begin with. ``until_found``: search no further than with the fewest faults that show something,
    and then no further than to this kind.
    """
    searching = _Search(Project(frozenset(without), table), came_from_there)
    found = Found(0, 0, {}, frozenset(), frozenset())
    for n in range(n_faults + 1):
        searching.spread(until_found)
        if until_found or n == n_faults:
            found = searching.found(n)
            if found.ways:
                break
        if n < n_faults:
            searching.fail()
    return found


class _Search:
    """Worlds by number, in the order in which they were come to."""

    def __init__(self, project: Project, came_from_there: Iterable[bool]) -> None:
        self.project = project
        self.space = Space(project)
        self.numbers: dict[int, int] = {}  # from a world's number in the space
        self.worlds: list[int] = []
        self.parents = array("i")
        self.labels: list[str] = []
        self.edges_from, self.edges_to = array("i"), array("i")
        self.n_spread = self.n_failed = 0
        self.ways: dict[str, list[str]] = {}
        for each in came_from_there:
            first = began(self.project, came_from_there=each)
            self._come_to(self.space.number(first), -1, "")

    def spread(self, until_found: str | None = None) -> None:
        """Come to all worlds that follow without one more fault, or to one that shows this."""
        while self.n_spread < len(self.worlds) and until_found not in self.ways:
            number, world = self.n_spread, self.worlds[self.n_spread]
            self.n_spread += 1
            for label, after in self.space.following(world):
                self.edges_from.append(number)
                self.edges_to.append(self._come_to(after, number, label))

    def fail(self) -> None:
        """Come to all worlds that one fault leads to."""
        for number in range(self.n_failed, self.n_spread):
            for label, after in self.space.failing(self.worlds[number]):
                self._come_to(after, number, label)
        self.n_failed = self.n_spread

    def _come_to(self, world: int, parent: int, label: str) -> int:
        number = self.numbers.get(world)
        if number is None:
            number = self.numbers[world] = len(self.worlds)
            self.worlds.append(world)
            self.parents.append(parent)
            self.labels.append(label)
            self._judge(*self.space.hosts(world), number)
        if label.endswith(IMPOSSIBLE):  # whatever else leads to that world
            self._note_way("RUDE", f"{self._way(parent)} · {label}")
        return number

    def _judge(self, s: SourceHost, d: DestinationHost, number: int) -> None:
        if d.denied:
            self._note("DENIED", number)
        by_source, by_destination = source_can(s), destination_can(d)
        if not by_source and not by_destination:
            return
        if by_source and by_destination:
            self._note("TWO", number)
        values = {s.value} if by_source else set()
        if by_destination:
            values.add(d.value)
        if FOREIGN in values:
            self._note("FOREIGN", number)
        if values - {NEWEST, FOREIGN}:
            self._note("LOST", number)

    def _note(self, kind: str, number: int) -> None:
        self._note_way(kind, self._way(number))

    def _note_way(self, kind: str, way: str) -> None:
        ways = self.ways.setdefault(kind, [])
        if len(ways) < WAYS_MAX:
            ways.append(way)

    def found(self, n_faults: int) -> Found:
        """Return what was found, and worlds from which nobody will ever serve without a fault."""
        if self.n_spread == len(self.worlds):
            self._note_stuck()
        project = self.project
        rows, engine_rows = frozenset(project.rows), frozenset(project.engine_rows)
        return Found(len(self.worlds), n_faults, self.ways, rows, engine_rows)

    def _note_stuck(self) -> None:
        alive = bytearray(_serves(*self.space.hosts(world)) for world in self.worlds)
        changed = True
        edges = list(zip(self.edges_from, self.edges_to, strict=True))
        # Most edges lead to later worlds: few passes are needed, the last edges first.
        edges.reverse()
        while changed:
            changed = False
            for before, after in edges:
                if alive[after] and not alive[before]:
                    alive[before] = changed = True
        for number, world in enumerate(self.worlds):
            if not alive[number] and _is_held(*self.space.hosts(world)):
                self._note("STUCK", number)

    def _way(self, number: int) -> str:
        """Return how a world is come to."""
        labels = []
        while self.parents[number] >= 0:
            labels.append(self.labels[number])
            number = self.parents[number]
        return " · ".join(reversed(labels))


def _serves(s: SourceHost, d: DestinationHost) -> bool:
    return (source_can(s) and s.value == NEWEST) or (destination_can(d) and d.value == NEWEST)


def _is_held(s: SourceHost, d: DestinationHost) -> bool:
    """Return whether the newest state is on a disk somewhere: then somebody must get to serve."""
    return NEWEST in (s.value, d.own) or (d.file == "granted" and d.staged == NEWEST)
