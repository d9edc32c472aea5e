"""Chapter: what a guest's TPM commands wait for because its vTPM is exported.

A client works the TPM in a guest's place: it extends a PCR, which waits for no disk, and counts in
NV, which waits for one. In turn `vtpmd export` is run of the state directory, and of the TPM that
runs, with its volatile state; nothing is exported; and, as the processes before need a processor
themselves, the states are asked for over the management socket alone, as often as they are
answered: that is what the engine's lock costs, at its worst.
"""

import subprocess
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.emulators import ROOT, BenchError
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution
from tests.bench.working import working
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import NV_COUNTER, Tpm

if TYPE_CHECKING:
    from tests.harness.lab import Lab
    from vtpmd.testing.management import Management

NAME = "export"
SUMMARY = "what a guest's TPM commands wait for because its vTPM is exported"

EXPORTS = 60
COUNTER = 0x01500020
PCR = 16
DIGEST = bytes(range(32))
EXPORT_TIMEOUT_S = 60
WAIT_MS_MAX = 1.0


class What(StrEnum):
    """What is timed."""

    EXTEND = "TPM2_PCR_Extend"
    COUNT = "TPM2_NV_Increment"


class When(StrEnum):
    """What is done meanwhile, again and again."""

    ALONE = "nothing is exported"
    PERMANENT = "vtpmd export DIR"
    VOLATILE = "vtpmd export --manage --volatile"
    ASKED = "export-states alone"


Times = dict[What, list[float]]


def export(*options: str | Path) -> None:
    """Export a vTPM as a person does, to nowhere; BenchError unless it succeeds."""
    command = [ROOT / ".venv/bin/vtpmd", "export", *options]
    try:
        ended = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=EXPORT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"vtpmd export took more than {EXPORT_TIMEOUT_S} s") from error
    if ended.returncode != 0:
        raise BenchError(ended.stderr.decode(errors="replace").strip())


def ask_for(management: "Management", duration_s: float) -> None:
    """Ask for the states for so long, as often as they are answered."""
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s:
        management.command("export-states")


def measure_in(lab: "Lab", exports: int) -> dict[When, Times]:
    """Work beside each in turn, so many times, and for as long as the last export took."""
    emulator = lab.peer()
    management = lab.management(emulator)
    found = {when: {what: list[float]() for what in What} for when in When}
    with ControlClient(emulator.control_path) as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        tpm.nv_define(COUNTER, 8, NV_COUNTER)
        tpm.nv_increment(COUNTER)
        actions: dict[What, Callable[[], None]] = {
            What.EXTEND: lambda: tpm.extend(PCR, DIGEST),
            What.COUNT: lambda: tpm.nv_increment(COUNTER),
        }
        for _ in range(exports):
            began_s = time.monotonic()
            with working(actions, found[When.PERMANENT]):
                export(emulator.state)
            took_s = time.monotonic() - began_s
            with working(actions, found[When.VOLATILE]):
                export("--manage", emulator.manage_path, "--volatile")
            with working(actions, found[When.ALONE]):
                time.sleep(took_s)
            with working(actions, found[When.ASKED]):
                ask_for(management, took_s)
    return found


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    from tests.harness.lab import Lab

    exports = EXPORTS // 10 if settings.quick else EXPORTS
    with Lab() as lab:
        times = measure_in(lab, exports)
    found = {when: {what: Distribution.of(times[when][what]) for what in What} for when in When}
    rows = [
        [f"{what}, {when}", *(f"{one:.3f}" for one in (each.p50, each.p99))]
        for when, each_of in found.items()
        for what, each in each_of.items()
    ]
    table = Table(
        title="answers while the vTPM is exported",
        columns=["ms", "p50", "p99"],
        rows=rows,
        note=f"{exports} exports of each kind. What counts in NV waits for the disk, too",
    )
    targets = [
        Target(
            what=f"{what}, {when}: p99 above that beside none",
            unit="ms",
            measured=found[when][what].p99 - found[When.ALONE][what].p99,
            limit=WAIT_MS_MAX,
        )
        for when in When
        if when is not When.ALONE
        for what in What
    ]
    answers = {
        when: {what: each.to_json() for what, each in each_of.items()}
        for when, each_of in found.items()
    }
    return Result(tables=[table], targets=targets, data={"answers_ms": answers})
