"""What QEMU has brought in whole blobs, and whose INIT was answered, survives a loss of power.

Invariant 1, where the engine had made room for it before it came (csrc/engine/room.h), and where it
had not. A client of the sockets stands for QEMU; the disk is real, and loses power.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import canary
from tests.harness.lab import Lab
from tests.harness.raw_guest import NV_INDEX, NV_SIZE, RawGuest
from tests.support.file_names import NAMES, PERMANENT_NAME
from vtpmd.daemon.engine import EXIT_JOURNAL, EXIT_REMOVED
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Emulator, EmulatorKind

ROOM_TIMEOUT_S = 20.0
POLL_S = 0.002
ROUNDS = 5
SAFE = f"the state is safe in {NAMES.arrived}"


@pytest.fixture
def source(lab: Lab) -> RawGuest:
    """Give a guest that uses its TPM."""
    guest = lab.raw_guest(lab.emulator(EmulatorKind.VTPMD))
    guest.boot()
    return guest


def waiting(lab: Lab, state: Path, *, has_room: bool) -> tuple[Emulator, RawGuest]:
    """Start a destination whose QEMU waits for a guest: until there is room, or not at all."""
    emulator = lab.emulator(EmulatorKind.VTPMD, state)
    guest = lab.raw_guest(emulator)
    guest.control.stop()
    guest.control.set_buffer_size()
    deadline = time.monotonic() + ROOM_TIMEOUT_S
    while has_room and not (state / NAMES.arrived).exists():
        assert time.monotonic() < deadline, "no room is made"
        time.sleep(POLL_S)
    return emulator, guest


@contextmanager
def after_power_loss(
    lab: Lab, disk: Disk, emulator: Emulator, guest: RawGuest
) -> Iterator[RawGuest]:
    """Lose power, and give a guest that boots from what is there."""
    disk.lose_power()
    emulator.kill()
    guest.close()
    disk.repair()
    emulator = lab.emulator(EmulatorKind.VTPMD, emulator.state)
    guest = lab.raw_guest(emulator)
    guest.control.init()
    guest.tpm.startup()
    yield guest
    guest.close()
    assert emulator.stop() == 0


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("waits_s", [0.0, 0.2], ids=["at once", "in its file"])
def test_invariant_1_what_qemu_brought_survives(
    lab: Lab, disk: Disk, source: RawGuest, has_room: bool, waits_s: float
) -> None:
    state = disk.path / "state"
    emulator, guest = waiting(lab, state, has_room=has_room)
    guest.load(source.save())
    time.sleep(waits_s)
    assert not (has_room and waits_s) or not (state / NAMES.arrived).exists()

    with after_power_loss(lab, disk, emulator, guest) as again:
        assert again.tpm.nv_read(NV_INDEX, NV_SIZE) == source.facts().nv
        assert not (state / NAMES.arrived).exists()


def test_invariant_1_what_a_guest_writes_then_survives(
    lab: Lab, disk: Disk, source: RawGuest
) -> None:
    """From the first command on, however soon it comes."""
    for round_number in range(ROUNDS):
        emulator, guest = waiting(lab, disk.path / f"state{round_number}", has_room=True)
        guest.load(source.save())
        content = round_number.to_bytes(NV_SIZE, "big")
        guest.tpm.nv_write(NV_INDEX, content)
        with after_power_loss(lab, disk, emulator, guest) as again:
            assert again.tpm.nv_read(NV_INDEX, NV_SIZE) == content
        source.resume()


def test_what_comes_onto_a_full_disk_stays_where_it_came(
    lab: Lab, disk: Disk, source: RawGuest
) -> None:
    """There is room for it, and none for its file; the guest is served, and starts again later."""
    emulator, guest = waiting(lab, disk.path / "state", has_room=True)
    disk.fill()
    guest.load(source.save())
    assert guest.facts() == source.facts()
    guest.control.shutdown()
    assert emulator.program.wait() == EXIT_JOURNAL
    assert SAFE in emulator.program.output
    disk.make_room()
    again = lab.raw_guest(lab.emulator(EmulatorKind.VTPMD, emulator.state))
    again.control.init()
    again.tpm.startup()
    assert again.tpm.nv_read(NV_INDEX, NV_SIZE) == source.facts().nv


def test_what_came_is_not_said_to_be_safe_in_a_directory_that_is_removed(
    lab: Lab, disk: Disk, source: RawGuest
) -> None:
    """Where it could have had no file before, too."""
    emulator, guest = waiting(lab, disk.path / "state", has_room=True)
    disk.fill()
    guest.load(source.save())
    emulator.program.wait_for_output(SAFE)
    said = emulator.program.output.count(SAFE)
    shutil.rmtree(emulator.state)
    guest.control.shutdown()
    assert emulator.program.wait() == EXIT_REMOVED
    assert emulator.program.output.count(SAFE) == said


def test_what_came_takes_the_place_of_what_the_guest_left_here(
    lab: Lab, disk: Disk, source: RawGuest
) -> None:
    """It moves there, and back, and there again."""
    state = disk.path / "state"
    emulator, guest = waiting(lab, state, has_room=True)
    guest.load(source.save())
    guest.work()
    back = lab.raw_guest(lab.emulator(EmulatorKind.VTPMD))
    back.load(guest.save())
    guest.control.shutdown()
    assert emulator.program.wait() == 0
    back.tpm.nv_write(NV_INDEX, bytes(range(NV_SIZE)))
    emulator, guest = waiting(lab, state, has_room=True)
    guest.load(back.save())

    with after_power_loss(lab, disk, emulator, guest) as again:
        assert again.tpm.nv_read(NV_INDEX, NV_SIZE) == bytes(range(NV_SIZE))


def test_an_engine_that_leaves_out_a_sync_is_caught(
    lab: Lab, disk: Disk, source: RawGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there was no room: tests/c/test_room.c leaves out each sync of a room."""
    unsynced = canary.build("unsynced", ("fsync", "fdatasync"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(unsynced))
        emulator, guest = waiting(lab, disk.path / "state", has_room=False)
        guest.load(source.save())
        disk.lose_power()
        emulator.kill()
        guest.close()
    disk.repair()
    permanent = disk.path / "state" / PERMANENT_NAME  # its name may be durable with what else is
    assert not permanent.exists() or not permanent.read_bytes()


@pytest.mark.parametrize("boots", [True, False], ids=["boots", "goes"])
def test_room_that_nothing_comes_into_is_removed(lab: Lab, boots: bool) -> None:
    state = lab.new_path("state")
    _, guest = waiting(lab, state, has_room=True)
    if boots:
        guest.boot()
    else:
        guest.close()
    deadline = time.monotonic() + ROOM_TIMEOUT_S
    while (state / NAMES.arrived).exists():
        assert time.monotonic() < deadline, "room is left"
        time.sleep(POLL_S)
