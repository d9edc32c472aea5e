"""The engine's program, and asking libtpms by it: in its sandbox, not in this process.

Source: ``csrc/engine/inquiry.h``.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import nullcontext
from enum import IntEnum

import vtpmd
from vtpmd._core import lib
from vtpmd.core.boot import LinkHeader, LinkOperation, pack_link_header
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

EXECUTABLE = f"{vtpmd.__path__[0]}/vtpmd-engine"
ARGUMENTS = ("vtpmd-engine",)

# Above the fixed numbers of LinkDescriptor, so that no dup2() overwrites a source of another.
DESCRIPTOR_MIN = 16
_OUTPUT_BYTES_MAX = 256 * 1024

# What this process is in while it starts a program to ask: who enters another root directory, where
# that is not, has it be outside.
where_it_is: Callable[[], AbstractContextManager[None]] = nullcontext


class LinkInquiry(IntEnum):
    """The exit statuses of an engine that is only asked (``enum link_inquiry``)."""

    ANSWERED = lib.LINK_INQUIRY_ANSWERED
    FAILED = lib.LINK_INQUIRY_FAILED
    REFUSED = lib.LINK_INQUIRY_REFUSED


class Inquired(NamedTuple):
    """What became of an inquiry."""

    status: int  # of LinkInquiry, or another one: it has failed
    output: bytes
    errors: str  # libtpms' own words

    def __repr__(self) -> str:
        """Leave the output out: it may be a state."""
        return f"Inquired({self.status})"


def environment() -> dict[str, str]:
    """Return what libraries of the engine look at, and sanitizers.

    Not the loader's LD_: who holds the secrets runs no other code than it was installed with.
    """
    kept = ("LANG", "LC_", "OPENSSL_", "ASAN_", "UBSAN_", "TSAN_", "LSAN_")
    return {name: value for name, value in os.environ.items() if name.startswith(kept)}


def inquire(
    version: int, flags: int, messages: Sequence[tuple[LinkOperation, int, bytes]]
) -> Inquired:
    """Have an engine ask libtpms, of a TPM of a version, once it was given what is in the messages.

    Raises OSError.
    """
    return _inquire(("info", str(int(version)), str(flags)), messages)


def make(version: int, messages: Sequence[tuple[LinkOperation, int, bytes]]) -> Inquired:
    """Have an engine make a new TPM of a version, once it was given what is in the messages.

    The output is a line with libtpms' version, and the TPM's permanent state. Raises OSError.
    """
    return _inquire(("make", str(int(version))), messages)


def _inquire(
    asked: Sequence[str], messages: Sequence[tuple[LinkOperation, int, bytes]]
) -> Inquired:
    given, output, errors = (os.memfd_create("vtpmd-inquiry", os.MFD_CLOEXEC) for _ in range(3))
    try:
        for operation, argument, payload in messages:
            header = LinkHeader(operation, argument=argument, payload_bytes=len(payload))
            os.writev(given, [pack_link_header(header), payload])
        os.lseek(given, 0, os.SEEK_SET)
        status = _run(asked, (given, output, errors))
        return Inquired(status, _content(output), _content(errors).decode(errors="replace"))
    finally:
        for fd in (given, output, errors):
            os.close(fd)


def _run(asked: Sequence[str], standard: Sequence[int]) -> int:
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, DESCRIPTOR_MIN) for fd in standard]
    actions = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(copies)]
    arguments = (*ARGUMENTS, *asked)
    try:
        with where_it_is():
            pid = os.posix_spawn(EXECUTABLE, arguments, environment(), file_actions=actions)
    finally:
        for fd in copies:
            os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _content(fd: int) -> bytes:
    return os.pread(fd, _OUTPUT_BYTES_MAX, 0)
