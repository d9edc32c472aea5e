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
from contextlib import suppress

from vtpmd.closing import Closing
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple
from vtpmd.wire import swtpm_format
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import StateType
from vtpmd.wire.tpm import TpmVersion as TpmVersion

if TYPE_CHECKING:
    from vtpmd.store.keys import Key

# As the files hold the TPM's secrets, nobody else gets to list a directory that is made here.
DIRECTORY_MODE = 0o700
LOCK_NAME = ".lock"
LOCK_MODE = 0o660  # swtpm's
LOCK_BYTES_MAX = 512  # of the record of who has it
LINK_NAME = "vtpmd.link"  # the engine's socket

FILE_MODE = 0o640  # swtpm's for state

# The names that libtpms gives to its states; swtpm's files are called after them.
STATE_NAMES = {
    StateType.PERMANENT: "permall",
    StateType.VOLATILE: "volatilestate",
    StateType.SAVESTATE: "savestate",
}

# What to do about a state file that does not go with the key.
KEY_REMEDIES: dict[type[Exception], str] = {
    swtpm_format.KeyNeeded: "the file is as it was",
    swtpm_format.KeyWrong: "give the right key, or restore the directory from a backup",
    swtpm_format.NotEncrypted: "leave out --key, or encrypt the directory with `vtpmd rekey`",
}

# What else to do about one.
RESTORE = "restore the directory from a backup, or give another one"

# What is said of a linear file, or block device, which has no place for all that a directory has.
NO_DIRECTORY = (
    "a vTPM in a file is served by swtpm's command line, with backend-uri=file://, and moves by "
    "QEMU's own migration alone; what looks into it takes it: vtpmd inspect, verify, export, backup"
)

# And of a socket.
ASK_IT = "a vtpmd that listens there is asked with --manage, by vtpmd status, export and backup"

# struct flock: l_type, l_whence, l_start, l_len, l_pid. Length 0 is the whole file, and l_pid has
# to be 0 for a lock of an open file description.
FLOCK = struct.Struct("@hhqqi4x")


class FileNames(NamedTuple):
    """What the files of a state directory are called, by its TPM's version."""

    permanent: str
    volatile: str
    savestate: str
    journal: str
    owner: str
    incoming: str
    arrived: str  # vtpmd/store/arrived.py
    backup: str  # that swtpm makes of the permanent state
    importing: str  # what is being imported

    def state(self, state_type: StateType) -> str:
        """Return the name of a state's file."""
        return self[state_type - StateType.PERMANENT]


def names_of(version: TpmVersion) -> FileNames:
    """Return the names of the files of a TPM of this version."""
    names = (
        *STATE_NAMES.values(),
        *("journal", "owner", "incoming", "arrived", "permall.bak", "import"),
    )
    return FileNames(*(f"{version.facts.prefix}.{name}" for name in names))


# Linux, linux/fs.h: the numbers are those of a long, what is passed is an int.
FS_IOC_GETFLAGS = 0x8008_6601
FS_IOC_SETFLAGS = 0x4008_6602
FS_NOCOW_FL = 0x0080_0000
_FLAGS = struct.Struct("@i")


class StateDirectoryError(VtpmdError):
    """A state directory cannot be used."""


class StateDirectoryInUse(StateDirectoryError):
    """Another process holds the lock on a state directory."""

    exit_status = 3


class StateKeyError(StateDirectoryError):
    """What is in a state directory needs a key, or another one, or none."""

    exit_status = 4


class OpenDirectory(Closing):
    """A state directory that is looked into; who uses it may be writing meanwhile.

    Everything is looked up relative to its descriptor.
    """

    def __init__(
        self, path: str | os.PathLike[str], directory_fd: int, version: TpmVersion
    ) -> None:
        self.path = os.fspath(path)
        self.directory_fd = directory_fd
        self.version = version
        self.names = names_of(version)

    def close(self) -> None:
        """Close its descriptor."""
        os.close(self.directory_fd)

    def place(self, name: str) -> str:
        """Return where a file is, for people."""
        return os.path.join(self.path, name)

    def read(self, name: str, bytes_max: int) -> bytes | None:
        """Return a file's content, at most one byte more than ``bytes_max``, or None without it.

        Raises StateDirectoryError.
        """
        try:
            return read_regular_file(self.directory_fd, name, bytes_max)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateDirectoryError(
                f"cannot read {self.place(name)}: {error.strerror}; "
                f"{self.remedy(name, error, 'repair the file system')}"
            ) from error

    def remedy(self, name: str, error: OSError, otherwise: str) -> str:
        """Return what to do about an error with a file: ``otherwise``, or give this user rights."""
        return _remedy(self.path, self.directory_fd, name, error, otherwise)

    def exists(self, name: str) -> bool:
        """Return whether there is something of that name."""
        try:
            os.stat(name, dir_fd=self.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int | None:
        """Return how many bytes a file has, or None without it. Raises StateDirectoryError."""
        try:
            status = os.stat(name, dir_fd=self.directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise StateDirectoryError(f"{self.place(name)} is no regular file; {RESTORE}")
        return status.st_size

    def is_in_use(self) -> bool:
        """Return whether somebody holds the lock. Raises StateDirectoryError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            lock_fd = os.open(LOCK_NAME, flags, dir_fd=self.directory_fd)
            try:
                return is_locked(lock_fd)
            finally:
                os.close(lock_fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StateDirectoryError(
                f"cannot read {self.place(LOCK_NAME)}: {error.strerror}; "
                f"{self.remedy(LOCK_NAME, error, 'put a file in its place')}"
            ) from error


def write_new(
    path: str | os.PathLike[str], content: bytes, mode: int, directory_fd: int | None = None
) -> None:
    """Make a file, and return once its content is on the disk; its name may not be yet.

    ``path`` is relative to ``directory_fd``, if there is one. Raises OSError; then a part of it may
    be there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, mode, dir_fd=directory_fd)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(content)
        file.flush()
        os.fsync(fd)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Return once renames and removals in a directory are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_socket(path: str | os.PathLike[str]) -> bool:
    """Return whether a socket is there, which opens as nothing else does."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _instead_of_a_directory(path: str | os.PathLike[str]) -> str:
    """Return what to do with what is no directory."""
    return ASK_IT if is_socket(path) else NO_DIRECTORY


def look_into(path: str | os.PathLike[str]) -> OpenDirectory:
    """Open a state directory that is there, and do not lock it. Raises StateDirectoryError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        remedy = "give one that is there, and that this user may read"
        if error.errno == errno.ENOTDIR:
            remedy = _instead_of_a_directory(path)
        raise StateDirectoryError(
            f"cannot read state directory {path}: {error.strerror}; {remedy}"
        ) from error
    try:
        return OpenDirectory(path, fd, _find_version(path, fd, None))
    except BaseException:
        os.close(fd)
        raise


def _find_version(
    path: str | os.PathLike[str], directory_fd: int, wanted: TpmVersion | None
) -> TpmVersion:
    """Return of which version the TPM is that a directory is for.

    Where it holds none it is the one that is ``wanted``, or a 2.0. Raises StateDirectoryError
    where that is lying there which must not be taken for it.
    """
    there = set(os.listdir(directory_fd))
    found = [version for version in TpmVersion if not there.isdisjoint(names_of(version))]
    if len(found) > 1:
        raise StateDirectoryError(
            f"state directory {path} holds a TPM 1.2 and a TPM 2.0: give each a directory of its "
            "own, with the files whose names begin as its state's does"
        )
    if wanted is not None and found and found != [wanted]:
        raise StateDirectoryError(
            f"state directory {path} holds a TPM {found[0].facts.word}, not a TPM "
            f"{wanted.facts.word}: give another directory, or ask for that one"
        )
    return found[0] if found else wanted or TpmVersion.TPM_2_0


class StateDirectory(OpenDirectory):
    """A state directory that is locked: it is this process's, and its engine's."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        directory_fd: int,
        lock_fd: int,
        version: TpmVersion,
    ) -> None:
        super().__init__(path, directory_fd, version)
        self.lock_fd = lock_fd
        self.file_mode = FILE_MODE

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        make: bool = True,
        version: TpmVersion | None = None,
        lock: bool = True,
        claims: bool = False,
    ) -> StateDirectory:
        """Open and lock a state directory; ``make`` it if its parent is there.

        It is for a TPM of this ``version``, or of the one that it holds. What a crash left half
        written is removed. With ``lock`` false it is another's meanwhile: it is left as it is, and
        to be locked by its ``lock_fd`` before it is used. With ``claims`` the word of another
        host that has it is not asked for. Raises StateDirectoryInUse, or StateDirectoryError.
        """
        descriptors: list[int] = []
        try:
            if make:
                _make_directory(path)
            descriptors.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            descriptors.append(_open_lock(descriptors[0]))
            if lock:
                _lock(path, descriptors[1], claims=claims)
            found = _find_version(path, descriptors[0], version)
            if lock:
                _remove_temporary_files(descriptors[0], names_of(found))
        except BaseException as error:
            failure = _failure(os.fspath(path), descriptors, error)
            for descriptor in descriptors:
                os.close(descriptor)
            if failure is error:
                raise
            raise failure from error
        return cls(path, descriptors[0], descriptors[1], found)

    def set_file_mode(self, mode: int) -> None:
        """Have the state's files, those that are there too, have this mode. Raises OSError."""
        self.file_mode = mode
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        for name in map(self.names.state, STATE_NAMES):
            with suppress(FileNotFoundError):
                fd = os.open(name, flags, dir_fd=self.directory_fd)
                try:
                    os.fchmod(fd, mode)
                finally:
                    os.close(fd)

    def write_in_place(self) -> None:
        """Have files that are made from now on written in place, where btrfs would copy them.

        Nothing happens on other file systems, which write so or cannot, and in a directory of
        another user's.
        """
        with suppress(OSError):
            before = fcntl.ioctl(self.directory_fd, FS_IOC_GETFLAGS, bytes(_FLAGS.size))
            (flags,) = _FLAGS.unpack(before)
            fcntl.ioctl(self.directory_fd, FS_IOC_SETFLAGS, _FLAGS.pack(flags | FS_NOCOW_FL))

    def close(self) -> None:
        """Close both descriptors; the lock stays for as long as the engine has its copy."""
        os.close(self.lock_fd)
        super().close()

    def read_states(self, key: Key | None = None) -> dict[StateType, bytes]:
        """Return the states that there are files of, as libtpms marshalled them.

        With a key all of them must be encrypted with it, without one none may be. Raises
        StateKeyError, or StateDirectoryError for a file that cannot be one; they stay as they are.
        """
        found = {kind: self.read_state(kind, key) for kind in STATE_NAMES}
        return {kind: state for kind, state in found.items() if state is not None}

    def read_state(self, state_type: StateType, key: Key | None = None) -> bytes | None:
        """Return one state, or None without its file; raises as ``read_states`` does."""
        name = self.names.state(state_type)
        try:
            content = read_regular_file(self.directory_fd, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            remedy = self.remedy(name, error, RESTORE)
            raise StateDirectoryError(
                f"cannot read state file {self.place(name)}: {reason}; {remedy}"
            ) from error
        return self.decode_state(name, content, key)

    def decode_state(self, name: str, content: bytes, key: Key | None) -> bytes:
        """Return the state that a file of this name holds; raises as ``read_states`` does."""
        try:
            return swtpm_format.decode_file(content, key=None if key is None else key.material)
        except swtpm_format.FormatError as error:
            kind, remedy = StateDirectoryError, RESTORE
            if isinstance(error, tuple(KEY_REMEDIES)):
                kind, remedy = StateKeyError, KEY_REMEDIES[type(error)]
            raise kind(f"cannot read state file {self.place(name)}: {error}; {remedy}") from error

    def read_lineage(self) -> Lineage | None:
        """Return where the permanent state's file says that it stands, or None if it does not.

        Raises StateDirectoryError.
        """
        name = self.names.permanent
        content = self.read(name, swtpm_format.FILE_BYTES_MAX)
        try:
            return None if content is None else swtpm_format.read_lineage(content)
        except swtpm_format.FormatError as error:
            raise StateDirectoryError(
                f"cannot read state file {self.place(name)}: {error}; restore the directory from a "
                "backup, or give another one"
            ) from error

    def write_state(
        self,
        state_type: StateType,
        state: bytes,
        key: Key | None,
        lineage: Lineage | None = None,
    ) -> None:
        """Replace a state file, durably; with a key it is encrypted.

        No journal continues a permanent state afterwards. Unless a ``lineage`` is given it has the
        one of the file before. Raises StateDirectoryError.
        """
        if state_type == StateType.PERMANENT and lineage is None:
            before = self.read_lineage()
            lineage = None if before is None else before._replace(continued=False)
        material, iv = (None, b"") if key is None else (key.material, key.new_iv())
        content = swtpm_format.encode_file(state, key=material, iv=iv, lineage=lineage)
        self.replace(self.names.state(state_type), content)

    def replace(self, name: str, content: bytes) -> None:
        """Replace a file, durably: after a crash it is the old one or the new one.

        Raises StateDirectoryError; then it may be either one, too.
        """
        temporary = _temporary(name)
        try:
            self._unlink(temporary)
            write_new(temporary, content, self.file_mode, self.directory_fd)
            os.rename(temporary, name, src_dir_fd=self.directory_fd, dst_dir_fd=self.directory_fd)
            os.fsync(self.directory_fd)
        except OSError as error:
            raise self.failed(name, error) from error

    def rename(self, name: str, to: str) -> None:
        """Give a file another name, durably. Raises StateDirectoryError."""
        try:
            os.rename(name, to, src_dir_fd=self.directory_fd, dst_dir_fd=self.directory_fd)
            os.fsync(self.directory_fd)
        except OSError as error:
            raise self.failed(name, error) from error

    def remove(self, name: str) -> None:
        """Remove a file if it is there, durably. Raises StateDirectoryError."""
        try:
            self._unlink(name)
            os.fsync(self.directory_fd)
        except OSError as error:
            raise self.failed(name, error) from error

    def failed(self, name: str, error: OSError) -> StateDirectoryError:
        """Return the error for a file that could not be written."""
        return StateDirectoryError(
            f"cannot update {self.place(name)}: {error.strerror}; "
            f"{self.remedy(name, error, 'make room or repair the file system')}"
        )

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.directory_fd)
        except FileNotFoundError:
            return


def _make_directory(path: str | os.PathLike[str]) -> None:
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except OSError:
        if not os.path.lexists(path):
            raise  # else what it is, is said when it is opened


def _failure(path: str, descriptors: list[int], error: BaseException) -> BaseException:
    """Return what to raise where a directory that is at ``path`` cannot be opened and locked.

    The first of the ``descriptors`` is the directory's, if that could be opened.
    """
    if isinstance(error, StateDirectoryInUse) and _has_link(path):
        return StateDirectoryInUse(
            f"{error}; or, if it is an engine whose vtpmd has died: vtpmd attach {path}"
        )
    if not isinstance(error, OSError):
        return error
    name, otherwise = error.filename, "give one that this user may write to"
    if error.errno == errno.ENOTDIR:
        otherwise = _instead_of_a_directory(path)
    if isinstance(error, _NoFile):
        otherwise = "remove it"
    if not descriptors or not name:
        remedy, place = otherwise, ""
    else:
        remedy = _remedy(path, descriptors[0], name, error, otherwise)
        place = f"{name}: "
    return StateDirectoryError(
        f"cannot use state directory {path}: {place}{error.strerror}; {remedy}"
    )


def _remedy(path: str, directory_fd: int, name: str, error: OSError, otherwise: str) -> str:
    """Return what to do about an error with a file of a directory: ``otherwise``, or give rights.

    All files of a directory are to be one user's: what cannot be removed may be the directory's.
    """
    if error.errno not in (errno.EACCES, errno.EPERM) or os.geteuid() == 0:
        return otherwise  # root's rights are enough
    try:
        status, what = os.stat(name, dir_fd=directory_fd, follow_symlinks=False), name
    except OSError:  # there is none: it cannot be made
        status, what = os.fstat(directory_fd), "the directory"
    return (
        f"{what} is user {status.st_uid}'s, with mode {stat.S_IMODE(status.st_mode):04o}: be that "
        f"user, or as root: chown -R {os.geteuid()} {path}"
    )


def _has_link(path: str | os.PathLike[str]) -> bool:
    return os.path.lexists(os.path.join(os.fspath(path), LINK_NAME))


class _NoFile(OSError):
    """Something else is where the lock is to be."""

    def __init__(self) -> None:
        super().__init__(errno.EINVAL, "it is no regular file", LOCK_NAME)


def _open_lock(directory_fd: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(LOCK_NAME, flags, LOCK_MODE, dir_fd=directory_fd)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise _NoFile from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _NoFile
    return fd


def _lock(path: str | os.PathLike[str], fd: int, *, claims: bool) -> None:
    """Lock a directory, and see that no other host has it. Raises StateDirectoryInUse."""
    try:
        lock_file(f"state directory {path}", fd)
    except StateDirectoryInUse:
        _check_holder(path, fd, claims=claims, is_locked=False)
        raise
    _check_holder(path, fd, claims=claims, is_locked=True)


def _check_holder(path: str | os.PathLike[str], fd: int, *, claims: bool, is_locked: bool) -> None:
    if not os.pread(fd, 1, 0):
        return  # it was not on storage that hosts share
    from vtpmd.store import holder

    asked = holder.Asked.CLAIM if claims else holder.Asked.START
    holder.check(path, fd, asked, is_locked=is_locked)


def is_locked(fd: int) -> bool:
    """Return whether somebody else has a lock on an open file. Raises OSError."""
    wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return bool(FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)


def lock_file(what: str, fd: int) -> None:
    """Lock an open file, for as long as its description is open. Raises StateDirectoryInUse."""
    wanted = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))[4]
        # The kernel names the holder only of a lock that is a process's, as swtpm's is.
        holder = f"process {pid}" if pid > 0 else "another vtpmd, or its engine"
        raise StateDirectoryInUse(
            f"{what} is in use by {holder}; stop that first, or give another one"
        ) from None


def _temporary(name: str) -> str:
    """Return what a file is called until it is whole, as swtpm and the engine have it."""
    return f"TMP{name.removeprefix('tpm')}"


def _remove_temporary_files(directory_fd: int, names: FileNames) -> None:
    for name in names:
        try:
            os.unlink(_temporary(name), dir_fd=directory_fd)
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
