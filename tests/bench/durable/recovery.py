"""How long a start takes on what a crash has left: a journal that is full, beside one that is not.

The journals are made by a vtpmd that is killed. A full one comes of folds that fail: there is a
directory in the place of their temporary file.
"""

import shutil
import signal
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice
from pathlib import Path
from random import Random

from tests.bench.chapters.start_up import Event, time_start
from tests.bench.durable.subjects import OPERATIONS, OURS, Size, prepare
from tests.bench.emulators import BenchError, Emulator
from tests.bench.report import Settings, Table, Target
from tests.bench.stats import Distribution
from tests.harness.killing import Processes, Victims, wait_until_unused
from tests.support.emulator_client import ControlClient, DataSocket
from tests.support.tpm2 import ReturnCode, Tpm, parse_response
from vtpmd.testing.program import Program

FOLDED_INTO = "TMP2-00.permall"
COMMITS_MAX = 10_000  # many times what fits
RECOVERY_MS_MAX = 50.0
STARTS = 20
STARTS_QUICK = 2


class Left(StrEnum):
    """What a start finds, at 85 KB of state."""

    CHECKPOINT = "a checkpoint"  # after a stop in order
    ONE_COMMIT = "a journal of one commit"
    FULL = "a full journal"


@dataclass(frozen=True, kw_only=True)
class Starts:
    """How long starts took, in milliseconds until the first TPM response."""

    emulator: Emulator
    times_ms: dict[Left, list[float]]
    commits: int  # in the full journal

    def of(self, left: Left) -> Distribution:
        """Describe the starts on something."""
        return Distribution.of(self.times_ms[left])

    @property
    def recovery_ms(self) -> float:
        """How much longer the median start is with a full journal than with next to nothing."""
        return self.of(Left.FULL).p50 - self.of(Left.ONE_COMMIT).p50

    def to_json(self) -> dict[str, object]:
        """Return everything that was measured in JSON's types."""
        return {
            "emulator": self.emulator.name,
            "commits": self.commits,
            "starts_ms": {left: self.of(left).to_json() for left in self.times_ms},
        }


def leave(emulator: Emulator, directory: Path, left: Left) -> int:
    """Make the state directory that a start is to find; return the commits of its last run."""
    prepare(emulator, directory, Size.MEDIUM)
    if left is Left.CHECKPOINT:
        return 0
    state, control_path = directory / "state", directory / "tpm"
    in_the_way = state / FOLDED_INTO
    program = Program("crashed", emulator.command(state, control_path), directory)
    try:
        program.connect(control_path).close()
        with closing(Processes(program)) as processes, ControlClient(control_path) as control:
            data = control.attach_data()
            control.init()
            Tpm(data.transact).startup()
            if left is Left.FULL:
                in_the_way.mkdir()
            commits = write(data, COMMITS_MAX if left is Left.FULL else 1)
            processes.send(signal.SIGKILL, Victims.BOTH, Random(0))
    finally:
        program.kill()
    wait_until_unused(state)
    if left is Left.FULL:
        in_the_way.rmdir()
        if commits == COMMITS_MAX:
            raise BenchError(f"{emulator.name}: the journal is not full after {commits} commits")
    return commits


def write(data: DataSocket, commits_max: int) -> int:
    """Write 8 bytes, and others, in turn until the TPM refuses; return how often it did not."""
    operation = OPERATIONS[0]
    commands = cycle(operation.commands + (operation.others or []))
    for number, command in enumerate(islice(commands, commits_max)):
        if parse_response(data.transact(command)).return_code != ReturnCode.SUCCESS:
            return number
    return commits_max


def sockets(directory: str, names: list[str]) -> list[str]:
    """Return which of the names are sockets': a vtpmd that was killed leaves them, and no state."""
    return [name for name in names if (Path(directory) / name).is_socket()]


def time_starts(emulator: Emulator, directory: Path, count: int) -> Starts:
    """Start an emulator on copies of what was left, in turn."""
    commits = {left: leave(emulator, directory / left.name, left) for left in Left}
    times_ms: dict[Left, list[float]] = {left: [] for left in Left}
    for number in range(count):
        for left, times in times_ms.items():
            copy = directory / f"{left.name}-{number}"
            shutil.copytree(directory / left.name / "state", copy / "state", ignore=sockets)
            times.append(time_start(emulator, copy)[Event.TPM_READY])
    return Starts(emulator=emulator, times_ms=times_ms, commits=commits[Left.FULL])


def measure(settings: Settings) -> list[Starts]:
    """Measure the starts of vtpmd in all its forms."""
    count = STARTS_QUICK if settings.quick else STARTS
    return [
        time_starts(emulator, settings.scratch / f"recovery {emulator.name}", count)
        for emulator in OURS
    ]


def table(all_starts: list[Starts]) -> Table:
    """Lay out how long starts took."""
    rows = []
    for starts in all_starts:
        for left in starts.times_ms:
            name = f"{starts.emulator.name}: {left}"
            if left is Left.FULL:
                name += f", {starts.commits} commits"
            times = starts.of(left)
            rows.append([name, f"{times.p50:.1f}", f"{times.percentiles[100.0]:.1f}"])
    return Table(
        title=f"start on what a crash left, {Size.MEDIUM} of state",
        columns=["ms to the first TPM response", "p50", "max"],
        rows=rows,
    )


def targets(all_starts: list[Starts]) -> list[Target]:
    """Hold the recovery of a full journal against its limit."""
    return [
        Target(
            what=f"{starts.emulator.name}: recovery of a full journal",
            unit="ms",
            measured=starts.recovery_ms,
            limit=RECOVERY_MS_MAX,
        )
        for starts in all_starts
    ]
