"""The engine's codec of the control channel: what it makes of any bytes, in any reads.

The other side is docs/control-channel.md (tests/support/control_document.py); answers are held
against bytes that are written out here. Arbitrary bytes, descriptors and power are for
tests/fuzz/fuzz_control.c, too, which has the same corpus and a model of its own.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.control_codec import RUNNING, STOPPED, Codec, asked
from tests.support.control_document import COMMANDS, NEED_DATA, Command, judge
from vtpmd._core import lib

CORPUS = sorted((Path(__file__).resolve().parents[1] / "fuzz" / "corpus" / "control").iterdir())
INFO_BYTES_MAX = 3072
STOP = struct.pack(">I", 14)
ERROR_BYTES = {4: 8, 12: 16}  # as QEMU reads them; of all others it is the result alone
FAIL = bytes.fromhex("00000009")

powers = st.sampled_from([STOPPED, RUNNING])
u32 = st.integers(0, 0xFFFFFFFF)


def numbers(letter: str) -> st.SearchStrategy[int]:
    """Return the numbers that a field may have, and often those that reach further."""
    largest = (1 << 8 * struct.calcsize(">" + letter)) - 1
    return st.sampled_from([0, 1]) | st.integers(0, largest)


def requests_of(command: Command) -> st.SearchStrategy[bytes]:
    """Return whole requests for a command."""
    letters = command.layout.format[2:]
    if command.data_bytes_max is None:
        values = st.tuples(*map(numbers, letters))
        return values.map(lambda fields: command.layout.pack(command.number, *fields))
    return st.tuples(st.tuples(*map(numbers, letters[:-1])), st.binary(max_size=100)).map(
        lambda both: command.layout.pack(command.number, *both[0], len(both[1])) + both[1]
    )


requests = st.sampled_from(list(COMMANDS.values())).flatmap(requests_of)
# The numbers of commands, with lengths that are often right.
commands = st.builds(
    lambda number, body, data: struct.pack(">I", number) + body + data,
    st.integers(0, 21),
    st.sampled_from([0, 1, 4, 12, 16]).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    st.binary(max_size=12),
)
with_data = st.builds(
    lambda prefix, length, data: prefix + struct.pack(">I", length) + data,
    st.sampled_from([struct.pack(">I", 7), struct.pack(">III", 13, 0, 1)]),
    st.integers(0, 12) | st.sampled_from([0x10000, 0x10001, 0x80000, 0x80001, 0xFFFFFFFF]),
    st.binary(max_size=12),
)


def check_reads(reads: list[bytes], power: int, said: dict[int, Command] = COMMANDS) -> None:
    """Check what comes of some reads, up to the first event, and that the next is understood."""
    codec, data = Codec(), b""
    for read in reads:
        data += read
        expected = judge(data, power, said)
        assert codec.receive(read, power) == expected.verdict
        if expected is NEED_DATA:
            continue
        number = int.from_bytes(data[:4], "big")
        if expected.verdict == lib.CONTROL_REQUEST:
            assert codec.fields() == {name: said for name, said in expected.fields.items() if said}
            answer, result = codec.answer("result", 9), 9
        else:
            assert codec.result == expected.result
            answer, result = codec.sent(), expected.result
        assert answer == struct.pack(">I", result).ljust(ERROR_BYTES.get(number, 4), b"\0")
        following = lib.CONTROL_CLOSED if expected.closes else lib.CONTROL_REQUEST
        assert codec.receive(STOP, power) == following
        return


@given(st.lists(st.binary(min_size=1, max_size=8), max_size=6), powers)
def test_any_bytes_give_the_event_that_the_document_says(reads: list[bytes], power: int) -> None:
    check_reads(reads, power)


@given(
    commands | with_data | st.builds(bytes.__add__, requests, st.binary(max_size=40)),
    st.lists(st.integers(1, 30), max_size=4),
    powers,
)
def test_a_command_and_excess_in_any_reads_give_the_event_that_the_document_says(
    data: bytes, cuts: list[int], power: int
) -> None:
    ends = sorted({cut for cut in cuts if cut < len(data)} | {len(data)})
    check_reads([data[a:b] for a, b in zip([0, *ends], ends, strict=False)], power)


@given(requests, powers)
def test_a_command_split_at_every_byte_is_the_same_command(data: bytes, power: int) -> None:
    for split in range(1, len(data) + 1):
        check_reads([part for part in (data[:split], data[split:]) if part], power)


@given(requests, powers)
def test_no_truncation_is_a_command(data: bytes, power: int) -> None:
    for length in range(len(data)):
        # GET_INFO's padding is part of it; a bare command cut short is a shorter number.
        assert Codec().receive(data[:length], power) == lib.CONTROL_NEED_DATA


def test_corpus_has_every_command() -> None:
    in_corpus = {int.from_bytes(path.read_bytes()[1:5], "big") for path in CORPUS}
    assert COMMANDS.keys() <= in_corpus


def reads_of(path: Path) -> Iterator[list[bytes]]:
    """Yield the reads in which an input of the corpus may come."""
    data = path.read_bytes()[1:]
    yield [data] if data else []
    yield [bytes([byte]) for byte in data]


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_gives_the_events_that_the_document_says(path: Path) -> None:
    for reads in reads_of(path):
        for power in (STOPPED, RUNNING):
            check_reads(reads, power)


@pytest.mark.parametrize(
    "wrong",
    [
        COMMANDS[2]._replace(drops_excess=True),
        COMMANDS[3]._replace(powers={RUNNING}, powers_to_ask={RUNNING}),
        COMMANDS[5]._replace(layout=struct.Struct(">II")),
        COMMANDS[7]._replace(data_bytes_max=1 << 20),
        COMMANDS[12]._replace(fields=("offset", "flags", "type")),
        COMMANDS[14]._replace(layout=struct.Struct(">II"), fields=("flags",)),
        COMMANDS[16]._replace(needs_descriptor=False),
    ],
    ids=lambda command: str(command.name),
)
def test_a_wrong_row_is_noticed(wrong: Command) -> None:
    said = COMMANDS | {wrong.number: wrong}
    with pytest.raises(AssertionError):
        for path in CORPUS:
            for reads in reads_of(path):
                for power in (STOPPED, RUNNING):
                    check_reads(reads, power, said)


@given(st.lists(st.binary(max_size=40), max_size=3), st.integers(0, 130) | u32, st.booleans())
def test_a_state_blob_is_given_from_any_offset_on(
    pieces: list[bytes], offset: int, is_encrypted: bool
) -> None:
    codec = asked(struct.pack(">IIII", 12, 0, 1, offset), RUNNING)
    rest = b"".join(pieces)[offset:]
    head = struct.pack(">IIII", 0, 2 if is_encrypted else 0, len(rest), len(rest))
    assert codec.answer_state_blob(*pieces, is_encrypted=is_encrypted) == head + rest


@given(st.binary(max_size=5000).map(lambda text: text.replace(b"\0", b"0")), st.integers(0, 6000))
@example(b"x" * 4000, 0)
@example(b"x" * 4000, INFO_BYTES_MAX)
@example(b"x" * 4000, 3999)
@example(b"x" * 4000, 4000)
@example(b"x" * 4000, 0xFFFFFFFF)
def test_info_can_be_put_together_from_its_pieces(text: bytes, offset: int) -> None:
    whole, given = text + b"\0", b""
    first = offset
    while offset < len(text):
        answer = asked(struct.pack(">IQII", 18, 1, offset, 0)).answer_info(text)
        result, total, length = struct.unpack_from(">III", answer)
        assert (result, total, len(answer)) == (0, len(whole), 12 + length)
        assert length == min(INFO_BYTES_MAX, len(whole) - offset)
        given += answer[12:]
        offset += length
    assert given.removesuffix(b"\0") == text[first:]
    past = asked(struct.pack(">IQII", 18, 1, max(offset, len(text)), 0)).answer_info(text)
    assert past == bytes.fromhex("00000003")


@given(u32, u32, u32)
def test_numbers_are_answered_as_they_are(size: int, smallest: int, largest: int) -> None:
    codec = asked(struct.pack(">II", 17, 0))
    answer = codec.answer("buffer_size", size, smallest, largest)
    assert answer == struct.pack(">IIII", 0, size, smallest, largest)
    assert asked(struct.pack(">I", 15)).answer("config", size) == struct.pack(">II", 0, size)


@given(st.sampled_from(list(COMMANDS)), u32.filter(bool))
def test_an_error_has_the_length_that_clients_read(number: int, result: int) -> None:
    command = COMMANDS[number]
    codec = Codec()
    request = command.layout.pack(number, *(0 for _ in command.fields))
    if codec.receive(request, max(command.powers)) == lib.CONTROL_REQUEST:
        error = struct.pack(">I", result).ljust(ERROR_BYTES.get(number, 4), b"\0")
        assert codec.answer("result", result) == error
    else:
        assert command.needs_descriptor
