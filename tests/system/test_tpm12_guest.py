"""Linux guests with a TPM 1.2 behind tpm-tis: they boot, use it, sleep, and move while they use it.

Invariants 5 (the guest finds its TPM as it was), 6 (whole blobs are swtpm's) and 12 (a guest that
sleeps wakes up). The guest checks its PCR and NV memory in each step; owner and key are the test's,
by commands that go through the guest's driver.
"""

from typing import NamedTuple

import pytest

from tests.harness.guest_tpm12 import tpm12_of
from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest12
from tests.support import tpm12
from tests.support.tpm12 import Key
from tests.system.test_loaded_snapshots import epoch_at
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.management import Management
from vtpmd.testing.waiting import wait_until
from vtpmd.wire.tpm import TpmVersion

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
MACHINE = Machine()
OWNER, STORAGE, USAGE, DIGEST = (letter * 20 for letter in (b"o", b"s", b"k", b"d"))
NV_BYTES = 64


class Owned(NamedTuple):
    """A key of the guest's TPM, and where it is loaded."""

    key: Key
    handle: int


def enable(lab: Lab, emulator: Emulator) -> None:
    """Do what a vendor does: firmware leaves a new TPM as it is, disabled, and locks that."""
    first = lab.raw_guest(emulator, RawGuest12)
    assert isinstance(first, RawGuest12)
    first.control.init()
    first.tpm12.startup()
    first.tpm12.enable()
    first.tpm12.nv_define(tpm12.NV_INDEX, NV_BYTES)
    first.control.stop()
    first.data.close()
    first.close()


def booted_guest(lab: Lab, emulator: Emulator, machine: Machine = MACHINE) -> tuple[Guest, Owned]:
    """Boot a guest, become its TPM's owner and load a key, and let the guest use it."""
    enable(lab, emulator)
    guest = lab.guest(emulator, machine)
    guest.wait_for_workload()
    tpm = tpm12_of(guest)
    tpm.create_endorsement_key()
    tpm.take_ownership(OWNER, STORAGE)
    key = tpm.create_key(STORAGE, USAGE)
    owned = Owned(key, tpm.load_key(key, STORAGE))
    guest.command("work 5 tpm-1.2")
    check(guest, owned)
    return guest, owned


def check(guest: Guest, owned: Owned) -> None:
    """Let the guest check what it has done, and sign with the key that is loaded."""
    guest.command("check12")
    owned.key.verify(DIGEST, tpm12_of(guest).sign(owned.handle, DIGEST, USAGE))


@pytest.mark.parametrize(("source", "destination"), [(VTPMD, SWTPM), (SWTPM, VTPMD)])
def test_guest_moves_with_whole_blobs(
    lab: Lab, source: EmulatorKind, destination: EmulatorKind
) -> None:
    version = TpmVersion.TPM_1_2
    first, second = (lab.emulator(kind, version=version) for kind in (source, destination))
    guest, owned = booted_guest(lab, first)
    there = lab.guest(second, MACHINE, migration.INCOMING)
    for each in (guest, there):
        migration.set_capabilities(each)
    guest.command("start tpm-1.2")
    migration.migrate(guest, there, migration.listen_unix(there, lab.new_path("stream")))
    assert int(there.command("stop")["operations"]) > 0
    check(there, owned)
    there.command("work 5 tpm-1.2")


def test_a_snapshot_that_is_loaded_begins_the_next_epoch(lab: Lab) -> None:
    """Each time, and the guest finds the TPM that it had; a crash right after keeps it."""
    emulator = lab.emulator(VTPMD, version=TpmVersion.TPM_1_2)
    guest, owned = booted_guest(lab, emulator, Machine(disk=lab.new_disk()))
    assert guest.human_monitor("savevm checked") == ""
    for epoch in (1, 2):
        guest.command("work 5 tpm-1.2")
        assert epoch_at(emulator.state) == epoch - 1
        assert guest.human_monitor("loadvm checked") == ""
        check(guest, owned)
        emulator.program.wait_for_output(f"; restore epoch {epoch} begins")
        assert epoch_at(emulator.state) == epoch
    emulator.kill()
    assert epoch_at(emulator.state) == 2


def test_guest_moves_with_a_tail_and_again_as_it_sleeps(lab: Lab) -> None:
    """What it says before it sleeps, the firmware's TPM_Startup finds where it wakes up."""
    peering = Peering(credentials=credentials(), follows_qemu=True)
    version = TpmVersion.TPM_1_2
    first, second, third = (lab.peer(peering, version=version) for _ in range(3))
    guest, owned = booted_guest(lab, first)
    there = wait_for_armed(lab, first, second)
    guest.command("start tpm-1.2")
    for each in (guest, there):
        migration.set_capabilities(each)
    migration.migrate(guest, there, migration.listen_unix(there, lab.new_path("stream")))
    manage = lab.management(first)
    wait_until(lambda: manage.migration()["outcome"] == "handed-over")
    assert manage.migration()["tail-bytes"] > 0
    assert int(there.command("stop")["operations"]) > 0
    check(there, owned)
    there.command("work 5 tpm-1.2")

    last = wait_for_armed(lab, second, third)
    there.fall_asleep()
    # With a tail, or with whole blobs: its TPM starts for a second, where QEMU wakes it up to move.
    migration.migrate_asleep(there, last, lab.new_path("stream"))
    last.wake_up()
    check(last, owned)
    last.command("work 5 tpm-1.2")


def wait_for_armed(lab: Lab, source: Emulator, destination: Emulator) -> Guest:
    """Arm a session to a QEMU that waits for a guest, which is returned."""
    there, managed = (
        lab.guest(destination, MACHINE, migration.INCOMING),
        lab.management(destination),
    )
    wait_until(lambda: is_followed(managed))
    managed.close()
    manage = lab.management(source)
    assert manage.arm(destination.address)["event"] == "VTPM_ARMED"
    manage.close()
    return there


def is_followed(manage: Management) -> bool:
    return bool(manage.command("query-status")["qemu"] == "following")
