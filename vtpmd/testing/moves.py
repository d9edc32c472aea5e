"""Move a guest from one host to another, and say what was measured."""

import time
from dataclasses import dataclass
from typing import Any

from vtpmd.testing import migration
from vtpmd.testing.host import Host

# Until the destination says that the TPM runs there, or why it does not.
OUTCOME_TIMEOUT_S = 20.0
POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Move:
    """What QEMU and the source's vtpmd said of a move that has succeeded."""

    guest: migration.MigrationReport
    session: dict[str, Any]  # the answer to query-migration

    @property
    def has_tail(self) -> bool:
        """Whether the vTPM was handed over, and QEMU's stream carried a tail."""
        return self.session.get("outcome") == "handed-over"

    @property
    def tail_bytes(self) -> int | None:
        """How long that tail was."""
        tail_bytes: int | None = self.session.get("tail-bytes")
        return tail_bytes

    @property
    def phases_us(self) -> dict[str, int]:
        """How long each phase of the vTPM's hand-over took, on either host, in microseconds."""
        return dict(self.session.get("phases-us", {}))


def move(
    source: Host,
    destination: Host,
    *,
    armed: bool = True,
    show: migration.Show | None = None,
    timeout_s: float = migration.MIGRATION_TIMEOUT_S,
) -> Move:
    """Move the guest; return when it runs at the destination.

    Both QEMU live afterwards; the destination's is new. MigrationFailedError or TimeoutError when
    it does not come to run there.
    """
    guest = source.guest
    assert guest is not None
    incoming = destination.await_guest(guest.machine)
    migration.set_capabilities(guest)
    if armed:
        source.manage.arm(destination.peer_address)
    report = migration.migrate(guest, incoming, destination.listen(), show, timeout_s)
    return Move(guest=report, session=_concluded(source) if armed else {"state": "none"})


def _concluded(source: Host) -> dict[str, Any]:
    """Return what a session was when its outcome is known."""
    deadline = time.monotonic() + OUTCOME_TIMEOUT_S
    while (session := source.manage.migration())["outcome"] in (None, "granted"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"host {source.name} does not say what became of the vTPM")
        time.sleep(POLL_S)
    return session
