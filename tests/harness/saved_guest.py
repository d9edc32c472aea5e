"""A guest that has booted once, and that many tests go on with, each from the same moment.

QEMU saves it to a file as `virsh save` does: its vTPM's state is in there, in whole blobs.
"""

from pathlib import Path
from typing import NamedTuple

from tests.harness.lab import Lab
from vtpmd.testing import migration
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.testing.facts import Facts
from vtpmd.testing.guest import Guest, Machine

MACHINE = Machine()


class SavedGuest(NamedTuple):
    """A guest in a file, and what it found in its TPM before."""

    path: Path
    facts: Facts


def save(lab: Lab) -> SavedGuest:
    """Boot a guest, let it use its TPM, and save it."""
    guest = lab.booted_guest(lab.emulator(EmulatorKind.VTPMD), MACHINE)
    facts = guest.check()
    path = lab.new_path("saved-guest")
    migration.set_capabilities(guest, return_path=False)
    guest.pause()
    guest.qmp("migrate", uri=f"exec:cat >{path}")
    assert migration.wait_until_ended(guest) == "completed"
    guest.close()
    return SavedGuest(path, facts)


def load(saved: SavedGuest, guest: Guest) -> None:
    """Let a QEMU that waits for a guest go on with this one; return when it runs."""
    guest.qmp("migrate-incoming", uri=f"exec:cat {saved.path}")
    migration.wait_until(guest, "paused")
    guest.resume()


def go_on(saved: SavedGuest, emulator: Emulator, lab: Lab) -> Guest:
    """Have a new QEMU, with an emulator's TPM, go on with the guest."""
    guest = lab.guest(emulator, MACHINE, migration.INCOMING)
    load(saved, guest)
    return guest
