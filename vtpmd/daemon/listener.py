"""Listening sockets: UNIX, with a file that only its owner may connect to, and TCP for peers.

Those that a start needs are of C's ``_socket``, which ``socket`` is built on: that makes enums of a
thousand constants when it is imported, which is a tenth of a start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as BareSocket
from contextlib import closing, contextmanager, suppress

from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

# QEMU's connection, and a few that wait while it is served.
BACKLOG = 8
# Connections to take in one turn of the event loop; what has no room tries again a second later,
# and so would a peer among many strangers.
PEER_BACKLOG = 128
# Others need a moment, unless somebody who may read the directory keeps it locked.
OTHERS_WAIT_S = 1.0
OTHERS_POLL_S = 0.005
# sun_path of struct sockaddr_un, less its NUL (unix(7)).
PATH_BYTES_MAX = 107


class SocketInUse(VtpmdError):
    """Somebody serves on the socket's path."""

    exit_status = 3


@contextmanager
def listen(path: str | os.PathLike[str], option: str = "--socket") -> Iterator[socket.socket]:
    """Listen as ``listen_bare`` does, on a socket that Python can accept with."""
    import socket

    with (
        listen_bare(path, option) as bare,
        socket.socket(fileno=os.dup(bare.fileno())) as listening,
    ):
        yield listening


@contextmanager
def listen_bare(
    path: str | os.PathLike[str], option: str = "--socket", mode: int = 0o600
) -> Iterator[BareSocket]:
    """Listen on ``path``, and remove the file afterwards.

    A socket that nobody serves any more is replaced; anything else in its place is left alone.
    ``option`` is what gives another path, for errors.
    Raises SocketInUse or VtpmdError.
    """
    _check_length(path, option)
    with closing(BareSocket(AF_UNIX, SOCK_STREAM)) as listening:
        with _alone_at(path, option):
            _bind(listening, path, option, mode)
            listening.listen(BACKLOG)
        try:
            yield listening
        finally:
            with suppress(OSError):  # what went wrong before is what is to be told
                os.unlink(path)


def path_for_qemu(path: str) -> str:
    """Return what QEMU can connect to: the whole path, or where that is too long the relative one.

    Raises VtpmdError if that is too long, too.
    """
    _check_length(path, "--socket")
    # The current directory of a process may be gone.
    whole = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    return path if len(os.fsencode(whole)) > PATH_BYTES_MAX else whole


def _check_length(path: str | os.PathLike[str], option: str) -> None:
    if not os.fsencode(path):  # Linux would find a name for it that nobody knows
        raise VtpmdError(f"cannot listen without a path: give one with {option}")
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise VtpmdError(
            f"cannot listen on {path}: a socket's path has at most {PATH_BYTES_MAX} bytes; "
            f"give a shorter one with {option}"
        )


@contextmanager
def listen_in(directory_fd: int, name: str) -> Iterator[BareSocket]:
    """Listen in a directory (mode 0600) that is locked: what is there is nobody's any more.

    Unless the block is left without an error the file is removed. Raises VtpmdError.
    """
    path = path_in(directory_fd, name)
    with closing(BareSocket(AF_UNIX, SOCK_STREAM)) as listening:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory_fd)
        _bind(listening, path, "another state directory")
        listening.listen(BACKLOG)
        try:
            yield listening
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory_fd)
            raise


def path_in(directory_fd: int, name: str) -> str:
    """Return a path for a socket that fits, however long the directory's own is."""
    return f"/proc/self/fd/{directory_fd}/{name}"


@contextmanager
def _alone_at(path: str | os.PathLike[str], option: str) -> Iterator[None]:
    """Keep others that begin to listen out of the directory. Raises SocketInUse.

    What is bound, and not listened on yet, looks as what nobody serves any more: of two that find
    a stale socket each would remove the other's.
    """
    try:
        directory_fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield  # what is wrong with the path, bind() says
        return
    try:
        until_s = time.monotonic() + OTHERS_WAIT_S
        while not _lock(directory_fd):
            if time.monotonic() > until_s:
                raise SocketInUse(
                    f"cannot listen on {path}: another process holds a lock on its directory; try "
                    f"again, or give another path with {option}"
                )
            time.sleep(OTHERS_POLL_S)
        yield
    finally:
        os.close(directory_fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bind(
    listening: BareSocket, path: str | os.PathLike[str], option: str, mode: int = 0o600
) -> None:
    if _is_socket(path):
        _remove_stale(path, option)
    # The file has its mode from the start: there is no moment for another user to connect.
    umask = os.umask(0o777 & ~mode)
    try:
        listening.bind(os.fspath(path))
    except OSError as error:
        raise VtpmdError(
            f"cannot listen on {path}: {error.strerror}; give another path with {option}"
        ) from error
    finally:
        os.umask(umask)


def _is_socket(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False  # what is wrong with the path, bind() says


def _remove_stale(path: str | os.PathLike[str], option: str) -> None:
    with closing(BareSocket(AF_UNIX, SOCK_STREAM)) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(os.fspath(path))
    if result != errno.ECONNREFUSED:
        raise SocketInUse(
            f"cannot listen on {path}: another process does; stop it or give another path with "
            f"{option}"
        )
    os.unlink(path)


@contextmanager
def listen_for_peers(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on a TCP address; port 0 is one that is free. Raises VtpmdError."""
    import socket

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=PEER_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VtpmdError(
            f"cannot listen for peers on {host}:{port}: {reason}; give another --listen"
        ) from error
    with listening:
        listening.setblocking(False)
        yield listening
