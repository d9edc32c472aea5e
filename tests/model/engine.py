"""What the two engines do by themselves in the model, as csrc/engine/blackout.c does it.

What follows from what is csrc/engine/handover.c's own table. Beside the states that it has there is
the lane, which is cut apart from the stream, and the news: what vtpmd is told, and takes later than
it was told.
"""

from __future__ import annotations

from typing import Literal

from tests.model.world import BROKEN, FOREIGN, UP, DestinationHost, Project, SourceHost, World
from vtpmd.core.handover import HandoverAction, HandoverEvent

Side = Literal["s", "d"]


def engine_takes(project: Project, world: World, side: Side, event: HandoverEvent) -> World | None:
    """Have a host's engine take an event; None: it is not possible."""
    step = project.handover(_host(world, side).engine, event)
    if step is None:
        return None
    world = _with(world, side, engine=step.state)
    if HandoverAction.SEND_TAKE in step.actions:
        world = _says(world, side, _take_of(project, world))
    if HandoverAction.SEND_GRANT in step.actions:
        world = _says(world, side, HandoverEvent.GRANT)
    if HandoverAction.SEND_END in step.actions:
        world = _says(world, side, HandoverEvent.END)
    if HandoverAction.CLOSE in step.actions:
        world = close_lane(world, side)
    if HandoverAction.TELL in step.actions:
        world = tell(world, side, step.state.name)
    if HandoverAction.RETIRE in step.actions:
        world = _retires(project, world)
    return world


def engine_may(project: Project, world: World, side: Side, event: HandoverEvent) -> bool:
    """Return whether its table has an event now."""
    return project.handover(_host(world, side).engine, event) is not None


def tell(world: World, side: Side, news: str) -> World:
    """The engine tells its vtpmd, which is told in order."""
    return _with(world, side, news=(*_host(world, side).news, news))


def _host(world: World, side: Side) -> SourceHost | DestinationHost:
    return world.s if side == "s" else world.d


def _with(world: World, side: Side, **changes: object) -> World:
    return world.source(**changes) if side == "s" else world.destination(**changes)


def _take_of(project: Project, world: World) -> HandoverEvent:
    """What a Take is to the source: the digests in it are those of what the TPM started from."""
    is_other = world.d.value == FOREIGN and "digests" not in project.without
    return HandoverEvent.TAKE_OTHER if is_other else HandoverEvent.TAKE


def _retires(project: Project, world: World) -> World:
    """tpm_retire(): refused if a command ran since the tail was made, or the TPM is off."""
    has_worked = world.s.worked and "worked" not in project.without
    if has_worked or not world.s.on:
        taken = engine_takes(project, world, "s", HandoverEvent.NOT_RETIRED)
    else:
        retired = world.source(fenced="retire" not in project.without)
        taken = engine_takes(project, retired, "s", HandoverEvent.RETIRED)
    assert taken is not None
    return taken


# The lane. Each end is up, broken, or closed; who closed it reads no more.


def open_lane(world: World) -> World:
    """Both engines have a connection between them."""
    return world._replace(s_lane=UP, d_lane=UP, lane_to_s=(), lane_to_d=())


def close_lane(world: World, side: Side) -> World:
    """An end is closed; what it has said arrives."""
    if side == "s":
        return world._replace(s_lane=0, lane_to_s=(), d_lane=world.d_lane and BROKEN)
    return world._replace(d_lane=0, lane_to_d=(), s_lane=world.s_lane and BROKEN)


def _says(world: World, side: Side, frame: HandoverEvent) -> World:
    if side == "s":
        is_heard = world.s_lane == UP
        return world._replace(lane_to_d=(*world.lane_to_d, frame)) if is_heard else world
    is_heard = world.d_lane == UP
    return world._replace(lane_to_s=(*world.lane_to_s, frame)) if is_heard else world


def hears_lane(project: Project, world: World, side: Side) -> tuple[str, World] | None:
    """Have an engine take what has come over the lane, or that it broke; None: nothing has."""
    coming = world.lane_to_s if side == "s" else world.lane_to_d
    end = world.s_lane if side == "s" else world.d_lane
    event = HandoverEvent.LOST
    if not end or (end == UP and not coming):
        return None
    if coming:
        event, rest = coming[0], coming[1:]
        world = world._replace(lane_to_s=rest) if side == "s" else world._replace(lane_to_d=rest)
    if not engine_may(project, world, side, event):
        event = HandoverEvent.LOST
    taken = engine_takes(project, world, side, event)
    assert taken is not None  # blackout.c: check(step.is_possible)
    return event.name, taken
