"""Migrate a guest between two QEMU processes, as a management program does over QMP."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vtpmd.testing.guest import Guest, Machine

MIGRATION_TIMEOUT_S = 60.0
POLL_S = 0.01
BANDWIDTH_BYTES_S_MAX = 1 << 30  # QEMU's default would make tests wait for memory
CRB_CONTROL_START = 0xFED4_004C  # 1 while a command runs (TCG PC Client Platform TPM Profile)
INCOMING = ("-incoming", "defer")
ENDED = ("completed", "failed", "cancelled")  # what query-migrate says
# After migrate_cancel with a return path: QEMU 7.2 shuts the socket down before it says
# "cancelling", and the migration's thread may call that a failure first (migrate_fd_cancel).
GIVEN_UP = ("cancelled", "failed")

STAYS_ASLEEP_FROM = 9  # QEMU's major version

Show = Callable[[str, dict[str, int]], None]


class Migrating(Protocol):
    """A QEMU that a guest leaves or comes to."""

    @property
    def machine(self) -> Machine:
        """What it emulates."""

    @property
    def status(self) -> str:
        """Its run state, as query-status names it."""

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return its result."""

    def human_monitor(self, command_line: str) -> str:
        """Run a command of the human monitor; return what it says."""


class MigrationFailedError(Exception):
    """QEMU says that the migration failed."""


@dataclass(frozen=True, kw_only=True)
class MigrationReport:
    """What the source's query-migrate says about a completed migration."""

    total_ms: int
    downtime_ms: int
    setup_ms: int
    ram_bytes: int
    passes: int


def set_capabilities(guest: Migrating, *, return_path: bool = True) -> None:
    """Set what libvirt sets: events, and a way back on which the destination says that it runs.

    A guest with tpm-crb is also stopped before the last of its memory is sent; see `crb_is_busy`.
    """
    states = {
        "events": True,
        "return-path": return_path,
        "pause-before-switchover": guest.machine.tpm_model == "tpm-crb",
    }
    guest.qmp(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in states.items()],
    )
    guest.qmp("migrate-set-parameters", **{"max-bandwidth": BANDWIDTH_BYTES_S_MAX})


def listen_unix(destination: Migrating, path: Path) -> str:
    """Let the destination wait for a migration on a UNIX socket; return the source's URI."""
    destination.qmp("migrate-incoming", uri=f"unix:{path}")
    return f"unix:{path}"


def listen_tcp(destination: Migrating, host: str = "127.0.0.1") -> str:
    """Let the destination wait on a free port of its own `host`; return the source's URI."""
    destination.qmp("migrate-incoming", uri=f"tcp:{host}:0")
    address = destination.qmp("query-migrate")["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


def wait_until_ended(
    source: Migrating, show: Show | None = None, timeout_s: float = MIGRATION_TIMEOUT_S
) -> str:
    """Wait until the migration is over; return its status: completed, failed or cancelled.

    When QEMU has stopped the guest, let it go on as soon as its TPM has answered. `show` is called
    with the status and what query-migrate says of RAM, many times in a second.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        info = source.qmp("query-migrate")
        status = str(info["status"])
        if show is not None and "ram" in info:
            show(status, info["ram"])
        if status in ENDED:
            return status
        if status == "pre-switchover" and not crb_is_busy(source):
            source.qmp("migrate-continue", state="pre-switchover")
        time.sleep(POLL_S)
    raise TimeoutError(f"the migration is still {status} after {timeout_s:.0f} s")


def crb_is_busy(guest: Migrating) -> bool:
    """Say whether a tpm-crb runs a command; always False for a tpm-tis.

    QEMU 7.2 loses the response of a command that tpm-crb is running when it sends the last of
    guest memory: it waits for the command only after that, and the response goes into memory. The
    guest then finds its own command in the place of a response, whatever emulator serves the TPM.
    """
    if guest.machine.tpm_model != "tpm-crb":
        return False
    said = guest.human_monitor(f"xp /1wx {CRB_CONTROL_START:#x}")
    return int(said.rpartition(":")[2], 16) != 0


def wait_until(guest: Migrating, wanted: str) -> None:
    """Wait until a guest that comes in by migration has the run state `wanted`."""
    deadline = time.monotonic() + MIGRATION_TIMEOUT_S
    while (status := guest.status) != wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the guest is still {status} after {MIGRATION_TIMEOUT_S} s")
        time.sleep(POLL_S)


def report(source: Guest) -> MigrationReport:
    """Return the numbers of a completed migration."""
    answer = source.qmp("query-migrate")
    return MigrationReport(
        total_ms=answer["total-time"],
        downtime_ms=answer["downtime"],
        setup_ms=answer["setup-time"],
        ram_bytes=answer["ram"]["transferred"],
        passes=answer["ram"]["dirty-sync-count"],
    )


def migrate(
    source: Guest,
    destination: Guest,
    uri: str,
    show: Show | None = None,
    timeout_s: float = MIGRATION_TIMEOUT_S,
) -> MigrationReport:
    """Migrate to a destination that listens on `uri`; return when the guest runs there.

    Both sides must have had `set_capabilities`; `show` is as for `wait_until_ended`.
    MigrationFailedError when QEMU says that it failed.
    """
    source.qmp("migrate", uri=uri)
    status = wait_until_ended(source, show, timeout_s)
    if status != "completed":
        description = source.qmp("query-migrate").get("error-desc", "no reason given")
        raise MigrationFailedError(f"the migration {status}: {description}")
    wait_until(destination, "running")
    return report(source)


def is_woken_up_to_move(guest: Guest) -> bool:
    """Say whether QEMU wakes a guest up that it migrates."""
    return bool(guest.qmp("query-version")["qemu"]["major"] < STAYS_ASLEEP_FROM)


def migrate_asleep(guest: Guest, there: Guest, stream: Path) -> None:
    """Migrate a guest that sleeps.

    A QEMU that wakes it up may have the TPM's state before it has reset it; then the guest never
    finds out, whatever its emulator is. So it is let go on only once it has done so.
    """
    set_capabilities(guest)
    set_capabilities(there)
    if is_woken_up_to_move(guest):
        pause = {"capability": "pause-before-switchover", "state": True}
        guest.qmp("migrate-set-capabilities", capabilities=[pause])
    guest.qmp("migrate", uri=listen_unix(there, stream))
    if is_woken_up_to_move(guest):
        guest.wait_for_event("WAKEUP")
    if (status := wait_until_ended(guest)) != "completed":
        raise MigrationFailedError(f"the migration of a guest that sleeps {status}")
    deadline = time.monotonic() + MIGRATION_TIMEOUT_S
    while there.status not in ("running", "suspended"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the guest is still {there.status}")
        time.sleep(POLL_S)
