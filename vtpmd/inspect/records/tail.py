"""A tail: what QEMU's stream carries in the state's place. Its session's two vtpmd alone can open
it; what is in front of the seal says which generations it is of (docs/stream-format.md).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from vtpmd.inspect.primitives import Fields, read_fields
from vtpmd.inspect.reader import Fault, Reader
from vtpmd.store.keys import Key

MAGIC: Final = b"VTPMTAIL"
VERSION: Final = 3
TAG_BYTES: Final = 16
HEAD: Final[Fields] = (
    ("magic", "UINT64"),
    ("version", "UINT16"),
    ("incompatible-flags", "UINT16"),
    ("session", "IDENTITY"),
    ("permanent-from-generation", "UINT64"),
    ("permanent-to-generation", "UINT64"),
    ("volatile-from-generation", "UINT64"),
    ("volatile-to-generation", "UINT64"),
    ("nonce", "AEAD_NONCE"),
)


def is_one(content: bytes) -> bool:
    """Return whether a blob begins as a tail."""
    return content.startswith(MAGIC)


def opened(content: bytes, _: Key | None) -> tuple[Callable[[Reader], None], dict[str, Any]]:
    """Return how a tail is taken apart, and what it says."""
    reader = Reader(content, "tail")
    with suppress(Fault):  # told when it is taken apart to be shown
        read(reader)
    head = reader.root.find("header") or reader.root
    says: dict[str, Any] = {"session": head.content("session").hex() or None}
    for name, _type in HEAD[4:-1]:
        says[name] = head.number(name)
    sealed = reader.root.find("sealed")
    return read, {**says, "sealed-bytes": None if sealed is None else sealed.length}


def read(reader: Reader) -> None:
    """Take a tail apart, as far as that goes without its session's key. Raises Fault."""
    with reader.part("header", "TAIL_HEADER") as head:
        read_fields(reader, HEAD)
    version = head.number("version") or 0
    if version != VERSION:
        what = f"it is of version {version}, and {VERSION} is known here"
        raise reader.fault(what, 8, is_newer=version > VERSION)
    reader.take("sealed", max(reader.left - TAG_BYTES, 0), "AES-256-GCM")
    reader.take("tag", TAG_BYTES, "AES-256-GCM tag")
