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
    found = set(_with_lock(directory))
    # swtpm's lock, and the one that says which vtpmd looks after an engine, are of processes.
    for name in (LOCK_NAME, DAEMON_NAME):
        found.add(_of_process(directory, name))
    return [Holder(pid, _program(pid)) for pid in sorted(found - {0})]


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


def _with_lock(directory: OpenDirectory) -> Iterator[int]:
    """Yield the number of each process with a descriptor that has the directory's lock."""
    try:
        lock = os.stat(LOCK_NAME, dir_fd=directory.directory_fd, follow_symlinks=False)
    except OSError:
        return
    for process in PROCESSES.glob("[0-9]*"):
        # It may end meanwhile, or be another user's.
        with suppress(OSError):
            if any(_has_lock(process, fd, lock) for fd in (process / "fd").iterdir()):
                yield int(process.name)


def _has_lock(process: Path, fd: Path, lock: os.stat_result) -> bool:
    try:
        if not os.path.samestat(fd.stat(), lock):
            return False
        told = (process / "fdinfo" / fd.name).read_text("ascii", "replace")
    except OSError:
        return False  # closed meanwhile
    return any(line.startswith("lock:") for line in told.splitlines())


def _program(pid: int) -> str:
    try:
        name = (PROCESSES / str(pid) / "comm").read_text("utf-8", "replace").strip()
    except OSError:
        return ""
    return "".join(char if char.isprintable() else "?" for char in name)
