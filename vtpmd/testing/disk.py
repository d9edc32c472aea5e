"""A disk of a test's own that can be full, fail, stall, become read-only, and lose power.

A file system, ext4 or btrfs, on a zram device, which is a real block device with a useful trait:
while the memory that it may use is less than it uses, every write to it fails (kernel
documentation, admin-guide/blockdev/zram: mem_limit). The mount is in a namespace of the test's
process and what that starts: nothing else sees it, and it goes with them.
"""

import ctypes
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

ZRAM_CONTROL = Path("/sys/class/zram-control")
DISK_SIZE = "32M"
# Metadata goes to the disk when something asks for it, not also every few seconds.
MOUNT_OPTIONS = "commit=300"
COMMAND_TIMEOUT_S = 60
BUSY_TIMEOUT_S = 60.0
BUSY_POLL_S = 0.01
CLONE_NEWNS = 0x0002_0000  # unshare(2)
FIFREEZE, FITHAW = 0xC004_5877, 0xC004_5878  # linux/fs.h
EXT4_IOC_SHUTDOWN = 0x8004_587D  # Linux, fs/ext4/ext4.h
EXT4_GOING_FLAGS_NOLOGFLUSH = 2  # neither journal nor data is written
E2FSCK_CORRECTED = 1
NO_LIMIT = "0"
LOWEST_LIMIT = "4K"
FILLER_CHUNKS = (1 << 20, 1 << 10, 1)  # bytes a write, until not even one goes
_entered: set[str] = set()  # the mount namespaces that were made here


class FileSystem(Enum):
    """How a disk is made."""

    # No reserve that is only root's, nothing left for the kernel to do later.
    EXT4 = "mkfs.ext4 -q -m 0 -e remount-ro -E lazy_itable_init=0,lazy_journal_init=0"
    # On a disk as small as this, data and metadata go into the same blocks.
    BTRFS = "mkfs.btrfs -q --mixed --metadata single --data single"


class Disk:
    """A mounted disk; what is to survive it being unmounted goes into `path`."""

    def __init__(self, path: Path, file_system: FileSystem = FileSystem.EXT4) -> None:
        """Make a disk and mount it.

        OSError when this machine has no zram or not that file system, or this is not root.
        """
        self.path = path
        self._file_system = file_system
        self._filler = path / "filler"
        _enter_mount_namespace()
        self._number = int((ZRAM_CONTROL / "hot_add").read_text())
        self._device = Path(f"/dev/zram{self._number}")
        self._settings = Path(f"/sys/block/zram{self._number}")
        try:
            (self._settings / "disksize").write_text(DISK_SIZE)
            _run(*file_system.value.split(), self._device)
            path.mkdir()
            self._mount()
        except OSError:
            self._remove()
            raise

    def close(self) -> None:
        """Unmount and remove the disk; what uses it has to have ended."""
        self._unmount()
        self._remove()

    def fill(self) -> None:
        """Leave no room at all, at a time when nobody else writes."""
        with self._filler.open("ab", buffering=0) as file:
            os.fsync(file.fileno())  # what was removed makes room only then
            for size in FILLER_CHUNKS:
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
            os.fsync(file.fileno())

    def make_room(self) -> None:
        """Take away what `fill` put there."""
        self._filler.unlink()

    def fail_writes(self, fails: bool) -> None:
        """Let every write to the device end in EIO, or succeed again."""
        (self._settings / "mem_limit").write_text(LOWEST_LIMIT if fails else NO_LIMIT)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Let nothing that writes to the file system end meanwhile, as for a snapshot."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FIFREEZE, 0)
            try:
                yield
            finally:
                fcntl.ioctl(descriptor, FITHAW, 0)
        finally:
            os.close(descriptor)

    def become_read_only(self) -> None:
        """Let the kernel find an error in the file system, which it then makes read-only."""
        Path(f"/sys/fs/ext4/{self._device.name}/trigger_fs_error").write_text("1")

    def lose_power(self) -> None:
        """Stop all input and output, now; what has not reached the device is lost.

        What uses the disk gets EIO until it is repaired.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            flags = struct.pack("I", EXT4_GOING_FLAGS_NOLOGFLUSH)
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, flags)
        finally:
            os.close(descriptor)

    def repair(self) -> None:
        """Bring the disk back as a restart of the host does; what uses it has to have ended."""
        self.fail_writes(False)
        self._unmount()
        _run("e2fsck", "-f", "-y", self._device, allowed=(0, E2FSCK_CORRECTED))
        self._mount()

    def _mount(self) -> None:
        kind = self._file_system.name.lower()
        _run("mount", "-t", kind, "-o", MOUNT_OPTIONS, self._device, self.path)

    def _unmount(self) -> None:
        _when_free(lambda: _run("umount", self.path))

    def _remove(self) -> None:
        _when_free(lambda: (self._settings / "reset").write_text("1"))
        _when_free(lambda: (ZRAM_CONTROL / "hot_remove").write_text(str(self._number)))


def _enter_mount_namespace() -> None:
    """Give this thread and what it starts mounts of their own, which nobody else gets to see.

    Once: a thread that was left in one of two would keep what both have mounted.
    """
    if _mount_namespace() in _entered:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot have mounts of my own: {os.strerror(error)}; run as root")
    _run("mount", "--make-rprivate", "/")
    _entered.add(_mount_namespace())


def _mount_namespace() -> str:
    return str(Path("/proc/thread-self/ns/mnt").readlink())


def _run(*command: str | Path, allowed: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode not in allowed:
        raise OSError(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()}")


def _when_free(act: Callable[[], object]) -> None:
    """Do something that fails while a process that is ending still uses the disk."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            act()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(BUSY_POLL_S)
        else:
            return
