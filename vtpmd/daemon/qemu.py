"""What QEMU's monitor tells a vTPM: when a round is due, and whether it is really migrating."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vtpmd.daemon.mobility import Mobility
from vtpmd.daemon.qmp import (
    GuestResumed,
    GuestStopped,
    MigrationPass,
    MigrationState,
    MigrationStatus,
    QemuConnected,
    QemuDisconnected,
    QemuEvent,
    QemuFollower,
)

# savevm asks for the state too, but goes from SETUP to COMPLETED.
MIGRATING: Final = {
    MigrationState.ACTIVE,
    MigrationState.PRE_SWITCHOVER,
    MigrationState.DEVICE,
}


async def follow(path: Path, mobility: Mobility) -> None:
    """Follow the QEMU on a monitor's socket until cancelled. Raises QmpError for a long path."""
    await QemuFollower(path, _Listener(mobility).deliver).run()


class _Listener:
    """Takes QEMU's events; never waits, as the next ones are behind it."""

    def __init__(self, mobility: Mobility) -> None:
        self._mobility = mobility
        self._status = MigrationState.NONE
        mobility.qemu_migrates = lambda: self._status in MIGRATING

    def deliver(self, event: QemuEvent) -> None:
        match event:
            case QemuConnected():
                self._status = event.migration_status
            case QemuDisconnected():
                self._status = MigrationState.NONE
            case MigrationStatus():
                self._status = event.status
            case MigrationPass():
                self._mobility.round_due()
            case GuestStopped():
                self._mobility.guest_was_stopped()
            case GuestResumed():
                self._mobility.guest_was_resumed()
