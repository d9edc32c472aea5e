"""Everything that one test runs: emulators, guests, proxies, in a private directory."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.emulator import Emulator, EmulatorKind
from tests.harness.guest import Guest, Machine
from tests.harness.proxy import ControlProxy, Trigger

LOG_CHARACTERS_MAX = 4000  # of each log, from its end, in a failed test's report


class Lab:
    """Start what a test needs, and end it all when the test is over, however that went.

    The directory is /tmp/vtpmd-XXXXXXXX, as the path of a UNIX socket has at most 107 bytes.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vtpmd-", dir="/tmp"))
        self._emulators: list[Emulator] = []
        self._guests: list[Guest] = []
        self._names = 0
        self._ending = ExitStack()
        self._ending.callback(shutil.rmtree, self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.close()

    def _new_directory(self, name: str) -> Path:
        self._names += 1
        return self.directory / f"{self._names}-{name}"

    def emulator(self, kind: EmulatorKind, state: Path | None = None) -> Emulator:
        """Start an emulator, with a new state directory unless one is given."""
        emulator = Emulator(kind, self._new_directory(kind.value), state)
        self._emulators.append(emulator)
        self._ending.callback(emulator.kill)
        return emulator

    def guest(
        self, control: Emulator | ControlProxy, machine: Machine, arguments: Sequence[str] = ()
    ) -> Guest:
        """Start a guest with an emulator's TPM, or with that behind a proxy."""
        guest = Guest(self._new_directory("guest"), control.control_path, machine, arguments)
        self._guests.append(guest)
        self._ending.callback(guest.close)
        return guest

    def booted_guest(self, control: Emulator | ControlProxy, machine: Machine) -> Guest:
        """Start a guest, wait for its workload, and let that set up its TPM and use it."""
        guest = self.guest(control, machine)
        guest.wait_for_workload()
        guest.command("setup")
        guest.command("work 30")
        return guest

    def proxy(self, emulator: Emulator, trigger: Trigger) -> ControlProxy:
        """Put a proxy in front of an emulator's control socket."""
        proxy = ControlProxy(self._new_directory("proxy"), emulator.control_path, trigger)
        self._ending.callback(proxy.close)
        return proxy

    def logs(self) -> list[tuple[str, str]]:
        """Return a title and the end of the text of each log there is."""
        logs = []
        for emulator in self._emulators:
            logs.append((f"{emulator.kind} (process {emulator.program.pid})", emulator.program))
        for guest in self._guests:
            logs.append((f"QEMU (process {guest.program.pid})", guest.program))
        texts = [(title, program.output) for title, program in logs]
        texts += [(f"console of process {g.program.pid}", g.console) for g in self._guests]
        return [(title, text[-LOG_CHARACTERS_MAX:]) for title, text in texts if text]
