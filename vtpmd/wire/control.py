"""The control channel without its I/O: bytes in, events out; answers in, bytes out.

A request is a u32 command and its body; a response is a u32 result and its body. Numbers are
big-endian. There is no length field: what one read brings is one command. While its fixed or
announced length is short it is read on, and what comes in excess is dropped, never taken as the
next command: a client waits for its answer before it sends again. ``docs/control-channel.md`` has
the tables. Sources: QEMU's ``tpm_ioctl.h`` and ``tpm_emulator.c``, swtpm's ``ctrlchannel.c``.

    EMPTY ── receive_data ──► COLLECTING ── next_event ──► COLLECTING   NEED_DATA
                                                      ├──► EMPTY        a request, or ProtocolError
                                                      └──► FAILED       ProtocolError with close

From FAILED there is no way back: where the next command would begin is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntEnum, IntFlag
from struct import Struct
from typing import Final, Literal, NamedTuple

from vtpmd.wire.swtpm_format import BLOB_BYTES_MAX as BLOB_BYTES_MAX
from vtpmd.wire.tpm import Result as Result
from vtpmd.wire.tpm import StateType as StateType

# Sixteen times what swtpm_ioctl sends at once; longer data comes in several HASH_DATA.
HASH_DATA_BYTES_MAX = 64 * 1024
# swtpm's: from the first byte of a command to its last.
COMMAND_TIMEOUT_S = 0.5
# What a GET_INFO answer carries at most (PTM_GETINFO_SIZE); the rest is asked for by its offset.
INFO_BYTES_MAX = 3 * 1024


class Command(IntEnum):
    """The commands, by number."""

    GET_CAPABILITY = 1
    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    SET_LOCALITY = 5
    HASH_START = 6
    HASH_DATA = 7
    HASH_END = 8
    CANCEL_TPM_CMD = 9
    STORE_VOLATILE = 10
    RESET_TPMESTABLISHED = 11
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    GET_CONFIG = 15
    SET_DATAFD = 16
    SET_BUFFERSIZE = 17
    GET_INFO = 18
    LOCK_STORAGE = 19


class Capability(IntFlag):
    """The flags of a GET_CAPABILITY answer."""

    INIT = 1 << 0
    SHUTDOWN = 1 << 1
    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    CANCEL_TPM_CMD = 1 << 5
    STORE_VOLATILE = 1 << 6
    RESET_TPMESTABLISHED = 1 << 7
    GET_STATEBLOB = 1 << 8
    SET_STATEBLOB = 1 << 9
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATAFD = 1 << 12
    SET_BUFFERSIZE = 1 << 13
    GET_INFO = 1 << 14
    SEND_COMMAND_HEADER = 1 << 15
    LOCK_STORAGE = 1 << 16


class InitFlag(IntFlag):
    """The flags of an INIT request."""

    DELETE_VOLATILE = 1 << 0


class StateFlag(IntFlag):
    """The flags of a state blob: the first is a request's, the second is its content's."""

    DECRYPTED = 1 << 0
    ENCRYPTED = 1 << 1


class ConfigFlag(IntFlag):
    """The flags of a GET_CONFIG answer."""

    FILE_KEY = 1 << 0
    MIGRATION_KEY = 1 << 1


class Bare(NamedTuple):
    """A command without a body."""

    command: Command


class Init(NamedTuple):
    """INIT: power the TPM on; it resumes from its volatile state, if there is one."""

    flags: int
    command: Literal[Command.INIT] = Command.INIT


class SetLocality(NamedTuple):
    """SET_LOCALITY: the locality of the commands that follow, 0 to 255 as it was sent."""

    locality: int
    command: Literal[Command.SET_LOCALITY] = Command.SET_LOCALITY


class HashData(NamedTuple):
    """HASH_DATA: at most HASH_DATA_BYTES_MAX bytes to measure."""

    data: bytes
    command: Literal[Command.HASH_DATA] = Command.HASH_DATA


class ResetEstablished(NamedTuple):
    """RESET_TPMESTABLISHED: reset the bit, as from a locality, 0 to 255 as it was sent."""

    locality: int
    command: Literal[Command.RESET_TPMESTABLISHED] = Command.RESET_TPMESTABLISHED


class GetStateBlob(NamedTuple):
    """GET_STATEBLOB: a blob from an offset on; the type may be one that no blob has."""

    flags: int
    state_type: int
    offset: int
    command: Literal[Command.GET_STATEBLOB] = Command.GET_STATEBLOB


class SetStateBlob(NamedTuple):
    """SET_STATEBLOB: a blob of at most BLOB_BYTES_MAX bytes; the type may be one that none has."""

    flags: int
    state_type: int
    blob: bytes
    command: Literal[Command.SET_STATEBLOB] = Command.SET_STATEBLOB

    def __repr__(self) -> str:
        """Leave the blob out: it holds the TPM's secrets."""
        return f"SetStateBlob({self.flags:#x}, {self.state_type}, <{len(self.blob)} bytes>)"


class SetBufferSize(NamedTuple):
    """SET_BUFFERSIZE: the wanted size in bytes; 0 asks."""

    wanted_bytes: int
    command: Literal[Command.SET_BUFFERSIZE] = Command.SET_BUFFERSIZE


class GetInfo(NamedTuple):
    """GET_INFO: libtpms' description of itself (TPMLIB_GetInfo's flags), from an offset on."""

    flags: int
    offset: int
    command: Literal[Command.GET_INFO] = Command.GET_INFO


class LockStorage(NamedTuple):
    """LOCK_STORAGE: take the lock on the state directory, with so many retries of 10 ms."""

    retries: int
    command: Literal[Command.LOCK_STORAGE] = Command.LOCK_STORAGE


Request = (
    Bare
    | Init
    | SetLocality
    | HashData
    | ResetEstablished
    | GetStateBlob
    | SetStateBlob
    | SetBufferSize
    | GetInfo
    | LockStorage
)


class ProtocolError(NamedTuple):
    """What came is no command: to be answered with ``encode_error(number, result)``.

    ``reason`` is for the log. If ``close`` is set nothing more can be read from this connection.
    """

    number: int
    result: Result
    reason: str
    close: bool = False


class NeedData(Enum):
    """The type of NEED_DATA."""

    NEED_DATA = "the command is not complete"


NEED_DATA: Final = NeedData.NEED_DATA


class _Layout(NamedTuple):
    """How a command's body is parsed."""

    body: Struct
    # Called with the body's fields; where data is announced, with that instead of its length.
    make: Callable[..., Request]
    announced_bytes_max: int | None = None
    excess_ignored: bool = False


def _bare(command: Command, *, excess_ignored: bool = False) -> _Layout:
    return _Layout(Struct(">"), lambda: Bare(command), excess_ignored=excess_ignored)


# What swtpm does with bytes in excess, except that it never answers a HASH_DATA that has some.
_LAYOUTS: Final[dict[int, _Layout]] = {
    Command.GET_CAPABILITY: _bare(Command.GET_CAPABILITY, excess_ignored=True),
    Command.INIT: _Layout(Struct(">I"), Init),
    Command.SHUTDOWN: _bare(Command.SHUTDOWN),
    Command.GET_TPMESTABLISHED: _bare(Command.GET_TPMESTABLISHED),
    Command.SET_LOCALITY: _Layout(Struct(">B"), SetLocality, excess_ignored=True),
    Command.HASH_START: _bare(Command.HASH_START),
    Command.HASH_DATA: _Layout(Struct(">I"), HashData, HASH_DATA_BYTES_MAX),
    Command.HASH_END: _bare(Command.HASH_END),
    Command.CANCEL_TPM_CMD: _bare(Command.CANCEL_TPM_CMD),
    Command.STORE_VOLATILE: _bare(Command.STORE_VOLATILE),
    Command.RESET_TPMESTABLISHED: _Layout(Struct(">B"), ResetEstablished, excess_ignored=True),
    Command.GET_STATEBLOB: _Layout(Struct(">III"), GetStateBlob, excess_ignored=True),
    Command.SET_STATEBLOB: _Layout(Struct(">III"), SetStateBlob, BLOB_BYTES_MAX),
    Command.STOP: _bare(Command.STOP),
    Command.GET_CONFIG: _bare(Command.GET_CONFIG),
    Command.SET_DATAFD: _bare(Command.SET_DATAFD, excess_ignored=True),
    Command.SET_BUFFERSIZE: _Layout(Struct(">I"), SetBufferSize, excess_ignored=True),
    Command.GET_INFO: _Layout(Struct(">QI4x"), GetInfo, excess_ignored=True),
    Command.LOCK_STORAGE: _Layout(Struct(">I"), LockStorage, excess_ignored=True),
}

_U32 = Struct(">I")

# The longest command: SET_STATEBLOB. A Receiver holds less than this between two reads.
COMMAND_BYTES_MAX = _U32.size + 12 + BLOB_BYTES_MAX


class Receiver:
    """Make commands of what a client sends.

    Call :meth:`next_event` after each :meth:`receive_data`, which takes one read. After an event
    with ``close`` set, the same event is returned for ever.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._failure: ProtocolError | None = None

    @property
    def buffered_bytes(self) -> int:
        """How much of a command that is not complete has come."""
        return len(self._buffer)

    def receive_data(self, data: bytes) -> None:
        """Take what one read brought."""
        if self._failure is None:
            self._buffer += data

    def next_event(self) -> Request | ProtocolError | NeedData:
        """Return the command that has come, what is wrong with it, or NEED_DATA.

        Nothing stays buffered after a command or an error.
        """
        if self._failure is not None:
            return self._failure
        event = self._parse()
        if event is not NEED_DATA:
            self._buffer = bytearray()
        if isinstance(event, ProtocolError) and event.close:
            self._failure = event
        return event

    def _parse(self) -> Request | ProtocolError | NeedData:
        if len(self._buffer) < _U32.size:
            return NEED_DATA
        (number,) = _U32.unpack_from(self._buffer)
        layout = _LAYOUTS.get(number)
        if layout is None:
            return ProtocolError(number, Result.BAD_ORDINAL, f"there is no command {number:#x}")
        end = _U32.size + layout.body.size
        if len(self._buffer) < end:
            return NEED_DATA
        fields: tuple[int | bytes, ...] = layout.body.unpack_from(self._buffer, _U32.size)
        if layout.announced_bytes_max is not None:
            start, length = end, int(fields[-1])
            if length > layout.announced_bytes_max:
                reason = f"{length} bytes announced; the limit is {layout.announced_bytes_max}"
                return ProtocolError(number, Result.BAD_PARAMETER, reason, close=True)
            end += length
            if len(self._buffer) < end:
                return NEED_DATA
            fields = (*fields[:-1], bytes(self._buffer[start:end]))
        excess = len(self._buffer) - end
        if excess and not layout.excess_ignored:
            return ProtocolError(number, Result.BAD_PARAMETER, f"{excess} bytes in excess")
        return layout.make(*fields)


# A client reads these answers whole whatever the result is (QEMU's tpm_emulator.c), and would wait
# for ever for what a bare result lacks.
_ERROR_BYTES: Final[dict[int, int]] = {Command.GET_TPMESTABLISHED: 8, Command.GET_STATEBLOB: 16}


def encode_result(result: int = Result.SUCCESS) -> bytes:
    """Return a response without a body."""
    return _U32.pack(result)


def encode_error(number: int, result: int) -> bytes:
    """Return the response to command ``number`` when it failed.

    To GET_TPMESTABLISHED and GET_STATEBLOB it is as long as one without a body's data, all zero.
    """
    return encode_result(result).ljust(_ERROR_BYTES.get(number, 0), b"\0")


def encode_capability(flags: int) -> bytes:
    """Return the response to GET_CAPABILITY: eight bytes, which QEMU reads as one number."""
    return Struct(">Q").pack(flags)


def encode_established(bit: bool) -> bytes:
    """Return the response to GET_TPMESTABLISHED."""
    return Struct(">I?3x").pack(Result.SUCCESS, bit)


def encode_state_blob(blob: bytes | bytearray, offset: int, *, encrypted: bool = False) -> bytes:
    """Return the response to GET_STATEBLOB: all of a blob from an offset on.

    Nothing is left past the end. Both lengths are that of what follows, as in swtpm. ``encrypted``
    says that the blob is so with the file key.
    """
    rest = memoryview(blob)[offset:]
    flags = StateFlag.ENCRYPTED if encrypted else 0
    return b"".join((Struct(">IIII").pack(Result.SUCCESS, flags, len(rest), len(rest)), rest))


def encode_config(flags: int) -> bytes:
    """Return the response to GET_CONFIG."""
    return Struct(">II").pack(Result.SUCCESS, flags)


def encode_buffer_size(size: int, smallest: int, largest: int) -> bytes:
    """Return the response to SET_BUFFERSIZE; sizes in bytes."""
    return Struct(">IIII").pack(Result.SUCCESS, size, smallest, largest)


def encode_info(text: bytes | bytearray, offset: int) -> bytes:
    """Return the response to GET_INFO: a text, which gets a NUL at its end, from an offset on.

    An offset past the text is an error.
    """
    if offset >= len(text):
        return encode_result(Result.BAD_PARAMETER)
    terminated = bytes(text) + b"\0"
    piece = terminated[offset : offset + INFO_BYTES_MAX]
    return Struct(">III").pack(Result.SUCCESS, len(terminated), len(piece)) + piece
