"""The disk loses power, fails, is full, stalls, or becomes read-only, under a load of NV writes.

Invariants of the design that are checked: 1 (no change is acknowledged that is not durable) and 2
(what comes up is what was acknowledged last, at most with the one command in it that was not).
The disk is real, see `vtpmd.testing.disk`. After each fault it loses power, so that what was never
synced is gone; a canary proves that this finds a sync that was left out.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from tests.harness import canary
from tests.harness.followed import followed
from tests.harness.handover import (
    assert_serves,
    assert_serves_nothing,
    assert_tail,
)
from tests.harness.killing import TEMPORARY_FILES, meanwhile
from tests.harness.lab import Lab
from tests.harness.nv_load import NvLoad, WriteLostError
from tests.harness.raw_guest import RawGuest
from tests.support.emulator_client import ControlClient
from tests.support.file_names import JOURNAL_NAME
from tests.support.tpm2 import ReturnCode, TpmError
from vtpmd.testing.disk import Disk, FileSystem
from vtpmd.testing.emulator import Emulator, EmulatorKind

LATEST_S = 0.030  # after the first command of a round: up to some hundred commits
ROUNDS = 10
CANARY_ROUNDS_MAX = 30
STEPS = 20
STALL_TIMEOUT_S = 60.0  # it is told of after ten
STALLED_S = 0.5  # less than an INIT waits for its Grant
STALLS, ANSWERS = "the storage has not answered for 10 s: ", "the storage answers again, after "
COMMITS_IN_A_JOURNAL = 200  # at least, of the load's mix


class Fault(NamedTuple):
    """What happens to a disk, and the kernel's reason why a write then fails."""

    name: str
    strike: Callable[[Disk], None]
    reason: str  # a pattern
    at_rest: bool = False  # between two commands: a file that is being replaced makes room later


POWER = Fault("power", Disk.lose_power, "Input/output error")
EIO = Fault("eio", lambda disk: disk.fail_writes(True), "Input/output error")
FULL = Fault("full", Disk.fill, "No space left on device", at_rest=True)
# A write meets the one, a sync that is under way the other.
READ_ONLY = Fault("read-only", Disk.become_read_only, "(Read-only file system|Input/output error)")

each_fault = pytest.mark.parametrize(
    "fault", [POWER, EIO, FULL, READ_ONLY], ids=lambda fault: fault.name
)


class Faults:
    """A vTPM on a disk, and the rounds in which something happens to that."""

    def __init__(self, lab: Lab, disk: Disk, random: Random) -> None:
        """Make a vTPM for the load, and stop it in order."""
        self.load = NvLoad(random)
        self._lab = lab
        self._disk = disk
        self._random = random
        emulator, guest = self._start()
        self.load.define(guest.tpm)
        guest.close()
        assert emulator.stop() == 0

    def start(self) -> tuple[Emulator, RawGuest]:
        """Start a daemon, and hold its vTPM against what that owes."""
        emulator, guest = self._start()
        self.load.check(guest.tpm)
        return emulator, guest

    def round(self, fault: Fault) -> None:
        """Let a fault come under load, and the power fail after the first command that is refused.

        WriteLostError when the vTPM comes up with less than it owes, or with something else.
        """
        emulator, guest = self.start()
        for _ in range(self._random.randrange(STEPS)):
            self.load.step(guest.tpm)
        if fault.at_rest:
            fault.strike(self._disk)
            self.work_until_refused(guest)
        else:
            with meanwhile(self._strike_soon(fault)):
                self.work_until_refused(guest)
        assert_says_why(emulator, fault)
        self.lose_power(emulator, guest)

    def work_until_refused(self, guest: RawGuest) -> None:
        """Run the load until a command fails, and demand that no other succeeds after it."""
        with pytest.raises(TpmError) as refused:
            while True:
                self.load.step(guest.tpm)
        assert refused.value.return_code == ReturnCode.FAILURE
        with pytest.raises(TpmError, match="TPM_RC 0x101"):
            guest.tpm.random(8)

    def lose_power(self, emulator: Emulator, guest: RawGuest) -> None:
        """Lose the power of the disk, and with it what runs; then repair the disk."""
        self._disk.lose_power()
        emulator.kill()
        guest.close()
        self._disk.repair()

    def _strike_soon(self, fault: Fault) -> Callable[[], None]:
        delay_s = self._random.uniform(0, LATEST_S)

        def strike() -> None:
            time.sleep(delay_s)
            fault.strike(self._disk)

        return strike

    def _start(self) -> tuple[Emulator, RawGuest]:
        emulator = self._lab.emulator(EmulatorKind.VTPMD, self._disk.path / "state")
        guest = self._lab.raw_guest(emulator)
        guest.control.init()
        guest.tpm.startup()
        return emulator, guest


def assert_says_why(emulator: Emulator, fault: Fault) -> None:
    """One line says what could not be stored, and why."""
    lines = [line for line in emulator.program.output.splitlines() if "cannot store" in line]
    assert len(lines) == 1, emulator.program.output
    assert re.search(f": {fault.reason}; ", lines[0])


@each_fault
def test_invariants_1_and_2_what_was_acknowledged_survives(
    lab: Lab, disk: Disk, random: Random, fault: Fault
) -> None:
    """The guest gets errors, one line says why, and after the repair everything is there."""
    faults = Faults(lab, disk, random)
    for _ in range(ROUNDS):
        faults.round(fault)
        if fault is FULL:
            disk.make_room()
    emulator, guest = faults.start()
    guest.close()
    assert emulator.stop() == 0
    assert faults.load.acknowledged > ROUNDS


@pytest.fixture(scope="module")
def unsynced_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the engine that leaves out syncs."""
    replaced = ("fsync", "fdatasync")
    return canary.build("unsynced", replaced, tmp_path_factory.mktemp("unsynced"))


@each_fault
def test_an_engine_that_leaves_out_a_sync_is_caught(
    lab: Lab,
    disk: Disk,
    random: Random,
    fault: Fault,
    unsynced_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was acknowledged without a sync is lost with the power."""
    faults = Faults(lab, disk, random)
    monkeypatch.setenv("PYTHONPATH", str(unsynced_engine))
    with pytest.raises(WriteLostError, match="acknowledged"):
        for _ in range(CANARY_ROUNDS_MAX):
            faults.round(fault)
            if fault is FULL:
                disk.make_room()


@pytest.mark.parametrize(
    ("fault", "repair"),
    [(FULL, Disk.make_room), (EIO, lambda disk: disk.fail_writes(False))],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_guests_restart_is_enough_when_the_disk_works_again(
    lab: Lab, disk: Disk, random: Random, fault: Fault, repair: Callable[[Disk], None]
) -> None:
    """The daemon goes on; its vTPM starts with what was acknowledged, and takes new writes."""
    faults = Faults(lab, disk, random)
    emulator, guest = faults.start()
    fault.strike(disk)
    faults.work_until_refused(guest)
    repair(disk)

    guest.control.init()
    guest.tpm.startup()
    faults.load.check(guest.tpm)
    for _ in range(STEPS):
        faults.load.step(guest.tpm)
    faults.lose_power(emulator, guest)
    faults.start()


def test_a_full_disk_stops_no_commit_while_the_journal_has_room(
    lab: Lab, disk: Disk, random: Random
) -> None:
    """It cannot be folded, which is said once; what was written to it survives a loss of power."""
    faults = Faults(lab, disk, random)
    emulator, guest = faults.start()
    faults.load.step(guest.tpm)
    disk.fill()
    before = faults.load.acknowledged
    faults.work_until_refused(guest)
    assert faults.load.acknowledged - before > COMMITS_IN_A_JOURNAL
    said = [line for line in emulator.program.output.splitlines() if "cannot fold" in line]
    assert len(said) == 1
    assert f": {FULL.reason}; " in said[0]
    faults.lose_power(emulator, guest)
    disk.make_room()
    faults.start()


def test_a_full_btrfs_stops_no_commit_while_the_journal_has_room(lab: Lab, random: Random) -> None:
    """It would copy what takes another's place, which needs room: the journal's files say not to.

    So does the one that the engine made when it folded the first.
    """
    disk = Disk(lab.directory / "disk", FileSystem.BTRFS)
    lab.close_at_end(disk)
    faults = Faults(lab, disk, random)
    emulator, guest = faults.start()
    faults.load.step(guest.tpm)
    first = (emulator.state / JOURNAL_NAME).stat().st_ino
    while (emulator.state / JOURNAL_NAME).stat().st_ino == first:
        faults.load.step(guest.tpm)
    disk.fill()
    before = faults.load.acknowledged
    faults.work_until_refused(guest)
    assert faults.load.acknowledged - before > COMMITS_IN_A_JOURNAL
    emulator.kill()
    guest.close()
    disk.make_room()
    faults.start()


def files_of(emulator: Emulator) -> dict[str, bytes]:
    """Return what is in a state directory, but for temporary files."""
    paths = (
        path
        for path in emulator.state.iterdir()
        if path.is_file() and not path.match(TEMPORARY_FILES)
    )
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("fault", [FULL, READ_ONLY], ids=lambda fault: fault.name)
def test_a_start_that_cannot_fold_says_why_and_changes_nothing(
    lab: Lab, disk: Disk, random: Random, fault: Fault
) -> None:
    """The journal of the crash stays, and is folded when the disk works again."""
    faults = Faults(lab, disk, random)
    emulator, guest = faults.start()
    faults.load.step(guest.tpm)
    guest.close()
    emulator.kill()
    fault.strike(disk)
    before = files_of(emulator)
    with pytest.raises(RuntimeError, match=f"ended with status 1: .*{fault.reason}"):
        faults.start()
    assert files_of(emulator) == before
    disk.repair()
    if fault is FULL:
        disk.make_room()
    faults.start()


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_disk_that_stalls_is_waited_for(lab: Lab, disk: Disk, is_alone: bool) -> None:
    """One line says so, and one that it is over; the guest's command is answered then."""
    state = disk.path / "state"
    emulator = lab.emulator(EmulatorKind.VTPMD, state) if is_alone else lab.daemon(state)
    guest = lab.raw_guest(emulator)
    guest.boot()
    with ThreadPoolExecutor(1) as executor:
        with disk.stalled():
            work = executor.submit(guest.work)
            emulator.program.wait_for_output(STALLS, STALL_TIMEOUT_S)
            guest.control.set_locality(1)
            assert not work.done()
            assert ANSWERS not in emulator.program.output
        work.result(STALL_TIMEOUT_S)
    emulator.program.wait_for_output(ANSWERS)
    assert emulator.program.output.count(STALLS) == 1
    guest.work()
    assert emulator.stop() == 0


def test_qemu_that_goes_while_the_disk_stalls_makes_way_for_the_next(lab: Lab, disk: Disk) -> None:
    """The command that waits for the disk has the TPM's lock, which a connection does not need."""
    emulator = lab.emulator(EmulatorKind.VTPMD, disk.path / "state")
    guest = lab.raw_guest(emulator)
    guest.boot()
    with ThreadPoolExecutor(1) as executor:
        with disk.stalled():
            work = executor.submit(guest.work)
            time.sleep(STALLED_S)
            guest.control.socket.close()
            with ControlClient(emulator.control_path) as next_one:
                next_one.get_capability()
            assert not work.done()
        work.result(STALL_TIMEOUT_S)
    assert emulator.stop() == 0


def test_an_end_that_waits_for_its_disk_says_so(lab: Lab, disk: Disk) -> None:
    """No other thread is left then, and the journal is folded all the same."""
    emulator = lab.emulator(EmulatorKind.VTPMD, disk.path / "state")
    guest = lab.raw_guest(emulator)
    guest.boot()
    with disk.stalled():
        os.kill(emulator.program.pid, signal.SIGTERM)
        emulator.program.wait_for_output(STALLS, STALL_TIMEOUT_S)
        assert emulator.program.exit_code is None
    assert emulator.program.wait() == 0
    assert ANSWERS in emulator.program.output
    assert JOURNAL_NAME not in files_of(emulator)


def test_invariant_3_nothing_is_granted_while_the_record_is_not_durable(
    lab: Lab, disk: Disk
) -> None:
    """QEMU has the tail by then, and brings it; its INIT waits for the disk of the source."""
    source, monitor = followed(lab, disk.path / "state", is_incoming=False)
    destination, incoming = followed(lab, None, is_incoming=True)
    source.guest.boot()
    assert source.manage.arm(destination.vtpmd.address)["event"] == "VTPM_ARMED"
    source.guest.work()
    facts = source.guest.facts()

    def move() -> None:
        blobs = source.guest.save()
        assert_tail(blobs)
        destination.guest.load(blobs)

    with ThreadPoolExecutor(1) as executor:
        with disk.stalled():
            for each in (incoming, monitor):
                each.migration("setup")
                each.migration("active")
            time.sleep(STALLED_S)  # the record is to be written by then
            monitor.stop()
            time.sleep(STALLED_S)  # the tail is made; if it is not, QEMU waits for vtpmd instead
            moved = executor.submit(move)
            time.sleep(STALLED_S)
            assert not moved.done()
            assert_serves_nothing(destination.guest)
        moved.result(STALL_TIMEOUT_S)
    assert destination.guest.facts() == facts
    assert_serves(destination.guest)
