"""The journal of a real daemon: killed at any moment under load, folded beside it, refused.

Invariant 1: a response to a command that changed NV leaves only after the change is durable.
Invariant 2: what a start recovers is the last durable generation; what is damaged is refused.
Invariant 9: stopped in order, the directory is swtpm's; killed, swtpm must not take it for whole.
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.state_files import look
from tests.support.emulator_client import Blob, Control, ControlClient, DataSocket
from tests.support.tpm2 import NV_COUNTER, Tpm
from tests.system.test_run import run_to_its_end
from vtpmd._core import lib
from vtpmd.daemon.engine import EXIT_JOURNAL
from vtpmd.testing.emulator import Emulator, EmulatorKind

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
COUNTER = 0x01500001
JOURNAL, PERMANENT = "tpm2-00.journal", "tpm2-00.permall"
KILLS = 12  # of each kind
ENGINE_END_TIMEOUT_S = 20.0


def power_on(control: ControlClient) -> tuple[Tpm, DataSocket]:
    data = control.attach_data()
    control.init()
    tpm = Tpm(data.transact)
    tpm.startup()
    return tpm, data


def counted(lab: Lab, state: Path) -> int:
    """Start a vtpmd, read the counter, and stop it."""
    emulator = lab.emulator(VTPMD, state)
    with ControlClient(emulator.control_path) as control:
        value = power_on(control)[0].nv_counter(COUNTER)
    assert emulator.stop() == 0
    return value


def make_counter(lab: Lab) -> Path:
    """Return a state directory whose TPM has a counter, stopped in order."""
    emulator = lab.emulator(VTPMD)
    with ControlClient(emulator.control_path) as control:
        tpm, _ = power_on(control)
        tpm.nv_define(COUNTER, 8, NV_COUNTER)
        tpm.nv_increment(COUNTER)
    assert emulator.stop() == 0
    return emulator.state


def test_invariant_9_journal_is_there_while_the_tpm_is_on(lab: Lab) -> None:
    """And the state file says so, in a way that swtpm understands; after a stop there is none."""
    state = make_counter(lab)
    assert not (state / JOURNAL).exists()
    emulator = lab.emulator(VTPMD, state)
    with ControlClient(emulator.control_path) as control:
        tpm, _ = power_on(control)
        tpm.nv_increment(COUNTER)
        assert (state / JOURNAL).stat().st_size == lib.JOURNAL_BYTES
        assert (state / JOURNAL).stat().st_blocks * 512 >= lib.JOURNAL_BYTES
        emulator.kill()
    killed = (state / PERMANENT).read_bytes()

    swtpm = lab.emulator(SWTPM, state)
    with ControlClient(swtpm.control_path) as control:
        assert control.request(Control.INIT, bytes(4)) != 0
        control.shutdown()
    swtpm.program.wait()
    assert (state / PERMANENT).read_bytes() == killed

    assert counted(lab, state) == 2
    assert not (state / JOURNAL).exists()
    swtpm = lab.emulator(SWTPM, state)
    with ControlClient(swtpm.control_path) as control:
        assert power_on(control)[0].nv_counter(COUNTER) == 2


class Load:
    """A guest that increments a counter until its TPM is gone."""

    def __init__(self, tpm: Tpm) -> None:
        self.acknowledged = 0
        self._tpm = tpm
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._tpm.nv_increment(COUNTER)
                self.acknowledged += 1
        except (OSError, EOFError, AssertionError):
            return

    def join(self) -> None:
        self._thread.join(ENGINE_END_TIMEOUT_S)
        assert not self._thread.is_alive()


def kill_engine(emulator: Emulator) -> None:
    """The daemon says so, and ends when it is told to."""
    (engine,) = emulator.engines()
    os.kill(engine, signal.SIGKILL)
    emulator.program.wait_for_output("SIGKILL")
    assert emulator.stop() == 1


def kill_daemon(emulator: Emulator) -> None:
    """The engine serves on; told to end, it does so in order: it folds, and lets go of the lock."""
    emulator.program.kill()
    emulator.signal_engine(signal.SIGTERM)
    emulator.wait_for_engine()
    assert not (emulator.state / JOURNAL).exists()


@pytest.mark.parametrize("kill", [kill_engine, kill_daemon, Emulator.kill])
def test_invariant_1_killed_under_load_nothing_acknowledged_is_lost(
    lab: Lab, kill: Callable[[Emulator], None]
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    state = make_counter(lab)
    value = 1
    for _ in range(KILLS):
        emulator = lab.daemon(state)
        with ControlClient(emulator.control_path) as control:
            tpm, _ = power_on(control)
            load = Load(tpm)
            time.sleep(moments.uniform(0, 0.15))
            kill(emulator)
            load.join()
        found = counted(lab, state)
        assert value + load.acknowledged <= found <= value + load.acknowledged + 1
        value = found


def test_journal_is_folded_while_the_guest_works(lab: Lab) -> None:
    """Several times its size is written, and it never grows; killed then, nothing is lost."""
    commits = 5000
    state = make_counter(lab)
    emulator = lab.emulator(VTPMD, state)
    with ControlClient(emulator.control_path) as control:
        tpm, _ = power_on(control)
        journals = set()
        for number in range(commits):
            tpm.nv_increment(COUNTER)
            if number % 100 == 0:
                status = (state / JOURNAL).stat()
                assert status.st_size == lib.JOURNAL_BYTES
                journals.add(status.st_ino)
        emulator.kill()
    assert len(journals) > 2
    found = look(state)
    assert found.letter == "O"
    assert 0 < found.records < commits // 2
    assert counted(lab, state) == 1 + commits


def test_reset_of_the_guest_folds_nothing_and_goes_on(lab: Lab) -> None:
    """QEMU sends INIT alone, or STOP first: neither file is replaced, and the end folds."""
    state = make_counter(lab)
    emulator = lab.emulator(VTPMD, state)
    with ControlClient(emulator.control_path) as control:
        tpm, _ = power_on(control)
        for expected in (2, 3, 4):
            tpm.nv_increment(COUNTER)
            before = [(state / name).stat().st_ino for name in (JOURNAL, "tpm2-00.permall")]
            if expected > 2:
                control.stop()
            control.init()
            after = [(state / name).stat().st_ino for name in (JOURNAL, "tpm2-00.permall")]
            assert after == before
            tpm.startup()
            assert tpm.nv_counter(COUNTER) == expected
        emulator.kill()
    assert counted(lab, state) == 4
    assert not (state / JOURNAL).exists()


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside"])
@pytest.mark.parametrize("runs_on", [True, False], ids=["runs on", "does not"])
def test_invariant_9_stop_says_whether_the_directory_is_swtpm_s(
    lab: Lab, is_alone: bool, runs_on: bool
) -> None:
    """Not where QEMU was given the state and the guest did not run on; folded, it is."""
    emulator = lab.emulator(VTPMD) if is_alone else lab.daemon()
    state = emulator.state
    with ControlClient(emulator.control_path) as control:
        tpm, _ = power_on(control)
        tpm.nv_define(COUNTER, 8, NV_COUNTER)
        tpm.nv_increment(COUNTER)
        control.get_state_blob(Blob.PERMANENT)
        if runs_on:
            tpm.nv_increment(COUNTER)
    assert emulator.stop() == (0 if runs_on else EXIT_JOURNAL)
    assert (state / JOURNAL).exists() != runs_on
    assert ("tpm2-00.journal stays: QEMU was given the state" in emulator.program.output) != runs_on
    if not runs_on:
        assert run_to_its_end(state, command="fold").returncode == 0
    with ControlClient(lab.emulator(SWTPM, state).control_path) as control:
        assert power_on(control)[0].nv_counter(COUNTER) == 1 + runs_on


def alter(state: Path) -> None:
    journal = bytearray((state / JOURNAL).read_bytes())
    journal[512 + 100] ^= 1
    (state / JOURNAL).write_bytes(journal)


def remove(state: Path) -> None:
    (state / JOURNAL).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (alter, "tpm2-00.journal is damaged: a sector is altered, at byte 512 (K)"),
        (remove, "tpm2-00.journal is missing"),
    ],
)
def test_invariant_2_damaged_journal_stops_the_start(
    lab: Lab, damage: Callable[[Path], None], reason: str
) -> None:
    """Status 5, one line with the place, and the files as they were."""
    state = make_counter(lab)
    emulator = lab.emulator(VTPMD, state)
    with ControlClient(emulator.control_path) as control:
        power_on(control)[0].nv_increment(COUNTER)
        emulator.kill()
    damage(state)
    before = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    done: subprocess.CompletedProcess[str] = run_to_its_end(state)
    assert done.returncode == 5
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()} == before


def test_start_says_what_it_took_up(lab: Lab) -> None:
    state = make_counter(lab)
    emulator = lab.emulator(VTPMD, state)
    with ControlClient(emulator.control_path) as control:
        tpm, _ = power_on(control)
        for _ in range(3):
            tpm.nv_increment(COUNTER)
        emulator.kill()
    changes = look(state).applied
    again = lab.emulator(VTPMD, state)
    again.program.wait_for_output(f"took up {changes} changes from the journal")
