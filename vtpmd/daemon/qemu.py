"""What a vTPM knows of its QEMU: whether it migrates, or takes in a migration, and when it says so.

A view takes the events of a monitor in the order in which QEMU sent them, and tells a listener what
follows from each, before the next one is taken. It makes no I/O and keeps no time: ``follow`` joins
it to a monitor, whose client is imported only then.

Whose migration an event of QEMU's is about, it does not say. QEMU takes in at most one, before its
guest has run, and can begin none of its own until then: so while its run state is ``inmigrate``
when it is connected to, all that it says up to the end of a migration is about the one that comes
in (``migration/migration.c``: ``migrate_prepare``, ``process_incoming_migration_co``).
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Protocol

from vtpmd.daemon.qemu_events import (
    POSTCOPY,
    Capabilities,
    GuestResumed,
    GuestStopped,
    MigrationState,
    MigrationStatus,
    Phase,
    QemuConnected,
    QemuDisconnected,
    QemuEvent,
)
from vtpmd.errors import VtpmdError

INCOMING = "inmigrate"


class Following(Enum):
    """How much a vTPM can know of its QEMU."""

    NOT_ASKED_FOR = "vtpmd was started without a monitor to follow"
    NOT_REACHABLE = "no QEMU answers on the monitor's socket now"
    WITHOUT_EVENTS = "QEMU answers, but tells of no migration: it is asked every second"
    FOLLOWING = "QEMU tells of each step of a migration"


class Listener(Protocol):
    """Who is told what QEMU does. No method may wait: QEMU's next event is behind it."""

    def migration_began(self) -> None:
        """QEMU migrates its guest away, to whatever that may be."""

    def migration_ended(self) -> None:
        """What began has been completed, has failed, was cancelled, or QEMU is gone."""

    def guest_stopped(self) -> None:
        """The guest's processors stand still, for whatever reason."""

    def guest_resumed(self) -> None:
        """The guest's processors run."""

    def receiving(self, now: bool) -> None:
        """Say that a migration begins (``now``) or ceases to come into this QEMU."""

    def colo_seen(self) -> None:
        """Say that x-colo is switched on: whoever migrates now runs on, on both sides."""

    def disconnected(self) -> None:
        """Nothing is known of QEMU any more. What had begun has been told as ended."""


class Monitor(Protocol):
    """A QEMU that can be asked."""

    async def look(self) -> Capabilities:
        """Ask now what is else asked at intervals. Raises VtpmdError."""


class QemuView:
    """One QEMU, as its monitor shows it."""

    def __init__(self, listener: Listener, *, asked_for: bool) -> None:
        """Know nothing yet; ``asked_for`` says whether there is a monitor to follow at all."""
        self._listener = listener
        self._asked_for = asked_for
        self._monitor: Monitor | None = None
        self._capabilities: Capabilities | None = None  # None: no QEMU is connected
        self._status = MigrationState.NONE
        self._incoming = False  # what QEMU says of a migration is about the one that comes in
        self._running: bool | None = None  # None: there was no QEMU yet
        self._migration_told = False
        self._receiving_told = False

    @property
    def following(self) -> Following:
        """Return how much is known."""
        if not self._asked_for:
            return Following.NOT_ASKED_FOR
        if self._capabilities is None:
            return Following.NOT_REACHABLE
        return Following.FOLLOWING if self._capabilities.events else Following.WITHOUT_EVENTS

    @property
    def word(self) -> str:
        """Return ``following`` as people and JSON have it, as ``without-events``."""
        return self.following.name.lower().replace("_", "-")

    @property
    def is_migrating(self) -> bool:
        """Whether QEMU would put a state that it asks for now into a migration of its guest.

        False for savevm. A migration to a file looks like one to a host. False with COLO, of which
        QEMU asks for the state at each checkpoint, while the guest goes on here.
        """
        colo = self._capabilities is not None and self._capabilities.colo
        return self._is_under_way and not self._incoming and not colo

    @property
    def is_receiving(self) -> bool:
        """Whether a migration comes into this QEMU now; False as soon as the guest runs here."""
        return self._is_under_way and self._incoming and not self._running

    async def check_can_arm(self) -> None:
        """Ask QEMU whether a vTPM may be armed for its next migration. Raises VtpmdError if not.

        Where there is no QEMU to ask, there is nothing against it. Events that somebody has
        switched off are on again, or ``following`` says that they are not.
        """
        if self._monitor is None or self._capabilities is None:
            return
        if (await self._monitor.look()).colo:
            raise VtpmdError(
                "cannot arm: QEMU's migration capability x-colo is on, with which the guest runs "
                "on both hosts; switch it off, or migrate without arming"
            )

    def attach(self, monitor: Monitor) -> None:
        """Have ``check_can_arm`` ask this monitor, whose events go to ``deliver``."""
        self._monitor = monitor

    def deliver(self, event: QemuEvent) -> None:
        """Take an event and tell the listener what follows from it."""
        match event:
            case QemuConnected():
                self._connected(event)
            case QemuDisconnected():
                self._disconnected()
            case Capabilities():
                self._capabilities_are(event)
            case MigrationStatus():
                self._status_is(event.status)
            case GuestStopped():
                self._guest_runs(False)
            case GuestResumed():
                self._guest_runs(True)

    @property
    def _is_under_way(self) -> bool:
        return self._status.phase is Phase.UNDER_WAY

    def _connected(self, event: QemuConnected) -> None:
        came = event.running and event.migration_status in POSTCOPY
        self._incoming = event.status == INCOMING or came
        ran, self._running = self._running, event.running
        self._capabilities_are(event.capabilities)
        self._status_is(event.migration_status)
        if ran is not None and ran is not event.running:
            self._tell_of_guest()

    def _disconnected(self) -> None:
        self._capabilities = None
        self._status_is(MigrationState.NONE)
        self._listener.disconnected()

    def _capabilities_are(self, capabilities: Capabilities) -> None:
        had_colo = self._capabilities is not None and self._capabilities.colo
        self._capabilities = capabilities
        if capabilities.colo and not had_colo:
            self._listener.colo_seen()

    def _guest_runs(self, running: bool) -> None:
        if running is self._running:
            return
        self._running = running
        self._tell_of_guest()
        if running and not self._is_under_way:
            self._incoming = False  # its end was not told
        self._tell_receiving()

    def _status_is(self, status: MigrationState) -> None:
        self._status = status
        self._tell_receiving()
        if self._incoming:
            self._incoming = not status.has_ended
        elif self._is_under_way and not self._migration_told:
            self._migration_told = True
            self._listener.migration_began()
        elif status.phase is Phase.IDLE and self._migration_told:
            self._migration_told = False
            self._listener.migration_ended()

    def _tell_of_guest(self) -> None:
        if self._running:
            self._listener.guest_resumed()
        else:
            self._listener.guest_stopped()

    def _tell_receiving(self) -> None:
        if self.is_receiving is not self._receiving_told:
            self._receiving_told = self.is_receiving
            self._listener.receiving(self.is_receiving)


async def follow(path: Path, view: QemuView) -> None:
    """Follow the QEMU on a monitor's socket until cancelled. Raises QmpError for a long path."""
    from vtpmd.daemon.qmp import QemuFollower

    follower = QemuFollower(path, view.deliver)
    view.attach(follower)
    await follower.run()
