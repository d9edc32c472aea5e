"""What an armed session costs the guest while it runs: its command throughput, armed and not.

One vtpmd is armed and disarmed in turn, so that where its pages happen to lie is the same for both.
It shares a core with its client, as the host of a busy guest; the destination, which is another
host, has the other core if there is one. Nobody says when QEMU's passes begin, so that there are as
many rounds as there can be.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.chapters.round_trip import Operation, Placement, build_client
from tests.bench.chapters.round_trip import measure as measure_round_trips
from tests.bench.emulators import ROOT, cores
from tests.bench.moving import load
from tests.bench.moving.pair import Mode, Side, arm, pair
from tests.bench.stats import Distribution
from tests.support import tpm2
from vtpmd.testing.emulator import Emulator

SUBJECT = "vtpmd"
MIX = Operation(
    name="GetRandom and PCR_Extend",
    commands=[tpm2.get_random(32), tpm2.pcr_extend(load.PCRS[0], load.DIGEST)],
    samples_per_round=50_000,  # half a second: five rounds of the session
)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The guest's commands per second, turn by turn, and how many rounds the session made."""

    unarmed: list[float]
    armed: list[float]
    rounds: int

    @property
    def loss_percent(self) -> Distribution:
        """How much less the guest gets done while armed, turn by turn."""
        pairs = zip(self.unarmed, self.armed, strict=True)
        return Distribution.of([100 * (1 - armed / unarmed) for unarmed, armed in pairs])

    def to_json(self) -> dict[str, object]:
        """Return everything that was measured in JSON's types."""
        return {
            "unarmed_per_s": self.unarmed,
            "armed_per_s": self.armed,
            "rounds": self.rounds,
            "loss_percent": self.loss_percent.to_json(),
        }


def measure(state_file: Path, turns: int) -> Throughput:
    """Let a vtpmd be armed and disarmed in turn, and a client send it what it can."""
    client = build_client(ROOT / "build/bench")
    first, last = cores()[0], cores()[-1]
    placement = Placement(name="armed", client_core=first, emulator_core=first)
    unarmed, armed = [], []
    rounds = 0
    with pair(Mode.TAIL, state_file, follows_qemu=False) as (lab, source, destination):
        management = lab.management(source.emulator)
        _stay_on_core(source.emulator, first)
        _stay_on_core(destination.emulator, last)
        for turn in range(turns):
            if turn % 2 == 0:
                unarmed.append(_commands_per_s(client, placement, source))
            arm(management, destination)
            armed.append(_commands_per_s(client, placement, source))
            rounds += len(management.migration()["rounds"])
            management.command("migrate-disarm")
            management.wait_for("VTPM_FALL_BACK")
            if turn % 2 == 1:
                unarmed.append(_commands_per_s(client, placement, source))
    return Throughput(unarmed=unarmed, armed=armed, rounds=rounds)


def _commands_per_s(client: Path, placement: Placement, source: Side) -> float:
    with _blocking(source):
        sockets = {SUBJECT: source.guest.data}
        measured = measure_round_trips(client, MIX, placement, sockets, rounds=1)
    samples = measured.rounds_ns[SUBJECT][0]
    return len(samples) * len(MIX.commands) / (sum(samples) / 1e9)


@contextmanager
def _blocking(source: Side) -> Iterator[None]:
    """Let the C client take the data socket over; it sets its own time limit."""
    socket = source.guest.data.socket
    timeout_s = socket.gettimeout()
    socket.setblocking(True)
    try:
        yield
    finally:
        socket.settimeout(timeout_s)


def _stay_on_core(emulator: Emulator, core: int) -> None:
    """Keep an emulator's processes, and the threads that they have, on a core."""
    for process in (emulator.program.pid, *emulator.engines()):
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
