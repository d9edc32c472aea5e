"""A guest that works its TPM at host a and is moved to host b; and who serves it after a fault."""

import re
import time
from typing import NamedTuple

from tests.harness import saved_guest
from tests.harness.faults import Progress
from tests.harness.raw_guest import RawGuest
from tests.harness.saved_guest import MACHINE, SavedGuest
from tests.harness.testbed import Host, Testbed
from tests.harness.wire import Side
from tests.support.emulator_client import ControlError
from tests.support.tpm2 import TpmError
from vtpmd.testing import migration, outcome
from vtpmd.testing.facts import differences
from vtpmd.testing.workload import WorkloadFailedError

# Who may serve a vTPM is found out by its hosts, with waits between two attempts.
SETTLE_TIMEOUT_S = 20.0
RETRY_S = 0.2
# The counter that the guest's workload defines (vtpmd/testing/guest_image/workload.c).
COUNTER_INDEX = 0x01500002
COUNTER_AUTH = b"auth of the counter"
COUNTER_BYTES = 8

# What the workload says of a command that was not executed.
REFUSED = re.compile("TPM_RC|the TPM device")


class Owner(NamedTuple):
    """A host that serves the vTPM, and to whom."""

    side: Side
    to_guest: bool  # that has gone on all the time; else to one that boots


class HandOver:
    """One move, from a guest that runs at host a to a vTPM that one host serves.

    What is done about a fault is what a supervisor and an operator do: processes are started again,
    and QEMU's cont is said. No file is touched.
    """

    def __init__(self, testbed: Testbed, saved: SavedGuest) -> None:
        """Have the guest run at host a, and a QEMU at host b wait for it."""
        self._testbed = testbed
        self._facts = saved.facts
        self._has_begun = False
        saved_guest.load(saved, testbed.a.await_guest(MACHINE))
        testbed.b.await_guest(MACHINE)
        self.progress = Progress(testbed)

    def arm(self) -> None:
        """Begin a session; host b holds a base then."""
        event = self._testbed.a.manage.arm(self._testbed.b.peer_address)
        assert event["event"] == "VTPM_ARMED", event

    def begin(self, *, over_link: bool) -> None:
        """Let the guest work its TPM, and QEMU begin to migrate it."""
        source = outcome.guest_of(self._testbed.a)
        uri = self._testbed.listen(self._testbed.b, over_link=over_link)
        source.command("start mixed")
        source.qmp("migrate", uri=uri)
        self._has_begun = True

    def wait_until_decided(self) -> None:
        """Wait until QEMU has the guest at host b, or has given up."""
        outcome.wait_until_decided(self._testbed.a, self._testbed.b)

    def resume_source(self) -> list[Owner]:
        """Say cont at host a as soon as QEMU takes it, as somebody who is mistaken does.

        Return who serves the vTPM then: both guests run, and later one boots where none is served.
        """
        source, destination = self._testbed.a, self._testbed.b
        assert migration.wait_until_ended(outcome.guest_of(source)) == "completed"
        outcome.guest_of(source).resume()
        migration.wait_until(outcome.guest_of(destination), "running")
        owners = self._checked(destination) + self._checked(source)
        idle = self._without(owners)
        for host in idle:
            host.restart_vtpmd()  # what is on its disk is what counts
        return owners + self._boots(idle)

    def restart(self) -> None:
        """Start what has ended, as a supervisor does."""
        for host in self._testbed.hosts.values():
            if not host.is_serving:
                host.restart_vtpmd()

    def settle(self) -> list[Owner]:
        """Start what has ended, have the guest go on if one can; return who serves the vTPM.

        A guest that goes on has checked its TPM, and found all that it had acknowledged.
        """
        self.restart()
        if self._has_begun:
            self.wait_until_decided()
        owners = self._guests()
        if self._moved_in_whole_blobs:
            return owners  # as with swtpm: vtpmd has nothing to say of whose they are
        idle = self._without(owners)
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        booted: list[Owner] = []
        while not (owners or booted) and time.monotonic() < deadline:
            booted = self._boots(idle)
            time.sleep(RETRY_S)
        return owners + (self._boots(idle) if owners else booted)

    def _without(self, owners: list[Owner]) -> list[Host]:
        """Return the hosts that serve no guest."""
        sides = [owner.side for owner in owners]
        return [host for side, host in self._testbed.hosts.items() if side not in sides]

    @property
    def _moved_in_whole_blobs(self) -> bool:
        return self.progress.destination_answers("SET_STATEBLOB") > 1

    def _guests(self) -> list[Owner]:
        """Have the guest go on where it is; return where it finds its TPM."""
        try:
            return self._checked(outcome.go_on(self._testbed.a, self._testbed.b))
        except outcome.GuestLostError:
            return []

    def _checked(self, host: Host) -> list[Owner]:
        guest = outcome.guest_of(host)
        try:
            guest.command("stop")
            found = guest.check()
            guest.command("work 30")
            guest.check()
        except WorkloadFailedError as error:
            assert REFUSED.search(str(error)), error  # else its TPM is not what it was
            host.close_guest()
            return []
        assert differences(self._facts, found, worked=True) == []
        return [Owner(host.side, to_guest=True)]

    def _boots(self, hosts: list[Host]) -> list[Owner]:
        """Try where a guest can boot with this vTPM: without a QEMU, and all at the same time."""
        owners, guests = [], []
        for host in hosts:
            host.close_guest()
            if not host.is_serving:
                host.restart_vtpmd()
            # Without it a start would make another TPM, which is nothing that an operator wants.
            if not (host.state / "tpm2-00.permall").exists():
                continue
            guest = RawGuest(host.vtpmd.control_path)
            guests.append(guest)
            if self._is_served(guest):
                owners.append(Owner(host.side, to_guest=False))
        for guest in guests:
            guest.close()
        return owners

    def _is_served(self, guest: RawGuest) -> bool:
        """Power the TPM on; tell whether that works, and is the guest's."""
        try:
            guest.control.init()
            guest.tpm.startup()
            counter = guest.tpm.nv_read(COUNTER_INDEX, COUNTER_BYTES, COUNTER_AUTH)
        except (ControlError, TpmError):
            return False
        assert int.from_bytes(counter, "big") >= int(self._facts["counter"])
        return True
