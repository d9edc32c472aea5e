"""Starting the engine process. Imports no asyncio, so that the two come up side by side."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import NamedTuple

from vtpmd.core import LinkDescriptor
from vtpmd.errors import VtpmdError

EXECUTABLE = Path(__file__).resolve().parent.parent / "vtpmd-engine"

# Above the fixed numbers of LinkDescriptor, so that no dup2() overwrites a source of another.
DESCRIPTOR_MIN = 16


class EngineProcess(NamedTuple):
    """A started engine: ours to wait for, and our end of the link to it."""

    pid: int
    link: socket.socket


def spawn(
    *, directory_fd: int, lock_fd: int, store_fd: int, boot_fd: int, anchor_fd: int | None = None
) -> EngineProcess:
    """Start an engine on a state directory, from a boot record (``vtpmd.front.boot``).

    It gets copies of the descriptors and holds them, and so the lock, for as long as it lives.
    Raises VtpmdError if the executable cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    sources = {
        LinkDescriptor.SOCKET: theirs.fileno(),
        LinkDescriptor.DIRECTORY: directory_fd,
        LinkDescriptor.LOCK: lock_fd,
        LinkDescriptor.STORE: store_fd,
        LinkDescriptor.BOOT: boot_fd,
    }
    if anchor_fd is not None:
        sources[LinkDescriptor.ANCHOR] = anchor_fd
    copies = {
        to: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, DESCRIPTOR_MIN) for to, fd in sources.items()
    }
    actions = [
        (os.POSIX_SPAWN_OPEN, LinkDescriptor.INPUT, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, LinkDescriptor.LIBRARY_LOG, os.devnull, os.O_WRONLY, 0),
        *((os.POSIX_SPAWN_DUP2, fd, to) for to, fd in copies.items()),
    ]
    try:
        pid = os.posix_spawn(EXECUTABLE, ["vtpmd-engine"], os.environ, file_actions=actions)
    except OSError as error:
        ours.close()
        raise VtpmdError(
            f"cannot start {EXECUTABLE}: {error.strerror}; install vtpmd again"
        ) from error
    finally:
        theirs.close()
        for fd in copies.values():
            os.close(fd)
    return EngineProcess(pid, ours)
