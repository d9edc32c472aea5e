"""The stream between two vtpmd: frames in, messages out; messages to frames. No I/O.

A frame is a u32 length, a u8 type and a body of that length less one. Numbers are big-endian. The
stream runs inside TLS, which sees to its integrity and order; docs/stream-format.md has who says
what when, docs/delta-format.md what is in a Record.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

from vtpmd.counted import counted
from vtpmd.wire.state_level import PROFILE_NAME_BYTES_MAX
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX

# What both sides speak. A side refuses a peer whose range does not meet its own.
VERSION: Final = 8
VERSION_MINIMUM: Final = 8

SESSION_BYTES: Final = 16
UUID_BYTES: Final = 16
LINEAGE_BYTES: Final = 16
KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 32
# The longest frame is a record of a whole image: 256 KiB and its header.
FRAME_BYTES_MAX: Final = 320 * 1024
TEXT_BYTES_MAX: Final = 512
# Of one read; frames may come in pieces.
READ_BYTES_MAX: Final = 64 * 1024
_LENGTH: Final = Struct(">I")


class Reason(IntEnum):
    """Why a side refuses to go on."""

    VERSION = 1
    TPM_VERSION = 2
    LIBTPMS_VERSION = 3
    UUID = 4
    BUSY = 5
    LIMIT = 6
    STATE = 7
    STORAGE = 8
    NOT_ALLOWED = 9
    LINEAGE = 10

    @property
    def word(self) -> str:
        """What people and programs are shown."""
        return self.name.lower().replace("_", "-")


class Following(IntEnum):
    """What a side knows of its QEMU, by a monitor."""

    NOT_ASKED_FOR = 0
    NOT_REACHABLE = 1
    WITHOUT_EVENTS = 2
    FOLLOWING = 3

    @property
    def word(self) -> str:
        """What people and programs are shown."""
        return self.name.lower().replace("_", "-")


class Hello(NamedTuple):
    """The source introduces itself and the vTPM that it would send."""

    version: int
    version_minimum: int
    session: bytes
    uuid: bytes  # all zero: the operator gave none
    lineage: bytes  # the vTPM's identity, which it keeps wherever it goes
    tpm_version: int  # of TpmVersion
    format_level: int  # that the state needs libtpms to read (state_level.py); 0: not known
    profile: bytes  # that it needs, its name; then zeros
    image_bytes_max: int


class Welcome(NamedTuple):
    """The destination could run this state."""

    version: int
    following: int  # of Following; unless it is NOT_ASKED_FOR, Receiving will be said


class Refuse(NamedTuple):
    """This side does not go on; the text is for a person."""

    reason: int
    text: str


class Key(NamedTuple):
    """The key that will seal this session's tail."""

    key: bytes

    def __repr__(self) -> str:
        """Leave the key out."""
        return "Key(…)"


class Record(NamedTuple):
    """A delta record: a whole image at first, then what changed."""

    record: bytes

    def __repr__(self) -> str:
        """Leave the state out."""
        return f"Record(<{len(self.record)} bytes>)"


POWER_MAX: Final = 2  # what a TPM2_Shutdown says: enum link_shutdown of csrc/engine/link.cdef.h


class Commit(NamedTuple):
    """A round is complete: validate the images, make them durable, acknowledge."""

    round: int
    permanent_generation: int
    volatile_generation: int
    power: int  # what the guest's last TPM2_Shutdown said; 0: none since its TPM2_Startup
    is_last: int  # 1: the guest has stopped, and the tail will carry this round's records, too


class Ack(NamedTuple):
    """The round is durable at the destination, and libtpms takes its state."""

    round: int
    permanent_generation: int
    volatile_generation: int


class Running(NamedTuple):
    """The destination's TPM runs: how long the Grant took to come, and its start, in µs."""

    session: bytes
    wait_us: int
    init_us: int


class Reclaim(NamedTuple):
    """The guest runs on at the source: may it have the vTPM back?"""

    session: bytes


class Released(NamedTuple):
    """Yes: no guest's command was served at the destination, and none will be. It is durable."""

    session: bytes


class Kept(NamedTuple):
    """No: the destination has it. That may change while no guest's command was served there."""

    session: bytes


class Stopped(NamedTuple):
    """The guest stands still, or idles, with the state that was acknowledged last.

    QEMU will ask for it soon; if the guest does something after all, more rounds follow.
    """

    session: bytes


class Disarm(NamedTuple):
    """The source ends the session without a migration."""

    session: bytes


class Receiving(NamedTuple):
    """The destination's QEMU says that a stream comes in (1), or that none does any more (0)."""

    session: bytes
    is_receiving: int


class Ping(NamedTuple):
    """Is the destination there?"""

    session: bytes


class Pong(NamedTuple):
    """It is."""

    session: bytes


class Ask(NamedTuple):
    """Whose is the vTPM? Nothing changes by it: the answer is Kept, Released or Unknown."""

    session: bytes


class Unknown(NamedTuple):
    """This side does not know the session."""

    session: bytes


Message = (
    Hello
    | Welcome
    | Refuse
    | Key
    | Record
    | Commit
    | Ack
    | Running
    | Reclaim
    | Released
    | Kept
    | Disarm
    | Stopped
    | Receiving
    | Ping
    | Pong
    | Ask
    | Unknown
)

_HELLO: Final = Struct(
    f">HH{SESSION_BYTES}s{UUID_BYTES}s{LINEAGE_BYTES}sHH{PROFILE_NAME_BYTES_MAX}sI"
)
_TYPES: Final[dict[int, tuple[type[Message], Struct | None]]] = {
    1: (Hello, _HELLO),
    2: (Welcome, Struct(">HB")),
    3: (Refuse, None),
    4: (Key, Struct(f">{KEY_BYTES}s")),
    5: (Record, None),
    6: (Commit, Struct(">IQQBB")),
    7: (Ack, Struct(">IQQ")),
    10: (Reclaim, Struct(f">{SESSION_BYTES}s")),
    11: (Released, Struct(f">{SESSION_BYTES}s")),
    12: (Kept, Struct(f">{SESSION_BYTES}s")),
    13: (Disarm, Struct(f">{SESSION_BYTES}s")),
    14: (Running, Struct(f">{SESSION_BYTES}sII")),
    15: (Stopped, Struct(f">{SESSION_BYTES}s")),
    16: (Receiving, Struct(f">{SESSION_BYTES}sB")),
    17: (Ping, Struct(f">{SESSION_BYTES}s")),
    18: (Pong, Struct(f">{SESSION_BYTES}s")),
    19: (Ask, Struct(f">{SESSION_BYTES}s")),
    20: (Unknown, Struct(f">{SESSION_BYTES}s")),
}
TYPE_NUMBERS: Final = {kind: number for number, (kind, _) in _TYPES.items()}
_REFUSE_HEAD: Final = Struct(">H")


class StreamError(Exception):
    """The peer sent what is no message; nothing more can be read from it."""


class Decoder:
    """Make messages of what a peer sends. It holds less than one frame between two reads."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._failed = False

    def receive_data(self, data: bytes) -> None:
        """Take what one read brought."""
        self._buffer += data

    def next_message(self) -> Message | None:
        """Return the next message, or None until more has come.

        Raises StreamError for what is none, and ever after.
        """
        if self._failed:
            raise StreamError("the stream has failed before")
        try:
            return self._next_message()
        except StreamError:
            self._failed = True
            self._buffer.clear()
            raise

    def _next_message(self) -> Message | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 0 < length <= FRAME_BYTES_MAX:
            raise StreamError(f"a frame of {length} bytes; 1 to {FRAME_BYTES_MAX} are possible")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return _decode(frame[0], frame[1:])


def _decode(number: int, body: bytes) -> Message:
    if number not in _TYPES:
        raise StreamError(f"a message of type {number}, which there is not")
    kind, layout = _TYPES[number]
    if kind is Refuse:
        return _decode_refuse(body)
    if kind is Record:
        return Record(body)
    if layout is None or len(body) != layout.size:
        raise StreamError(f"a {kind.__name__} of {counted(len(body), 'byte')}")
    message = kind(*layout.unpack(body))
    if isinstance(message, Commit | Ack):
        last = max(message.permanent_generation, message.volatile_generation)
        if last > GENERATION_GIVEN_MAX:
            raise StreamError(f"a {kind.__name__} of generation {last}, which is none")
    return message


def _decode_refuse(body: bytes) -> Refuse:
    if not _REFUSE_HEAD.size <= len(body) <= _REFUSE_HEAD.size + TEXT_BYTES_MAX:
        raise StreamError(f"a Refuse of {counted(len(body), 'byte')}")
    (reason,) = _REFUSE_HEAD.unpack_from(body)
    text = body[_REFUSE_HEAD.size :].decode(errors="replace")
    # It is shown to a person: no line breaks, no terminal's control characters.
    return Refuse(reason, "".join(c if c.isprintable() else "?" for c in text))


def encode(message: Message) -> bytes:
    """Return the frame of a message. Raises ValueError for one that is too long."""
    number = TYPE_NUMBERS[type(message)]
    layout = _TYPES[number][1]
    if isinstance(message, Refuse):
        body = _REFUSE_HEAD.pack(message.reason) + message.text.encode()[:TEXT_BYTES_MAX]
    elif isinstance(message, Record):
        body = message.record
    else:
        assert layout is not None  # noqa: S101 - all others have one
        body = layout.pack(*message)
    if len(body) >= FRAME_BYTES_MAX:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes")
    return _LENGTH.pack(1 + len(body)) + bytes([number]) + body
