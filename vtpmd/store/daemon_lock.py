"""Which vtpmd looks after a state directory's engine: one at a time, by a lock of its process.

    .vtpmd   empty; locked with fcntl(F_SETLK) for as long as that vtpmd lives

Unlike the lock on the directory, which the engine shares, this one tells who holds it, and ends
with that process, whatever becomes of its descriptors. So a vtpmd that hangs can be found, and
ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from vtpmd.store.directory import FLOCK, StateDirectoryError, StateDirectoryInUse

DAEMON_NAME = ".vtpmd"
FILE_MODE = 0o600
END_TIMEOUT_S = 20.0  # of a process that was killed; its storage may stand still


@contextmanager
def look_after(directory_fd: int, path: str, *, take_over: bool = False) -> Iterator[None]:
    """Hold the lock; with ``take_over`` end the vtpmd that does.

    No other descriptor of the file may be closed in this process meanwhile: that ends the lock.
    Raises StateDirectoryInUse, or StateDirectoryError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(DAEMON_NAME, flags, FILE_MODE, dir_fd=directory_fd)
    except OSError as error:
        raise StateDirectoryError(
            f"cannot use {path}/{DAEMON_NAME}: {error.strerror}; be the user that vtpmd runs as"
        ) from error
    try:
        while not _lock(fd):
            holder = _holder(fd)
            if holder is None:
                continue  # it has just ended
            if not take_over:
                raise StateDirectoryInUse(_in_use(path, holder))
            _end(fd, path, holder)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _holder(fd: int) -> int | None:
    """Return the number of the process that holds the lock, 0 if it has none here, or None."""
    wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else max(pid, 0)


def _in_use(path: str, holder: int) -> str:
    who = f"process {holder}" if holder else "a process of another container"
    return (
        f"state directory {path} is looked after by {who} already; stop that first, or, if it "
        "hangs: vtpmd attach --take-over"
    )


def _end(fd: int, path: str, holder: int) -> None:
    """Kill the vtpmd that holds the lock, and wait for its end. Raises StateDirectoryInUse."""
    if not holder:
        raise StateDirectoryInUse(_in_use(path, holder))
    try:
        pidfd = os.pidfd_open(holder)
    except ProcessLookupError:
        return
    try:
        # The number may have come to be another's: what is killed is what holds the lock still.
        if _holder(fd) != holder:
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ends = select.poll()
        ends.register(pidfd, select.POLLIN)
        ended = ends.poll(END_TIMEOUT_S * 1000)
    except PermissionError:
        raise StateDirectoryInUse(
            f"cannot end process {holder}, which looks after state directory {path}: it is another "
            "user's; be root"
        ) from None
    finally:
        os.close(pidfd)
    if not ended:
        raise StateDirectoryInUse(
            f"process {holder}, which looks after state directory {path}, does not die of SIGKILL: "
            "its storage may stand still; try again when it answers"
        )
