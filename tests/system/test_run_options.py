"""`vtpmd run` for a QEMU of another user, and for one after the other, as libvirt has them."""

import os
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.state_files import look
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Handle, Tpm
from vtpmd.testing.emulator import VTPMD, Emulator, EmulatorKind
from vtpmd.testing.guest import Machine
from vtpmd.testing.waiting import wait_until

INDEX = Handle.NV_FIRST
JOURNAL = "tpm2-00.journal"
UID, GID = 54321, 54322


def test_socket_is_its_owners_alone(lab: Lab) -> None:
    emulator = lab.emulator(EmulatorKind.VTPMD)
    assert stat.S_IMODE(emulator.control_path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_socket_is_given_to_another_user(lab: Lab) -> None:
    options = ["--socket-mode", "0660", "--socket-owner", f"{UID}:{GID}"]
    status = lab.emulator(EmulatorKind.VTPMD, options=options).control_path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o660, UID, GID)
    status = lab.emulator(
        EmulatorKind.VTPMD, options=["--socket-owner", "nobody"]
    ).control_path.stat()
    assert (status.st_uid == 65534, status.st_gid) == (True, 0)


@pytest.mark.parametrize(
    "options",
    [
        ["--socket-mode", "0888"],
        ["--socket-mode", "1777"],
        ["--socket-mode", ""],
        ["--socket-owner", "nobody-of-that-name"],
        ["--socket-owner", "root:no-group-of-that-name"],
        ["--socket-owner", ""],
        ["--stay=1"],
    ],
    ids=" ".join,
)
def test_what_is_no_mode_or_owner_is_refused(tmp_path: Path, options: list[str]) -> None:
    done = refused(tmp_path, options)
    assert done.returncode == 2
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("options", [[f"--socket-owner={2**70}"]])
def test_owner_that_cannot_be_is_said_in_a_line(tmp_path: Path, options: list[str]) -> None:
    done = refused(tmp_path, options)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vtpmd: cannot give ")


def refused(tmp_path: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VTPMD, "run", tmp_path / "state", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


def is_whole(emulator: Emulator) -> bool:
    """Return whether the directory is as one that was stopped with in order."""
    return not (emulator.state / JOURNAL).exists() and look(emulator.state).applied == 0


@pytest.mark.parametrize("with_daemon", [False, True], ids=["alone", "with its daemon"])
@pytest.mark.parametrize("ends", ["SHUTDOWN", "its connection"])
def test_one_that_stays_serves_the_next_qemu(lab: Lab, ends: str, with_daemon: bool) -> None:
    more = ["--manage", str(lab.new_path("manage"))] if with_daemon else []
    emulator = lab.emulator(EmulatorKind.VTPMD, options=["--stay", *more])
    for turn in range(3):
        with ControlClient(emulator.control_path) as control:
            with closing(control.attach_data()) as data:
                control.stop()
                control.init()
                tpm = Tpm(data.transact)
                tpm.startup()
                if turn == 0:
                    unused = tpm.pcr(16)
                    tpm.nv_define(INDEX, 1)
                else:
                    assert tpm.nv_read(INDEX, 1) == bytes([turn - 1])
                assert tpm.pcr(16) == unused
                tpm.extend(16, b"1" * 32)
                tpm.nv_write(INDEX, bytes([turn]))
                assert not is_whole(emulator)
            if ends == "SHUTDOWN":
                control.shutdown()
        if ends == "SHUTDOWN":
            wait_until(lambda: is_whole(emulator))
        assert emulator.program.exit_code is None
        assert len(emulator.engines()) == 1
    assert emulator.stop() == 0
    assert is_whole(emulator)


def test_one_that_does_not_stay_ends_with_qemu(lab: Lab) -> None:
    emulator = lab.emulator(EmulatorKind.VTPMD)
    with ControlClient(emulator.control_path) as control:
        control.shutdown()
    assert emulator.program.wait() == 0


def test_guest_starts_again_on_one_that_stays(lab: Lab) -> None:
    emulator, machine = lab.emulator(EmulatorKind.VTPMD, options=["--stay"]), Machine()
    guest = lab.booted_guest(emulator, machine)
    guest.check()
    guest.close()
    again = lab.guest(emulator, machine)
    again.wait_for_workload()
    again.close()
    assert emulator.stop() == 0
