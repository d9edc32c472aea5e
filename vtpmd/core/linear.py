"""The header of swtpm's linear format (``csrc/linear_format.h``)."""

from __future__ import annotations

from enum import IntEnum

from vtpmd._core import ffi, lib
from vtpmd.light_typing import NamedTuple

LINEAR_HEADER_BYTES: int = lib.LINEAR_HEADER_BYTES


class LinearFault(IntEnum):
    """What is wrong with a header (``enum linear_fault``)."""

    NOTHING = lib.LINEAR_NOTHING
    MAGIC = lib.LINEAR_FAULT_MAGIC
    VERSION = lib.LINEAR_FAULT_VERSION
    SLOTS = lib.LINEAR_FAULT_SLOTS
    SECTION = lib.LINEAR_FAULT_SECTION
    OVERLAP = lib.LINEAR_FAULT_OVERLAP


class LinearExtent(NamedTuple):
    """Where a state file is; of no bytes where there is none."""

    offset: int
    n_bytes: int


def linear_decode(data: bytes, file_bytes: int) -> tuple[LinearFault, tuple[LinearExtent, ...]]:
    """Return what is wrong with a header, and where the states are, if nothing is.

    ``data`` is what the file begins with. The extents are those of the permanent, the volatile and
    the savestate, in the file, and apart.
    """
    header = ffi.new("struct linear_header *")
    held = ffi.from_buffer("uint8_t[]", data or b"\0")  # of no bytes cffi would make no pointer
    fault = LinearFault(lib.linear_decode(held, len(data), file_bytes, header))
    if fault is not LinearFault.NOTHING:
        return fault, ()
    return fault, tuple(LinearExtent(each.offset, each.n_bytes) for each in header.states)
