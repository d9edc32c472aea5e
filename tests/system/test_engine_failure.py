"""When the engine dies, the guest is told, QEMU and the daemon go on, and nothing hangs.

The engine runs libtpms, which parses what a guest sends: its death must stay its own.
"""

import signal

import pytest

from tests.harness.unix import connect
from vtpmd.testing.emulator import Emulator
from vtpmd.testing.guest import Guest
from vtpmd.testing.workload import WorkloadFailedError

ENGINE_END_TIMEOUT_S = 10.0
QEMU_FAILURE = "TPM_RC 0x9$"  # TPM_FAIL: QEMU's own answer when its emulator gives none


def test_guest_gets_an_error_when_the_engine_is_killed(vtpm: Emulator, vtpm_guest: Guest) -> None:
    """The guest's next command fails, the daemon says why in one line, and QEMU still answers."""
    said_before = vtpm.program.output

    vtpm.signal_engine(signal.SIGKILL)

    with pytest.raises(WorkloadFailedError, match=QEMU_FAILURE):
        vtpm_guest.check()
    vtpm_guest.pause()
    assert vtpm_guest.status == "paused"
    vtpm_guest.resume()
    assert vtpm.program.exit_code is None
    vtpm.program.wait_for_output("SIGKILL")
    with pytest.raises(ConnectionRefusedError):  # nobody waits for an answer
        connect(vtpm.control_path)
    errors = [
        line
        for line in vtpm.program.output.removeprefix(said_before).splitlines()
        if "engine" in line and "SIGKILL" in line
    ]
    assert len(errors) == 1, vtpm.program.output


def test_guest_gets_an_error_when_the_engine_dies_at_work(
    vtpm: Emulator, vtpm_guest: Guest
) -> None:
    """The same in the middle of a long command: the guest does not wait for ever."""
    vtpm_guest.command("start rsa-3072")

    vtpm.signal_engine(signal.SIGKILL)

    with pytest.raises(WorkloadFailedError, match=QEMU_FAILURE):
        vtpm_guest.command("work 1")
    assert vtpm_guest.status == "running"


def test_invariant_11_guest_does_not_notice_that_its_daemon_is_killed(
    vtpm: Emulator, vtpm_guest: Guest
) -> None:
    """Its engine serves on; who ends it has it stop in order."""
    vtpm.program.kill()

    vtpm_guest.check()
    vtpm_guest.command("work 5")
    vtpm_guest.check()
    vtpm.signal_engine(signal.SIGTERM)
    vtpm.wait_for_engine()
    assert not (vtpm.state / "tpm2-00.journal").exists()
    assert not vtpm.control_path.exists()
