"""A vTPM's state directory: locked while it is in use, and read at the start.

The engine writes the state files; it gets the descriptors of the directory and of the lock. The
lock is of the open file description (fcntl(2)): it excludes swtpm's, which is of the process, and
is excluded by it, and it lasts until vtpmd and its engine have both closed it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from vtpmd.errors import VtpmdError
from vtpmd.wire import swtpm_format
from vtpmd.wire.control import StateType

# As the files hold the TPM's secrets, nobody else gets to list a directory that is made here.
DIRECTORY_MODE = 0o700
LOCK_NAME = ".lock"
LOCK_MODE = 0o660  # swtpm's

# What is replaced by vtpmd, not by its engine, is written under this name first.
TEMPORARY_NAME = "TMP2-00.handover"
FILE_MODE = 0o640  # swtpm's for state

JOURNAL_NAME = "tpm2-00.journal"
PERMANENT_NAME = "tpm2-00.permall"

# The names that libtpms gives to its states; swtpm's files are called after them.
STATE_NAMES = {
    StateType.PERMANENT: "permall",
    StateType.VOLATILE: "volatilestate",
    StateType.SAVESTATE: "savestate",
}

# struct flock: l_type, l_whence, l_start, l_len, l_pid. Length 0 is the whole file, and l_pid has
# to be 0 for a lock of an open file description.
FLOCK = struct.Struct("@hhqqi4x")


class StateDirectoryError(VtpmdError):
    """A state directory cannot be used."""


class StateDirectoryInUse(StateDirectoryError):
    """Another process holds the lock on a state directory."""

    exit_status = 3


class StateDirectory:
    """An open state directory. Everything is looked up relative to its descriptor."""

    def __init__(self, path: Path, directory_fd: int, lock_fd: int) -> None:
        self.path = path
        self.directory_fd = directory_fd
        self.lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> StateDirectory:
        """Open and lock a state directory; make it if its parent is there.

        What a crash left half written is removed. Raises StateDirectoryInUse, or
        StateDirectoryError.
        """
        descriptors: list[int] = []
        try:
            path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            descriptors.append(_open_lock(descriptors[0]))
            _lock(path, descriptors[1])
            _remove_temporary_files(descriptors[0])
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise StateDirectoryError(
                    f"cannot use state directory {path}: {error.strerror}; "
                    "give one that this user may write to"
                ) from error
            raise
        return cls(path, *descriptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close both descriptors; the lock stays for as long as the engine has its copy."""
        os.close(self.lock_fd)
        os.close(self.directory_fd)

    def read_states(self) -> dict[StateType, bytes]:
        """Return the states that there are files of, as libtpms marshalled them.

        Raises StateDirectoryError for a file that cannot be one, which is left as it is.
        """
        states = {}
        for state_type, name in STATE_NAMES.items():
            content = self._read(f"tpm2-00.{name}")
            if content is not None:
                states[state_type] = content
        return states

    def read_lineage(self) -> swtpm_format.Lineage | None:
        """Return the lineage of the permanent state's file, which has been read.

        Raises StateDirectoryError.
        """
        try:
            return swtpm_format.read_lineage(read_regular_file(self.directory_fd, PERMANENT_NAME))
        except FileNotFoundError:
            return None
        except (OSError, swtpm_format.FormatError) as error:
            raise StateDirectoryError(
                f"cannot read state file {self.path / PERMANENT_NAME}: {error}; restore the "
                "directory from a backup, or give another one"
            ) from error

    def replace(self, name: str, content: bytes) -> None:
        """Replace a file, durably. Raises StateDirectoryError: it may be the old one or the new."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._unlink(TEMPORARY_NAME)
            fd = os.open(TEMPORARY_NAME, flags, FILE_MODE, dir_fd=self.directory_fd)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            source = target = self.directory_fd
            os.rename(TEMPORARY_NAME, name, src_dir_fd=source, dst_dir_fd=target)
            os.fsync(self.directory_fd)
        except OSError as error:
            raise self.update_failed(name, error) from error

    def remove(self, name: str) -> None:
        """Remove a file, if it is there, durably. Raises StateDirectoryError."""
        try:
            self._unlink(name)
            os.fsync(self.directory_fd)
        except OSError as error:
            raise self.update_failed(name, error) from error

    def exists(self, name: str) -> bool:
        """Return whether there is something of that name."""
        try:
            os.stat(name, dir_fd=self.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def update_failed(self, name: str, error: OSError) -> StateDirectoryError:
        """Return the error that says which file could not be written, and what to do."""
        return StateDirectoryError(
            f"cannot update {self.path / name}: {error.strerror}; make room or repair the file "
            "system"
        )

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.directory_fd)
        except FileNotFoundError:
            return

    def _read(self, name: str) -> bytes | None:
        try:
            return swtpm_format.decode_file(read_regular_file(self.directory_fd, name))
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        except swtpm_format.FormatError as error:
            reason = str(error)
        raise StateDirectoryError(
            f"cannot read state file {self.path / name}: {reason}; "
            "restore the directory from a backup, or give another one"
        )


def _open_lock(directory_fd: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(LOCK_NAME, flags, LOCK_MODE, dir_fd=directory_fd)


def _lock(path: Path, lock_fd: int) -> None:
    wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(lock_fd, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        pid = FLOCK.unpack(fcntl.fcntl(lock_fd, fcntl.F_OFD_GETLK, wanted))[4]
        # The kernel names the holder only of a lock that is a process's, as swtpm's is.
        holder = f"process {pid}" if pid > 0 else "another vtpmd, or its engine"
        raise StateDirectoryInUse(
            f"state directory {path} is in use by {holder}; stop that first, or give another one"
        ) from None


def _remove_temporary_files(directory_fd: int) -> None:
    for name in (*STATE_NAMES.values(), "journal"):
        try:
            os.unlink(f"TMP2-00.{name}", dir_fd=directory_fd)
        except FileNotFoundError:
            continue


def read_regular_file(
    directory_fd: int, name: str, bytes_max: int = swtpm_format.FILE_BYTES_MAX
) -> bytes:
    """Return a file's content, one byte more than ``bytes_max`` at most. Raises OSError."""
    # Without O_NONBLOCK a FIFO in the file's place would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(name, flags, dir_fd=directory_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            # One byte more than is allowed tells a caller that there is too much.
            return file.read(bytes_max + 1)
    finally:
        os.close(fd)
