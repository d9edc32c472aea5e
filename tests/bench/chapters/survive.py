"""Chapter: how late a guest's TPM answers while its vtpmd is killed and attached again.

A client works the TPM in a guest's place: it extends a PCR, which waits for no disk, and counts in
NV, which waits for one. First with a vtpmd that is left alone, for as long as it then takes to kill
it with SIGKILL, and to attach another one, many times.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution
from tests.bench.working import working
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import NV_COUNTER, Tpm

if TYPE_CHECKING:
    from vtpmd.testing.emulator import Emulator

NAME = "survive"
SUMMARY = "how late a TPM answers while its vtpmd is killed and attached again"

KILLS = 100
COUNTER = 0x01500020
PCR = 16
DIGEST = bytes(range(32))
LATE_MS_MAX = 50.0


class What(StrEnum):
    """What is timed."""

    EXTEND = "TPM2_PCR_Extend"
    COUNT = "TPM2_NV_Increment"
    CONTROL = "LOCK_STORAGE, which asks vtpmd"


class When(StrEnum):
    """Whether anything happens to vtpmd meanwhile."""

    LEFT_ALONE = "vtpmd is left alone"
    KILLED = "vtpmd is killed, and attached again"


Times = dict[What, list[float]]


class Client:
    """Works a TPM in a guest's place, and QEMU's, and keeps the ms that each answer took."""

    def __init__(self, control: ControlClient) -> None:
        self._control = control
        self._tpm = Tpm(control.attach_data().transact)
        control.init()
        self._tpm.startup()
        self._tpm.nv_define(COUNTER, 8, NV_COUNTER)
        self._tpm.nv_increment(COUNTER)

    @contextmanager
    def working(self) -> Iterator[Times]:
        """Work while the block runs, on a thread."""
        actions: dict[What, Callable[[], object]] = {
            What.EXTEND: lambda: self._tpm.extend(PCR, DIGEST),
            What.COUNT: lambda: self._tpm.nv_increment(COUNTER),
            What.CONTROL: self._control.lock_storage,
        }
        times = {what: list[float]() for what in What}
        with working(actions, times):
            yield times


def disturb(emulator: "Emulator", kills: int) -> float:
    """Kill vtpmd so many times, and attach another one; return the seconds that took."""
    began_s = time.monotonic()
    for _ in range(kills):
        emulator.program.kill()
        emulator.attach()
    return time.monotonic() - began_s


def measure(kills: int) -> dict[When, Times]:
    """Work beside kills, and beside none for as long as one kill takes, times their number."""
    from tests.harness.lab import Lab

    with Lab() as lab:
        emulator = lab.daemon()
        with ControlClient(emulator.control_path) as control:
            client = Client(control)
            took_s = disturb(emulator, 1)
            with client.working() as undisturbed:
                time.sleep(took_s * kills)
            with client.working() as disturbed:
                disturb(emulator, kills)
        emulator.stop()
    return {When.LEFT_ALONE: undisturbed, When.KILLED: disturbed}


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    kills = KILLS // 10 if settings.quick else KILLS
    found = {
        when: {what: Distribution.of(ms) for what, ms in times.items()}
        for when, times in measure(kills).items()
    }
    rows = [
        [f"{what}, {when}", *(f"{one:.2f}" for one in (each.p50, each.p99, each.percentiles[100]))]
        for when, each_of in found.items()
        for what, each in each_of.items()
    ]
    note = f"vtpmd is killed {kills} times. What counts in NV waits for the disk, killed or not"
    latest_ms = max(found[When.KILLED][what].percentiles[100] for what in What)
    return Result(
        tables=[
            Table(
                title="answers while vtpmd dies",
                columns=["ms", "p50", "p99", "latest"],
                rows=rows,
                note=note,
            )
        ],
        targets=[
            Target(
                what=f"latest answer beside {kills} kills of vtpmd",
                unit="ms",
                measured=latest_ms,
                limit=LATE_MS_MAX,
            )
        ],
        data={
            "answers_ms": {
                when: {what: each.to_json() for what, each in each_of.items()}
                for when, each_of in found.items()
            }
        },
    )
