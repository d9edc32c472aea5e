"""A state directory goes from swtpm to vtpmd and back, and each finds the TPM that the other left.

Invariant of the design that is checked: 9 (a cleanly stopped state directory is swtpm's, and
swtpm's is accepted as it is). No QEMU is needed: control channel and data socket are driven here.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.harness.lab import Lab
from tests.harness.raw_guest import RawGuest
from tests.support import tpm2
from tests.support.emulator_client import INIT_DELETE_VOLATILE, ControlClient
from tests.support.tpm2 import Property, StartupType, Tpm, TpmError
from vtpmd.daemon.engine import EXIT_REMOVED
from vtpmd.testing.emulator import ATTACHED, Emulator, EmulatorKind
from vtpmd.testing.program import POLL_S
from vtpmd.testing.waiting import wait_until

VTPMD, SWTPM = EmulatorKind.VTPMD, EmulatorKind.SWTPM
THERE_AND_BACK = [SWTPM, VTPMD, SWTPM, VTPMD]

PCR = 10
NV_INDEX = 0x0150_0001
NV_CONTENT = bytes(range(256)) * 8  # 2048 bytes, the most that an index holds
NV_COUNTER_INDEX = 0x0150_0002
GUARDED_INDEX = 0x0150_0003  # under dictionary-attack protection: wrong guesses count
SIGNING_KEY = 0x8101_0001
RESETS = 4
TIMES_MAX, MADE_TIMEOUT_S = 5, 4.0
LOCKOUT = {
    Property.MAX_AUTH_FAIL: 7,
    Property.LOCKOUT_INTERVAL_S: 4000,
    Property.LOCKOUT_RECOVERY_S: 5000,
}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a TPM holds that must go along with its state directory."""

    pcr: bytes
    nv: bytes
    counter: int
    signing_key: tpm2.EccPoint
    lockout: tuple[int, ...]


@contextmanager
def powered(emulator: Emulator, flags: int = 0) -> Iterator[tuple[ControlClient, Tpm]]:
    """Connect as QEMU does and power the TPM on, without TPM2_Startup; `flags` are INIT's."""
    with ControlClient(emulator.control_path) as control:
        data = control.attach_data()
        control.init(flags)
        yield control, Tpm(data.transact)


def fill(tpm: Tpm) -> None:
    """Put something of each kind into a fresh TPM."""
    tpm.startup()
    tpm.execute(tpm2.lockout_parameters(*LOCKOUT.values()))
    tpm.extend(PCR, hashlib.sha256(b"measured").digest())
    tpm.nv_define(NV_INDEX, len(NV_CONTENT))
    tpm.nv_write(NV_INDEX, NV_CONTENT)
    tpm.nv_define(NV_COUNTER_INDEX, 8, tpm2.NV_COUNTER)
    tpm.nv_increment(NV_COUNTER_INDEX)
    guarded = tpm2.NV_ORDINARY & ~tpm2.NvAttribute.NO_DICTIONARY_ATTACK
    tpm.nv_define(GUARDED_INDEX, 8, guarded, b"right")
    tpm.nv_write(GUARDED_INDEX, bytes(8), b"right")
    key = tpm.create_primary(tpm2.ecc_signing_template())
    tpm.make_persistent(key, SIGNING_KEY)
    tpm.flush(key)


def guess_wrong(tpm: Tpm) -> None:
    """Raise the lockout counter by one."""
    with pytest.raises(TpmError) as caught:
        tpm.nv_read(GUARDED_INDEX, 8, b"wrong")
    assert caught.value.return_code == tpm2.ReturnCode.AUTH_FAIL_SESSION_1


def contents(tpm: Tpm) -> Contents:
    """Read everything that `fill` put in."""
    lockout = (Property.LOCKOUT_COUNTER, *LOCKOUT)
    return Contents(
        pcr=tpm.pcr(PCR),
        nv=tpm.nv_read(NV_INDEX, len(NV_CONTENT)),
        counter=tpm.nv_counter(NV_COUNTER_INDEX),
        signing_key=tpm.ecc_public(SIGNING_KEY),
        lockout=tuple(tpm.property(name) for name in lockout),
    )


def test_invariant_9_state_directory_goes_there_and_back(lab: Lab) -> None:
    """The guest suspends (Shutdown and Startup with STATE), the programs change in between."""
    state = lab.directory / "state"
    expected: Contents | None = None
    clock: tpm2.Clock | None = None
    for step, kind in enumerate(THERE_AND_BACK):
        emulator = lab.emulator(kind, state)
        with powered(emulator) as (control, tpm):
            if step == 0:
                fill(tpm)
                guess_wrong(tpm)
            else:
                tpm.startup(StartupType.STATE)
                assert contents(tpm) == expected, f"{kind} in step {step}"
            clock = assert_clock_goes_on(clock, tpm.clock())
            change(tpm)
            expected = contents(tpm)
            tpm.shutdown(StartupType.STATE)
            control.shutdown()
        assert emulator.program.wait() == 0
    assert expected is not None
    assert expected.lockout == (1 + len(THERE_AND_BACK), *LOCKOUT.values())
    assert expected.counter == 1 + len(THERE_AND_BACK)


def change(tpm: Tpm) -> None:
    """Change what each program must hand on: a PCR, a counter, the lockout counter."""
    tpm.extend(PCR, hashlib.sha256(b"measured again").digest())
    tpm.nv_increment(NV_COUNTER_INDEX)
    guess_wrong(tpm)


def assert_clock_goes_on(before: tpm2.Clock | None, now: tpm2.Clock) -> tpm2.Clock:
    """Check a resume's clock and counts: one restart more, no reset, no time lost."""
    if before is not None:
        assert now.clock_ms >= before.clock_ms
        assert (now.reset_count, now.restart_count) == (
            before.reset_count,
            before.restart_count + 1,
        )
        assert now.safe
    return now


def stop_by_signal(emulator: Emulator, _: ControlClient) -> None:
    """Stop the emulator as an operator does."""
    assert emulator.stop() == 0


def stop_by_control_channel(emulator: Emulator, control: ControlClient) -> None:
    """Stop the emulator as libvirt does."""
    control.shutdown()
    assert emulator.program.wait() == 0


def power_off_first(emulator: Emulator, control: ControlClient) -> None:
    """Power the TPM off, then lose the emulator: swtpm needs the journal folded."""
    control.stop()
    emulator.kill()
    subprocess.run([Path(sys.executable).with_name("vtpmd"), "fold", emulator.state], check=True)


@pytest.mark.parametrize("stop", [stop_by_signal, stop_by_control_channel, power_off_first])
def test_stop_without_shutdown_by_the_guest_counts_no_failed_try(
    lab: Lab, stop: Callable[[Emulator, ControlClient], None]
) -> None:
    """vtpmd sends TPM2_Shutdown in the guest's place, or the lockout counter would grow.

    A guarded authorisation is used before, as it is that which libtpms counts after an unorderly
    shutdown (swtpm 0.7.1 lets it). PCRs are reset by the new start, the rest stays.
    """
    state = lab.directory / "state"
    first = lab.emulator(VTPMD, state)
    with powered(first) as (control, tpm):
        fill(tpm)
        guess_wrong(tpm)
        tpm.nv_read(GUARDED_INDEX, 8, b"right")
        before, clock = contents(tpm), tpm.clock()
        stop(first, control)

    with powered(lab.emulator(SWTPM, state)) as (_, tpm):
        tpm.startup()
        after = contents(tpm)
        assert after == replace(before, pcr=bytes(32))
        assert tpm.clock().reset_count == clock.reset_count + 1
        assert tpm.clock().safe


def test_invariant_1_no_write_into_a_directory_that_was_removed_is_acknowledged(lab: Lab) -> None:
    state = lab.directory / "state"
    served = lab.emulator(VTPMD, state)
    with powered(served) as (control, tpm):
        fill(tpm)
        shutil.rmtree(state)
        with pytest.raises(TpmError):
            tpm.nv_write(NV_INDEX, b"nowhere.")
        control.shutdown()
    assert served.program.wait() == EXIT_REMOVED
    assert "is safe" not in served.program.output
    assert served.program.output.count("what the guest has stored since is lost") == 1


@pytest.mark.parametrize("with_daemon", [False, True], ids=["alone", "with its daemon"])
def test_directory_that_was_removed_is_told_of_at_the_end(lab: Lab, with_daemon: bool) -> None:
    """Also where nothing is left to be written: what was stored is gone with it."""
    state = lab.directory / "state"
    served = lab.daemon(state) if with_daemon else lab.emulator(VTPMD, state)
    with powered(served) as (control, tpm):
        fill(tpm)
        control.shutdown()
    assert served.program.wait() == 0
    served = lab.daemon(state) if with_daemon else lab.emulator(VTPMD, state)
    if with_daemon:
        served.program.wait_for_output(ATTACHED)
    shutil.rmtree(state)
    assert served.stop() == EXIT_REMOVED
    assert served.program.output.count("was removed: what the guest has stored") == 1


def test_invariant_12_resets_after_a_shutdown_that_was_refused_count_no_failed_try(
    lab: Lab,
) -> None:
    """The guest meant to sleep, and could not: vtpmd sends the other TPM2_Shutdown.

    Each reset without one counts as a failed try, as a guarded authorisation was used before.
    """
    with powered(lab.emulator(VTPMD)) as (control, tpm):
        fill(tpm)
        for _ in range(RESETS):
            tpm.nv_read(GUARDED_INDEX, 8, b"right")
            tpm.execute(tpm2.pcr_allocate(range(24)))
            with pytest.raises(TpmError):
                tpm.shutdown(StartupType.STATE)
            control.stop()
            control.init()
            tpm.startup()
        assert tpm.property(Property.LOCKOUT_COUNTER) == 0


@pytest.mark.parametrize("kinds", [(SWTPM, VTPMD), (VTPMD, SWTPM)], ids="-to-".join)
def test_stored_volatile_state_resumes_in_the_other_program(
    lab: Lab, kinds: tuple[EmulatorKind, EmulatorKind]
) -> None:
    """STORE_VOLATILE keeps a running TPM in the directory; the next INIT goes on from there."""
    state = lab.directory / "state"
    first = lab.emulator(kinds[0], state)
    with powered(first) as (control, tpm):
        fill(tpm)
        transient = tpm.create_primary(tpm2.ecc_signing_template())
        before, clock, point = contents(tpm), tpm.clock(), tpm.ecc_public(transient)
        control.store_volatile()
        # With its engine, which would end in order and hold the lock meanwhile.
        first.kill()

    with powered(lab.emulator(kinds[1], state), INIT_DELETE_VOLATILE) as (_, tpm):
        assert contents(tpm) == before
        assert tpm.ecc_public(transient) == point
        now = tpm.clock()
        assert (now.reset_count, now.restart_count) == (clock.reset_count, clock.restart_count)
    assert not (state / "tpm2-00.volatilestate").exists()


def test_invariant_9_blobs_whose_init_does_not_come_leave_no_file(lab: Lab) -> None:
    """QEMU goes away at its migration's end, vtpmd stops, or the host fails; the next one starts.

    What was brought is on the disk before its INIT, but for its name.
    """
    source = lab.raw_guest(lab.emulator(VTPMD))
    source.boot()
    facts, blobs = source.facts(), source.save()
    directory = lab.new_path("destination")

    def start() -> Emulator:
        emulator = Emulator(VTPMD, directory)
        lab.kill_at_end(emulator)
        assert not list(emulator.state.glob("*2-00.*"))
        return emulator

    def bring(destination: Emulator) -> RawGuest:
        """Again where the engine is not done with removing what the one before has brought.

        It makes nothing ahead then (csrc/engine/ahead.h); that the file is gone says it too early.
        """
        file = destination.state / "TMP2-00.permall"
        guest = lab.raw_guest(destination)
        for _ in range(TIMES_MAX):
            guest.give(blobs)
            deadline = time.monotonic() + MADE_TIMEOUT_S
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if file.exists():
                return guest
        raise TimeoutError("no file is made ahead")

    left = start()
    bring(left).close()
    wait_until(lambda: not list(left.state.glob("*2-00.*")))
    bring(left)
    assert left.stop() == 0
    killed = start()
    bring(killed)
    killed.kill()
    guest = bring(start())
    guest.start()
    assert guest.facts() == facts
    assert not list(directory.rglob("TMP*"))
