"""Chapter 1: from sending a TPM command to having its response.

The emulators are brought up and given the same state over their control channels; a C client then
holds their data sockets and measures them in turn (see `client.c`). Each operation is measured in
two placements, because a wake-up is most of a round trip: client and emulator on one core, where
the emulator's own work shows, and on two cores, where waking an idle core dominates.

The floor is an echo process. On one core it has two speeds, by whether the kernel lets the process
that answered run on until it waits again, or preempts it at once; its p10 is the faster one, and an
emulator may come out below its p50.
"""

import json
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench import programs
from tests.bench.emulators import EMULATORS, ROOT, SWTPM, VTPMD, BenchError, cores, running
from tests.bench.report import Result, Settings, Table, Target
from tests.bench.stats import Distribution, pooled, round_ratios
from tests.support import tpm2
from tests.support.emulator_client import ControlClient, DataSocket

NAME = "round-trip"
SUMMARY = "TPM commands: p50 and p99 of both, their ratio, and the floor of a bare echo process"

ECHO = "echo"
CLIENT_TIMEOUT_S = 300
PCR = 10  # where Linux measures files
SIGNING_KEY = tpm2.Handle.PERSISTENT_FIRST + 1
NV_INDEX = tpm2.Handle.NV_FIRST + 0x50_0000
NV_INDEX_BYTES = 2048  # the most that libtpms allows
CERTIFICATES = 4
CERTIFICATE_BYTES = 1536  # as large as certificates of endorsement keys are
DIGEST = bytes(range(32))
RATIO_LIMIT = 1.0
SITTINGS = 5
ROUNDS_PER_SITTING = 40


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is measured: one sample is all commands, one after the other.

    With `others`, these take turns with the commands: a write that changes nothing is no write.
    """

    name: str
    commands: list[bytes]
    others: list[bytes] | None = None
    samples_per_round: int = 50
    has_target: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """On which cores the client and the emulators stay."""

    name: str
    client_core: int
    emulator_core: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The samples of one operation in one placement: nanoseconds by subject and round."""

    operation: Operation
    placement: Placement
    rounds_ns: dict[str, list[list[float]]]

    def of(self, subject: str) -> Distribution:
        """Describe the samples of a subject."""
        return pooled(self.rounds_ns[subject])

    @property
    def ratio_p50(self) -> float:
        """How vtpmd's median compares with swtpm's."""
        return self.of(VTPMD.name).p50 / self.of(SWTPM.name).p50

    @property
    def ratio_p99(self) -> float:
        """How vtpmd's 99th percentile compares with swtpm's."""
        return self.of(VTPMD.name).p99 / self.of(SWTPM.name).p99

    @property
    def ratios_by_round(self) -> Distribution:
        """The ratios of medians round by round."""
        return round_ratios(self.rounds_ns[VTPMD.name], self.rounds_ns[SWTPM.name])


def operations() -> list[Operation]:
    """Return the operations of the chapter."""
    chunk = tpm2.NV_CHUNK_BYTES_MAX
    nv_read = [tpm2.nv_read(NV_INDEX, chunk, offset) for offset in range(0, NV_INDEX_BYTES, chunk)]
    return [
        Operation(name="GetRandom, 32 B", commands=[tpm2.get_random(32)], has_target=True),
        Operation(name="PCR_Read", commands=[tpm2.pcr_read(PCR)], has_target=True),
        Operation(name="PCR_Extend", commands=[tpm2.pcr_extend(PCR, DIGEST)], has_target=True),
        Operation(name=f"NV_Read, 2 KB in {len(nv_read)}", commands=nv_read),
        Operation(
            name="Sign, P-256",
            commands=[tpm2.ecdsa_sign(SIGNING_KEY, DIGEST)],
            samples_per_round=10,
        ),
    ]


def placements() -> list[Placement]:
    """Return one core and, where there are two, two cores."""
    first, *others = cores()
    placed = [Placement(name="one core", client_core=first, emulator_core=first)]
    if others:
        placed.append(Placement(name="two cores", client_core=others[0], emulator_core=first))
    return placed


def build_client(directory: Path) -> Path:
    """Compile the C client and return its path; BenchError when it does not compile."""
    return programs.build("client", directory)


def prepare(data: DataSocket) -> None:
    """Give the TPM what a guest in use has: certificates, a persistent key, an index in use.

    The key is used once: libtpms writes to NV when a key under dictionary-attack protection is
    first used after a start.
    """
    tpm = tpm2.Tpm(data.transact)
    tpm.startup()
    for number in range(1, CERTIFICATES + 1):
        tpm.nv_define(NV_INDEX + number, CERTIFICATE_BYTES)
        tpm.nv_write(NV_INDEX + number, bytes(CERTIFICATE_BYTES))
    tpm.nv_define(NV_INDEX, NV_INDEX_BYTES)
    tpm.nv_write(NV_INDEX, bytes(NV_INDEX_BYTES))
    transient = tpm.create_primary(tpm2.ecc_signing_template())
    tpm.make_persistent(transient, SIGNING_KEY)
    tpm.flush(transient)
    tpm.ecdsa_sign(SIGNING_KEY, DIGEST)
    data.socket.setblocking(True)  # the C client takes it over and sets its own time limit


def measure(
    client: Path,
    operation: Operation,
    placement: Placement,
    data_sockets: dict[str, DataSocket],
    rounds: int,
) -> Measured:
    """Run the C client over one operation; BenchError with its line when it fails."""
    numbers = (rounds, operation.samples_per_round, placement.client_core, placement.emulator_core)
    lists = [operation.commands, *([operation.others] if operation.others else [])]
    descriptors = {name: data.socket.fileno() for name, data in data_sockets.items()}
    done = subprocess.run(
        [
            client,
            *map(str, numbers),
            "/".join(",".join(command.hex() for command in each) for each in lists),
            *(f"{name}={descriptor}" for name, descriptor in descriptors.items()),
        ],
        pass_fds=tuple(descriptors.values()),
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"{operation.name}: {done.stderr.strip()}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return Measured(
        operation=operation,
        placement=placement,
        rounds_ns={line["subject"]: line["rounds_ns"] for line in lines},
    )


def measure_sitting(
    client: Path, placement: Placement, directory: Path, rounds: int
) -> list[Measured]:
    """Start the emulators on the cores of a placement and measure every operation."""
    with ExitStack() as stack:
        data_sockets = {}
        for emulator in EMULATORS:
            started = stack.enter_context(
                running(emulator, directory / emulator.name, core=placement.emulator_core)
            )
            started.connect().close()
            control = stack.enter_context(ControlClient(started.control))
            data_sockets[emulator.name] = control.attach_data()
            control.init()
            prepare(data_sockets[emulator.name])
        return [
            measure(client, operation, placement, data_sockets, rounds)
            for operation in operations()
        ]


def measure_placement(client: Path, placement: Placement, settings: Settings) -> list[Measured]:
    """Measure every operation in several sittings, and put their rounds together.

    Where a process's pages happen to lie makes a per cent of difference for as long as it runs, so
    each sitting starts the emulators anew.
    """
    rounds = ROUNDS_PER_SITTING // 10 if settings.quick else ROUNDS_PER_SITTING
    place = settings.scratch / placement.name.replace(" ", "-")
    sittings = [
        measure_sitting(client, placement, place / str(number), rounds)
        for number in range(SITTINGS)
    ]
    return [
        Measured(
            operation=parts[0].operation,
            placement=placement,
            rounds_ns={
                subject: [samples for part in parts for samples in part.rounds_ns[subject]]
                for subject in parts[0].rounds_ns
            },
        )
        for parts in zip(*sittings, strict=True)
    ]


def table(placement: Placement, all_measured: list[Measured]) -> Table:
    """Lay out the figures of a placement."""
    rows = []
    for measured in all_measured:
        swtpm, vtpmd = measured.of(SWTPM.name), measured.of(VTPMD.name)
        floor = measured.of(ECHO)
        spread = measured.ratios_by_round.percentiles
        rows.append(
            [
                measured.operation.name,
                f"{floor.percentiles[10.0] / 1000:.1f} {floor.p50 / 1000:6.1f}",
                *(f"{each.p50 / 1000:.1f} {each.p99 / 1000:6.1f}" for each in (swtpm, vtpmd)),
                f"{measured.ratio_p50:.3f}",
                f"{spread[25.0]:.2f}-{spread[75.0]:.2f}",
                f"{measured.ratio_p99:.2f}",
            ]
        )
    columns = ["µs", "floor\np10    p50", "swtpm\np50    p99", "vtpmd\np50    p99"]
    columns += ["ratio\np50", "rounds", "ratio\np99"]
    note = "floor: an echo process; ratio: vtpmd / swtpm; rounds: p50 ratios of the middle half"
    return Table(title=f"round trip, {placement.name}", columns=columns, rows=rows, note=note)


def to_json(measured: Measured) -> dict[str, object]:
    """Return everything that was measured of an operation in JSON's types, in nanoseconds."""
    return {
        "placement": measured.placement.name,
        "operation": measured.operation.name,
        "commands": len(measured.operation.commands),
        "ratio_p50": measured.ratio_p50,
        "ratio_p99": measured.ratio_p99,
        "ratio_p50_by_round": measured.ratios_by_round.to_json(),
        "round_trip_ns": {name: measured.of(name).to_json() for name in measured.rounds_ns},
    }


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    client = build_client(ROOT / "build/bench")
    tables: list[Table] = []
    targets: list[Target] = []
    data: list[dict[str, object]] = []
    for placement in placements():
        all_measured = measure_placement(client, placement, settings)
        tables.append(table(placement, all_measured))
        data.extend(to_json(measured) for measured in all_measured)
        targets.extend(
            Target(
                what=f"{measured.operation.name}, {placement.name}: ratio of p50",
                unit="",
                measured=measured.ratio_p50,
                limit=RATIO_LIMIT,
            )
            for measured in all_measured
            if measured.operation.has_target
        )
    return Result(tables=tables, targets=targets, data={"operations": data})
