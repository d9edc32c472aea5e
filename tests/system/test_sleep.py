"""What a guest's power does to its TPM: it sleeps, and moves or is reset while it does.

Invariant of the design that is checked: 12 (a guest's own view of power is kept). Real Linux guests
suspend to RAM: their kernel sends TPM2_Shutdown(STATE), QEMU resets the TPM when they wake up, and
their firmware sends TPM2_Startup(STATE). QEMU before 9.0 wakes a guest up when it migrates.
"""

from functools import partial
from hashlib import sha256

import pytest

from tests.harness import migration
from tests.harness.credentials import credentials
from tests.harness.emulator import Emulator, EmulatorKind, Peering
from tests.harness.facts import Facts
from tests.harness.guest import Guest, Machine
from tests.harness.handover import wait_until
from tests.harness.lab import Lab
from tests.harness.management import Management

# SeaBIOS does not give a q35 its power management back: it falls asleep once.
SLEEPS = {"pc": 3, "q35": 1}
MACHINE = Machine(machine="pc")
VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
PAIRS = [(VTPMD, VTPMD), (SWTPM, VTPMD), (VTPMD, SWTPM)]
STAYS_ASLEEP_FROM = 9  # QEMU's major version


def measure(guest: Guest, before: Facts, what: str) -> str:
    """Have the guest measure something, and return what its PCR holds then."""
    guest.command(f"measure {what}")
    held = bytes.fromhex(before["pcr_kept"])
    return sha256(held + sha256(what.encode()).digest()).hexdigest()


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


def follows(management: Management) -> bool:
    """Say whether a vtpmd has found its QEMU's monitor."""
    return bool(management.command("query-status")["qemu"] == "following")


def is_woken_up_to_move(guest: Guest) -> bool:
    """Say whether QEMU wakes a guest up that it migrates."""
    return bool(guest.qmp("query-version")["qemu"]["major"] < STAYS_ASLEEP_FROM)


def migrate_asleep(lab: Lab, guest: Guest, there: Guest) -> None:
    """Migrate a guest that sleeps.

    A QEMU that wakes it up may have the TPM's state before it has reset it; then the guest never
    finds out, whatever its emulator is. So it is let go on only once it has done so.
    """
    migration.set_capabilities(guest)
    migration.set_capabilities(there)
    if is_woken_up_to_move(guest):
        pause = {"capability": "pause-before-switchover", "state": True}
        guest.qmp("migrate-set-capabilities", capabilities=[pause])
    guest.qmp("migrate", uri=migration.listen_unix(there, lab.new_path("stream")))
    if is_woken_up_to_move(guest):
        guest.wait_for_event("WAKEUP")
    assert migration.wait_until_ended(guest) == "completed"
    wait_until(lambda: there.status in ("running", "suspended"))


def move_asleep(lab: Lab, source: Emulator, destination: Emulator, *, arms: bool) -> None:
    """Move a guest that sleeps; check that it wakes up as it was, and falls asleep there again."""
    guest, there = lab.guest(source, MACHINE), lab.guest(destination, MACHINE, migration.INCOMING)
    guest.wait_for_workload()
    before = guest.command("power")
    before["pcr_kept"] = measure(guest, before, "at-the-source")
    guest.fall_asleep()
    if arms:
        management = lab.management(source)
        for each in (management, lab.management(destination)):
            wait_until(partial(follows, each))
        assert management.arm(destination.address)["event"] == "VTPM_ARMED"
    migrate_asleep(lab, guest, there)
    if arms:
        management.wait_for("VTPM_HANDED_OVER")

    there.wake_up()

    assert_slept(before, there.command("power"), 1)
    before["pcr_kept"] = measure(there, before, "at-the-destination")
    there.fall_asleep()
    there.wake_up()
    assert_slept(before, there.command("power"), 2)


@pytest.mark.parametrize("kinds", PAIRS, ids="-to-".join)
def test_invariant_12_guest_moves_in_whole_blobs_while_it_sleeps(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind]
) -> None:
    source, destination = (lab.emulator(kind) for kind in kinds)
    move_asleep(lab, source, destination, arms=False)


def test_invariant_12_guest_moves_with_a_tail_while_it_sleeps(lab: Lab) -> None:
    peering = Peering(credentials=credentials(), follows_qemu=True)
    source, destination = lab.peer(peering), lab.peer(peering)
    move_asleep(lab, source, destination, arms=True)
