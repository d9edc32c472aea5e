"""A limit on the size of files (RLIMIT_FSIZE) that a vTPM is served under, as some callers set one.

It counts for memory that is shared, too. Where there is no room for the store, which is smaller
than a journal, the engine has one of its own, and each change replaces the state's file.
"""

from __future__ import annotations

import errno
import os

from vtpmd.core import Store
from vtpmd.errors import VtpmdError
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from contextlib import ExitStack

    from vtpmd.store.start import Start

_REMEDY = "allow 1 MiB (LimitFSIZE=1M in a service, ulimit -f 1024 in a shell)"
NO_JOURNAL = (
    "the limit on the size of files (RLIMIT_FSIZE) leaves no room for a journal: each change "
    f"replaces the whole state, which is slower; {_REMEDY}"
)


class StoreFd(NamedTuple):
    """What an engine is given as its store."""

    fd: int  # of /dev/null if it is to have one of its own
    is_shared: bool

    def limited(self, begun: Start) -> Start:
        """Return the start, without a journal if there is no room for one."""
        return begun if self.is_shared else begun._replace(keeps_journal=False)


def open_store(stack: ExitStack) -> StoreFd:
    """Make a store to share, as far as the limit has room for it. Raises OSError."""
    try:
        return StoreFd(stack.enter_context(Store.create()).fd, is_shared=True)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return StoreFd(fd, is_shared=False)


def no_daemon() -> VtpmdError:
    """Return the error where a vtpmd is to be beside the engine, which has to share its store."""
    return VtpmdError(
        "the limit on the size of files (RLIMIT_FSIZE) leaves no room for a vtpmd beside the "
        f"vTPM's engine: {_REMEDY}, or serve it without options for moving"
    )
