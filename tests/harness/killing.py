"""Kill the processes of a vtpmd at random moments, and start it again on what they leave.

A round starts a daemon, holds its vTPM against what that owes (`NvLoad`), works it, and kills. The
moment is drawn from a range and not aimed: over many rounds it falls everywhere.
"""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from random import Random
from threading import Thread

from tests.harness.lab import Lab
from tests.harness.nv_load import LARGE, MIXED, NvLoad
from tests.harness.raw_guest import RawGuest
from tests.support.emulator_client import ControlError
from vtpmd.store.directory import FLOCK, LOCK_NAME
from vtpmd.testing.emulator import Emulator, EmulatorKind
from vtpmd.testing.program import Program

STEPS_BEFORE_MAX = 20  # so that a daemon that is killed while it stops has something to write
END_TIMEOUT_S = 60.0
POLL_S = 0.001
TEMPORARY_FILES = "TMP2-*"
FOLD_TIMEOUT_S = 30.0
FOLD_POLL_S = 0.0002


class Victims(StrEnum):
    """Which processes are killed."""

    ENGINE = "engine"
    DAEMON = "daemon"  # its engine serves on, and is stopped in order
    BOTH = "both"
    ALONE = "alone"  # the engine that has no daemon


class Moment(StrEnum):
    """What a vtpmd is doing when it is killed."""

    RECOVERING = "recovering"  # from exec until it listens
    POWERING_ON = "powering on"  # INIT and TPM2_Startup, which write, too
    SERVING = "serving"  # under the load
    FOLDING = "folding"  # under the load, which goes on
    STOPPING = "stopping"  # in order, by a signal or because the daemon died


# How late after the beginning of a moment a kill may come. On an idle machine a daemon listens 45
# ms after exec, has powered on 30 ms later, and stops within 20; a commit takes 0.1 to 1 ms.
LATEST_S = {
    Moment.RECOVERING: 0.090,
    Moment.POWERING_ON: 0.035,
    Moment.SERVING: 0.030,
    Moment.FOLDING: 0.008,
    Moment.STOPPING: 0.012,
}


class Processes:
    """A daemon and its engine, by descriptors: a process number may come to be another's."""

    def __init__(self, program: Program) -> None:
        """Find the processes; an engine that has not been started yet is not among them."""
        self._daemon = [os.pidfd_open(program.pid)]
        self._engines = [os.pidfd_open(child) for child in program.children()]

    def send(self, number: signal.Signals, victims: Victims, random: Random) -> None:
        """Send a signal, to both in either order; a process that has ended is left alone."""
        chosen = {
            Victims.ENGINE: self._engines,
            Victims.DAEMON: self._daemon,
            Victims.BOTH: self._daemon + self._engines,
            Victims.ALONE: self._daemon,
        }[victims]
        for descriptor in random.sample(chosen, len(chosen)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)

    def stop_engine(self) -> None:
        """Have an engine whose daemon was killed end in order, if it has been started."""
        for descriptor in self._engines:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self._daemon + self._engines:
            os.close(descriptor)


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread while the block runs; it has been done when the block is left."""
    thread = Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def wait_until_unused(state: Path) -> None:
    """Wait until no process holds the lock on a state directory; TimeoutError when one keeps it."""
    descriptor = os.open(state / LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
                return
            time.sleep(POLL_S)
    finally:
        os.close(descriptor)
    raise TimeoutError(f"{state} is in use {END_TIMEOUT_S} s after its daemon was killed")


class Killing:
    """One state directory, and the rounds in which what serves it is killed."""

    def __init__(
        self,
        lab: Lab,
        random: Random,
        victims: Victims,
        key: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        """Make a vTPM for the load, and stop it in order.

        `key` is options of either program, `options` are vtpmd's only.
        """
        self._victims = victims
        if victims is not Victims.ALONE:
            options = (*options, "--manage", str(lab.new_path("manage")))
        self.state = lab.directory / "state"
        self.load = NvLoad(random)
        self._lab = lab
        self._random = random
        self._options = {
            EmulatorKind.VTPMD: (*key, *options),
            EmulatorKind.SWTPM: tuple(key),
        }
        emulator = self._start()
        guest = lab.raw_guest(emulator)
        guest.control.init()
        guest.tpm.startup()
        self.load.define(guest.tpm)
        guest.close()
        assert emulator.stop() == 0

    def round(self, moment: Moment) -> None:
        """Start a daemon, kill at a moment, and wait until nothing of it is left.

        WriteLostError when the vTPM comes up with less than it owes, or with something else.
        """
        if moment is Moment.RECOVERING:
            self._kill_while_recovering()
            return
        emulator = self._start()
        guest = self._lab.raw_guest(emulator)
        if moment is Moment.POWERING_ON:
            # The daemon answers TPM_FAIL when its engine dies first.
            cut = suppress(ConnectionError, ControlError)
            with self._kill_soon(moment, emulator.program), cut:
                guest.control.init()
                guest.tpm.startup()
        else:
            self._power_on(guest)
            self.load.weights = LARGE if moment is Moment.FOLDING else MIXED
            for _ in range(self._random.randrange(STEPS_BEFORE_MAX)):
                self.load.step(guest.tpm)
            with self._kill_soon(moment, emulator.program):
                self._work_until_cut(guest)
        guest.close()
        self._end(emulator.program)

    def check(self, kind: EmulatorKind = EmulatorKind.VTPMD) -> None:
        """Hold the vTPM against what it owes, in an emulator that is then stopped in order."""
        emulator = self._start(kind)
        guest = self._lab.raw_guest(emulator)
        self._power_on(guest)
        guest.control.shutdown()
        guest.close()
        assert emulator.program.wait() == 0

    def _start(self, kind: EmulatorKind = EmulatorKind.VTPMD) -> Emulator:
        return self._lab.emulator(kind, self.state, options=self._options[kind])

    def _power_on(self, guest: RawGuest) -> None:
        guest.control.init()
        guest.tpm.startup()
        self.load.check(guest.tpm)

    def _work_until_cut(self, guest: RawGuest) -> None:
        with suppress(ConnectionError):
            while True:
                self.load.step(guest.tpm)

    def _kill_while_recovering(self) -> None:
        directory = self._lab.new_path("vtpmd")
        directory.mkdir()
        vtpmd = Path(sys.executable).with_name("vtpmd")
        arguments: list[str | Path] = [vtpmd, "run", self.state, "--socket", directory / "tpm"]
        arguments += self._options[EmulatorKind.VTPMD]
        program = Program("vtpmd", arguments, directory)
        try:
            with self._kill_soon(Moment.RECOVERING, program):
                pass
            self._end(program)
        finally:
            program.kill()

    @contextmanager
    def _kill_soon(self, moment: Moment, program: Program) -> Iterator[None]:
        """Kill at a time that is drawn, while the block runs; it has been done after that."""
        delay_s = self._random.uniform(0, LATEST_S[moment])
        first = self._random.choice([signal.SIGTERM, signal.SIGKILL])
        order = Random(self._random.random())
        stopped = Victims.ALONE if self._victims is Victims.ALONE else Victims.DAEMON

        def kill() -> None:
            if moment is Moment.RECOVERING:
                time.sleep(delay_s)  # before the engine is looked for: it may have been started
            with closing(Processes(program)) as processes:
                if moment is Moment.STOPPING:
                    processes.send(first, stopped, order)
                if moment is Moment.FOLDING:
                    self._wait_for_fold()
                if moment is not Moment.RECOVERING:
                    time.sleep(delay_s)
                processes.send(signal.SIGKILL, self._victims, order)
                if self._victims is Victims.DAEMON:
                    processes.stop_engine()

        with meanwhile(kill):
            yield

    def _wait_for_fold(self) -> None:
        """Wait until there is a temporary file; without one for long, let the rest be a kill."""
        deadline = time.monotonic() + FOLD_TIMEOUT_S
        while not any(self.state.glob(TEMPORARY_FILES)) and time.monotonic() < deadline:
            time.sleep(FOLD_POLL_S)

    def _end(self, program: Program) -> None:
        if program.exit_code is None:
            program.stop()
        wait_until_unused(self.state)
