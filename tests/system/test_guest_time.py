"""What the guests of these tests make of an answer that comes late, and of one that does not come.

Linux gives a TPM command some time and then up. On a machine that has other things to do, QEMU may
not run for that long: no fault of a vTPM, and a test of one must not fail for it. So these guests
count as time what they have run for. A canary proves that a lost answer is found all the same.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness import canary
from tests.harness.lab import Lab
from tests.harness.versions import LINUX_THAT_LOOKS_ONCE_MORE, linux_of_guests
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.waiting import wait_until
from vtpmd.testing.workload import WorkloadFailedError

WORK_TIMEOUT_S = 60.0
# Longer than Linux gives an extend: 750 ms (TPM2_DURATION_MEDIUM in drivers/char/tpm/tpm.h).
PAUSE_S = 1.5
WORK_BEFORE_AN_EXTEND = 5  # operations after those of Lab.booted_guest()
TRIES = 5  # if Linux was just looking, and not asleep, it sees the answer in time
TIS_STATUS = 0xFED4_0018  # of locality 0 (TCG PC Client Platform TPM Profile)
TIS_STATES = 0x78  # ready, go, data available, expects data: none while a command runs
TIS_VALID = 0x80


def runs_a_command(guest: Guest) -> bool:
    """Say whether the guest waits for an answer of its TPM."""
    said = guest.human_monitor(f"xp /1wx {TIS_STATUS:#x}")
    status = int(said.rpartition(":")[2], 16) & (TIS_STATES | TIS_VALID)
    return status == TIS_VALID


def extend_while_nothing_runs(guest: Guest, emulator: Emulator) -> None:
    """Have the guest extend a PCR, and its QEMU stand still from before the answer on."""
    (engine,) = emulator.engines()
    guest.command(f"work {WORK_BEFORE_AN_EXTEND}")
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as executor:
        working = executor.submit(guest.command, "work 1")
        wait_until(lambda: runs_a_command(guest))
        os.kill(guest.program.pid, signal.SIGSTOP)
        os.kill(engine, signal.SIGCONT)
        time.sleep(PAUSE_S)  # it is what the test is about
        os.kill(guest.program.pid, signal.SIGCONT)
        working.result(WORK_TIMEOUT_S)


def test_guest_that_did_not_run_takes_the_answer(lab: Lab) -> None:
    emulator = lab.emulator(EmulatorKind.VTPMD)
    guest = lab.booted_guest(emulator, Machine())
    extend_while_nothing_runs(guest, emulator)
    guest.check()


def test_canary_by_the_host_s_clock_it_would_give_up(lab: Lab) -> None:
    """An older Linux does: it goes by the time alone where it was asleep when the answer came."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    guest = lab.booted_guest(emulator, replace(Machine(), counts_ticks=False))
    if linux_of_guests() >= LINUX_THAT_LOOKS_ONCE_MORE:
        extend_while_nothing_runs(guest, emulator)
        guest.check()
        return
    with pytest.raises(WorkloadFailedError, match="Timer expired"):
        for _ in range(TRIES):
            extend_while_nothing_runs(guest, emulator)


def test_canary_an_answer_that_is_lost_fails_the_guest_s_command(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = ("TPMLIB_Process", "sendmsg")
    monkeypatch.setenv("PYTHONPATH", str(canary.build("lost", replaced, tmp_path)))
    guest = lab.guest(lab.emulator(EmulatorKind.VTPMD), Machine())
    guest.wait_for_workload()
    with pytest.raises(WorkloadFailedError, match="Timer expired"):
        guest.command("setup")
