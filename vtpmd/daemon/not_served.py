"""Why there is no engine to attach to: nobody serves the directory, or one that has no link."""

from __future__ import annotations

import os
from typing import Final

from vtpmd.store import holder, holders
from vtpmd.store.directory import LOCK_NAME, is_locked

NOBODY: Final = "no engine serves the state directory; start it: vtpmd run DIR"
# Which files another process has open root alone gets to know.
NOBODY_SEEN: Final = (
    f"{NOBODY}; or does one wait for a vTPM, with --migration, which root would see: nothing can "
    "be attached to that"
)
NO_ENGINE: Final = (
    "what serves the state directory has no link to attach to, as swtpm has none, or begins or "
    "ends just now; see who it is: vtpmd status DIR"
)


def why_not(directory_fd: int) -> str:
    """Return what a person is told where nothing listens on the link of a state directory."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        lock_fd = os.open(LOCK_NAME, flags, dir_fd=directory_fd)
    except OSError:
        return NOBODY  # whatever is wrong with it, a start says
    try:
        return _by_lock(directory_fd, lock_fd)
    except OSError:
        return NOBODY
    finally:
        os.close(lock_fd)


def _by_lock(directory_fd: int, lock_fd: int) -> str:
    found, who = holder.look(lock_fd)
    if who is not None and found in (holder.Found.LIVES, holder.Found.ELSEWHERE):
        return (
            f"{holder.describe(who)}, serves the vTPM with --migration, for storage that hosts "
            "share: nothing can be attached there, it moves by QEMU's own migration; what looks "
            "into it needs no vtpmd: vtpmd status DIR, inspect, export, backup"
        )
    return NO_ENGINE if is_locked(lock_fd) else _by_processes(directory_fd)


def _by_processes(directory_fd: int) -> str:
    """Return the same where nobody has the lock: who waits for it has it open."""
    waiting = holders.without_lock(directory_fd)
    if waiting:
        return (
            f"{waiting[0].program} (process {waiting[0].pid}) has the state directory without its "
            "lock: it waits for a vTPM, or has given it away, with --migration; nothing can be "
            "attached there, it moves by QEMU's own migration"
        )
    return NOBODY if os.geteuid() == 0 else NOBODY_SEEN
