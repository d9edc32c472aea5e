"""A vTPM's state blobs in a migration stream of QEMU's that was saved to a file.

A section of a device that is saved whole (QEMU's migration/savevm.c, backends/tpm/tpm_emulator.c):

    u8 4, u32 number, u8 length, idstr "tpm-emulator", u32 instance, u32 version 0,
    then of permanent, volatile and savestate each: u32 flags, u32 size, blob

The guest's memory comes before all of that, and may look like it: the last one counts. libvirt puts
a header of its own before the stream.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from vtpmd.wire.swtpm_format import BLOB_BYTES_MAX
from vtpmd.wire.tpm import StateType

MARKS: Final = (b"QEVM", b"LibvirtQemudSave")
IDSTR: Final = b"\x0ctpm-emulator"
SECTION_FULL: Final = b"\x04"
BEFORE_IDSTR: Final = 5  # bytes: type and number
NUMBERS: Final = Struct(">II")
ENCRYPTED: Final = 2  # a blob's flag: PTM_STATE_FLAG_ENCRYPTED
TRIES_MAX: Final = 64  # of places that look like the section


class CarriedBlob(NamedTuple):
    """A state blob as QEMU carries it."""

    content: bytes
    is_encrypted: bool


def carried_blobs(path: Path) -> dict[StateType, CarriedBlob] | None:
    """Return the blobs that are not empty in a stream; None without a vTPM. Raises OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        return blobs_in(stream)


def blobs_in(stream: mmap.mmap | bytes) -> dict[StateType, CarriedBlob] | None:
    """Return the blobs that are not empty in a stream, or in its end; None without a vTPM."""
    end = len(stream)
    for _ in range(TRIES_MAX):
        end = stream.rfind(IDSTR, 0, end)
        if end < BEFORE_IDSTR:
            return None
        if stream[end - BEFORE_IDSTR : end - BEFORE_IDSTR + 1] == SECTION_FULL:
            found = _section(stream, end + len(IDSTR))
            if found is not None:
                return found
    return None


def _section(stream: mmap.mmap | bytes, at: int) -> dict[StateType, CarriedBlob] | None:
    """Return the blobs of a section from its instance number on, or None if it is not one."""
    found: dict[StateType, CarriedBlob] = {}
    head = stream[at : at + NUMBERS.size]
    if len(head) < NUMBERS.size or NUMBERS.unpack(head)[1] != 0:
        return None
    at += NUMBERS.size
    for kind in StateType:
        head = stream[at : at + NUMBERS.size]
        if len(head) < NUMBERS.size:
            return None
        flags, size = NUMBERS.unpack(head)
        at += NUMBERS.size
        if size > min(BLOB_BYTES_MAX, len(stream) - at):
            return None
        if size:
            found[kind] = CarriedBlob(stream[at : at + size], bool(flags & ENCRYPTED))
        at += size
    return found if StateType.PERMANENT in found else None
