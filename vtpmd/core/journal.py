"""What a checkpoint and a journal are together (``csrc/journal_recover.c``)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from vtpmd._core import ffi, lib
from vtpmd.core.image import IMAGE_BYTES_MAX, IMAGE_TYPES, Image
from vtpmd.core.memory import allocate, check_error, check_length
from vtpmd.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any

JOURNAL_BYTES_MAX: int = lib.JOURNAL_BYTES_MAX
JOURNAL_IDENTITY_BYTES: int = lib.JOURNAL_IDENTITY_BYTES
JOURNAL_SECRET_BYTES: int = lib.JOURNAL_SECRET_BYTES
JOURNAL_SECTOR_BYTES: int = lib.JOURNAL_SECTOR_BYTES

_BASE = Struct(">64xQ")  # docs/journal-format.md, "Header"


class JournalFault(IntEnum):
    """What is wrong with a journal in rows E, F and K (``enum journal_fault``)."""

    NONE = lib.JOURNAL_FAULT_NONE
    LENGTH = lib.JOURNAL_FAULT_LENGTH
    MAGIC = lib.JOURNAL_FAULT_MAGIC
    CHECKSUM = lib.JOURNAL_FAULT_CHECKSUM
    VERSION = lib.JOURNAL_FAULT_VERSION
    FLAG = lib.JOURNAL_FAULT_FLAG
    HEADER = lib.JOURNAL_FAULT_HEADER
    SECTOR = lib.JOURNAL_FAULT_SECTOR
    ORDER = lib.JOURNAL_FAULT_ORDER
    GAP = lib.JOURNAL_FAULT_GAP
    RECORD = lib.JOURNAL_FAULT_RECORD
    LINK = lib.JOURNAL_FAULT_LINK
    DELTA = lib.JOURNAL_FAULT_DELTA
    OTHER_BASE = lib.JOURNAL_FAULT_OTHER_BASE


class Recovery(NamedTuple):
    """What a state directory holds, by the table in ``csrc/journal_recover.c``.

    ``letter`` is its row, ``fault`` says more of rows E, F and K, and ``offset`` is where in the
    journal. ``image`` is the permanent state that the vTPM may start from, or, if ``may_start`` is
    false, what was right before the fault; None if there is none. Its generation is 0 where only
    the checkpoint says what it is. ``records`` counts those that are right, ``applied`` those of
    them that the checkpoint did not have; ``used_bytes`` ends with the journal's last byte that is
    not zero.
    """

    letter: str
    fault: JournalFault
    may_start: bool
    offset: int
    image: Image | None
    records: int
    applied: int
    used_bytes: int


class Step(NamedTuple):
    """A record of a journal that is whole and right.

    ``offset`` is where in the file, ``n_bytes`` what it takes there; ``is_applied`` says whether it
    leads on from the checkpoint, and not to it. ``time_ms`` is when it was written, in milliseconds
    since 1970 (UTC) by the host's clock, or None: it does not say.
    """

    offset: int
    n_bytes: int
    from_generation: int
    to_generation: int
    base_bytes: int
    result_bytes: int
    is_applied: bool
    time_ms: int | None
    delta: bytes
    header: Any

    def make(self, base: bytes) -> bytes:
        """Return the image that the record makes of the one before it.

        Raises ValueError for another one.
        """
        kept = ffi.from_buffer("uint8_t[]", base or b"\0")
        image = ffi.new("struct delta_image *", {"bytes": kept, "n_bytes": len(base)})
        result = allocate("uint8_t[]", max(self.result_bytes, 1))
        if lib.delta_make(image, self.delta, self.header, result) != 0:
            raise ValueError(f"{self!r} is not of this image")
        try:
            return bytes(ffi.buffer(result, self.result_bytes))
        finally:
            lib.explicit_bzero(result, self.result_bytes)

    def __repr__(self) -> str:
        """Leave the delta record out: it is state in the clear."""
        return f"Step({self.from_generation} to {self.to_generation})"


def journal_base(journal: bytes) -> int | None:
    """Return the generation that a journal's header says it continues; None without a header."""
    if len(journal) < _BASE.size:
        return None
    (generation,) = _BASE.unpack_from(journal)
    return int(generation)


def journal_recover(
    checkpoint: bytes | None,
    journal: bytes | None,
    *,
    continued: bool = False,
    identity: bytes | None = None,
    secret: bytes | None = None,
    steps: list[Step] | None = None,
) -> Recovery:
    """Decide what a checkpoint's image and a journal's file are together; None is one that is not.

    ``continued`` is what the checkpoint says of itself, ``identity`` the one that the journal must
    have, and ``secret`` what it must be sealed with, or None for one that must not be sealed.
    The records that are right are appended to ``steps``. Nothing in the files is trusted. Raises
    OSError without memory.
    """
    evidence = ffi.new("struct journal_evidence *", {"continued": continued})
    kept = []
    for name, data in (("checkpoint", checkpoint), ("journal", journal)):
        if data is not None:
            # Of no bytes cffi would make a pointer to none.
            kept.append(ffi.from_buffer("uint8_t[]", data or b"\0"))
            setattr(evidence, name, kept[-1])
            setattr(evidence, f"{name}_bytes", len(data))
    for name, data, n_bytes in (
        ("identity", identity, JOURNAL_IDENTITY_BYTES),
        ("secret", secret, JOURNAL_SECRET_BYTES),
    ):
        if data is not None:
            check_length(name, data, n_bytes)
            kept.append(ffi.from_buffer("uint8_t[]", data))
            setattr(evidence, name, kept[-1])
    image, found = allocate("uint8_t[]", IMAGE_BYTES_MAX), ffi.new("struct journal_recovery *")
    history = ffi.NULL if steps is None else allocate("struct journal_history *")
    check_error(lib.journal_recover_history(evidence, image, found, history))
    if steps is not None:
        steps += [_step(history, number) for number in range(history.n_steps)]
        lib.explicit_bzero(history.deltas, history.deltas_bytes)
    return _recovery(found, image, checkpoint)


def _step(history: Any, number: int) -> Step:
    step = history.steps[number]
    header = ffi.new("struct delta_header *", step.header)
    end = step.delta_offset + step.delta_bytes
    return Step(
        offset=step.offset,
        n_bytes=step.n_sectors * JOURNAL_SECTOR_BYTES,
        from_generation=header.from_generation,
        to_generation=header.to_generation,
        base_bytes=header.base_bytes,
        result_bytes=header.result_bytes,
        is_applied=step.is_applied,
        time_ms=header.time_ms or None,
        delta=bytes(ffi.buffer(history.deltas)[step.delta_offset : end]),
        header=header,
    )


def _recovery(found: Any, image: Any, checkpoint: bytes | None) -> Recovery:
    letter = chr(found.verdict)
    recovered = None
    if found.has_image:
        data = bytes(ffi.buffer(image, found.image_bytes))
        recovered = Image(IMAGE_TYPES[0], found.generation, data)
        lib.explicit_bzero(image, found.image_bytes)
    elif letter in "BC" and checkpoint is not None:
        recovered = Image(IMAGE_TYPES[0], 0, checkpoint)
    return Recovery(
        letter=letter,
        fault=JournalFault(found.fault),
        may_start=lib.journal_may_start(found),
        offset=found.offset,
        image=recovered,
        records=found.n_records,
        applied=found.n_applied,
        used_bytes=found.used_bytes,
    )
