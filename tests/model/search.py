"""Search the model breadth first, and say what it finds, by the shortest way to each kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from tests.model.moves import faults, moves
from tests.model.world import World, began, destination_can, source_can


class Found(NamedTuple):
    """What a search has found: kinds of fault, each with the shortest way to it."""

    states: int
    two: list[str]
    lost: list[str]
    stuck: list[str]

    @property
    def nothing(self) -> bool:
        """True if the vTPM has one owner, whatever happens."""
        return not (self.two or self.lost or self.stuck)


def search(n_faults: int, without: Iterable[str] = ()) -> Found:
    """Search all that can happen with so many faults; ``without`` names repairs left out."""
    left_out = frozenset(without)
    start = began()._replace(faults=n_faults)
    parents: dict[World, tuple[World, str] | None] = {start: None}
    edges: dict[World, list[World]] = {}
    two: list[str] = []
    lost: list[str] = []
    queue = deque([start])
    while queue:
        world = queue.popleft()
        _judge(world, parents, two, lost)
        usual = list(moves(world, left_out))
        edges[world] = [following for _, following in usual]
        for label, following in (*usual, *faults(world, left_out)):
            if following not in parents:
                parents[following] = (world, label)
                queue.append(following)
    return Found(len(parents), two, lost, _stuck(edges, parents))


def _judge(
    world: World,
    parents: dict[World, tuple[World, str] | None],
    two: list[str],
    lost: list[str],
) -> None:
    source, destination = source_can(world), destination_can(world)
    if source and destination and len(two) < KINDS_MAX:
        two.append(way(parents, world))
    stale = (source and world.s.value != world.last) or (
        destination and world.d.value != world.last
    )
    if stale and len(lost) < KINDS_MAX:
        lost.append(way(parents, world))


# Enough to work with; the shortest come first.
KINDS_MAX = 5


def _stuck(
    edges: dict[World, list[World]], parents: dict[World, tuple[World, str] | None]
) -> list[str]:
    """Return ways to worlds from which, without more faults, nobody will ever serve."""
    back: dict[World, list[World]] = {}
    for world, following in edges.items():
        for each in following:
            back.setdefault(each, []).append(world)
    alive = {world for world in edges if _serves(world)}
    queue = deque(alive)
    while queue:
        for world in back.get(queue.popleft(), ()):
            if world not in alive:
                alive.add(world)
                queue.append(world)
    found = [world for world in parents if world not in alive and _is_held(world)]
    return [way(parents, world) for world in found[:KINDS_MAX]]


def _serves(world: World) -> bool:
    return (source_can(world) and world.s.value == world.last) or (
        destination_can(world) and world.d.value == world.last
    )


def _is_held(world: World) -> bool:
    """Return whether the newest state is on a disk somewhere: then somebody must get to serve."""
    return world.last in (world.s.value, world.d.own) or (
        world.d.file == "granted" and world.d.staged == world.last
    )


def way(parents: dict[World, tuple[World, str] | None], world: World) -> str:
    """Return how a world is come to."""
    labels = []
    while (step := parents[world]) is not None:
        world, label = step
        labels.append(label)
    return " · ".join(reversed(labels))
