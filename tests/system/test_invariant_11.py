"""Invariant 11: killing vtpmd at any moment changes nothing that a guest can see.

Its engine serves on, and another vtpmd attaches to it. Real processes, and a client of the data and
control channels in a guest's place, or a real guest.
"""

import hashlib
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.faults import hanging
from tests.harness.handover import make_pair
from tests.harness.lab import Lab
from tests.support.emulator_client import Blob, Control, ControlClient, DataSocket
from tests.support.tpm2 import NV_COUNTER, Tpm
from tests.system.test_run import run_to_its_end
from vtpmd.store.daemon_lock import DAEMON_NAME
from vtpmd.testing.emulator import EmulatorKind
from vtpmd.testing.guest import Machine

COUNTER = 0x01500020
KILLS = 100
SILENCE_MAX_S = 5.0  # ASKER_SILENCE_MAX_MS
TIMEOUT_S = 30.0


class Worker:
    """A guest that works its TPM, and minds every failure."""

    def __init__(self, data: DataSocket) -> None:
        self._tpm = Tpm(data.transact)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.digest = bytes(32)
        self.count = 0
        self.failure: Exception | None = None

    def _work(self) -> None:
        try:
            while not self._ends.is_set():
                event = struct.pack(">I", self.count)
                self._tpm.extend(16, event.ljust(32, b"."))
                self.digest = hashlib.sha256(self.digest + event.ljust(32, b".")).digest()
                self._tpm.nv_increment(COUNTER)
                self.count += 1
        except Exception as error:  # whatever it is: the test fails with it
            self.failure = error

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work while the block runs; nothing has failed then, and the TPM is as it must be."""
        self._tpm.nv_define(COUNTER, 8, NV_COUNTER)
        self._tpm.nv_increment(COUNTER)
        first = self._tpm.nv_counter(COUNTER)
        self.digest = self._tpm.pcr(16)
        self._thread.start()
        try:
            yield
        finally:
            self._ends.set()
            self._thread.join()
        assert self.failure is None, self.failure
        assert self.count > 0
        assert self._tpm.pcr(16) == self.digest
        assert self._tpm.nv_counter(COUNTER) == first + self.count


def test_invariant_11_vtpmd_is_killed_a_hundred_times_under_a_guest_that_works(lab: Lab) -> None:
    """And is attached again each time. All that QEMU asks meanwhile is answered, too."""
    emulator = lab.daemon()
    (engine,) = emulator.engines()
    with ControlClient(emulator.control_path) as control:
        data = control.attach_data()
        control.init()
        Tpm(data.transact).startup()
        with Worker(data).working():
            for _ in range(KILLS):
                emulator.program.kill()
                control.lock_storage()
                control.get_established()
                emulator.attach()
        assert emulator.engines() == [engine]
    assert emulator.stop() == 0


def reset(control: ControlClient) -> None:
    """Do all that QEMU does at a guest's reset, and when it saves a state and goes on."""
    control.get_capability()
    control.get_config()
    control.lock_storage()
    assert control.get_state_blob(Blob.PERMANENT)
    assert control.get_state_blob(Blob.VOLATILE)
    control.get_established()
    control.set_locality(0)
    control.cancel()
    control.get_info(1)
    control.store_volatile()
    control.stop()
    control.set_buffer_size()
    control.init()


def test_invariant_11_a_vtpmd_that_hangs_without_a_session_is_not_waited_for(lab: Lab) -> None:
    """It has nothing to say: nothing that QEMU asks is late."""
    emulator = lab.daemon()
    emulator.program.wait_for_output("is attached")
    with ControlClient(emulator.control_path, TIMEOUT_S) as control:
        data = control.attach_data()
        control.init()
        Tpm(data.transact).startup()
        with hanging(emulator):
            began_s = time.monotonic()
            with Worker(data).working():
                control.lock_storage()
            for _ in range(3):
                reset(control)
            assert time.monotonic() - began_s < SILENCE_MAX_S
        control.init()
    assert "attaching again" not in emulator.program.output
    assert emulator.stop() == 0


def test_invariant_11_a_vtpmd_that_hangs_is_waited_for_once(lab: Lab) -> None:
    """Then it is attached no more: what comes later is carried out at once, and it can do nothing.

    When it goes on it attaches again by itself.
    """
    pair = make_pair(lab)
    assert pair.arm()["event"] == "VTPM_ARMED"
    emulator, guest = pair.source.vtpmd, pair.source.guest
    with hanging(emulator):
        with Worker(guest.data).working():
            guest.control.lock_storage()
            began_s = time.monotonic()
            guest.control.lock_storage()
            assert time.monotonic() - began_s < SILENCE_MAX_S
        for _ in range(3):
            reset(guest.control)
    emulator.program.wait_for_output("attaching again")
    guest.control.init()
    assert emulator.stop() == 0


def test_invariant_11_news_for_a_vtpmd_that_hangs_are_no_burden(lab: Lab) -> None:
    """Stopped for days: what it is told fills its socket, and is waited for by nobody."""
    emulator = lab.daemon()
    with ControlClient(emulator.control_path, TIMEOUT_S) as control:
        control.attach_data()
        control.init()
        os.kill(emulator.program.pid, signal.SIGSTOP)
        try:
            for _ in range(1000):
                control.init()
        finally:
            os.kill(emulator.program.pid, signal.SIGCONT)
    assert emulator.stop() == 0


def test_invariant_11_real_guest_goes_on_while_vtpmd_is_killed(lab: Lab) -> None:
    """Its kernel's driver and its workload notice nothing, also at a reset."""
    emulator = lab.daemon()
    guest = lab.booted_guest(emulator, Machine())
    for _ in range(3):
        guest.command("start mixed")
        emulator.program.kill()
        emulator.attach()
        guest.command("stop")
        guest.check()
    emulator.program.kill()
    guest.command("work 20")
    guest.check()


def test_one_vtpmd_at_a_time_looks_after_an_engine(lab: Lab) -> None:
    """Another one is refused, in a line that says who does."""
    emulator = lab.daemon()
    emulator.program.wait_for_output("is attached")
    done = run_to_its_end(emulator.state, command="attach")
    assert done.returncode == 3
    assert f"looked after by process {emulator.program.pid} already" in done.stderr
    assert done.stderr.count("\n") == 1


def test_vtpmd_that_hangs_is_taken_over_from(lab: Lab) -> None:
    """It is ended; its engine serves on."""
    emulator = lab.daemon()
    emulator.program.wait_for_output("is attached")
    (engine,) = emulator.engines()
    hung = emulator.program
    os.kill(hung.pid, signal.SIGSTOP)
    emulator.attach("--take-over")
    assert hung.wait() == -signal.SIGKILL
    assert emulator.engines() == [engine]
    assert emulator.stop() == 0


def test_attach_without_an_engine_says_so(tmp_path: Path) -> None:
    done = run_to_its_end(tmp_path, command="attach")
    assert done.returncode == 1
    assert done.stderr == "vtpmd: no engine serves the state directory; start it: vtpmd run DIR\n"


def test_signal_to_attach_detaches_alone(lab: Lab) -> None:
    """The engine serves on, without it."""
    emulator = lab.daemon()
    with ControlClient(emulator.control_path) as control:
        control.init()
        emulator.program.kill()
        emulator.attach()
        assert emulator.program.stop() == 0
        control.init()
    emulator.attach()
    assert emulator.stop() == 0


def test_engine_that_is_alone_is_attached_to(lab: Lab) -> None:
    """And SHUTDOWN ends it, and what has attached."""
    emulator = lab.emulator(EmulatorKind.VTPMD)
    (engine,) = emulator.engines()
    alone = emulator.program
    emulator.attach()
    assert emulator.engines() == [engine]
    with ControlClient(emulator.control_path) as control:
        control.init()
        control.shutdown()
    assert emulator.program.wait() == 0
    assert alone.wait() == 0


def test_orphan_that_qemu_shuts_down_ends_in_order(lab: Lab) -> None:
    emulator = lab.daemon()
    with ControlClient(emulator.control_path) as control:
        control.init()
        emulator.program.kill()
        control.shutdown()
    emulator.wait_for_engine()
    left = {each.name for each in emulator.state.iterdir()}
    assert left == {".lock", DAEMON_NAME, "tpm2-00.permall"}


def test_key_is_needed_to_attach(lab: Lab) -> None:
    """And a wrong one is refused."""
    key, wrong = lab.key_file("0" * 64), lab.key_file("1" * 64)
    options = ("--key", f"file={key},mode=aes-256-cbc")
    emulator = lab.emulator(EmulatorKind.VTPMD, options=options)
    with ControlClient(emulator.control_path) as control:
        control.init()
    for given in ((), ("--key", f"file={wrong},mode=aes-256-cbc")):
        done = run_to_its_end(emulator.state, *given, command="attach")
        assert done.returncode == 4, done.stderr
    emulator.attach()
    assert emulator.stop() == 0


def test_engine_with_no_state_makes_none_once_there_was_a_vtpmd(lab: Lab) -> None:
    """The directory may be one that a peer's state was on its way to."""
    emulator = lab.daemon()
    emulator.program.wait_for_output("is attached")
    emulator.program.kill()
    with ControlClient(emulator.control_path, TIMEOUT_S) as control:
        began_s = time.monotonic()
        assert control.request(Control.INIT, struct.pack(">I", 0)) != 0
        assert time.monotonic() - began_s >= SILENCE_MAX_S - 1
        emulator.attach()
        control.init()
