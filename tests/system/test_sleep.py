"""What a guest's power does to its TPM: it sleeps, and moves or is reset while it does.

Invariant of the design that is checked: 12 (a guest's own view of power is kept). Real Linux guests
suspend to RAM: their kernel sends TPM2_Shutdown(STATE), QEMU resets the TPM when they wake up, and
their firmware sends TPM2_Startup(STATE). QEMU before 9.0 wakes a guest up when it migrates.

A command that changes something after that word makes the TPM forget it, and some firmware sends
one. Here a workload does that whose kernel does not know of the TPM, and would say the word again.
"""

from dataclasses import replace
from functools import partial
from hashlib import sha256

import pytest

from tests.harness.lab import Lab
from vtpmd.testing import migration
from vtpmd.testing.credentials import credentials
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.facts import Facts
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.management import Management
from vtpmd.testing.waiting import wait_until

# SeaBIOS does not give a q35 its power management back: it falls asleep once.
SLEEPS = {"pc": 3, "q35": 1}
MACHINE = Machine(machine="pc")
TALKS_ON = Machine(machine="pc", has_tpm_driver=False)
VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
PAIRS = [(VTPMD, VTPMD), (SWTPM, VTPMD), (VTPMD, SWTPM)]

in_between = pytest.mark.parametrize(
    "machine", [MACHINE, TALKS_ON], ids=["nothing-in-between", "command-in-between"]
)


def measure(guest: Guest, before: Facts, what: str) -> str:
    """Have the guest measure something, and return what its PCR holds then."""
    guest.command(f"measure {what}")
    held = bytes.fromhex(before["pcr_kept"])
    return sha256(held + sha256(what.encode()).digest()).hexdigest()


def fall_asleep(guest: Guest, before: Facts) -> None:
    """Have the guest fall asleep, by its kernel alone or with a command after the last word."""
    if not guest.machine.has_tpm_driver:
        guest.command("shutdown")
        before["pcr_kept"] = measure(guest, before, "after-the-last-word")
    guest.fall_asleep()


def assert_slept(before: Facts, now: Facts, sleeps: int) -> None:
    """Check that the TPM was resumed so many times, and not reset, and lost no measurement."""
    restarts = int(before["restart_count"]) + sleeps
    assert now == {**before, "restart_count": str(restarts)}


@pytest.mark.parametrize(("machine", "sleeps"), SLEEPS.items())
def test_invariant_12_guest_wakes_up_with_what_it_has_measured(
    lab: Lab, machine: str, sleeps: int
) -> None:
    guest = lab.guest(lab.emulator(VTPMD), Machine(machine=machine))
    guest.wait_for_workload()
    before = guest.command("power")
    for number in range(sleeps):
        before["pcr_kept"] = measure(guest, before, f"before-{number}")
        guest.fall_asleep()
        guest.wake_up()
        assert_slept(before, guest.command("power"), number + 1)


def test_invariant_12_guest_uses_its_tpm_between_its_last_word_and_its_sleep(lab: Lab) -> None:
    """By what it has measured, and by what a TPM that was not shut down counts as a failure."""
    guest = lab.guest(lab.emulator(VTPMD), TALKS_ON)
    guest.wait_for_workload()
    guest.command("touch")
    before = guest.command("power")
    for number in range(SLEEPS["pc"]):
        guest.command("shutdown")
        before["pcr_kept"] = measure(guest, before, f"between-{number}")
        guest.command("touch")
        guest.fall_asleep()
        guest.wake_up()
        assert_slept(before, guest.command("power"), number + 1)


def test_invariant_12_guest_that_is_reset_while_it_sleeps_wakes_up(lab: Lab) -> None:
    """Its firmware finds in the clock's memory that it slept."""
    guest = lab.guest(lab.emulator(VTPMD), MACHINE)
    guest.wait_for_workload()
    before = guest.command("power")
    before["pcr_kept"] = measure(guest, before, "something")
    guest.fall_asleep()
    guest.qmp("system_reset")
    wait_until(lambda: guest.status != "suspended")
    guest.resume()  # QEMU leaves to others what had not run
    guest.wake_up()
    assert_slept(before, guest.command("power"), 1)


@in_between
def test_invariant_12_guest_goes_back_to_where_it_slept(lab: Lab, machine: Machine) -> None:
    """A snapshot that was taken meanwhile is loaded when it sleeps again: it stays asleep."""
    guest = lab.guest(lab.emulator(VTPMD), replace(machine, disk=lab.new_disk()))
    guest.wait_for_workload()
    before = guest.command("power")
    before["pcr_kept"] = measure(guest, before, "something")
    fall_asleep(guest, before)
    assert guest.human_monitor("savevm asleep") == ""
    assert guest.status == "suspended"
    guest.wake_up()
    assert_slept(before, guest.command("power"), 1)
    guest.command("measure what-is-gone-then")
    guest.fall_asleep()

    assert guest.human_monitor("loadvm asleep") == ""

    guest.wake_up()
    assert_slept(before, guest.command("power"), 1)
    before["pcr_kept"] = measure(guest, before, "afterwards")
    fall_asleep(guest, before)
    guest.wake_up()
    assert_slept(before, guest.command("power"), 2)


def follows(management: Management) -> bool:
    """Say whether a vtpmd has found its QEMU's monitor."""
    return bool(management.command("query-status")["qemu"] == "following")


def move_asleep(
    lab: Lab, source: Emulator, destination: Emulator, machine: Machine, *, arms: bool
) -> None:
    """Move a guest that sleeps; check that it wakes up as it was, and falls asleep there again."""
    guest, there = lab.guest(source, machine), lab.guest(destination, machine, migration.INCOMING)
    guest.wait_for_workload()
    before = guest.command("power")
    before["pcr_kept"] = measure(guest, before, "at-the-source")
    fall_asleep(guest, before)
    if arms:
        management = lab.management(source)
        for each in (management, lab.management(destination)):
            wait_until(partial(follows, each))
        assert management.arm(destination.address)["event"] == "VTPM_ARMED"
    migration.migrate_asleep(guest, there, lab.new_path("stream"))
    if arms:
        management.wait_for("VTPM_HANDED_OVER")

    there.wake_up()

    assert_slept(before, there.command("power"), 1)
    before["pcr_kept"] = measure(there, before, "at-the-destination")
    fall_asleep(there, before)
    there.wake_up()
    assert_slept(before, there.command("power"), 2)


@pytest.mark.parametrize("kinds", PAIRS, ids="-to-".join)
def test_invariant_12_guest_moves_in_whole_blobs_while_it_sleeps(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind]
) -> None:
    source, destination = (lab.emulator(kind) for kind in kinds)
    move_asleep(lab, source, destination, MACHINE, arms=False)


def test_invariant_12_guest_that_talked_on_moves_in_whole_blobs_while_it_sleeps(lab: Lab) -> None:
    """The state does not say that it sleeps: vtpmd's own word beside it does."""
    move_asleep(lab, lab.emulator(VTPMD), lab.emulator(VTPMD), TALKS_ON, arms=False)


@in_between
def test_invariant_12_guest_moves_with_a_tail_while_it_sleeps(lab: Lab, machine: Machine) -> None:
    peering = Peering(credentials=credentials(), follows_qemu=True)
    source, destination = lab.peer(peering), lab.peer(peering)
    move_asleep(lab, source, destination, machine, arms=True)
