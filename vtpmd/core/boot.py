"""What a start needs of the engine link: its messages' form, and those of the boot record.

All else of the link is in ``vtpmd.core.link``. Source: ``csrc/engine/link.cdef.h``.
"""

from __future__ import annotations

import os
from enum import IntEnum, IntFlag

from vtpmd._core import ffi, lib
from vtpmd.core.image import DIGEST_BYTES, GENERATION_MAX
from vtpmd.core.journal import JOURNAL_IDENTITY_BYTES, JOURNAL_SECRET_BYTES
from vtpmd.core.memory import check_length
from vtpmd.light_typing import NamedTuple

LINK_HEADER_BYTES: int = ffi.sizeof("struct link_header")
LINK_PAYLOAD_BYTES_MAX: int = lib.LINK_PAYLOAD_BYTES_MAX


LOCALITY_MAX = 4
# Of what lines begin with: the last is a NUL.
PROGRAM_BYTES_MAX: int = dict(ffi.typeof("struct link_serving").fields)["program"].type.length - 1


class LinkOperation(IntEnum):
    """The operations of the engine link (``enum link_operation``)."""

    READY = lib.LINK_READY
    SERVE_CONTROL = lib.LINK_SERVE_CONTROL
    SET_JOURNAL = lib.LINK_SET_JOURNAL
    SET_KEY = lib.LINK_SET_KEY
    SET_ANCHOR = lib.LINK_SET_ANCHOR
    LOAD_STATE = lib.LINK_LOAD_STATE
    SET_VERSION = lib.LINK_SET_VERSION
    EXECUTE = lib.LINK_EXECUTE
    SERVE_DATA = lib.LINK_SERVE_DATA
    EXPECT_HEADER = lib.LINK_EXPECT_HEADER
    SET_PROFILE = lib.LINK_SET_PROFILE
    SET_HOLDER = lib.LINK_SET_HOLDER
    GET_CONDITION = lib.LINK_GET_CONDITION
    TAKE_BLOB = lib.LINK_TAKE_BLOB
    END_CONTROL = lib.LINK_END_CONTROL
    BE_ASKED = lib.LINK_BE_ASKED
    END = lib.LINK_END
    INIT = lib.LINK_INIT
    STOP = lib.LINK_STOP
    CAPTURE = lib.LINK_CAPTURE
    STAGE = lib.LINK_STAGE
    FORGET_STATE = lib.LINK_FORGET_STATE
    GET_STAGED = lib.LINK_GET_STAGED
    KEEP_BASE = lib.LINK_KEEP_BASE
    STORE_PERMANENT = lib.LINK_STORE_PERMANENT
    RAISE_GENERATION = lib.LINK_RAISE_GENERATION
    GET_LINEAGE = lib.LINK_GET_LINEAGE
    COPY = lib.LINK_COPY
    GET_INFO = lib.LINK_GET_INFO
    RETIRE = lib.LINK_RETIRE
    UNRETIRE = lib.LINK_UNRETIRE
    AWAIT = lib.LINK_AWAIT
    ADMIT = lib.LINK_ADMIT
    ARM = lib.LINK_ARM
    SET_LANE = lib.LINK_SET_LANE
    RECORD = lib.LINK_RECORD
    LET_GO = lib.LINK_LET_GO
    WITHDRAW = lib.LINK_WITHDRAW
    RECORDED = lib.LINK_RECORDED


class LinkKey(IntEnum):
    """What is encrypted with a key (``enum link_key``)."""

    FILE = lib.LINK_KEY_FILE
    MIGRATION = lib.LINK_KEY_MIGRATION


class LinkDescriptor(IntEnum):
    """The descriptors that the engine is started with (``enum link_descriptor``)."""

    INPUT = lib.LINK_FD_INPUT
    LIBRARY_LOG = lib.LINK_FD_LIBRARY_LOG
    ERROR = lib.LINK_FD_ERROR
    SOCKET = lib.LINK_FD_SOCKET
    DIRECTORY = lib.LINK_FD_DIRECTORY
    LOCK = lib.LINK_FD_LOCK
    STORE = lib.LINK_FD_STORE
    BOOT = lib.LINK_FD_BOOT
    ANCHOR = lib.LINK_FD_ANCHOR
    CONTROL = lib.LINK_FD_CONTROL
    CONTROL_DIRECTORY = lib.LINK_FD_CONTROL_DIRECTORY
    DATA = lib.LINK_FD_DATA
    DATA_DIRECTORY = lib.LINK_FD_DATA_DIRECTORY
    PID_DIRECTORY = lib.LINK_FD_PID_DIRECTORY
    ROOT = lib.LINK_FD_ROOT
    STARTED = lib.LINK_FD_STARTED


class LinkControl(IntEnum):
    """What the control channel's socket is (``enum link_control``)."""

    LISTENS = lib.LINK_CONTROL_LISTENS
    CONNECTED = lib.LINK_CONTROL_CONNECTED
    NONE = lib.LINK_CONTROL_NONE


class LinkStarting(IntFlag):
    """What is done once the boot record is carried out (``enum link_starting``)."""

    TOLD = lib.LINK_STARTING_TOLD
    SILENT = lib.LINK_STARTING_SILENT


class LinkData(IntEnum):
    """How the data channel's socket is served (``enum link_data``)."""

    CONNECTED = lib.LINK_DATA_CONNECTED
    DISCONNECTS = lib.LINK_DATA_DISCONNECTS


class LinkEnd(IntEnum):
    """What ends the vTPM beside SHUTDOWN and a signal (``enum link_end``)."""

    CONTROL = lib.LINK_END_WITH_CONTROL
    DATA = lib.LINK_END_WITH_DATA


class LinkSharing(IntEnum):
    """What is done where hosts share the storage of a state (``enum link_sharing``)."""

    INCOMING = lib.LINK_SHARING_INCOMING
    RELEASES = lib.LINK_SHARING_RELEASES


class LinkNames(NamedTuple):
    """The names of the files that the engine removes at its end; empty ones are of none."""

    socket: str = ""
    link: str = ""
    data: str = ""
    pid: str = ""


class LinkHeader(NamedTuple):
    """What precedes each payload on the engine link (``struct link_header``)."""

    operation: int
    result: int = 0
    argument: int = 0
    payload_bytes: int = 0


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


def pack_link_journal(
    identity: bytes,
    generation: int,
    loaded: int = 0,
    secret: bytes | None = None,
    *,
    is_known: bool = True,
) -> bytearray:
    """Return the payload of SET_JOURNAL: ``struct link_journal``; without a secret, not sealed.

    ``loaded`` is the generation of the state that LOAD_STATE gives, or 0, and not above the other;
    ``is_known`` is false for a state that does not say whose it is.
    Overwrite it after use. Raises ValueError for what is no identity, generation or secret.
    """
    check_length("identity", identity, JOURNAL_IDENTITY_BYTES)
    if secret is not None:
        check_length("secret", secret, JOURNAL_SECRET_BYTES)
    if not 0 <= loaded <= generation <= GENERATION_MAX:
        raise ValueError(f"{loaded} and {generation} are no generations")
    fields = (
        generation,
        loaded,
        secret is not None,
        is_known,
        identity,
        secret or bytes(JOURNAL_SECRET_BYTES),
    )
    journal = ffi.new("struct link_journal *", fields)
    packed = bytearray(ffi.buffer(journal))
    lib.explicit_bzero(journal, ffi.sizeof("struct link_journal"))
    return packed


def pack_link_anchor(identity: bytes, serial: int, generation: int, digest: bytes) -> bytes:
    """Return the payload of LinkOperation.SET_ANCHOR (``struct link_anchor``).

    ``identity`` has 16 bytes, ``digest`` 32. Raises ValueError otherwise, OverflowError for what is
    no u64.
    """
    check_length("identity", identity, JOURNAL_IDENTITY_BYTES)
    check_length("digest", digest, DIGEST_BYTES)
    anchor = ffi.new("struct link_anchor *", {"serial": serial, "generation": generation})
    ffi.memmove(anchor.identity, identity, len(identity))
    ffi.memmove(anchor.digest, digest, len(digest))
    return bytes(ffi.buffer(anchor))


def pack_link_serving(
    program: str,
    names: LinkNames,
    *,
    is_verbose: bool = False,
    is_alone: bool = False,
    control: LinkControl = LinkControl.LISTENS,
    ends: int = 0,
    locality_max: int = LOCALITY_MAX,
    file_mode: int = 0,
    sharing: int = 0,
    stays: bool = False,
    starting: int = 0,
) -> bytes:
    """Return the payload of SERVE_CONTROL (``struct link_serving``).

    ``program`` is what lines begin with, ``ends`` LinkEnds, added up, ``locality_max`` what QEMU
    may set, ``file_mode`` that of the state's files, or 0 for swtpm's default, ``sharing``
    LinkSharings, added up, and ``starting`` LinkStartings. One that ``stays`` is not ended by
    SHUTDOWN. Raises ValueError for what has no room.
    """
    fields = {"is_verbose": is_verbose, "is_alone": is_alone, "control": control, "ends": ends}
    fields |= {"locality_max": locality_max, "file_mode": file_mode, "sharing": sharing}
    fields |= {"stays": stays, "starting": starting}
    serving = ffi.new("struct link_serving *", fields)
    texts = (
        (serving.program, program),
        (serving.socket_name, names.socket),
        (serving.link_name, names.link),
        (serving.data_name, names.data),
        (serving.pid_name, names.pid),
    )
    for field, text in texts:
        data = os.fsencode(text)
        if len(data) >= len(field) or 0 in data:
            raise ValueError(f"{text!r} has no room on the engine link")
        ffi.memmove(field, data, len(data))
    return bytes(ffi.buffer(serving))
