"""What a QEMU tells: whether its guest runs and how its migration goes, as typed events.

Apart from ``qmp``, which reads them from a monitor and is slow to import: who takes the events does
not need it.

Source: QEMU's ``qapi/migration.json``, ``qapi/run-state.json`` and ``migration/migration.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final


class Phase(Enum):
    """What a migration's state means for a vTPM."""

    IDLE = "no migration, or one that has not begun to send or has ended; also all of savevm"
    UNDER_WAY = "what QEMU asks for or takes now belongs to the migration"
    ENDING = "it has been given up, but has not ended"


class MigrationState(StrEnum):
    """The states of a migration, as ``qapi/migration.json`` names them."""

    NONE = "none"
    SETUP = "setup"  # at a destination: it listens
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"
    OTHER = "other"  # a word of a later QEMU

    @property
    def phase(self) -> Phase:
        """Return what it means; a state of a later QEMU is taken for one that is under way."""
        return _PHASES.get(self, Phase.UNDER_WAY)

    @property
    def has_ended(self) -> bool:
        """Whether a migration is over in this state."""
        return self in (MigrationState.COMPLETED, MigrationState.FAILED, MigrationState.CANCELLED)


_PHASES: Final = {
    MigrationState.NONE: Phase.IDLE,
    MigrationState.SETUP: Phase.IDLE,
    MigrationState.COMPLETED: Phase.IDLE,
    MigrationState.FAILED: Phase.IDLE,
    MigrationState.CANCELLED: Phase.IDLE,
    MigrationState.CANCELLING: Phase.ENDING,
    MigrationState.FAILING: Phase.ENDING,
    # Here QEMU asks for the state at every checkpoint, and both sides run.
    MigrationState.COLO: Phase.ENDING,
}

# A guest runs in these only where it has come to: the source's stands still from then on.
POSTCOPY: Final = {
    MigrationState.POSTCOPY_DEVICE,
    MigrationState.POSTCOPY_ACTIVE,
    MigrationState.POSTCOPY_PAUSED,
    MigrationState.POSTCOPY_RECOVER_SETUP,
    MigrationState.POSTCOPY_RECOVER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The migration capabilities that matter here, as QEMU has them now; an event when they change.

    They cannot be set while a migration runs.
    """

    events: bool  # False: QEMU tells no MigrationStatus; it is asked
    colo: bool  # the source is to run on beside the destination


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConnected:
    """QEMU answers. Its state is a moment old: what came since follows, and may repeat it."""

    uuid: str  # all zero when QEMU was given none
    running: bool  # the guest's processors
    status: str  # the word of query-status
    migration_status: MigrationState
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class QemuDisconnected:
    """QEMU ended, or the connection did. Comes once after each QemuConnected."""


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """The migration has a new state. savevm goes from SETUP to COMPLETED, never to ACTIVE."""

    status: MigrationState


@dataclass(frozen=True, slots=True)
class GuestStopped:
    """The guest's processors stand still; since when, by QEMU's clock (µs since 1970), if said."""

    timestamp_us: int | None = None


@dataclass(frozen=True, slots=True)
class GuestResumed:
    """The guest's processors run; since when, by QEMU's clock (µs since 1970), if said."""

    timestamp_us: int | None = None


@dataclass(frozen=True, slots=True)
class QemuShutdown:
    """The guest powered off, or QEMU was told to quit. QEMU may stay (``-no-shutdown``)."""


QemuEvent = (
    QemuConnected
    | QemuDisconnected
    | Capabilities
    | MigrationStatus
    | GuestStopped
    | GuestResumed
    | QemuShutdown
)
