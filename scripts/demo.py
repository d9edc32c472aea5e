"""Live-migrate a guest that works its TPM from one vtpmd to another, and show what happened."""

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from scripts.demo_options import parse_arguments
from tests.harness.lab import Lab
from vtpmd.cli import moving_report
from vtpmd.cli.moving import Order, Progress, move
from vtpmd.cli.moving_display import guest_text, stage, vtpm_text
from vtpmd.cli.moving_verdict import Ending, Report
from vtpmd.config import parse_address
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, Peering
from vtpmd.testing.facts import CHANGED_BY_A_CHECK, CHANGED_BY_WORK, Facts, differences
from vtpmd.testing.guest import Machine

EXIT_GOOD = 0
EXIT_BAD = 1
EXIT_INTERRUPTED = 130

# Its guest says how long its commands took.
MACHINE = Machine(memory_mib=512, counts_ticks=False)
LOAD_BEFORE_S = 1.0  # how long the guest works before and after it is moved

# What the debug log says of a control command that succeeded; 0x800 is an empty state blob's.
CONTROL_LOG = re.compile(
    r"(?P<name>[A-Z_]+): result 0x(?:0|800), (?P<answer_bytes>\d+) bytes, (?P<duration_us>\d+) µs"
)
GET_STATEBLOB_HEADER_BYTES = 16  # of an answer: result, flags, total length, length


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the downtime."""

    name: str
    duration_ms: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the guest, vtpmd and QEMU said."""

    before: Facts
    after: Facts
    differences: list[str]
    load: Facts
    move: Report
    stream_bytes: int  # of the vTPM's state in QEMU's stream
    downtime_phases: list[Phase]

    @property
    def is_good(self) -> bool:
        """Whether all went as it should."""
        return not self.differences and self.move.ending is Ending.TAIL

    def as_json(self) -> dict[str, object]:
        """Return it as what JSON can say."""
        return {
            "good": self.is_good,
            "differences": self.differences,
            "before": self.before,
            "after": self.after,
            "load": self.load,
            "move": moving_report.as_json(self.move),
            "stream-bytes": self.stream_bytes,
            "downtime-phases-ms": {phase.name: phase.duration_ms for phase in self.downtime_phases},
        }


class MoveFailedError(Exception):
    """The guest did not move."""


class Display:
    """Show stages as they happen: bars on a terminal, one line each elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._step = ""
        self._progress = Bars(
            TextColumn("{task.description:<38}"),
            BarColumn(bar_width=8),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show progress while the block runs."""
        with self._progress:
            yield

    @contextmanager
    def stage(self, description: str) -> Iterator[TaskID]:
        """Show a stage while the block runs, without an end to come nearer to."""
        self._line(description)
        task = self._progress.add_task(description, total=None, detail="")
        yield task
        self._progress.update(task, total=1, completed=1)

    def moved(self, task: TaskID, progress: Progress) -> None:
        """Show how far a move is; lines only where there is something new to say."""
        vtpm, guest = f"vTPM: {vtpm_text(progress)}", f"guest: {guest_text(progress)}"
        self._progress.update(task, detail=f"{vtpm}\n{guest}")
        if stage(progress) != self._step:
            self._line(f"  {vtpm}; {guest}")
        self._step = stage(progress)

    def warn(self, text: str) -> None:
        """Show a warning, which stays."""
        self._console.print(f"warning: {text}", markup=False)

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{time.monotonic() - self._start:6.2f} s  {text}")


def main() -> int:
    """Run the demonstration; return the exit status."""
    options = parse_arguments()
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    display = Display(console)
    with Lab() as lab:
        try:
            with display.running():
                outcome = demonstrate(lab, display)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except Exception as error:
            print_failure(lab, error)
            return EXIT_BAD
    if options.json:
        print(json.dumps(outcome.as_json(), indent=2))
    else:
        print_outcome(console, outcome)
    return EXIT_GOOD if outcome.is_good else EXIT_BAD


def demonstrate(lab: Lab, display: Display) -> Outcome:
    """Boot, set up, work, migrate, check; return the outcome."""
    with display.stage("make certificates, start two vtpmd and QEMU"):
        first = lab.peer(Peering(credentials=credentials(), listens=False, follows_qemu=True))
        second = lab.peer()
        monitor = lab.directory / "monitor"
        source = lab.guest(first, MACHINE, ("-qmp", f"unix:{monitor},server=on,wait=off"))
    with display.stage("boot the guest"):
        source.wait_for_workload()
    with display.stage("let it fill its TPM"):
        source.command("setup")
        source.command("work 100")
    with display.stage("let it check everything"):
        before = source.check()
    with display.stage("start another QEMU, and load on the TPM"):
        destination = lab.guest(second, MACHINE, migration.INCOMING)
        migration.set_capabilities(source)
        migration.set_capabilities(destination)
        uri = migration.listen_tcp(destination)
        source.command("start")
        time.sleep(LOAD_BEFORE_S)
    with display.stage("live-migrate") as task:
        to = parse_address(second.address)
        order = Order(manage=first.manage_path, to=to, qmp=monitor, uri=uri)
        report = asyncio.run(
            move(order, lambda progress: display.moved(task, progress), display.warn)
        )
        if report.ending not in (Ending.TAIL, Ending.WHOLE_BLOBS):
            raise MoveFailedError(moving_report.heading(report))
        migration.wait_until(destination, "running")
    with display.stage("go on working at the destination"):
        time.sleep(LOAD_BEFORE_S)
        load = destination.command("stop")
    with display.stage("let it check everything again"):
        after = destination.check()
    return Outcome(
        before=before,
        after=after,
        differences=differences(before, after, worked=True),
        load=load,
        move=report,
        stream_bytes=stream_bytes(first),
        downtime_phases=downtime_phases(first, second, report),
    )


def downtime_phases(source: Emulator, destination: Emulator, report: Report) -> list[Phase]:
    """Split QEMU's downtime into what it waited for each daemon, by their logs, and the rest."""
    vtpm = [
        Phase(name=name, duration_ms=sum(duration_ms for duration_ms, _ in commands))
        for name, commands in {
            "vTPM state taken from the source": control_commands(source, "GET_STATEBLOB"),
            "vTPM state set at the destination": control_commands(destination, "SET_STATEBLOB"),
            "vTPM started at the destination": control_commands(destination, "INIT"),
        }.items()
    ]
    assert report.guest is not None and report.guest.downtime_ms is not None
    rest_ms = report.guest.downtime_ms - sum(phase.duration_ms for phase in vtpm)
    return [*vtpm, Phase(name="guest memory, devices, QEMU", duration_ms=rest_ms)]


def stream_bytes(source: Emulator) -> int:
    """Sum up the state that a daemon gave to QEMU, in bytes."""
    return sum(
        answer_bytes - GET_STATEBLOB_HEADER_BYTES
        for _, answer_bytes in control_commands(source, "GET_STATEBLOB")
    )


def control_commands(emulator: Emulator, command: str) -> list[tuple[float, int]]:
    """Return the duration in ms and the answer's bytes of each such command in a daemon's log."""
    return [
        (int(match["duration_us"]) / 1000, int(match["answer_bytes"]))
        for match in CONTROL_LOG.finditer(emulator.program.output)
        if match["name"] == command
    ]


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Print what was checked, what moved, how long it took, and the verdict."""
    console.print(facts_table(outcome), "", sep="\n")
    console.print(moving_report.text(outcome.move), "", markup=False, sep="\n")
    console.print(downtime_table(outcome), "", sep="\n")
    for line in outcome.differences:
        console.print(f"DIFFERENT  {line}")
    if not outcome.differences:
        console.print("The guest saw no difference.")


def facts_table(outcome: Outcome) -> Table:
    """Make the table of what the guest found before and after."""
    table = Table("what the guest checked", "before", "after", "must be")
    for name in outcome.before:
        if name in CHANGED_BY_WORK:
            rule = "its own model"
        elif name in CHANGED_BY_A_CHECK:
            rule = "valid" if name == "signature" else "later"
        else:
            rule = "the same"
        table.add_row(name, shorten(outcome.before[name]), shorten(outcome.after[name]), rule)
    return table


def shorten(value: str) -> str:
    """Cut a long hexadecimal value to its ends."""
    return value if len(value) <= 20 else f"{value[:8]}…{value[-8:]}"


def downtime_table(outcome: Outcome) -> Table:
    """Make the table of what QEMU got and waited for, and of what the guest noticed."""
    guest = outcome.move.guest
    assert guest is not None
    table = Table("what QEMU and the guest saw", "")
    table.columns[1].justify = "right"
    table.add_row("vTPM state in QEMU's stream", f"{outcome.stream_bytes:,} bytes")
    table.add_row("downtime", f"{guest.downtime_ms} ms")
    for phase in outcome.downtime_phases:
        table.add_row(f"  {phase.name}", f"{phase.duration_ms:.3f} ms")
    table.add_row("TPM operations around it", outcome.load["operations"])
    longest_ms = int(outcome.load["latency_max_us"]) / 1000
    table.add_row("longest TPM command", f"{longest_ms:.1f} ms")
    return table


def print_failure(lab: Lab, error: Exception) -> None:
    """Say on standard error what failed, after what the programs said."""
    for title, text in lab.logs():
        print(f"---- {title}\n{text}", file=sys.stderr)
    print(
        f"demo: {error or type(error).__name__}; what the programs said is above", file=sys.stderr
    )


if __name__ == "__main__":
    sys.exit(main())
