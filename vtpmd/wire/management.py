"""The management socket without its I/O: the server's side of QMP's JSON.

A client sends JSON objects, ``{"execute": NAME, "arguments": {…}, "id": …}``, with or without white
space between them; the server sends a greeting, answers and events, each on a line of its own. So
``qmp-shell`` and ``qemu.qmp`` talk to it. ``docs/management.md`` has the tables. Source: QEMU's
``docs/interop/qmp-spec``.

    GREETING ── send Greeting ──► NEGOTIATING ── send Negotiated ──► READY
        │                              │                               │
        └─ send Refusal ──► CLOSED ◄───┴─ end of data, or a message ───┘
                                          that has no end in sight

What is wrong with one message is answered and leaves the connection as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Final, NamedTuple

from vtpmd.errors import VtpmdError

# One message of a client, as it is sent. The longest command there is has some hundred bytes.
MESSAGE_BYTES_MAX = 64 * 1024
# Objects and arrays inside each other. Arguments need three levels; json can do about a thousand.
NESTING_MAX = 32
# Integers are those that fit into 64 bits, with or without a sign: QMP's own.
INTEGER_MIN = -(2**63)
INTEGER_MAX = 2**64 - 1
# Of a client's words in our answers.
WORD_LENGTH_MAX = 64

NEGOTIATE = "qmp_capabilities"


class State(Enum):
    """Where a connection is."""

    GREETING = "the greeting has not been sent"
    NEGOTIATING = "the client must send qmp_capabilities before anything else"
    READY = "commands are accepted, events are sent"
    CLOSED = "nothing is accepted or sent any more"


class ErrorClass(StrEnum):
    """QMP's names for kinds of error."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"


class Id(NamedTuple):
    """What a client calls its command by, for the answer: any JSON value, null among them."""

    value: object


class Negotiate(NamedTuple):
    """The client's qmp_capabilities: to be answered with Negotiated."""

    id: Id | None


class Command(NamedTuple):
    """Any other command; ``id`` is None if it has none."""

    name: str
    arguments: Mapping[str, object]
    id: Id | None


class NeedData(Enum):
    """The type of NEED_DATA."""

    NEED_DATA = "no message is complete"


NEED_DATA: Final = NeedData.NEED_DATA


class Closed(Enum):
    """The type of CLOSED."""

    CLOSED = "there will be no more commands"


CLOSED: Final = Closed.CLOSED


class Greeting(NamedTuple):
    """The first message; ``version`` is what query-version answers."""

    version: Mapping[str, object]


class Negotiated(NamedTuple):
    """The answer to qmp_capabilities: from here on the connection is READY."""

    id: Id | None


class Return(NamedTuple):
    """The answer to a command that was carried out; ``value`` is what JSON can say."""

    value: object
    id: Id | None


class Error(NamedTuple):
    """The answer to a command that failed, or to what is none (then mostly without an id)."""

    error_class: ErrorClass
    description: str
    id: Id | None = None
    exit_status: int = VtpmdError.exit_status  # of the command line, had it failed so itself


class Refusal(NamedTuple):
    """Instead of a greeting: why this client is not served."""

    description: str


class Event(NamedTuple):
    """Something happened, at a time by the server's clock (µs since 1970)."""

    name: str
    data: Mapping[str, object]
    timestamp_us: int


Received = Negotiate | Command | Error | NeedData | Closed
Sent = Greeting | Negotiated | Return | Error | Refusal | Event

# What may be sent in which state, and the state it leads to. Whatever is not here is our own fault.
TRANSITIONS: Final[dict[tuple[State, type[Sent]], State]] = {
    (State.GREETING, Greeting): State.NEGOTIATING,
    (State.GREETING, Refusal): State.CLOSED,
    (State.NEGOTIATING, Negotiated): State.READY,
    (State.NEGOTIATING, Error): State.NEGOTIATING,
    (State.READY, Return): State.READY,
    (State.READY, Error): State.READY,
    (State.READY, Event): State.READY,
}


class LocalProtocolError(Exception):
    """The server was about to send what its connection's state does not allow."""


class Connection:
    """One client's connection.

    Call :meth:`next_event` after each :meth:`receive_data` until it returns NEED_DATA or CLOSED;
    less than a message and what one read brought are held meanwhile.
    """

    def __init__(self) -> None:
        self.state = State.GREETING
        self._splitter = _Splitter()
        # Set when nothing more can be received; what has been, is answered first.
        self._ended = False

    def receive_data(self, data: bytes) -> None:
        """Take what one read brought; no bytes are the end of what the client sends."""
        if data and not self._ended:
            self._splitter.feed(data)
        self._ended |= not data

    def next_event(self) -> Received:
        """Return the next command; an Error to be sent for what is none; NEED_DATA; or CLOSED."""
        if self.state is State.CLOSED:
            return CLOSED
        try:
            message = self._splitter.next_message()
            if message is not None:
                return self._receive(_parse(message))
        except _Malformed as error:
            if isinstance(error, _TooLong):
                self._ended = True
                self._splitter = _Splitter()
            return Error(ErrorClass.GENERIC, str(error), error.id)
        if not self._ended:
            return NEED_DATA
        self.state = State.CLOSED
        return CLOSED

    def send(self, message: Sent) -> bytes:
        """Return a message's bytes, one line, and take the state it leads to.

        Raises LocalProtocolError if the state does not allow it, TypeError or ValueError for values
        that JSON cannot say; the state is then as before.
        """
        state = TRANSITIONS.get((self.state, type(message)))
        if state is None:
            raise LocalProtocolError(f"{type(message).__name__} while {self.state.name}")
        encoded = json.dumps(_encode(message), allow_nan=False).encode("ascii") + b"\r\n"
        self.state = state
        return encoded

    def _receive(self, command: Command) -> Negotiate | Command | Error:
        negotiates = command.name == NEGOTIATE
        if self.state is State.READY:
            if not negotiates:
                return command
            description = f"{NEGOTIATE} was done; this command is ignored"
        else:
            if negotiates:
                return _negotiate(command)
            description = f"send {NEGOTIATE} before any other command"
        return Error(ErrorClass.COMMAND_NOT_FOUND, description, command.id)


def _negotiate(command: Command) -> Negotiate | Error:
    """Accept qmp_capabilities: as the greeting offers no capability, none can be enabled."""
    if command.arguments not in ({}, {"enable": []}):
        description = (
            f"{NEGOTIATE} takes the argument 'enable', a list of the greeting's capabilities"
        )
        return Error(ErrorClass.GENERIC, description, command.id)
    return Negotiate(command.id)


def shown(word: str) -> str:
    """Return a client's word as our answers and log lines show it: one line, quoted, not long."""
    cut = word if len(word) <= WORD_LENGTH_MAX else word[:WORD_LENGTH_MAX] + "…"
    return f"'{''.join(c if c.isprintable() else '?' for c in cut)}'"


def _encode(message: Sent) -> dict[str, object]:
    match message:
        case Greeting(version=version):
            return {"QMP": {"version": dict(version), "capabilities": []}}
        case Negotiated(id=id_):
            return _with_id({"return": {}}, id_)
        case Return(value=value, id=id_):
            return _with_id({"return": value}, id_)
        case Error(error_class=error_class, description=description, id=id_, exit_status=status):
            error: dict[str, object] = {"class": error_class, "desc": description}
            if status != VtpmdError.exit_status:
                error["exit-status"] = status
            return _with_id({"error": error}, id_)
        case Refusal(description=description):
            return {"error": {"class": ErrorClass.GENERIC, "desc": description}}
        case Event(name=name, data=data, timestamp_us=timestamp_us):
            seconds, microseconds = divmod(timestamp_us, 10**6)
            timestamp = {"seconds": seconds, "microseconds": microseconds}
            return {"event": name, "data": dict(data), "timestamp": timestamp}


def _with_id(message: dict[str, object], id_: Id | None) -> dict[str, object]:
    return message if id_ is None else {**message, "id": id_.value}


class _Malformed(Exception):
    """A message is no command; ``id`` is the one it has, if that could be found."""

    def __init__(self, reason: str, id_: Id | None = None) -> None:
        super().__init__(reason)
        self.id = id_


class _TooLong(_Malformed):
    """A message has no end within its limit: where the next one begins is not known."""


# What matters outside of a string, and inside. No string has a line's end in it: there it is given
# up, so that a forgotten quote costs a line and not all that follows.
_OUTSIDE = re.compile(rb'[][{}"]')
_INSIDE = re.compile(rb'["\\\n]')
# What is neither inside an object nor white space is dropped up to here.
_RESUME = re.compile(rb"[{\n]")
_SPACE = b" \t\r\n"


class _Splitter:
    """Find where messages end, looking at each byte once: QMP puts nothing between them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start()

    def _start(self) -> None:
        self._scanned = 0  # may be one past the end: after a backslash
        self._depth = self._deepest = 0
        self._in_string = False

    def feed(self, data: bytes) -> None:
        """Take more bytes."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """Return the next message's bytes, or None if it is not complete.

        What begins with a bracket ends with its counterpart; anything else ends with its line.
        Raises _Malformed, and _TooLong, after which nothing more can be found.
        """
        if not self._scanned:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]
        end = self._find_end()
        if (len(self._buffer) if end is None else end) > MESSAGE_BYTES_MAX:
            raise _TooLong(f"a message has more than {MESSAGE_BYTES_MAX} bytes; connection closed")
        if end is None:
            return None
        message, deepest = bytes(self._buffer[:end]), self._deepest
        del self._buffer[:end]
        self._start()
        if deepest > NESTING_MAX:
            raise _Malformed(f"JSON is nested deeper than {NESTING_MAX}")
        return message

    def _find_end(self) -> int | None:
        if self._buffer and self._buffer[0] not in b"{[":
            found = _RESUME.search(self._buffer, self._scanned)
            self._scanned = len(self._buffer)
            return found.start() if found else None
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(
            self._buffer, self._scanned
        ):
            self._scanned = found.end()
            match found.group():
                case b'"':
                    self._in_string = not self._in_string
                case b"\\":
                    self._scanned += 1
                case b"\n":
                    return found.start()
                case b"{" | b"[":
                    self._depth += 1
                    self._deepest = max(self._deepest, self._depth)
                case _:
                    self._depth -= 1
                    if not self._depth:
                        return self._scanned
        self._scanned = max(self._scanned, len(self._buffer))
        return None


def _parse(message: bytes) -> Command:
    """Return the command that a message is. Raises _Malformed."""
    value = _parse_json(message)
    if not isinstance(value, dict):
        raise _Malformed("a message must be a JSON object")
    id_ = Id(value["id"]) if "id" in value else None
    for key in value:
        if key not in ("execute", "arguments", "id"):
            raise _Malformed(f"the member {shown(key)} of a message is unknown", id_)
    name, arguments = value.get("execute"), value.get("arguments", {})
    if not isinstance(name, str):
        raise _Malformed("a message needs the member 'execute', a string", id_)
    if not isinstance(arguments, dict):
        raise _Malformed("the member 'arguments' of a message must be an object", id_)
    return Command(name, arguments, id_)


def _parse_json(message: bytes) -> object:
    try:
        text = message.decode("utf-8")
        value: object = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        # "\ud800" alone is no character: nothing that is given such a string could write it down.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise _Malformed(f"JSON is malformed at character {error.pos}: {error.msg}") from error
    except UnicodeError as error:
        raise _Malformed("a message is not UTF-8") from error
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members: dict[str, object] = {}
    for name, value in pairs:
        if name in members:
            raise _Malformed(f"the member {shown(name)} of an object is there twice")
        members[name] = value
    return members


def _integer(digits: str) -> int:
    # Longer than any number within the limits: not worth converting, which takes quadratic time.
    if len(digits) > len(str(INTEGER_MIN)) or not INTEGER_MIN <= int(digits) <= INTEGER_MAX:
        raise _Malformed("an integer does not fit into 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise _Malformed("a number is too large")
    return number


def _constant(name: str) -> float:
    raise _Malformed(f"{name} is no JSON")
