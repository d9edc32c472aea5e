"""Starting the engine: beside this process, or in its place. Imports no asyncio."""

from __future__ import annotations

import fcntl
import os

from vtpmd.core import LinkDescriptor
from vtpmd.core.program import ARGUMENTS, DESCRIPTOR_MIN, EXECUTABLE, environment
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


def spawn(
    descriptors: dict[LinkDescriptor, int], announce: Callable[[], None] = lambda: None
) -> int:
    """Start an engine beside this process, with these descriptors; return its process number.

    It gets copies of them, and holds them, and so the lock, for as long as it lives. ``announce``
    is called when all is there that it needs. Raises VtpmdError if the executable cannot be
    started.
    """
    copies = _copies(descriptors)
    actions = [
        (os.POSIX_SPAWN_OPEN, LinkDescriptor.INPUT, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, LinkDescriptor.LIBRARY_LOG, os.devnull, os.O_WRONLY, 0),
        *((os.POSIX_SPAWN_DUP2, fd, to) for to, fd in copies.items()),
    ]
    try:
        announce()
        return os.posix_spawn(EXECUTABLE, ARGUMENTS, environment(), file_actions=actions)
    except OSError as error:
        raise _not_started(error) from error
    finally:
        for fd in copies.values():
            os.close(fd)


def become(
    descriptors: dict[LinkDescriptor, int],
    announce: Callable[[], None],
    arguments: tuple[str, ...] = ARGUMENTS,
) -> NoReturn:
    """Become an engine, with these descriptors and what the process was given.

    ``announce`` is called as by ``spawn``. Standard input and output are /dev/null: who waits for
    the end of what was written there is not kept waiting. Raises VtpmdError if the executable
    cannot be started.
    """
    copies = _copies(descriptors)
    announce()
    for fd in range(LinkDescriptor.SOCKET, max(LinkDescriptor) + 1):
        _move_away(fd)
    for fd in (LinkDescriptor.INPUT, LinkDescriptor.LIBRARY_LOG):
        _open_null(fd)
    for to, fd in copies.items():
        os.dup2(fd, to)
    try:
        os.execve(EXECUTABLE, arguments, environment())  # noqa: S606 - there is no shell to want
    except OSError as error:
        raise _not_started(error) from error


def _copies(descriptors: dict[LinkDescriptor, int]) -> dict[LinkDescriptor, int]:
    """Return copies that have no number of an engine's.

    Raises VtpmdError, also where there is no engine that they could be for.
    """
    if not os.access(EXECUTABLE, os.X_OK):
        raise VtpmdError(f"cannot start {EXECUTABLE}: it is no executable; install vtpmd again")
    try:
        return {
            to: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, DESCRIPTOR_MIN)
            for to, fd in descriptors.items()
        }
    except OSError as error:
        # EINVAL where the limit is below the numbers that are asked for.
        raise VtpmdError(
            "cannot give the engine its descriptors: too many open files; allow this process more "
            "(LimitNOFILE in a service, ulimit -n in a shell)"
        ) from error


def _move_away(fd: int) -> None:
    """Give a descriptor that this process was given, as a lock may be, another number."""
    try:
        inherited = os.get_inheritable(fd)
    except OSError:
        return
    if inherited:
        fcntl.fcntl(fd, fcntl.F_DUPFD, DESCRIPTOR_MIN)


def _open_null(to: int) -> None:
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if fd == to:
        os.set_inheritable(fd, True)
        return
    os.dup2(fd, to)
    os.close(fd)


def _not_started(error: OSError) -> VtpmdError:
    return VtpmdError(f"cannot start {EXECUTABLE}: {error.strerror}; install vtpmd again")
