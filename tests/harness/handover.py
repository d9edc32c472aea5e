"""Two vtpmd, one of which moves its vTPM to the other, and guests that are no QEMU."""

from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.lab import Lab
from tests.harness.raw_guest import Blobs, RawGuest
from tests.support.tail import is_tail
from tests.support.tpm2 import ReturnCode, get_random
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, Peering
from vtpmd.testing.link import Link
from vtpmd.testing.management import Management


class Host(NamedTuple):
    """A vtpmd, its management socket, and the guest that uses it."""

    vtpmd: Emulator
    manage: Management
    guest: RawGuest

    @property
    def log(self) -> list[str]:
        """The lines that vtpmd has written."""
        return self.vtpmd.program.output.splitlines()


class Pair(NamedTuple):
    """The two hosts of a migration; the source reaches the destination over a link."""

    source: Host
    destination: Host
    link: Link

    def arm(self) -> dict[str, Any]:
        """Begin a session over the link; return the event that says how that went."""
        return self.source.manage.arm(self.link.address)


def make_host(lab: Lab, peering: Peering | None = None, state: Path | None = None) -> Host:
    """Start a vtpmd that knows peers, with a new state directory or a given one; connect to it."""
    vtpmd = lab.peer(peering, state)
    return Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd))


def stopped(host: Host, status: int = 0) -> Host:
    """Stop a host's vtpmd as an operator does, and check its exit status."""
    assert host.vtpmd.stop() == status
    return host


def killed(host: Host) -> Host:
    """Kill a host's vtpmd and engine, as a power failure does."""
    host.vtpmd.kill()
    return host


def restarted(lab: Lab, host: Host) -> Host:
    """Start a vtpmd where one has ended: on its state directory, and for peers on its port."""
    port = host.vtpmd.port
    vtpmd = lab.peer(Peering(credentials=credentials(), port=port), host.vtpmd.state)
    return Host(vtpmd, lab.management(vtpmd), lab.raw_guest(vtpmd))


def make_pair(
    lab: Lab,
    *,
    source: Peering | None = None,
    destination: Peering | None = None,
    state: Path | None = None,
    link: type[Link] = Link,
) -> Pair:
    """Start two hosts; the source's TPM runs and was used. ``state`` is the destination's."""
    first, second = make_host(lab, source), make_host(lab, destination, state)
    first.guest.boot()
    return Pair(first, second, lab.link(second.vtpmd, link))


def make_armed_pair(lab: Lab, *, link: type[Link] = Link) -> Pair:
    """Start two hosts between which a session is armed; the TPM was used since."""
    pair = make_pair(lab, link=link)
    assert pair.arm()["event"] == "VTPM_ARMED"
    pair.source.guest.work()
    return pair


def assert_serves(guest: RawGuest) -> None:
    """Use a TPM for reading and for writing."""
    before = guest.facts()
    guest.work()
    assert guest.facts() != before


def assert_serves_nothing(guest: RawGuest) -> None:
    """Send a TPM a command, which it must not execute: it fails, or is to be sent again."""
    response = guest.data.transact(get_random(8))
    assert int.from_bytes(response[6:10], "big") in (ReturnCode.FAILURE, ReturnCode.RETRY)


def assert_tail(blobs: Blobs) -> None:
    """Check that what QEMU would carry is a tail and nothing else."""
    assert is_tail(blobs.permanent)
    assert blobs.volatile == blobs.savestate == b""


def assert_whole(blobs: Blobs) -> None:
    """Check that what QEMU would carry is swtpm's blobs."""
    assert not is_tail(blobs.permanent)
    assert blobs.permanent and blobs.volatile
