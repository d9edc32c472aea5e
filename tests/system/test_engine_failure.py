"""When the engine dies, the guest is told, QEMU and the daemon go on, and nothing hangs.

The engine runs libtpms, which parses what a guest sends: its death must stay its own.
"""

import os
import signal

import pytest

from tests.harness.emulator import Emulator
from tests.harness.guest import Machine
from tests.harness.lab import Lab
from tests.harness.unix import connect
from tests.harness.workload import WorkloadFailedError

ENGINE_END_TIMEOUT_S = 10.0
QEMU_FAILURE = "TPM_RC 0x9$"  # TPM_FAIL: QEMU's own answer when its emulator gives none


def engine_of(emulator: Emulator) -> int:
    """Return the process number of a daemon's only engine."""
    (engine,) = emulator.engines()
    return engine


def test_guest_gets_an_error_when_the_engine_is_killed(lab: Lab) -> None:
    """The guest's next command fails, the daemon says why in one line, and QEMU still answers."""
    emulator = lab.daemon()
    guest = lab.booted_guest(emulator, Machine())
    said_before = emulator.program.output

    os.kill(engine_of(emulator), signal.SIGKILL)

    with pytest.raises(WorkloadFailedError, match=QEMU_FAILURE):
        guest.check()
    guest.pause()
    assert guest.status == "paused"
    guest.resume()
    assert emulator.program.exit_code is None
    emulator.program.wait_for_output("SIGKILL")
    with pytest.raises(ConnectionRefusedError):  # nobody waits for an answer
        connect(emulator.control_path)
    errors = [
        line
        for line in emulator.program.output.removeprefix(said_before).splitlines()
        if "engine" in line and "SIGKILL" in line
    ]
    assert len(errors) == 1, emulator.program.output


def test_guest_gets_an_error_when_the_engine_dies_at_work(lab: Lab) -> None:
    """The same in the middle of a long command: the guest does not wait for ever."""
    emulator = lab.daemon()
    guest = lab.booted_guest(emulator, Machine())
    guest.command("start rsa-3072")

    os.kill(engine_of(emulator), signal.SIGKILL)

    with pytest.raises(WorkloadFailedError, match=QEMU_FAILURE):
        guest.command("work 1")
    assert guest.status == "running"


def test_invariant_11_guest_does_not_notice_that_its_daemon_is_killed(lab: Lab) -> None:
    """Its engine serves on; who ends it has it stop in order."""
    emulator = lab.daemon()
    guest = lab.booted_guest(emulator, Machine())

    emulator.program.kill()

    guest.check()
    guest.command("work 5")
    guest.check()
    emulator.signal_engine(signal.SIGTERM)
    emulator.wait_for_engine()
    assert not (emulator.state / "tpm2-00.journal").exists()
    assert not emulator.control_path.exists()
