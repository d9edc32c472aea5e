"""The boot record: what an engine starts from, and how it keeps it, as messages of the engine link.

It is a sealed memfd, so that it can be handed over at the start of the process, and nobody changes
it after that.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from itertools import chain

from vtpmd import core
from vtpmd.core import LinkHeader, LinkKey, LinkOperation
from vtpmd.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vtpmd.store.anchor import Anchor
    from vtpmd.store.keys import Key
    from vtpmd.store.start import Start

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

Message = tuple[LinkOperation, int, bytes | bytearray]


@contextmanager
def boot_record(
    begun: Start,
    key: Key | None,
    anchor: Anchor | None,
    serving: bytes,
    then: Sequence[Message] = (),
) -> Iterator[int]:
    """Make a boot record, and close its descriptor afterwards.

    ``serving`` is from ``core.pack_link_serving()``; ``then`` comes last. Raises OSError.
    """
    fd = os.memfd_create("vtpmd-boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # One after the other: what has a secret is overwritten once it is written.
        for operation, argument, payload in chain(_messages(begun, key, anchor, serving), then):
            header = LinkHeader(operation, argument=argument, payload_bytes=len(payload))
            _write_all(fd, core.pack_link_header(header), payload)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, header: bytes, payload: bytes | bytearray) -> None:
    """Write a message; what a limit on the size of files has no room for is not half there."""
    if os.writev(fd, [header, payload]) != len(header) + len(payload):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def _messages(
    begun: Start, key: Key | None, anchor: Anchor | None, serving: bytes
) -> Iterator[Message]:
    """Yield what the engine is to do, in this order."""
    yield LinkOperation.SERVE_CONTROL, 0, serving
    yield LinkOperation.SET_VERSION, begun.version, b""
    secret = None if key is None else key.journal_secret()
    journal = core.pack_link_journal(
        begun.identity, begun.generation, begun.loaded, secret, is_known=begun.is_known
    )
    yield LinkOperation.SET_JOURNAL, 0 if begun.keeps_journal else 1, journal
    journal[:] = bytes(len(journal))
    if key is not None:
        yield LinkOperation.SET_KEY, LinkKey.FILE, key.material
    if anchor is not None:
        seen = anchor.serial, anchor.generation, anchor.digest
        says = core.pack_link_anchor(begun.identity, *seen)
        yield LinkOperation.SET_ANCHOR, 0, says
    for kind, state in begun.states.items():
        yield LinkOperation.LOAD_STATE, kind, state
    if begun.fenced:
        yield LinkOperation.RETIRE, 0, b""
