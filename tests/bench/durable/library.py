"""What a commit takes beside libtpms alone, an append and a sync: what nobody can do without.

libtpms alone is `TPMLIB_Process` in a process that has the same state and keeps in memory what it
stores, so without a socket. A commit of vtpmd's and the append are measured on the same kind of
socket, in turns: each side of the comparison has one round trip on it.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.bench import programs
from tests.bench.chapters.round_trip import Measured, Operation
from tests.bench.durable.subjects import APPEND, OURS, Size
from tests.bench.emulators import BenchError
from tests.bench.report import Table, Target
from tests.bench.stats import Distribution
from vtpmd.wire.swtpm_format import decode_file

LIBRARY = "library"
SAMPLES = 2000
SAMPLES_QUICK = 200
TIMEOUT_S = 60
RATIO_MAX = 1.2


def measure(directory: Path, state_file: Path, operation: Operation, samples: int) -> Distribution:
    """Time libtpms alone on a copy of a state in the clear, in nanoseconds; BenchError on failure.

    The copy is made in `directory`.
    """
    program = programs.build(LIBRARY, programs.BUILD, libraries=["tpms"])
    state = directory / "library-state"
    state.write_bytes(decode_file(state_file.read_bytes()))
    commands = [command.hex() for command in operation.commands + (operation.others or [])]
    done = subprocess.run(
        [program, state, str(samples), *commands],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"{operation.name}: {done.stderr.strip()}")
    return Distribution.of(json.loads(done.stdout))


def ratio(library: Distribution, timed: Measured, ours: str) -> float:
    """How the median commit compares with the medians of what it is made of."""
    return timed.of(ours).p50 / (library.p50 + timed.of(APPEND).p50)


def row(size: Size, library: Distribution, timed: Measured) -> list[str]:
    """Lay out one operation at one size of the state."""
    append = timed.of(APPEND)
    parts = [f"{each.p50 / 1000:.1f} {each.p99 / 1000:6.1f}" for each in (library, append)]
    cells = [f"{size}: {timed.operation.name}", *parts]
    cells.append(f"{(library.p50 + append.p50) / 1000:.1f}")
    for ours in OURS:
        times = timed.of(ours.name)
        cells.append(f"{times.p50 / 1000:.1f} {times.p99 / 1000:6.1f}")
        cells.append(f"{ratio(library, timed, ours.name):.2f}")
    return cells


def table(rows: list[list[str]]) -> Table:
    """Lay out all of them."""
    columns = ["µs", "libtpms alone\np50    p99", "append\np50    p99", "sum\np50"]
    for ours in OURS:
        columns += [f"{ours.name}\np50    p99", "ratio\np50"]
    note = "append: of a sector, and fdatasync, for a command on a socket; ratio: to the sum"
    return Table(title="commits and what they are made of", columns=columns, rows=rows, note=note)


def targets(size: Size, library: Distribution, timed: Measured) -> Sequence[Target]:
    """Hold the median commit against the sum."""
    return [
        Target(
            what=f"{size}: {timed.operation.name}: {ours.name} / (libtpms alone + append), p50",
            unit="",
            measured=ratio(library, timed, ours.name),
            limit=RATIO_MAX,
        )
        for ours in OURS
    ]
