"""Chapter: the downtime of a guest that makes RSA keys, one after another, while it migrates.

QEMU waits for the TPM command that runs before it asks for the TPM's state. The guests take turns:
idle and at each size of keys, with swtpm and with vtpmd, whose session is armed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.bench.report import Result, Settings, Table, Target

if TYPE_CHECKING:
    from tests.bench.moving.guests import GuestTpm, Migrated, Traveller

NAME = "keys"
SUMMARY = "downtime of a guest that makes RSA keys in a loop"

MIGRATIONS = 30
IDLE = "idle"
LOADS = ("rsa-2048", "rsa-3072")
RATIO_MAX = 1.2

Migrations = dict[tuple[str, "GuestTpm"], list["Migrated"]]


@contextmanager
def travellers() -> Iterator[dict["GuestTpm", "Traveller"]]:
    """Run a guest with swtpm and one with vtpmd; each is stopped, and has migrated once."""
    from tests.bench.moving.guests import GuestTpm, Traveller
    from tests.bench.moving.load import Activity
    from tests.harness.lab import Lab

    with Lab() as lab:
        guests: dict[GuestTpm, Traveller] = {}
        try:
            for tpm in (GuestTpm.SWTPM, GuestTpm.VTPMD):
                guests[tpm] = Traveller(lab, tpm, tail_bytes=0)  # that is for the floor
                guests[tpm].migrate(Activity.IDLE)
            yield guests
        finally:
            for guest in guests.values():
                guest.close()


def measure(runs: int) -> Migrations:
    """Migrate each guest `runs` times under each load, in turn."""
    from tests.bench.moving.load import Activity

    found: Migrations = {}
    with travellers() as guests:
        for _ in range(runs):
            for load in (IDLE, *LOADS):
                activity = Activity.IDLE if load == IDLE else Activity.LOAD
                for tpm, guest in guests.items():
                    found.setdefault((load, tpm), []).append(guest.migrate(activity, load))
    return found


def table(migrations: Migrations) -> Table:
    """Lay out the downtimes."""
    from tests.bench.moving.guests import downtime_ms

    rows = []
    for (load, tpm), migrated in migrations.items():
        downtime = downtime_ms(migrated)
        middle = f"{downtime.percentiles[25.0]:.0f}-{downtime.percentiles[75.0]:.0f}"
        ratio = downtime.p50 / downtime_ms(migrations[IDLE, tpm]).p50
        figures = [f"{downtime.p50:.0f}", middle, f"{downtime.percentiles[100.0]:.0f}"]
        rows.append([f"{load}: {tpm}", *figures, f"{ratio:.2f}"])
    columns = ["", "downtime, ms\np50", "\nmiddle half", "\nmax", "ratio"]
    runs = len(next(iter(migrations.values())))
    title = f"migrations of a guest that makes keys, {runs} of each kind"
    note = "ratio: of p50 to the idle guest's with the same emulator"
    return Table(title=title, columns=columns, rows=rows, note=note)


def targets(migrations: Migrations) -> list[Target]:
    """Return what vtpmd has to reach."""
    from tests.bench.moving.guests import GuestTpm, downtime_ms

    idle = downtime_ms(migrations[IDLE, GuestTpm.VTPMD]).p50
    return [
        Target(
            what=f"downtime, {load}: p50's ratio to the idle guest",
            unit="",
            measured=downtime_ms(migrations[load, GuestTpm.VTPMD]).p50 / idle,
            limit=RATIO_MAX,
        )
        for load in LOADS
    ]


def run(settings: Settings) -> Result:
    """Measure the chapter; BenchError when a guest does not move as it should, or sees an error."""
    from qemu.qmp import QMPError

    from tests.bench.emulators import BenchError
    from vtpmd.testing.migration import MigrationFailedError
    from vtpmd.testing.workload import WorkloadFailedError

    try:
        migrations = measure(1 if settings.quick else MIGRATIONS)
    except (RuntimeError, QMPError, MigrationFailedError, WorkloadFailedError) as error:
        raise BenchError(str(error)) from error
    found = [
        {"load": load, "tpm": tpm, "migrations": [each.to_json() for each in migrated]}
        for (load, tpm), migrated in migrations.items()
    ]
    return Result(
        tables=[table(migrations)], targets=targets(migrations), data={"migrations": found}
    )
