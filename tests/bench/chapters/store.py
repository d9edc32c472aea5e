"""Chapter: what the store and the delta record cost, on what a TPM really does to its state.

vtpmd's engine makes the images: a TPM with forty NV indices of 2 KB works, and its state is taken
before and after each change. A C program (`store.c`) then times the core on each pair, in a process
of its own that stays on one core.
"""

import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench import programs
from tests.bench.emulators import ROOT, VTPMD, BenchError, cores, running
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution
from tests.support import tpm2
from tests.support.emulator_client import Blob, ControlClient
from vtpmd.wire.swtpm_format import decode_blob

NAME = "store"
SUMMARY = "capture, collect, encode and apply on real state: µs, and the sizes of delta records"

SOURCES = ("crc32c.c", "delta.c", "digest.c", "image_digest.c", "pages.c")
INDICES = 40
INDEX_BYTES = 2048  # the most that libtpms allows
FIRST_INDEX = tpm2.Handle.NV_FIRST + 0x50_0000
COUNTER = FIRST_INDEX + INDICES
PCR = 10
TIMEOUT_S = 300
REMOVAL_SHARE_MAX = 0.02
ENCODE_LIMIT_US = 1000.0

STORE_OPERATIONS = {
    "capture_unchanged": "capture, unchanged",
    "capture_changed": "capture, changed",
    "collect": "collect the changed pages",
    "read": "read the image",
}
DELTA_OPERATIONS = {
    "encode": "encode",
    "encode_base_digest_known": "base digest known",
    "apply": "apply",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that a guest has its TPM do, and the record that it may make at most."""

    name: str
    blob: Blob
    make: Callable[[tpm2.Tpm], object]
    record_bytes_max: int | None = None  # None: a share of the image, REMOVAL_SHARE_MAX


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the C program measured of one change."""

    change: Change
    image_bytes: int
    record_bytes: int
    changed_bytes: int
    ns: dict[str, list[int]]

    def microseconds(self, operation: str) -> Distribution:
        """Describe the times of an operation."""
        return Distribution.of([ns / 1000 for ns in self.ns[operation]])

    @property
    def record_bytes_max(self) -> float:
        """How large the record may be."""
        limit = self.change.record_bytes_max
        return self.image_bytes * REMOVAL_SHARE_MAX if limit is None else limit


CHANGES = (
    Change(
        name="NV_Write, 8 B",
        blob=Blob.PERMANENT,
        make=lambda tpm: tpm.nv_write(FIRST_INDEX + INDICES // 2, b"8 bytes!"),
        record_bytes_max=200,
    ),
    Change(
        name="NV_Increment",
        blob=Blob.PERMANENT,
        make=lambda tpm: tpm.nv_increment(COUNTER),
        record_bytes_max=160,
    ),
    Change(
        name="PCR_Extend",
        blob=Blob.VOLATILE,
        make=lambda tpm: tpm.extend(PCR, bytes(range(32))),
        record_bytes_max=400,
    ),
    Change(
        name="NV_UndefineSpace",
        blob=Blob.PERMANENT,
        make=lambda tpm: tpm.execute(tpm2.nv_undefine(FIRST_INDEX)),
    ),
)


def fill(tpm: tpm2.Tpm) -> None:
    """Give a TPM forty full NV indices and a counter; the content is the same in each run."""
    content = random.Random(1)
    tpm.startup()
    for number in range(INDICES):
        tpm.nv_define(FIRST_INDEX + number, INDEX_BYTES)
        tpm.nv_write(FIRST_INDEX + number, content.randbytes(INDEX_BYTES))
    tpm.nv_define(COUNTER, 8, tpm2.NV_COUNTER)
    tpm.nv_increment(COUNTER)


def make_images(directory: Path) -> None:
    """Let vtpmd's engine make every change; write the state before and after into files."""
    with running(VTPMD, directory) as started:
        started.connect().close()
        with ControlClient(started.control) as control:
            data = control.attach_data()
            control.init()
            tpm = tpm2.Tpm(data.transact)
            fill(tpm)
            for number, change in enumerate(CHANGES):
                for name in ("base", "next"):
                    if name == "next":
                        change.make(tpm)
                    state = decode_blob(control.get_state_blob(change.blob))
                    (directory / f"{number}-{name}").write_bytes(state)


def measure(program: Path, directory: Path, number: int, rounds: int) -> Measured:
    """Time the core on one change; BenchError when the program fails."""
    change = CHANGES[number]
    images = [str(directory / f"{number}-{name}") for name in ("base", "next")]
    numbers = [str(rounds), str(int(change.blob))]
    command = ["taskset", "--cpu-list", str(cores()[0]), str(program), *numbers, *images]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise BenchError(f"{change.name}: {done.stderr.strip()}")
    return Measured(change=change, **json.loads(done.stdout))


def figures(measured: Measured, operation: str) -> str:
    """Show p50 and p99 of an operation in microseconds."""
    times = measured.microseconds(operation)
    return f"{times.p50:.1f} {times.p99:6.1f}"


def store_table(all_measured: list[Measured]) -> Table:
    """Lay out what the store costs."""
    rows = [
        [
            measured.change.name,
            f"{measured.image_bytes}",
            f"{measured.changed_bytes}",
            *(figures(measured, operation) for operation in STORE_OPERATIONS),
        ]
        for measured in all_measured
    ]
    names = [f"{name.replace(', ', chr(10))}\np50    p99" for name in STORE_OPERATIONS.values()]
    columns = ["µs", "image\nbytes", "in changed\npages", *names]
    return Table(title="the store", columns=columns, rows=rows)


def delta_table(all_measured: list[Measured]) -> Table:
    """Lay out what delta records cost."""
    rows = [
        [
            measured.change.name,
            f"{measured.record_bytes}",
            *(figures(measured, operation) for operation in DELTA_OPERATIONS),
        ]
        for measured in all_measured
    ]
    columns = ["µs", "record\nbytes"]
    columns += [f"{name}\np50    p99" for name in DELTA_OPERATIONS.values()]
    note = "with the digests of both images; base digest known: as when records follow each other"
    return Table(title="delta records", columns=columns, rows=rows, note=note)


def targets(all_measured: list[Measured]) -> list[Target]:
    """Hold sizes, and the time to encode a removal, against what a migration counts on."""
    sizes = [
        Target(
            what=f"{measured.change.name}: record",
            unit="B",
            measured=measured.record_bytes,
            limit=measured.record_bytes_max,
        )
        for measured in all_measured
    ]
    removal = all_measured[-1]
    return [
        *sizes,
        Target(
            what=f"{removal.change.name}: encode, p99",
            unit="µs",
            measured=removal.microseconds("encode").p99,
            limit=ENCODE_LIMIT_US,
        ),
    ]


def to_json(measured: Measured) -> dict[str, object]:
    """Return everything that was measured of a change in JSON's types."""
    return {
        "change": measured.change.name,
        "image_bytes": measured.image_bytes,
        "changed_bytes": measured.changed_bytes,
        "record_bytes": measured.record_bytes,
        "us": {operation: measured.microseconds(operation).to_json() for operation in measured.ns},
    }


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    program = programs.build("store", ROOT / "build/bench", core=SOURCES)
    make_images(settings.scratch)
    rounds = 200 if settings.quick else 2000
    all_measured = [
        measure(program, settings.scratch, number, rounds) for number in range(len(CHANGES))
    ]
    return Result(
        tables=[store_table(all_measured), delta_table(all_measured)],
        targets=targets(all_measured),
        data={"changes": [to_json(measured) for measured in all_measured]},
    )
