"""A delta record alone: which generations it leads from and to, and where it changes bytes.

docs/delta-format.md has its format. What it inserts is state, and so a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

from vtpmd.core.delta import DeltaError, delta_inspect
from vtpmd.counted import counted
from vtpmd.inspect.primitives import Fields, read_fields, read_number
from vtpmd.inspect.reader import Fault, Reader
from vtpmd.inspect.tree import Types
from vtpmd.store.keys import Key

MAGIC: Final = b"VTPD"
CHECKSUM_BYTES: Final = 4
HEADER_BYTES_MAX: Final = 512
OPERATIONS_MAX: Final = 1 << 14  # that are told one by one
NUMBER_BYTES_MAX: Final = 3
HEAD: Final[Fields] = (
    ("magic", "UINT32"),
    ("version", "UINT8"),
    ("image-type", "IMAGE_TYPE"),
)
BODY: Final[Fields] = (
    ("compatible-flags", "UINT16"),
    ("incompatible-flags", "UINT16"),
    ("base-bytes", "UINT32"),
    ("from-generation", "UINT64"),
    ("to-generation", "UINT64"),
    ("result-bytes", "UINT32"),
    ("operations-bytes", "UINT32"),
    ("base-digest", "SHA256"),
    ("result-digest", "SHA256"),
)
HEADER_BYTES: Final = 104
DATED: Final = 1
TIME_BYTES: Final = 8


class Operation(NamedTuple):
    """What makes a part of the result."""

    is_insert: bool
    n_bytes: int
    base_at: int | None  # where a copy is from
    at: int  # where in the result it is


def is_one(content: bytes) -> bool:
    """Return whether a file begins as a delta record."""
    return content.startswith(MAGIC)


def opened(content: bytes, _: Key | None) -> tuple[Callable[[Reader], None], dict[str, Any]]:
    """Return how a delta record is taken apart, and what it says."""
    reader = Reader(content, "delta-record")
    found: list[Operation] = []
    with suppress(Fault):  # told when it is taken apart to be shown
        found.extend(_read(reader))
    header = reader.root.find("header")
    type_ = None if header is None else header.words("image-type") or None
    numbers = ("from-generation", "to-generation", "base-bytes", "result-bytes")
    says = {name: None if header is None else header.number(name) for name in numbers}
    when = None if header is None else header.words("time") or None
    return read, {"image": type_, "time": when, **says, "inserts": _inserts(found)}


def _inserts(operations: list[Operation]) -> list[dict[str, int]]:
    return [{"at": each.at, "bytes": each.n_bytes} for each in operations if each.is_insert]


def read(reader: Reader) -> None:
    """Take a delta record apart. Raises Fault."""
    for _ in _read(reader):
        pass


def _read(reader: Reader) -> Iterator[Operation]:
    content = reader.peek(reader.left)
    with reader.part("header", "DELTA_HEADER"):
        read_fields(reader, HEAD)
        n_bytes = reader.count("header-bytes", 2, HEADER_BYTES_MAX)
        read_fields(reader, BODY)
        _read_more(reader, n_bytes - HEADER_BYTES)
    with reader.part("operations", Types.LIST), reader.within(max(reader.left - CHECKSUM_BYTES, 0)):
        yield from _read_operations(reader)
    read_number(reader, "checksum", "UINT32")
    try:
        delta_inspect(content)
    except DeltaError as error:
        raise reader.fault(str(error), 0) from error


def _read_more(reader: Reader, n_bytes: int) -> None:
    flags = reader.part_node.number("compatible-flags") or 0
    if flags & DATED and n_bytes >= TIME_BYTES:
        read_number(reader, "time", "TIME_MS")
        n_bytes -= TIME_BYTES
    if n_bytes > 0:
        reader.take("more", n_bytes, Types.UNKNOWN, is_secret=True)


def _read_operations(reader: Reader) -> Iterator[Operation]:
    at, base_at = 0, 0
    for number in range(OPERATIONS_MAX + 1):
        if not reader.left:
            return
        if number == OPERATIONS_MAX:
            raise reader.fault(f"it has more than {OPERATIONS_MAX} operations")
        with reader.part(str(number), "OPERATION") as part:
            length = _number(reader, "length")
            n_bytes, is_insert = length >> 1, bool(length & 1)
            if is_insert:
                part.name = f"insert {counted(n_bytes, 'byte')} at {at}"
                reader.take("bytes", n_bytes, "BYTE[]", is_secret=True)
                yield Operation(True, n_bytes, None, at)
                base_at += n_bytes
            else:
                distance = _number(reader, "distance")
                base_at += -(distance + 1 >> 1) if distance & 1 else distance >> 1
                part.name = f"copy {counted(n_bytes, 'byte')} from {base_at} to {at}"
                yield Operation(False, n_bytes, base_at, at)
                base_at += n_bytes
            at += n_bytes


def _number(reader: Reader, name: str) -> int:
    """Read a number in groups of seven bits, the lowest first. Raises Fault."""
    raw = reader.peek(NUMBER_BYTES_MAX)
    size = next((at + 1 for at, byte in enumerate(raw) if byte < 0x80), None)
    if size is None:
        raise reader.fault(f"{name} has no end within {NUMBER_BYTES_MAX} bytes")
    value = sum((byte & 0x7F) << 7 * at for at, byte in enumerate(raw[:size]))
    reader.take(name, size, "NUMBER")
    reader.part_node.children[-1].value = value
    return value
