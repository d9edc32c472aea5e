"""Which processes have a state directory locked, as far as this one can tell.

Nothing is locked for that. The lock of a vtpmd is of the open file description, for which the
kernel names no process (fcntl(2), F_OFD_GETLK); but /proc tells of each descriptor which lock it
has. Of another user's processes, and of an engine, which is not dumpable, it tells root alone.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from vtpmd.store.daemon_lock import DAEMON_NAME
from vtpmd.store.directory import FLOCK, LOCK_NAME, OpenDirectory

PROCESSES: Final = Path("/proc")


class Holder(NamedTuple):
    """A process that has a state directory locked."""

    pid: int
    program: str  # its name, as the kernel has it; empty once it has ended


def holders(directory: OpenDirectory) -> list[Holder]:
    """Return who serves a state directory, or looks after it, by process number; maybe nobody."""
    found = {pid for pid, has_lock in _with_lock_open(directory.directory_fd) if has_lock}
    # swtpm's lock, and the one that says which vtpmd looks after an engine, are of processes.
    for name in (LOCK_NAME, DAEMON_NAME):
        found.add(_of_process(directory, name))
    return [Holder(pid, _program(pid)) for pid in sorted(found - {0})]


def without_lock(directory_fd: int) -> list[Holder]:
    """Return what other processes have a directory's lock open, and do not have it locked."""
    found = [pid for pid, has_lock in _with_lock_open(directory_fd) if not has_lock]
    return [Holder(pid, _program(pid)) for pid in sorted(found) if pid != os.getpid()]


def _of_process(directory: OpenDirectory, name: str) -> int:
    """Return the number of the process that has a file locked, or 0 if it cannot be told."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fd = os.open(name, flags, dir_fd=directory.directory_fd)
    except OSError:
        return 0
    try:
        kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
    finally:
        os.close(fd)
    return 0 if kind == fcntl.F_UNLCK else max(pid, 0)


def _with_lock_open(directory_fd: int) -> Iterator[tuple[int, bool]]:
    """Yield the number of each process that has the lock's file open, and whether it is locked."""
    try:
        lock = os.stat(LOCK_NAME, dir_fd=directory_fd, follow_symlinks=False)
    except OSError:
        return
    for process in PROCESSES.glob("[0-9]*"):
        # It may end meanwhile, or be another user's.
        with suppress(OSError):
            found = [_is_locked(process, fd, lock) for fd in (process / "fd").iterdir()]
            if True in found or False in found:
                yield int(process.name), True in found


def _is_locked(process: Path, fd: Path, lock: os.stat_result) -> bool | None:
    """Return whether a descriptor of the lock's has it locked; None: it is of something else."""
    try:
        if not os.path.samestat(fd.stat(), lock):
            return None
        told = (process / "fdinfo" / fd.name).read_text("ascii", "replace")
    except OSError:
        return None  # closed meanwhile
    return any(line.startswith("lock:") for line in told.splitlines())


def _program(pid: int) -> str:
    try:
        name = (PROCESSES / str(pid) / "comm").read_text("utf-8", "replace").strip()
    except OSError:
        return ""
    return "".join(char if char.isprintable() else "?" for char in name)
