"""Hosts that share a directory, and not its locks: on one kernel, by two mounts of one overlay.

Each is a mount namespace with a mount of its own, whose files have locks of their own, and says
another boot, machine and name of itself. It needs root.
"""

import subprocess
import uuid
from contextlib import ExitStack
from pathlib import Path

from vtpmd.closing import Closing

_SET_UP = """
set -e
mount -t overlay overlay "$1" -o "lowerdir=$2/lower,upperdir=$2/upper,workdir=$3"
mount --bind "$4" /proc/sys/kernel/random/boot_id
[ ! -e /etc/machine-id ] || mount --bind "$5" /etc/machine-id
hostname "$6"
echo ready
exec sleep infinity
"""


class UnsharedHost(Closing):
    """A namespace that sees the directory at ``mount``; it is gone when this is closed."""

    def __init__(self, directory: Path, storage: Path, name: str, boot: str, machine: str) -> None:
        self.name = name
        self.mount = storage / "mount"
        work = storage / directory.name
        for each in (directory, work):
            each.mkdir()
        boot_file, machine_file = directory / "boot", directory / "machine"
        boot_file.write_text(f"{boot}\n")
        machine_file.write_text(f"{machine}\n")
        given = (self.mount, storage, work, boot_file, machine_file, name)
        command = ["unshare", "--mount", "--uts", "setpriv", "--pdeathsig", "KILL", "--"]
        self._process = subprocess.Popen(
            [*command, "bash", "-c", _SET_UP, "bash", *map(str, given)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command line begins with, to run on this host; it replaces itself."""
        return ("nsenter", f"--target={self._process.pid}", "--mount", "--uts", "--root", "--")

    def close(self) -> None:
        """End it; what runs on it still keeps its namespace."""
        self._process.kill()
        self._process.communicate()


class UnsharedStorage(Closing):
    """A file system in memory, which each host mounts anew."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "hosts"
        self._directory.mkdir()
        self.storage = directory / "storage"
        self.storage.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.storage], check=True)
        for name in ("lower", "upper", "mount"):
            (self.storage / name).mkdir()
        # What each finds at its start, and none has to make.
        (self.storage / "upper" / ".lock").touch()
        self.lock_file = self.storage / "upper" / ".lock"
        self._ending = ExitStack()
        self._machines: dict[str, str] = {}
        self._n_hosts = 0

    def host(self, name: str) -> UnsharedHost:
        """Start a host: the same machine each time for the same name, with a new boot."""
        machine = self._machines.setdefault(name, uuid.uuid4().hex)
        self._n_hosts += 1
        directory = self._directory / f"{name}-{self._n_hosts}"
        boot = str(uuid.uuid4())
        return self._ending.enter_context(
            UnsharedHost(directory, self.storage, name, boot, machine)
        )

    def close(self) -> None:
        """End all hosts, and give the memory back when nothing uses it any more."""
        self._ending.close()
        subprocess.run(["umount", "--lazy", self.storage], check=True)
