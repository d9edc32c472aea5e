"""Attaching to an engine that runs: the connection, and what it shares.

The engine tells its process number by way of the kernel, and gives the descriptors of the state
directory, its lock and the store: who came later has the very lock.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from contextlib import suppress
from typing import Final, NamedTuple

from vtpmd import core
from vtpmd.core import LinkOperation
from vtpmd.core.link import LINK_SHARED, LINK_VERSION
from vtpmd.daemon.listener import path_in
from vtpmd.errors import VtpmdError
from vtpmd.store.directory import LINK_NAME
from vtpmd.wire.state_level import Library, library_of
from vtpmd.wire.tpm import TpmVersion

log = logging.getLogger(__name__)

# An engine that is well greets at once; one whose storage stands still is waited for.
WARN_AFTER_S: Final = 10.0
READ_BYTES_MAX: Final = 64 * 1024
_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid: struct ucred of unix(7)
_READY: Final = struct.Struct("=II")  # struct link_ready; what libtpms has comes after it
_SHARED: Final = struct.Struct(f"={LINK_SHARED}i")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(_SHARED.size)


class NotAttached(VtpmdError):
    """The engine was not attached to: there may be none, or none that this process may have."""


class Attachment(NamedTuple):
    """A connection to an engine, and what came with it; the receiver's to close."""

    link: socket.socket
    link_version: int  # that the engine knows, LINK_VERSION at most
    pid: int
    library: Library
    tpm_version: TpmVersion
    received: bytes  # what has come after that
    directory_fd: int
    lock_fd: int
    store_fd: int


async def attach(directory_fd: int) -> Attachment:
    """Attach to the engine of a state directory, and wait for its greeting.

    Raises NotAttached.
    """
    link = _connect(directory_fd)
    try:
        return await _greeting(link)
    except BaseException:
        link.close()
        raise


def _connect(directory_fd: int) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before the engine can have sent anything.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        link.setblocking(False)
        link.connect(path_in(directory_fd, LINK_NAME))
    except OSError as error:
        link.close()
        if not os.fstat(directory_fd).st_nlink:
            raise NotAttached(
                "its state directory was removed; stop it, and start it on one that is there"
            ) from None
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            from vtpmd.daemon.not_served import why_not

            raise NotAttached(why_not(directory_fd)) from None
        raise NotAttached(
            f"cannot connect to the engine: {error.strerror}; be the user that it runs as"
        ) from error
    return link


async def _greeting(link: socket.socket) -> Attachment:
    while not await _is_readable(link, WARN_AFTER_S):
        log.warning("the engine does not greet: its storage may stand still; waiting for it")
    try:
        data, ancillary, flags, _ = link.recvmsg(
            READ_BYTES_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        data, ancillary, flags = b"", [], 0
    found = {kind: content for level, kind, content in ancillary if level == socket.SOL_SOCKET}
    descriptors = _descriptors(found.get(socket.SCM_RIGHTS, b""))
    try:
        return _parse(link, data, found, descriptors, is_cut=bool(flags & socket.MSG_CTRUNC))
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise


def _parse(
    link: socket.socket,
    data: bytes,
    found: dict[int, bytes],
    descriptors: tuple[int, ...],
    *,
    is_cut: bool,
) -> Attachment:
    if not data:
        raise NotAttached("the engine has ended; start it again: vtpmd run DIR")
    if is_cut:
        raise NotAttached(
            "cannot take the engine's descriptors: too many open files; allow this process more "
            "(LimitNOFILE in a service, ulimit -n in a shell)"
        )
    head, credentials = core.LINK_HEADER_BYTES, found.get(socket.SCM_CREDENTIALS, b"")
    header = core.unpack_link_header(data[:head]) if len(data) >= head else None
    at, end = head + _READY.size, head + (0 if header is None else header.payload_bytes)
    if (
        header is None
        or header.operation != LinkOperation.READY
        or end < at
        or len(data) < end
        or len(credentials) != _UCRED.size
        or len(descriptors) != LINK_SHARED
    ):
        raise NotAttached("what listens there is no engine of this vtpmd; look what it is")
    pid = _UCRED.unpack(credentials)[0]
    if header.argument > LINK_VERSION:
        raise NotAttached(
            f"the engine (pid {pid}) is of a later version of vtpmd, whose link is version "
            f"{header.argument}, and not {LINK_VERSION}: attach that version, or a later one; the "
            "engine serves on"
        )
    number, version = _READY.unpack(data[head:at])
    name = f"{number >> 16}.{number >> 8 & 0xFF}.{number & 0xFF}"
    library = library_of(name, data[at:end].decode(errors="replace"))
    known = link, header.argument, pid, library, TpmVersion(version)
    return Attachment(*known, data[end:], *descriptors)


def _descriptors(content: bytes) -> tuple[int, ...]:
    n = len(content) // struct.calcsize("i")
    return struct.unpack(f"={n}i", content[: n * struct.calcsize("i")])


async def _is_readable(link: socket.socket, timeout_s: float) -> bool:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def found() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(link, found)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await readable
                return True
    finally:
        loop.remove_reader(link)
    return False
