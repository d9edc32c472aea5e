"""Chapter 2: how long a start takes, what vtpmd's is spent on, and the memory in use afterwards.

All times are from just before the program is started until something was seen from outside, and
all emulators start in turn. Memory is read from /proc while all of them run, so that what they
share counts alike for each.
"""

import socket
import statistics
import struct
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path

from tests.bench.breakdown import Breakdown, measure_breakdown
from tests.bench.emulators import (
    EMULATORS,
    SWTPM,
    VTPMD,
    BenchError,
    Emulator,
    memory_kib,
    running,
)
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution
from tests.support import tpm2
from tests.support.emulator_client import Control, ControlClient, DataSocket, receive_exactly

NAME = "start-up"
SUMMARY = "time until connect, first answer and first TPM response; memory after a small workload"

STARTS = 3.5
MEMORIES = 1.5
IMPORTS_SHOWN = 8
DIGEST = bytes(range(32))
WORKLOAD_REPEATS = 100
NV_INDEX = tpm2.Handle.NV_FIRST + 0x50_0000


class Event(StrEnum):
    """What is waited for after a start, in this order."""

    CONNECTED = "connect() succeeds"
    ANSWERED = "first answer (GET_CAPABILITY)"
    TPM_READY = "first TPM response (Startup)"


class State(StrEnum):
    """What the emulator finds: an empty directory, or the state of a TPM that was stopped."""

    FRESH = "fresh"
    EXISTING = "existing"


Times = dict[Event, float]
Starts = dict[tuple[Emulator, State], list[Times]]


def _request(control: socket.socket, command: Control, body: bytes = b"") -> None:
    control.sendall(struct.pack(">I", command) + body)


def _expect_success(control: socket.socket, command: Control) -> None:
    result = int.from_bytes(receive_exactly(control, 4), "big")
    if result != 0:
        raise BenchError(f"{command.name} got the result {result:#x}")


def power_on(control: socket.socket) -> None:
    """Take a connected emulator as far as its first TPM response, with nothing in between."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(control.gettimeout())
        message = struct.pack(">I", Control.SET_DATAFD)
        socket.send_fds(control, [message], [theirs.fileno()])
        _expect_success(control, Control.SET_DATAFD)
        _request(control, Control.INIT, struct.pack(">I", 0))
        _expect_success(control, Control.INIT)
        tpm2.Tpm(DataSocket(ours).transact).startup()


def time_start(emulator: Emulator, directory: Path) -> Times:
    """Start an emulator once and return the milliseconds from its start to each event."""
    seen: Times = {}
    with running(emulator, directory) as started, started.connect() as control:
        seen[Event.CONNECTED] = started.elapsed_ms()
        _request(control, Control.GET_CAPABILITY)
        receive_exactly(control, 8)
        seen[Event.ANSWERED] = started.elapsed_ms()
        power_on(control)
        seen[Event.TPM_READY] = started.elapsed_ms()
    return seen


def time_starts(scratch: Path, count: int) -> Starts:
    """Start all emulators `count` times in turn, on fresh and on existing state."""
    starts: Starts = {(emulator, state): [] for state in State for emulator in EMULATORS}
    for emulator in EMULATORS:
        time_start(emulator, scratch / emulator.name / State.EXISTING)
    for number in range(count):
        for emulator, state in starts:
            name = f"{state}-{number}" if state is State.FRESH else str(state)
            times = time_start(emulator, scratch / emulator.name / name)
            starts[emulator, state].append(times)
    return starts


def run_workload(data: DataSocket) -> None:
    """Let a TPM do a little of everything that a guest does in its first minutes."""
    tpm = tpm2.Tpm(data.transact)
    tpm.startup()
    tpm.nv_define(NV_INDEX, 1024)
    tpm.nv_write(NV_INDEX, bytes(1024))
    key = tpm.create_primary(tpm2.ecc_signing_template())
    for _ in range(WORKLOAD_REPEATS):
        tpm.random(32)
        tpm.extend(10, DIGEST)
        tpm.pcr(10)
        tpm.nv_read(NV_INDEX, 1024)
        tpm.ecdsa_sign(key, DIGEST)


def measure_memory(directory: Path) -> dict[str, dict[str, int]]:
    """Run the workload on all emulators and return the memory of each by its name, in KiB.

    All of them run, and still hold their connections, while they are looked at: each is one process
    then.
    """
    with ExitStack() as stack:
        pids = {}
        for emulator in EMULATORS:
            started = stack.enter_context(running(emulator, directory / emulator.name))
            started.connect().close()
            control = stack.enter_context(ControlClient(started.control))
            data = control.attach_data()
            control.init()
            run_workload(data)
            pids[emulator.name] = started.process.pid
        return {name: memory_kib(pid) for name, pid in pids.items()}


def times_table(starts: Starts) -> Table:
    """Lay out the times of all starts."""
    rows = []
    for state in State:
        for event in Event:
            row = [f"{state} state: {event}"]
            described = [describe(starts, emulator, state, event) for emulator in EMULATORS]
            row += [f"{figure:.1f}" for each in described for figure in (each.p50, each.p99)]
            swtpm, vtpmd = described
            rows.append([*row, f"{vtpmd.p50 / swtpm.p50:.1f}"])
    columns = ["ms from exec", "swtpm\np50", "\np99", "vtpmd\np50", "\np99", "ratio\np50"]
    count = min(map(len, starts.values()))
    note = f"{count} starts of each kind, so p99 is the slowest"
    return Table(title="start-up", columns=columns, rows=rows, note=note)


def describe(starts: Starts, emulator: Emulator, state: State, event: Event) -> Distribution:
    """Describe the milliseconds to an event over all starts of one kind."""
    return Distribution.of([times[event] for times in starts[emulator, state]])


def memory_table(memory: dict[str, dict[str, int]]) -> Table:
    """Lay out the memory of each process."""
    fields = {"RSS": "Rss", "PSS": "Pss", "private dirty": "Private_Dirty", "locked": "Locked"}
    rows = [
        [name, *(f"{kib[field] / 1024:.2f}" for field in fields.values())]
        for name, kib in memory.items()
    ]
    note = "PSS: pages in use by n processes count 1/n; swtpm and vtpmd share libtpms"
    title = "memory after the workload (medians)"
    return Table(title=title, columns=["MiB", *fields], rows=rows, note=note)


def median_memory(measured: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the median of each figure of each process."""
    return {
        name: {
            field: int(statistics.median(each[name][field] for each in measured)) for field in kib
        }
        for name, kib in measured[0].items()
    }


def breakdown_table(breakdown: Breakdown) -> Table:
    """Lay out what vtpmd's start is spent on."""
    packages = list(breakdown.imports_by_package_ms.items())[:IMPORTS_SHOWN]
    shown_ms = sum(ms for _, ms in packages)
    total_ms = sum(breakdown.imports_by_package_ms.values())
    rows = [
        ["first answer", f"{breakdown.answered_ms:.1f}"],
        ["the interpreter, empty", f"{breakdown.interpreter_ms:.1f}"],
        ["imports", f"{breakdown.imports_ms:.1f}"],
        *([f"    {package}", f"{ms:.1f}"] for package, ms in packages),
        ["    other packages", f"{total_ms - shown_ms:.1f}"],
        ["everything else", f"{breakdown.rest_ms:.1f}"],
        ["the engine is started after", f"{breakdown.engine_started_ms:.1f}"],
        ["the engine's program, loaded and linked", f"{breakdown.engine_load_ms:.1f}"],
    ]
    note = "packages: by -X importtime, which slows them a little"
    return Table(title="what vtpmd's start is spent on", columns=["", "ms"], rows=rows, note=note)


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    count = 5 if settings.quick else 30
    starts = time_starts(settings.scratch / "times", count)
    memory_runs = [
        measure_memory(settings.scratch / f"memory-{number}")
        for number in range(1 if settings.quick else 5)
    ]
    memory = median_memory(memory_runs)
    connected = describe(starts, VTPMD, State.EXISTING, Event.CONNECTED)
    breakdown = measure_breakdown(settings.scratch / "breakdown", count)
    return Result(
        tables=[times_table(starts), breakdown_table(breakdown), memory_table(memory)],
        targets=[
            Target(
                what=f"vtpmd accepts connections: p50, {STARTS} empty interpreters as the limit",
                unit="ms",
                measured=connected.p50,
                limit=STARTS * breakdown.interpreter_ms,
            ),
            Target(
                what=f"private dirty memory, {MEMORIES} of swtpm's as the limit",
                unit="KiB",
                measured=memory[VTPMD.name]["Private_Dirty"],
                limit=int(MEMORIES * memory[SWTPM.name]["Private_Dirty"]),
            ),
        ],
        data={
            "starts_ms": starts_to_json(starts),
            "breakdown_ms": asdict(breakdown),
            "memory_kib": memory_runs,
        },
    )


def starts_to_json(starts: Starts) -> list[dict[str, object]]:
    """Return the times of all starts in JSON's types, in milliseconds."""
    return [
        {
            "emulator": emulator.name,
            "state": state,
            "event": event,
            "times": describe(starts, emulator, state, event).to_json(),
        }
        for emulator, state in starts
        for event in Event
    ]
