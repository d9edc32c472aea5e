"""The state directory: its lock, and what is in it when a vTPM starts.

Reads only. The engine writes, through the directory's descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vtpmd.errors import VtpmdError
from vtpmd.wire import swtpm_format
from vtpmd.wire.control import StateType

# Nobody but the owner's group may even list what guests there are.
DIRECTORY_MODE: Final = 0o750
LOCK_NAME: Final = ".lock"
STATE_NAMES: Final = {
    StateType.PERMANENT: "permall",
    StateType.VOLATILE: "volatilestate",
    StateType.SAVESTATE: "savestate",
}
FILE_PREFIX: Final = "tpm2-00."
TEMPORARY_PREFIX: Final = "TMP2-00."

# struct flock (fcntl(2)): type, whence, start, length, pid. Length 0: the whole file.
_FLOCK: Final = struct.Struct("hhqqi")


class StateDirectoryInUse(VtpmdError):
    """Another process serves from the directory."""

    exit_status = 3


class StateDirectory:
    """An open, locked state directory. Close it, or use it as a context manager.

    The lock belongs to the open file behind :attr:`lock_fd` (an open-file-description lock): it
    lasts until every process that has a copy of the descriptor is gone. It excludes swtpm's, which
    is of the traditional kind, and is excluded by it.
    """

    def __init__(self, path: Path, directory_fd: int, lock_fd: int) -> None:
        self.path = path
        self.directory_fd = directory_fd
        self.lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open and lock the directory; make it if there is none.

        Raises StateDirectoryInUse, or VtpmdError if it cannot be opened.
        """
        directory_fd = lock_fd = -1
        try:
            path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            lock_fd = os.open(LOCK_NAME, flags, 0o640, dir_fd=directory_fd)
            _lock(lock_fd, path)
        except (OSError, VtpmdError) as error:
            for fd in (directory_fd, lock_fd):
                if fd >= 0:
                    os.close(fd)
            if isinstance(error, OSError):
                raise VtpmdError(
                    f"cannot open the state directory {path}: {error.strerror}; "
                    "check the path and its permissions"
                ) from error
            raise
        return cls(path, directory_fd, lock_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory and, unless an engine still holds it, of the lock."""
        os.close(self.directory_fd)
        os.close(self.lock_fd)

    def read_states(self) -> dict[StateType, bytes]:
        """Return the states that are there, and remove what an interrupted write left.

        Raises VtpmdError for a file that cannot be read or is not one that vtpmd can take over. The
        files are untouched then.
        """
        states = {
            kind: state
            for kind, name in STATE_NAMES.items()
            if (state := self._read(FILE_PREFIX + name)) is not None
        }
        for name in STATE_NAMES.values():
            self._remove_temporary(TEMPORARY_PREFIX + name)
        return states

    def _read(self, name: str) -> bytes | None:
        try:
            # O_NONBLOCK: a FIFO in the file's place must not hang the daemon.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(name, flags, dir_fd=self.directory_fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(name, error.strerror) from error
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise self._unreadable(name, "it is no regular file")
            try:
                return swtpm_format.decode_file(file.read(swtpm_format.FILE_BYTES_MAX + 1))
            except OSError as error:
                raise self._unreadable(name, error.strerror) from error
            except swtpm_format.FormatError as error:
                raise self._unreadable(name, str(error)) from error

    def _unreadable(self, name: str, reason: str) -> VtpmdError:
        return VtpmdError(
            f"cannot read {self.path / name}: {reason}; the vTPM is not started, and nothing was "
            "changed: repair the file or restore it from a copy"
        )

    def _remove_temporary(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.directory_fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EROFS, errno.EACCES):
                raise self._unreadable(name, error.strerror) from error


def _lock(fd: int, path: Path) -> None:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise StateDirectoryInUse(
            f"the state directory {path} is in use by another vtpmd or swtpm; stop it first"
        ) from error
