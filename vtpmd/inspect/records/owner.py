"""An owner record alone: whose a vTPM is, what became of its sessions (docs/owner-record.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from vtpmd.inspect.reader import Reader
from vtpmd.inspect.tree import Types
from vtpmd.store.keys import Key
from vtpmd.store.owner import (
    FORKS_MAX,
    SECTOR_BYTES,
    SESSIONS_MAX,
    OwnerRecordError,
    Record,
    parse,
)

BEGINS: Final = b'{"'
LINES_MAX: Final = 1 + SESSIONS_MAX + FORKS_MAX + 1  # the last one is empty
NAMES: Final = ("whose", "handed-over")  # one of them is in the first line of each version


def is_one(content: bytes) -> bool:
    """Return whether a file begins as an owner record."""
    if not content.startswith(BEGINS):
        return False
    try:
        first = json.loads(content[: 4 * SECTOR_BYTES].partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(name in first for name in NAMES)


def opened(content: bytes, _: Key | None) -> tuple[Callable[[Reader], None], dict[str, Any]]:
    """Return how an owner record is taken apart, and what it says."""
    try:
        found = parse(content, "it")
    except OwnerRecordError:
        return read, dict.fromkeys(Record._fields)
    return read, {
        "whose": found.whose.value,
        "session": found.session or None,
        "since": found.since or None,
        "generation": found.generation,
        "sessions": [session._asdict() for session in found.sessions],
        "forks": [fork._asdict() for fork in found.forks],
    }


def read(reader: Reader) -> None:
    """Take an owner record apart: a node for each line. Raises Fault."""
    content = reader.peek(reader.left)
    lines = content.split(b"\n", LINES_MAX)
    for number, line in enumerate(lines[:LINES_MAX]):
        if reader.left:
            _read_line(reader, "first" if number == 0 else str(number), line)
    try:
        parse(content, "it")
    except OwnerRecordError as error:
        raise reader.fault(f"it is not valid: {error.__cause__}", 0) from error


def _read_line(reader: Reader, name: str, line: bytes) -> None:
    text = line.rstrip(b" ")
    with reader.part(name, "LINE"):
        reader.take("object", len(text), "JSON")
        reader.part_node.children[-1].value = text.decode("utf-8", "replace")
        if len(text) < len(line):
            reader.take("blanks", len(line) - len(text), Types.UNUSED)
        if reader.left:
            reader.take("end", 1, "LF")
