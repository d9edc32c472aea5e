"""What a lane's connection begins with, in the clear; docs/lane-format.md has the table. No I/O."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from vtpmd.wire.peer import SESSION_BYTES

MAGIC: Final = b"VTPMLANE"
VERSION: Final = 1
HELLO_BYTES: Final = 96  # LANE_FRAME_BYTES of csrc/engine/lane.h

_LAYOUT: Final = Struct(f">{len(MAGIC)}sH{SESSION_BYTES}s{HELLO_BYTES}s")
GREETING_BYTES: Final = _LAYOUT.size


class Greeting(NamedTuple):
    """The session that the lane is of, and the source's first frame, which shows that it is."""

    session: bytes
    hello: bytes


class GreetingError(Exception):
    """What came is no greeting, in words for a person."""


def begins(first_byte: bytes) -> bool:
    """Tell a greeting from TLS, whose records begin with their type, 0x14 to 0x18 (RFC 8446, 5)."""
    return first_byte == MAGIC[:1]


def encode(greeting: Greeting) -> bytes:
    """Return the bytes of a greeting, GREETING_BYTES of them."""
    return _LAYOUT.pack(MAGIC, VERSION, *greeting)


def decode(data: bytes) -> Greeting:
    """Return the greeting in GREETING_BYTES bytes. Raises GreetingError; its frame is unchecked."""
    magic, version, session, hello = _LAYOUT.unpack(data)
    if magic != MAGIC:
        raise GreetingError("it does not begin as a lane does")
    if version != VERSION:
        raise GreetingError(f"it is of version {version}, this vtpmd knows {VERSION}")
    return Greeting(session, hello)
