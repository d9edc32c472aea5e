"""Fuzz the control channel's codec against an independent model of what one read may bring.

    python -m tests.fuzz.fuzz_control -max_total_time=600 tests/fuzz/corpus/control

needs atheris; every test run replays the corpus without it (tests/property/test_fuzz_corpus.py).

Input: one byte that seeds how the rest is cut into reads, then the bytes of a client's commands.

The oracle:
1. Whole input in one read: the event is what `expected_event` says, which knows the protocol from
   a table of its own.
2. However the bytes of one command are cut into reads, they give that same event, and NEED_DATA at
   every cut before.
3. A parsed request, encoded again by `encode`, is what the input begins with.
4. Never more than COMMAND_BYTES_MAX bytes are held between reads, and nothing after an event.
5. An error that closes is final; after any other event the next command is understood.
"""

import struct
import sys
from typing import NamedTuple

from vtpmd.wire import control
from vtpmd.wire.control import NEED_DATA, ProtocolError, Receiver, Request
from vtpmd.wire.tpm import Result

HEADER_BYTES = 4


class Shape(NamedTuple):
    """A command in the model: what the fields of its body are, and what may follow it."""

    fields: str  # struct's letters
    limit: int | None = None  # of the data that the last field announces
    excess: bool = False  # is ignored


# Not derived from the code under test.
SHAPES = {
    1: Shape("", excess=True),
    2: Shape("I"),
    3: Shape(""),
    4: Shape(""),
    5: Shape("B", excess=True),
    6: Shape(""),
    7: Shape("I", limit=0x10000),
    8: Shape(""),
    9: Shape(""),
    10: Shape(""),
    11: Shape("B", excess=True),
    12: Shape("III", excess=True),
    13: Shape("III", limit=0x80000),
    14: Shape(""),
    15: Shape(""),
    16: Shape("", excess=True),
    17: Shape("I", excess=True),
    18: Shape("QI4x", excess=True),
    19: Shape("I", excess=True),
}


class Expected(NamedTuple):
    """What the model says of a read: an error's result, a request's bytes, or neither yet."""

    result: int | None = None
    close: bool = False
    command_bytes: int | None = None


def expected_event(data: bytes) -> Expected:
    """Judge one read by the table alone."""
    if len(data) < HEADER_BYTES:
        return Expected()
    number = int.from_bytes(data[:HEADER_BYTES], "big")
    if number not in SHAPES:
        return Expected(result=0x0A)
    shape = SHAPES[number]
    needed = HEADER_BYTES + struct.calcsize(">" + shape.fields)
    if len(data) < needed:
        return Expected()
    if shape.limit is not None:
        announced = int.from_bytes(data[needed - 4 : needed], "big")
        if announced > shape.limit:
            return Expected(result=0x03, close=True)
        needed += announced
        if len(data) < needed:
            return Expected()
    if len(data) > needed and not shape.excess:
        return Expected(result=0x03)
    return Expected(command_bytes=needed)


def encode(request: Request) -> bytes:
    """Write a request as a client would; GET_INFO's padding is zero."""
    data = b""
    fields: tuple[int | bytes, ...] = () if isinstance(request, control.Bare) else request[:-1]
    if isinstance(request, control.HashData | control.SetStateBlob):
        data = request.data if isinstance(request, control.HashData) else request.blob
        fields = (*fields[:-1], len(data))
    shape = SHAPES[int(request.command)]
    return struct.pack(">I" + shape.fields, request.command, *fields) + data


def check_event(data: bytes, event: object) -> None:
    """Compare an event with the model's."""
    expected = expected_event(data)
    if expected.result is not None:
        assert isinstance(event, ProtocolError)
        assert (event.result, event.close) == (expected.result, expected.close)
        assert event.number == int.from_bytes(data[:HEADER_BYTES], "big")
    elif expected.command_bytes is None:
        assert event is NEED_DATA
    else:
        assert isinstance(event, Request)
        again, sent = encode(event), data[: expected.command_bytes]
        if isinstance(event, control.GetInfo):  # its last four bytes are padding of any value
            again, sent = again[:-4], sent[:-4]
        assert again == sent


def read_at_once(data: bytes) -> object:
    """Take the data as one read, and check what must hold whatever it is."""
    receiver = Receiver()
    receiver.receive_data(data)
    event = receiver.next_event()
    check_event(data, event)
    if event is NEED_DATA:
        assert receiver.buffered_bytes == len(data) < control.COMMAND_BYTES_MAX
        return event
    assert receiver.buffered_bytes == 0
    receiver.receive_data(struct.pack(">I", 14))
    following = receiver.next_event()
    final = isinstance(event, ProtocolError) and event.close
    assert following == (event if final else control.Bare(control.Command.STOP))
    return event


def read_in_pieces(data: bytes, seed: int) -> object:
    """Take the data in reads of lengths that the seed gives, until there is an event."""
    receiver = Receiver()
    event: object = NEED_DATA
    position = 0
    while position < len(data) and event is NEED_DATA:
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        piece = data[position : position + 1 + (seed >> 16) % max(8, len(data) // 8)]
        position += len(piece)
        receiver.receive_data(piece)
        event = receiver.next_event()
        check_event(data[:position], event)
    return event


def test_one_input(data: bytes) -> None:
    """Check one input; an AssertionError is a bug in the codec or in the model."""
    seed, data = (data[0], data[1:]) if data else (0, b"")
    event = read_at_once(data)
    command_bytes = expected_event(data).command_bytes
    # What follows a command is judged by the read that it came in: cut the command alone.
    alone = data[:command_bytes] if command_bytes is not None else data
    pieces = read_in_pieces(alone, seed)
    if command_bytes is not None:
        assert pieces == event
    if isinstance(event, ProtocolError):
        assert event.result in (Result.BAD_ORDINAL, Result.BAD_PARAMETER)


def main() -> None:
    """Fuzz until libFuzzer's arguments say to stop."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
