"""What may go wrong while a vTPM moves from host a to host b, and at which step.

Steps are what can be seen from outside; the link has a delay, so that each lasts long enough for a
fault to strike in it. A step that is added here is in the tests' tables.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from tests.harness.testbed import Host, Testbed
from tests.harness.wire import Conditions, Side
from vtpmd.testing.emulator import Emulator

# There and back takes longer than it takes to see a step and to strike.
CONDITIONS = Conditions(delay_us=25_000)
STEP_TIMEOUT_S = 30.0
POLL_S = 0.001


class Progress:
    """How far a hand-over from host a to host b has come, as it is seen from outside."""

    def __init__(self, testbed: Testbed) -> None:
        """Begin to look; what the logs say already does not count."""
        self._testbed = testbed
        self._before = {
            host.side: len(host.vtpmd.program.output) for host in (testbed.a, testbed.b)
        }

    def source_answers(self, control: str) -> int:
        """How often host a's vtpmd has answered a command of its QEMU's."""
        return self._answers(self._testbed.a, control)

    def destination_answers(self, control: str) -> int:
        """How often host b's vtpmd has answered a command of its QEMU's."""
        return self._answers(self._testbed.b, control)

    def wait_for(self, step: "Step") -> None:
        """Wait until a step has come; TimeoutError when it does not."""
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while not step.has_come(self):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the step {step.name} has not come; state: {self.state}")
            time.sleep(POLL_S)

    @property
    def rounds(self) -> int:
        """How many rounds host a has sent in its session; the first is the base."""
        return int(self._testbed.a.manage.migration()["rounds-sent"])

    @property
    def state(self) -> str:
        """What host a says of its session."""
        return str(self._testbed.a.manage.migration()["state"])

    @property
    def is_granted(self) -> bool:
        """Whether host a has granted; or more is known already."""
        return self.state == "granted" or self.outcome is not None

    @property
    def outcome(self) -> str | None:
        """What became of the session, as host a says."""
        outcome: str | None = self._testbed.a.manage.migration()["outcome"]
        return outcome

    def _answers(self, host: Host, control: str) -> int:
        log = host.vtpmd.program.output[self._before[host.side] :]
        return log.count(f"{control}: result ")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a hand-over, and how it is seen that it has come."""

    name: str
    has_come: Callable[[Progress], bool]


STEPS = (
    Step(name="armed", has_come=lambda _: True),
    Step(name="round", has_come=lambda progress: progress.rounds > 1),
    Step(name="frozen", has_come=lambda progress: progress.source_answers("GET_STATEBLOB") > 0),
    Step(
        name="tail-set", has_come=lambda progress: progress.destination_answers("SET_STATEBLOB") > 0
    ),
    Step(name="granted", has_come=lambda progress: progress.is_granted),
    Step(name="started", has_come=lambda progress: progress.destination_answers("INIT") > 0),
    Step(name="handed-over", has_come=lambda progress: progress.outcome == "handed-over"),
)

ARMED = STEPS[0]


class LinkFault(Enum):
    """What happens to the link between strike() and restore()."""

    CUT = "cut"
    DROP_TO_A = "drop-to-a"
    DROP_TO_B = "drop-to-b"

    def strike(self, testbed: Testbed) -> None:
        """Let it happen."""
        match self:
            case LinkFault.CUT:
                testbed.wire.cut()
            case LinkFault.DROP_TO_A:
                testbed.wire.drop(Side.A)
            case LinkFault.DROP_TO_B:
                testbed.wire.drop(Side.B)


@contextmanager
def hanging(emulator: Emulator) -> Iterator[None]:
    """Have a vtpmd do nothing while the block runs; its engine serves on."""
    os.kill(emulator.program.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(emulator.program.pid, signal.SIGCONT)
