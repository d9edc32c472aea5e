"""Migrate QEMU guests that differ in nothing but their TPM, and keep what QEMU says about it.

Each guest goes from QEMU to QEMU. The guests take turns, and wait stopped for theirs, so that
whatever else the machine does hits all alike.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from tests.bench.emulators import BenchError
from tests.bench.moving import waits
from tests.bench.moving.floor import Floor, floor
from tests.bench.moving.load import Activity
from tests.bench.stats import Distribution
from tests.harness.lab import Lab
from vtpmd.testing import guest as harness
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.migration import MigrationReport
from vtpmd.testing.monitored import Monitored
from vtpmd.testing.program import Program
from vtpmd.testing.workload import Workload

MACHINE = Machine(memory_mib=512, counts_ticks=False)
# What Ethernet of 1 Gbit/s carries of TCP's content, so that the time is the stream's, and not that
# of copying memory on a machine whose cores both QEMUs need; and little memory for stop-and-copy.
LINK = {"max-bandwidth": 117_700_000, "downtime-limit": 30}
WORK_BEFORE = 30  # operations of the guest's workload before the first migration
BEFORE_MIGRATION_S = 0.5  # the load runs, the session makes its first rounds
TPM_OPTIONS = ("id=tpmctl,", "emulator,id=tpm0,", f"{MACHINE.tpm_model},tpmdev=")


class GuestTpm(StrEnum):
    """What serves the guest's TPM."""

    NONE = "no TPM"
    SWTPM = "swtpm"
    VTPMD = "vtpmd, armed"
    FLOOR = "floor"


WITHOUT_LOAD = (GuestTpm.NONE, GuestTpm.FLOOR)  # there is nothing to work


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """One migration, by QEMU's account; for how long it waited for the vTPM; the tail's bytes."""

    report: MigrationReport
    share_us: float | None
    tail_bytes: int | None

    def to_json(self) -> dict[str, object]:
        """Return what was measured in JSON's types."""
        return asdict(self.report) | {"share_us": self.share_us, "tail_bytes": self.tail_bytes}


class GuestWithoutTpm(Guest):
    """A guest like the others, but for its TPM; its workload answers no command."""

    def __init__(
        self, directory: Path, machine: Machine, extra_arguments: Sequence[str] = ()
    ) -> None:
        """Start QEMU; `directory` is the guest's own. RuntimeError when QEMU ends instead."""
        directory.mkdir(exist_ok=True)
        self.machine = machine
        self._console = directory / "console"
        arguments = _without_tpm(harness._arguments(machine, directory, directory / "no-tpm"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "work"))
            listener.listen(1)
            program = Program("qemu", [*arguments, *extra_arguments], directory)
            self._workload = Workload(program.accept(listener), lambda: program.output)
        Monitored.__init__(self, program, directory / "qmp")


def _without_tpm(arguments: list[str | Path]) -> list[str | Path]:
    """Leave out the options whose values are about the TPM."""
    kept: list[str | Path] = []
    for argument in arguments:
        if any(text in str(argument) for text in TPM_OPTIONS):
            kept.pop()
        else:
            kept.append(argument)
    return kept


def _set_parameters(guest: Guest) -> None:
    migration.set_capabilities(guest)
    guest.qmp("migrate-set-parameters", **LINK)


class Traveller:
    """A guest that migrates again and again; it is stopped in between."""

    def __init__(self, lab: Lab, tpm: GuestTpm, tail_bytes: int) -> None:
        """Boot the guest, and let it set its TPM up and use it; `tail_bytes` is for the floor."""
        self._lab = lab
        self._tpm = tpm
        self._tail_bytes = tail_bytes
        self._machine = replace(MACHINE, started_through=waits.recorder())
        self._hops = 0
        self._emulator: Emulator | Floor | None = None
        self._emulator = self._start_emulator()
        self._guest = self._start_guest(self._emulator)
        self._guest.wait_for_workload()
        if tpm not in WITHOUT_LOAD:
            self._guest.command("setup")
            self._guest.command(f"work {WORK_BEFORE}")
        _set_parameters(self._guest)
        self._guest.pause()

    def close(self) -> None:
        """End the guest and its emulator."""
        self._guest.close()
        if self._emulator is not None:
            self._emulator.kill()

    def migrate(self, activity: Activity, load: str = "mixed") -> Migrated:
        """Migrate once. BenchError when a vTPM was to move as a tail and did not."""
        emulator = self._start_emulator()
        destination = self._start_guest(emulator, migration.INCOMING)
        _set_parameters(destination)
        uri = migration.listen_unix(destination, self._lab.directory / f"{self._name}-stream")
        self._guest.resume()
        if activity is Activity.LOAD:
            self._guest.command(f"start {load}")
        with self._armed_for(emulator) as tail_bytes:
            time.sleep(BEFORE_MIGRATION_S)
            report = migration.migrate(self._guest, destination, uri)
        if activity is Activity.LOAD:
            destination.command("stop")
        destination.pause()
        share_us = self._share_us(emulator)
        self.close()
        self._guest, self._emulator = destination, emulator
        moved = tail_bytes[0] if tail_bytes else None
        return Migrated(report=report, share_us=share_us, tail_bytes=moved)

    def _share_us(self, destination: Emulator | Floor | None) -> float | None:
        if self._emulator is None or destination is None:
            return None
        paths = (self._emulator.control_path, destination.control_path)
        return waits.share_us(*map(waits.waits_on, paths))

    @property
    def _name(self) -> str:
        return f"{self._tpm.name.lower()}-{self._hops}"

    def _start_emulator(self) -> Emulator | Floor | None:
        """Start the next one; a floor is the destination of the one before."""
        match self._tpm:
            case GuestTpm.NONE:
                return None
            case GuestTpm.SWTPM:
                return self._lab.emulator(EmulatorKind.SWTPM)
            case GuestTpm.VTPMD:
                follows = Peering(credentials=credentials(), follows_qemu=True, log_level="info")
                return self._lab.peer(follows)
            case GuestTpm.FLOOR:
                source = self._emulator if isinstance(self._emulator, Floor) else None
                return floor(self._lab, self._tail_bytes, source)

    def _start_guest(
        self, emulator: Emulator | Floor | None, arguments: Sequence[str] = ()
    ) -> Guest:
        self._hops += 1
        if emulator is None:
            return GuestWithoutTpm(self._lab.directory / self._name, MACHINE, arguments)
        return self._lab.guest(emulator, self._machine, arguments)

    @contextmanager
    def _armed_for(self, destination: Emulator | Floor | None) -> Iterator[list[int]]:
        """Have a session with a vtpmd; the list has the bytes in the tail when it is over."""
        tail_bytes: list[int] = []
        if (
            self._tpm is not GuestTpm.VTPMD
            or not isinstance(self._emulator, Emulator)
            or not isinstance(destination, Emulator)
        ):
            yield tail_bytes
            return
        management = self._lab.management(self._emulator)
        if (event := management.arm(destination.address))["event"] != "VTPM_ARMED":
            raise BenchError(f"no session with the destination: {event['data']}")
        yield tail_bytes
        management.wait_for("VTPM_HANDED_OVER", "VTPM_FALL_BACK", "VTPM_GO_ON")
        result = management.migration()
        if result["outcome"] != "handed-over":
            raise BenchError(f"the vTPM was not handed over: {result['reason']}")
        tail_bytes.append(result["tail-bytes"])


@contextmanager
def travellers() -> Iterator[dict[GuestTpm, Traveller]]:
    """Run a guest of each kind; each is stopped, and has migrated once."""
    with Lab() as lab:
        guests: dict[GuestTpm, Traveller] = {}
        tail_bytes = 1
        try:
            for tpm in GuestTpm:
                guests[tpm] = Traveller(lab, tpm, tail_bytes)
                migrated = guests[tpm].migrate(Activity.IDLE)
                tail_bytes = migrated.tail_bytes or tail_bytes  # the floor's are as long
            yield guests
        finally:
            for guest in guests.values():
                guest.close()


Migrations = dict[tuple[Activity, GuestTpm], list[Migrated]]


def measure(runs: int) -> Migrations:
    """Migrate each guest `runs` times, idle and under load, in turn.

    A guest without a TPM, as the floor's is, can have no load on it: it is idle only.
    """
    found: Migrations = {}
    with travellers() as guests:
        for _ in range(runs):
            for activity in Activity:
                for tpm, guest in guests.items():
                    if activity is Activity.LOAD and tpm in WITHOUT_LOAD:
                        continue
                    found.setdefault((activity, tpm), []).append(guest.migrate(activity))
    return found


def total_ms(migrations: Sequence[Migrated]) -> Distribution:
    """Describe the total time of migrations, in milliseconds."""
    return Distribution.of([each.report.total_ms for each in migrations])


def downtime_ms(migrations: Sequence[Migrated]) -> Distribution:
    """Describe the downtime of migrations, in milliseconds."""
    return Distribution.of([each.report.downtime_ms for each in migrations])


def share_us(migrations: Sequence[Migrated]) -> Distribution:
    """Describe for how long QEMU waited for the vTPM, in microseconds; ValueError without one."""
    return Distribution.of([each.share_us for each in migrations if each.share_us is not None])
