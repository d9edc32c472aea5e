"""Find out where a guest is after a migration that may have failed, and have it go on there."""

from typing import TypeVar

from qemu.qmp import QMPError

from vtpmd.testing import migration
from vtpmd.testing.guest import Guest
from vtpmd.testing.host import Host
from vtpmd.testing.waiting import wait_until

AnyHost = TypeVar("AnyHost", bound=Host)


class GuestLostError(Exception):
    """No QEMU has the guest any more: it can only boot again."""


def wait_until_decided(source: Host, destination: Host) -> None:
    """Wait until QEMU has the guest at the destination, or has given up."""
    wait_until(lambda: _has_decided(source, destination))


def go_on(source: AnyHost, destination: AnyHost) -> AnyHost:
    """Have the guest go on where it is, and end the other QEMU; return that host.

    GuestLostError when no QEMU has it.
    """
    if runs(destination):
        source.close_guest()
        return destination
    destination.close_guest()
    if not source.has_guest():
        raise GuestLostError("the guest runs at neither host")
    if not runs(source):
        guest_of(source).resume()
    return source


def guest_of(host: Host) -> Guest:
    """Return a host's guest, which is there."""
    assert host.guest is not None
    return host.guest


def runs(host: Host) -> bool:
    """Whether a host's guest runs."""
    if not host.has_guest():
        return False
    guest = guest_of(host)
    try:
        return guest.status == "running"
    except (QMPError, OSError, EOFError):
        guest.program.wait()  # it has ended just now
        return False


def migration_status(host: Host) -> str:
    """Return what a QEMU says of its migration, "none" before the first."""
    return str(guest_of(host).qmp("query-migrate").get("status", "none"))


def _has_decided(source: Host, destination: Host) -> bool:
    """Whether the guest runs at the destination, or is known not to come there."""
    if runs(destination):
        return True
    if destination.has_guest():
        # It ends when its stream does, or runs; if the source has given up, it may wait on.
        return source.has_guest() and migration_status(source) in migration.GIVEN_UP
    if not source.has_guest() or migration_status(source) in migration.ENDED:
        return True
    # One that has sent all, and whose connection's end was lost with the link, waits for ever:
    # nothing is under way that TCP would find unanswered. Whoever sees that the other is gone
    # cancels.
    guest_of(source).qmp("migrate_cancel")
    return False
