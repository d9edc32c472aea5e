"""A journal alone: whose it is, and its records. What they changed, its checkpoint is needed for.

docs/journal-format.md has its format. What its records hold is state, and so a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from vtpmd.core import JOURNAL_SECTOR_BYTES, JournalFault, Recovery, Step, journal_recover
from vtpmd.inspect.primitives import Fields, read_fields
from vtpmd.inspect.reader import Reader
from vtpmd.inspect.tree import Types
from vtpmd.moment import at_millisecond
from vtpmd.store.directory import StateKeyError
from vtpmd.store.keys import Key
from vtpmd.store.recovery import FAULTS, REASONS

MAGIC: Final = b"VTPMJRNL"
HEADER: Final[Fields] = (
    ("magic", "UINT64"),
    ("version", "UINT16"),
    ("header-bytes", "UINT16"),
    ("compatible-flags", "UINT16"),
    ("incompatible-flags", "JOURNAL_FLAGS"),
    ("identity", "IDENTITY"),
    ("salt", "SHA256"),
    ("base-generation", "UINT64"),
    ("base-bytes", "UINT32"),
    ("file-bytes", "UINT32"),
    ("base-digest", "SHA256"),
    ("seal", "AEAD_TAG"),
)
HEADER_BYTES: Final = 128
CHECKSUM_AT: Final = 508
FRAME: Final[Fields] = (
    ("checksum", "UINT32"),
    ("index", "UINT16"),
    ("sectors", "UINT16"),
    ("sequence", "UINT64"),
)
PART_BYTES: Final = 496
SEALED: Final = 1
# Of the rows of the table: nothing is wrong with the journal but that its checkpoint is not there,
# and without its key nothing is known of its records.
RIGHT: Final = "L"
CLOSED: Final = "H"
WRONG_KEY: Final = "IJ"


def is_one(content: bytes) -> bool:
    """Return whether a file begins as a journal."""
    return content.startswith(MAGIC)


def opened(content: bytes, key: Key | None) -> tuple[Callable[[Reader], None], dict[str, Any]]:
    """Return how a journal is taken apart, and what it says."""
    steps: list[Step] = []
    secret = None if key is None else key.journal_secret()
    found = journal_recover(b"", content, secret=secret, steps=steps)
    if found.letter in WRONG_KEY:
        raise StateKeyError(f"cannot inspect the journal: it {REASONS[found.letter]}")
    reader = Reader(content[:JOURNAL_SECTOR_BYTES], "journal")
    if len(content) >= JOURNAL_SECTOR_BYTES:
        _read_header(reader)
    header = reader.root.find("header") or reader.root
    flags = header.number("incompatible-flags")
    says = {
        "identity": header.content("identity").hex() or None,
        "sealed": None if flags is None else bool(flags & SEALED),
        "base-generation": header.number("base-generation"),
        "base-bytes": header.number("base-bytes"),
        "records": None if found.letter == CLOSED else [_record(step) for step in steps],
    }
    return partial(_read, content=content, found=found), says


def _record(step: Step) -> dict[str, Any]:
    return {
        "generation": step.to_generation,
        "time": None if step.time_ms is None else at_millisecond(step.time_ms),
        "offset": step.offset,
        "journal-bytes": step.n_bytes,
        "delta-bytes": len(step.delta),
        "state-bytes": step.result_bytes,
    }


def _read(reader: Reader, content: bytes, found: Recovery) -> None:
    """Take a journal apart: its header, and each sector. Raises Fault."""
    _read_header(reader)
    while reader.left >= JOURNAL_SECTOR_BYTES:
        if any(reader.peek(JOURNAL_SECTOR_BYTES)):
            _read_sector(reader)
        else:
            _take_empty(reader, content)
    if found.letter in (RIGHT, CLOSED):
        return
    what = REASONS.get(found.letter, "").format(permanent="the checkpoint")
    if found.fault is not JournalFault.NONE:
        what += f": {FAULTS[found.fault]}"
    raise reader.fault(f"it {what}", found.offset)


def _read_header(reader: Reader) -> None:
    with reader.part("header", "JOURNAL_HEADER"):
        read_fields(reader, HEADER)
        reader.take("more", CHECKSUM_AT - HEADER_BYTES, Types.UNUSED)
        reader.number("checksum", 4, "UINT32")


def _read_sector(reader: Reader) -> None:
    with reader.part(f"sector {reader.at // JOURNAL_SECTOR_BYTES}", "JOURNAL_SECTOR") as sector:
        read_fields(reader, FRAME)
        reader.take("part", PART_BYTES, "RECORD_PART", is_secret=True)
        index, of = sector.number("index") or 0, sector.number("sectors")
        sector.name += f": record {sector.number('sequence')}, {index + 1} of {of}"


def _take_empty(reader: Reader, content: bytes) -> None:
    """Take all empty sectors that follow each other."""
    start = end = reader.at
    while content[end : end + JOURNAL_SECTOR_BYTES] == bytes(JOURNAL_SECTOR_BYTES):
        end += JOURNAL_SECTOR_BYTES
    number = start // JOURNAL_SECTOR_BYTES
    reader.take(f"empty from sector {number}", end - start, Types.UNUSED)
