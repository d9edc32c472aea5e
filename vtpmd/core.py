"""The C core for Python: the only importer of ``vtpmd._core``.

Ownership: nothing here keeps C memory. Every function copies what it is given and returns Python
objects, so callers need no lifetime rules. All functions may be called from any thread.
"""

from enum import IntEnum
from typing import NamedTuple

from vtpmd._core import ffi, lib


class LinkOperation(IntEnum):
    """The operations of the engine link (``csrc/engine/link.cdef.h``)."""

    READY = lib.LINK_READY
    LOAD_STATE = lib.LINK_LOAD_STATE
    SET_DATA_SOCKET = lib.LINK_SET_DATA_SOCKET
    INIT = lib.LINK_INIT
    STOP = lib.LINK_STOP
    GET_ESTABLISHED = lib.LINK_GET_ESTABLISHED
    RESET_ESTABLISHED = lib.LINK_RESET_ESTABLISHED
    SET_LOCALITY = lib.LINK_SET_LOCALITY
    HASH_START = lib.LINK_HASH_START
    HASH_DATA = lib.LINK_HASH_DATA
    HASH_END = lib.LINK_HASH_END
    CANCEL = lib.LINK_CANCEL
    STORE_VOLATILE = lib.LINK_STORE_VOLATILE
    GET_STATE = lib.LINK_GET_STATE
    SET_STATE = lib.LINK_SET_STATE
    SET_BUFFER_SIZE = lib.LINK_SET_BUFFER_SIZE
    GET_INFO = lib.LINK_GET_INFO


class LinkLocked(IntEnum):
    """How much of the engine's memory is locked (``enum link_locked``)."""

    NOTHING = lib.LINK_LOCKED_NOTHING
    PRESENT = lib.LINK_LOCKED_PRESENT
    ALL = lib.LINK_LOCKED_ALL


class LinkDescriptor(IntEnum):
    """The descriptors that the engine is started with (``enum link_descriptor``)."""

    INPUT = lib.LINK_FD_INPUT
    LIBRARY_LOG = lib.LINK_FD_LIBRARY_LOG
    ERROR = lib.LINK_FD_ERROR
    SOCKET = lib.LINK_FD_SOCKET
    DIRECTORY = lib.LINK_FD_DIRECTORY
    LOCK = lib.LINK_FD_LOCK


class LinkHeader(NamedTuple):
    """What precedes each payload on the engine link (``struct link_header``)."""

    operation: int
    result: int = 0
    argument: int = 0
    payload_bytes: int = 0


LINK_HEADER_BYTES: int = ffi.sizeof("struct link_header")
LINK_PAYLOAD_BYTES_MAX: int = lib.LINK_PAYLOAD_BYTES_MAX


def pack_link_header(header: LinkHeader) -> bytes:
    """Return the bytes of a header. Raises OverflowError for a field that is no u32."""
    return bytes(ffi.buffer(ffi.new("struct link_header *", tuple(header))))


def unpack_link_header(data: bytes | bytearray) -> LinkHeader:
    """Return the header that ``data``, LINK_HEADER_BYTES long, holds."""
    if len(data) != LINK_HEADER_BYTES:
        raise ValueError(f"a link header has {LINK_HEADER_BYTES} bytes, not {len(data)}")
    header = ffi.new("struct link_header *")
    ffi.memmove(header, data, LINK_HEADER_BYTES)
    return LinkHeader(header.operation, header.result, header.argument, header.payload_bytes)


def forbid_core_dumps() -> None:
    """Keep this process's memory out of core files and from other processes of its user."""
    if lib.prctl(lib.PR_SET_DUMPABLE, ffi.cast("unsigned long", 0)) != 0:
        raise OSError(ffi.errno, "prctl(PR_SET_DUMPABLE)")
