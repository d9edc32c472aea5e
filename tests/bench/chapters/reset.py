"""Chapter: what a guest's reset costs, for which QEMU holds its main loop.

The emulators take turns at what QEMU sends then, each for a guest that has used its TPM and said no
TPM2_Shutdown. What is measured ends with the answer to INIT; the guest's TPM2_Startup, which comes
after it and is its own wait, is in the table.
"""

import socket
import struct
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.bench.emulators import EMULATORS, SWTPM, VTPMD, BenchError, Emulator, running
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution
from tests.support import tpm2
from tests.support.emulator_client import Control, ControlClient

NAME = "reset"
SUMMARY = "a guest's reset: how long QEMU's main loop waits, and the TPM2_Startup after it"

RESETS = 300
RATIO_LIMIT = 2.0
BUFFER_BYTES = 4096  # what QEMU's TIS asks for
PCR = 10  # where Linux measures files
DIGEST = bytes(range(32))


class Step(StrEnum):
    """What QEMU sends, in this order, and then the guest."""

    STOP = "STOP"
    BUFFER_SIZE = "SET_BUFFERSIZE"
    INIT = "INIT"
    STARTUP = "TPM2_Startup"


HELD = (Step.STOP, Step.BUFFER_SIZE, Step.INIT)  # while these are answered QEMU does nothing else
REQUESTS = {
    Step.STOP: struct.pack(">I", Control.STOP),
    Step.BUFFER_SIZE: struct.pack(">II", Control.SET_BUFFERSIZE, BUFFER_BYTES),
    Step.INIT: struct.pack(">II", Control.INIT, 0),
}

Times = dict[Step, float]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An emulator whose guest is reset."""

    control: socket.socket
    tpm: tpm2.Tpm

    def request(self, step: Step) -> None:
        """Send a command and have its answer, which is short; BenchError unless it succeeds."""
        self.control.sendall(REQUESTS[step])
        result = int.from_bytes(self.control.recv(BUFFER_BYTES)[:4], "big")
        if result != 0:
            raise BenchError(f"{step} got the result {result:#x}")

    def reset(self) -> Times:
        """Reset the guest, and return the microseconds of each step."""
        times: Times = {}
        before_ns = time.perf_counter_ns()
        for step in Step:
            if step is Step.STARTUP:
                self.tpm.startup()
            else:
                self.request(step)
            now_ns = time.perf_counter_ns()
            times[step] = (now_ns - before_ns) / 1000
            before_ns = now_ns
        self.tpm.extend(PCR, DIGEST)
        return times


def power_on(emulator: Emulator, directory: Path, stack: ExitStack) -> Subject:
    """Start an emulator, and its TPM, until the stack is left."""
    started = stack.enter_context(running(emulator, directory))
    started.connect().close()
    control = stack.enter_context(ControlClient(started.control))
    data = control.attach_data()
    control.init()
    tpm = tpm2.Tpm(data.transact)
    tpm.startup()
    for sock in (control.socket, data.socket):
        sock.setblocking(True)  # a time limit costs a poll() for each call
    return Subject(control=control.socket, tpm=tpm)


def held(times: list[Times]) -> Distribution:
    """Describe how long QEMU's main loop waited, in microseconds."""
    return Distribution.of([sum(each[step] for step in HELD) for each in times])


def table(measured: dict[str, list[Times]]) -> Table:
    """Lay out the steps, and what QEMU waits for in all."""
    rows = []
    for step in Step:
        each = [Distribution.of([times[step] for times in measured[name]]) for name in measured]
        rows.append([step, *(f"{one.p50:.0f} {one.p99:6.0f}" for one in each)])
    in_all = [held(times) for times in measured.values()]
    rows.append(["QEMU waits", *(f"{one.p50:.0f} {one.p99:6.0f}" for one in in_all)])
    columns = ["µs", *(f"{name}\np50    p99" for name in measured)]
    note = "QEMU waits: all but TPM2_Startup. swtpm syncs nothing, and sends no TPM2_Shutdown"
    return Table(title="a guest's reset", columns=columns, rows=rows, note=note)


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    count = RESETS // 10 if settings.quick else RESETS
    with ExitStack() as stack:
        subjects = {
            each.name: power_on(each, settings.scratch / each.name, stack) for each in EMULATORS
        }
        measured: dict[str, list[Times]] = {name: [] for name in subjects}
        for _ in range(count):
            for name, subject in subjects.items():
                measured[name].append(subject.reset())
    ratio = held(measured[VTPMD.name]).p50 / held(measured[SWTPM.name]).p50
    what = "QEMU waits for a reset: vtpmd / swtpm, p50"
    return Result(
        tables=[table(measured)],
        targets=[Target(what=what, unit="", measured=ratio, limit=RATIO_LIMIT)],
        data={
            "resets_us": {
                name: {
                    step: Distribution.of([each[step] for each in times]).to_json() for step in Step
                }
                for name, times in measured.items()
            }
        },
    )
