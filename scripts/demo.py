"""Live-migrate a guest that works its TPM from one vtpmd to another, and show what happened."""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.harness import migration
from tests.harness.emulator import Emulator, EmulatorKind
from tests.harness.facts import CHANGED_BY_A_CHECK, CHANGED_BY_WORK, Facts, differences
from tests.harness.guest import Machine
from tests.harness.lab import Lab
from tests.harness.migration import MigrationReport

EXIT_SAME = 0
EXIT_DIFFERENT = 1
EXIT_INTERRUPTED = 130

EPILOG = """\
The guest creates sealed data, keys, NV indices and a session in its TPM, goes on using it while it
is moved, and checks everything before and after. Takes well under a minute; needs no privileges
but, the first time, root for scripts/setup.

example:
  scripts/demo
  scripts/demo --json >result.json     progress goes to standard error

exit status:
  0  the guest saw no difference
  1  it did, or the migration failed
  2  the command line was wrong
"""

MACHINE = Machine(memory_mib=512)
LOAD_BEFORE_S = 1.0  # how long the guest works before and after it is moved
MIB = 1 << 20

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
    """What the guest and QEMU said."""

    before: Facts
    after: Facts
    differences: list[str]
    load: Facts
    migration: MigrationReport
    vtpm_bytes: int
    downtime_phases: list[Phase]


class Display:
    """Show stages as they happen: bars on a terminal, one line each elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._step = ""
        self._progress = Progress(
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

    def moved(self, task: TaskID, status: str, ram: dict[str, int]) -> None:
        """Show how far a migration is; lines only where there is something new to say."""
        done_bytes = ram["transferred"]
        step = f"{status}, pass {ram['dirty-sync-count']}"
        detail = f"pass {ram['dirty-sync-count']}, {done_bytes / MIB:.1f} MiB"
        total_bytes = done_bytes + ram["remaining"]
        self._progress.update(task, completed=done_bytes, total=total_bytes, detail=detail)
        if step != self._step:
            self._line(f"  {step}, {done_bytes / MIB:.1f} MiB of RAM moved")
        self._step = step

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
            return EXIT_DIFFERENT
    if options.json:
        print(json.dumps({"same": not outcome.differences} | asdict(outcome), indent=2))
    else:
        print_outcome(console, outcome)
    return EXIT_DIFFERENT if outcome.differences else EXIT_SAME


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with status 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Live-migrate a QEMU guest with a vTPM from one vtpmd to another.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    return parser.parse_args()


def demonstrate(lab: Lab, display: Display) -> Outcome:
    """Boot, set up, work, migrate, check; return the outcome."""
    with display.stage("start two vtpmd, and QEMU"):
        first, second = (lab.emulator(EmulatorKind.VTPMD) for _ in range(2))
        source = lab.guest(first, MACHINE)
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
        report = migration.migrate(
            source, destination, uri, lambda status, ram: display.moved(task, status, ram)
        )
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
        migration=report,
        vtpm_bytes=vtpm_bytes(first),
        downtime_phases=downtime_phases(first, second, report),
    )


def downtime_phases(
    source: Emulator, destination: Emulator, report: MigrationReport
) -> list[Phase]:
    """Split the downtime into what the vTPM took, by the daemons' logs, and the rest."""
    vtpm = [
        Phase(name=name, duration_ms=sum(duration_ms for duration_ms, _ in commands))
        for name, commands in {
            "vTPM state taken from the source": control_commands(source, "GET_STATEBLOB"),
            "vTPM state set at the destination": control_commands(destination, "SET_STATEBLOB"),
            "vTPM started at the destination": control_commands(destination, "INIT"),
        }.items()
    ]
    rest_ms = report.downtime_ms - sum(phase.duration_ms for phase in vtpm)
    return [*vtpm, Phase(name="guest memory, devices, QEMU", duration_ms=rest_ms)]


def vtpm_bytes(source: Emulator) -> int:
    """Sum up the state blobs that a daemon gave to QEMU, in bytes."""
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
    console.print(facts_table(outcome), "", numbers_table(outcome), "", sep="\n")
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


def numbers_table(outcome: Outcome) -> Table:
    """Make the table of what moved and how long it took."""
    report = outcome.migration
    table = Table("migration", "")
    table.columns[1].justify = "right"
    table.add_row("guest RAM moved", f"{report.ram_bytes:,} bytes")
    table.add_row("vTPM state moved", f"{outcome.vtpm_bytes:,} bytes")
    table.add_row("total time", f"{report.total_ms} ms")
    table.add_row("downtime", f"{report.downtime_ms} ms")
    for phase in outcome.downtime_phases:
        table.add_row(f"  {phase.name}", f"{phase.duration_ms:.3f} ms")
    table.add_row("TPM operations around it", outcome.load["operations"])
    table.add_row("longest TPM command", f"{int(outcome.load['latency_max_us']) / 1000:.1f} ms")
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
