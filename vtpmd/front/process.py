"""What a command line makes of the process: its log, its process number's file, its user."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager, suppress

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpmd.front.options import Values

LOG_MODE = 0o640
PID_MODE = 0o644
ERROR_FD = 2
UID_MAX = 2**32 - 2  # the last is no user's
UID_DIGITS_MAX = 10
FAILED = 1
TOLD = b"\0"  # the last byte from a child that serves; lines have none
PIECE_BYTES_MAX = 4096


def open_log(values: Values) -> int | None:
    """Return a descriptor of the log that ``--log`` names, or None for standard error.

    Raises VtpmdError.
    """
    if "fd" in values:
        return _given_log(int(values["fd"]))
    path = values.get("file")
    if path is None:
        return None
    if path == "-":
        path = os.devnull  # as swtpm takes it: no log
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    flags |= os.O_TRUNC if values.get("truncate") else 0
    try:
        return os.open(str(path), flags, LOG_MODE)
    except OSError as error:
        raise VtpmdError(
            f"cannot open log {path}: {error.strerror}; give another one with --log"
        ) from error


def _given_log(fd: int) -> int:
    """Return a descriptor that this process was given, to write to. Raises UsageError."""
    import fcntl

    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except (OSError, OverflowError, ValueError):
        raise UsageError(f"--log fd={fd}: this process was given no such descriptor") from None
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise UsageError(f"--log fd={fd}: this is not open for writing")
    return fd


def write_pid(values: Values) -> str | None:
    """Write the process number where ``--pid`` says; return the path of a file that has it then.

    A device has nothing then, and is not to be removed at the end; a symbolic link is refused. A
    file that is made is there only when it is whole: who waits for it reads it at once. Raises
    VtpmdError.
    """
    number = f"{os.getpid()}\n".encode()
    path = values.get("file")
    if path is None and "fd" not in values:
        raise UsageError("--pid needs file= or fd=")
    try:
        if path is None:
            os.write(int(values["fd"]), number)
            return None
        return str(path) if _write_whole(str(path), number) else None
    except OSError as error:
        raise VtpmdError(
            f"cannot write the process number to {values['fd'] if path is None else path}: "
            f"{error.strerror}; give another --pid"
        ) from error


def _write_whole(path: str, content: bytes) -> bool:
    """Have the content there; return False if it is not in a file. Raises OSError."""
    try:
        # Who has made the file looks into it by a descriptor: swtpm_setup, for one.
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        _make_whole(path, content)
        return True
    return _fill(fd, content)


def _make_whole(path: str, content: bytes) -> None:
    temporary = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, PID_MODE)
    try:
        _fill(fd, content)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _fill(fd: int, content: bytes) -> bool:
    try:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        if is_file:
            os.fchmod(fd, PID_MODE)
        os.write(fd, content)
    finally:
        os.close(fd)
    return is_file


class User(NamedTuple):
    """Whom to run as."""

    uid: int
    gid: int
    groups: list[int]

    def become(self, *, for_good: bool) -> None:
        """Run as this user from now on, or until the effective user is root again.

        Raises VtpmdError.
        """
        try:
            os.setgroups(self.groups)
            os.setgid(self.gid)
            (os.setuid if for_good else os.seteuid)(self.uid)
        except OSError as error:
            raise VtpmdError(f"cannot run as user {self.uid}: {error.strerror}; be root") from error


def find_user(name: str) -> User:
    """Return a user by its name, or its number, which need not be known. Raises UsageError."""
    import pwd

    if name.isascii() and name.isdigit():
        if len(name) > UID_DIGITS_MAX or int(name) > UID_MAX:
            raise UsageError(f"--runas {name}: a user's number is at most {UID_MAX}")
        return User(int(name), int(name), [])
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"--runas {name}: there is no such user") from None
    return User(user.pw_uid, user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid))


@contextmanager
def in_background(*, wanted: bool) -> Iterator[int | None]:
    """Go on in a child if that is wanted; the parent ends when it is told so.

    Yields the descriptor to tell it by, with TOLD, or None. The parent ends with 0 then, and else
    with the child's exit status.
    """
    if not wanted:
        yield None
        return
    import signal

    # Who had it ignored, as some shells' scripts have, would learn of no child's end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told_fd, tell_fd = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child != 0:
        os.close(tell_fd)
        os._exit(_follow(told_fd, child))
    os.close(told_fd)
    os.setsid()
    yield tell_fd


def _follow(told_fd: int, child: int) -> int:
    """Wait until the child serves, or has ended; return the exit status.

    The child's own standard error is closed before it knows that it can serve. What it has to say
    by then is said here.
    """
    said = b""
    while TOLD not in said and (piece := os.read(told_fd, PIECE_BYTES_MAX)):
        said += piece
    lines, told, _ = said.partition(TOLD)
    with suppress(OSError):  # nobody reads it
        os.write(ERROR_FD, lines)
    if told:
        return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or FAILED
