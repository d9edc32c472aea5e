"""A file system that fails under a real daemon: full, as far as the engine can tell.

Invariant 1: a response to a command that changed NV leaves only after the change is durable.
Invariant 7: no secret is ever logged or put in an error, also when libtpms would log a command.
"""

import resource
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.state_files import durable_state
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import ReturnCode, Tpm, TpmError
from vtpmd.testing.emulator import EmulatorKind

INDEX = 0x01500010
SECRET = b"a secret that must not be told"


# A fresh TPM's state is larger; the log, which is a file here, is smaller.
FILE_BYTES_MAX = 1100


def allow_writes(engine: int, allowed: bool) -> None:
    """Make writes of state fail half-way with EFBIG, or succeed again."""
    limit = resource.RLIM_INFINITY if allowed else FILE_BYTES_MAX
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_invariant_1_no_change_is_acknowledged_that_is_not_stored(lab: Lab) -> None:
    """The write fails, the TPM says so until it is restarted, and nothing before it is lost."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    with ControlClient(emulator.control_path) as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        tpm.nv_define(INDEX, len(SECRET))
        tpm.nv_write(INDEX, b"x" * len(SECRET))
        (engine,) = emulator.engines()
        stored = durable_state(emulator.state)

        allow_writes(engine, False)
        with pytest.raises(TpmError) as failure:
            tpm.nv_write(INDEX, SECRET)
        assert failure.value.return_code == ReturnCode.FAILURE
        assert durable_state(emulator.state) == stored

        allow_writes(engine, True)
        control.init()
        tpm.startup()
        assert tpm.nv_read(INDEX, len(SECRET)) == b"x" * len(SECRET)
        tpm.nv_write(INDEX, SECRET)
    assert emulator.stop() == 0


def test_invariant_7_a_failing_command_is_not_logged(lab: Lab) -> None:
    """One line says what failed and why; libtpms' own log of the command goes nowhere."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    with ControlClient(emulator.control_path) as control:
        tpm = Tpm(control.attach_data().transact)
        control.init()
        tpm.startup()
        tpm.nv_define(INDEX, len(SECRET))
        (engine,) = emulator.engines()
        allow_writes(engine, False)
        with pytest.raises(TpmError):
            tpm.nv_write(INDEX, SECRET)
    lines = [line for line in emulator.program.output.splitlines() if "cannot store" in line]
    assert len(lines) == 1
    assert lines[0].startswith("vtpmd: cannot store tpm2-00.journal: File too large; ")
    # libtpms' log has sixteen bytes a line.
    said = "".join(emulator.program.output.lower().split())
    for form in (SECRET.decode().replace(" ", ""), SECRET.hex()):
        assert form not in said


def test_invariant_2_damaged_state_is_refused_and_left_as_it_is(lab: Lab, tmp_path: Path) -> None:
    """INIT fails with libtpms' result, and no fresh TPM takes the place of the damaged one."""
    state = tmp_path / "state"
    first = lab.emulator(EmulatorKind.VTPMD, state)
    with ControlClient(first.control_path) as control:
        control.init()
    assert first.stop() == 0
    file = state / "tpm2-00.permall"
    damaged = bytearray(file.read_bytes())
    damaged[18] ^= 0xFF  # in libtpms' own header, behind swtpm's
    file.write_bytes(damaged)

    second = lab.emulator(EmulatorKind.VTPMD, state)
    with ControlClient(second.control_path) as control:
        for _ in range(2):
            assert control.request(2, bytes(4)) == 0x101
    assert second.stop() == 0
    assert file.read_bytes() == damaged
    assert "libtpms refuses its state" in second.program.output
