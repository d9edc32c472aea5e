"""Run one schedule: all of it follows from its seed."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.sim import schedule
from tests.sim.canaries import Canary
from tests.sim.loop import Livelock
from tests.sim.world import Violation, World, inside


class Outcome(NamedTuple):
    """How a schedule went."""

    seed: int
    violation: str | None
    transcript: list[str]
    steps: int
    executed: int
    exports: int

    def __str__(self) -> str:
        return "\n".join((*self.transcript, f"seed {self.seed}: {self.violation or 'fine'}"))


def simulate(seed: int, canary: Canary | None = None) -> Outcome:
    """Run the schedule of a seed, with one thing taken out if a canary is given."""
    world = World(seed)
    violation: str | None = None
    try:
        with inside(world), pytest.MonkeyPatch.context() as patch:
            try:
                if canary is None:
                    schedule.run(world)
                else:
                    canary.apply(patch)
                    faults, steps = canary.faults, canary.steps
                    schedule.run(world, faults, steps, with_exports=canary.exports)
            finally:
                world.scheduler.close()
    except (Violation, Livelock) as error:
        violation = str(error)
    return Outcome(seed, violation, world.transcript, world.step, world.vm.executed, world.exports)
