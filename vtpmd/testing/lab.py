"""Everything that one test runs, emulators and guests, in a private directory."""

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from vtpmd.closing import Closing
from vtpmd.testing import leftovers
from vtpmd.testing.credentials import credentials
from vtpmd.testing.disk import Disk
from vtpmd.testing.emulator import Emulator, EmulatorKind, Peering
from vtpmd.testing.guest import Guest, Machine
from vtpmd.testing.link import Link
from vtpmd.testing.logged import Logged
from vtpmd.testing.management import Management
from vtpmd.wire.tpm import TpmVersion

DISK_TIMEOUT_S = 30
LOG_CHARACTERS_MAX = 4000  # of each log, from its end, in a failed test's report


class Closable(Protocol):
    """What a test has opened and may leave open."""

    def close(self) -> None:
        """Close it; nothing happens if it is closed."""


class Killable(Protocol):
    """What a test has started and may leave running."""

    def kill(self) -> None:
        """End it; nothing happens if it has ended."""


class ForGuests(Protocol):
    """What a guest can have as its TPM: an emulator, or what looks like one."""

    @property
    def control_path(self) -> Path:
        """Where it accepts QEMU's control connection."""

    @property
    def qmp_path(self) -> Path | None:
        """Where QEMU has to have a monitor for it."""


class Lab(Closing, Logged):
    """Start what a test needs, and end it all when the test is over, however that went.

    The directory is /tmp/vtpmd-PROCESS-XXXXXXXX, as the path of a UNIX socket has at most 107
    bytes. With `network`, a network namespace, emulators and guests are started in that.
    """

    def __init__(self, network: Path | None = None) -> None:
        self.directory = leftovers.new_directory()
        self._network = network
        self._emulators: list[Emulator] = []
        self._guests: list[Guest] = []
        self._names = 0
        self._ending = ExitStack()
        self._ending.callback(shutil.rmtree, self.directory)

    def close(self) -> None:
        """End all that was started, and remove the directory."""
        self._ending.close()

    def new_path(self, name: str) -> Path:
        """Return a path of its own, where there is nothing yet; `name` is for people."""
        self._names += 1
        return self.directory / f"{self._names}-{name}"

    def key_file(self, text: str) -> Path:
        """Write a key, or a password, into a file that its owner alone may read."""
        path = self.new_path("key")
        path.touch(0o600)
        path.write_text(text)
        return path

    def new_disk(self) -> Path:
        """Make an empty image that QEMU saves its snapshots in."""
        disk = self.new_path("disk")
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"]
        subprocess.run(create, check=True, timeout=DISK_TIMEOUT_S)
        return disk

    def new_power_disk(self) -> Disk:
        """Make a disk that can lose power. OSError unless this is root, with zram and ext4."""
        disk = Disk(self.new_path("disk"))
        self.close_at_end(disk)
        return disk

    def emulator(
        self,
        kind: EmulatorKind,
        state: Path | None = None,
        peering: Peering | None = None,
        options: Sequence[str] = (),
        version: TpmVersion = TpmVersion.TPM_2_0,
    ) -> Emulator:
        """Start an emulator, with a new state directory unless one is given."""
        directory = self.new_path(kind.value)
        emulator = Emulator(kind, directory, state, peering, options, self._network, version)
        self._emulators.append(emulator)
        self.kill_at_end(emulator)
        return emulator

    def daemon(self, state: Path | None = None) -> Emulator:
        """Start a vtpmd that stays beside its engine, though nothing moves."""
        options = ("--manage", str(self.new_path("manage")))
        return self.emulator(EmulatorKind.VTPMD, state, None, options)

    def peer(
        self,
        peering: Peering | None = None,
        state: Path | None = None,
        options: Sequence[str] = (),
        version: TpmVersion = TpmVersion.TPM_2_0,
    ) -> Emulator:
        """Start a vtpmd that moves its vTPM to and from others, by default to all of the tests'."""
        peering = peering or Peering(credentials=credentials())
        return self.emulator(EmulatorKind.VTPMD, state, peering, options, version)

    def management(self, emulator: Emulator) -> Management:
        """Connect to a vtpmd's management socket."""
        management = Management(emulator)
        self.close_at_end(management)
        return management

    def link(self, emulator: Emulator, kind: type[Link] = Link) -> Link:
        """Put a link that can be cut in front of a vtpmd that waits for vTPMs."""
        link = kind(emulator.port)
        self.close_at_end(link)
        return link

    def guest(self, control: ForGuests, machine: Machine, arguments: Sequence[str] = ()) -> Guest:
        """Start a guest with an emulator's TPM, or with that behind a proxy."""
        directory = self.new_path("guest")
        if control.qmp_path is not None:
            monitor = f"unix:{control.qmp_path},server=on,wait=off"
            arguments = (*arguments, "-qmp", monitor)
        guest = Guest(directory, control.control_path, machine, arguments, self._network)
        self._guests.append(guest)
        self.close_at_end(guest)
        return guest

    def booted_guest(self, control: ForGuests, machine: Machine) -> Guest:
        """Start a guest, wait for its workload, and let that set up its TPM and use it."""
        guest = self.guest(control, machine)
        guest.set_up()
        return guest

    def kill_at_end(self, process: Killable) -> None:
        """Have a process killed when the test is over, before what was started earlier."""
        self._ending.callback(process.kill)

    def close_at_end(self, resource: Closable) -> None:
        """Have something closed when the test is over, before what was started earlier."""
        self._ending.callback(resource.close)

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
