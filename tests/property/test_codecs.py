"""C's codecs of the control channel and of state blobs do what Python's do, byte for byte."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.fuzz_control import SHAPES
from vtpmd._core import ffi, lib
from vtpmd.wire import control, swtpm_format
from vtpmd.wire.control import NEED_DATA, Command, ProtocolError, Receiver
from vtpmd.wire.swtpm_format import FormatError
from vtpmd.wire.tpm import Result

CORPUS = Path(__file__).resolve().parents[1] / "fuzz" / "corpus"
RUNNING: int = lib.CONTROL_RUNNING
STOPPED: int = lib.CONTROL_STOPPED


class Codec:
    """C's codec, for one client."""

    def __init__(self) -> None:
        """Begin with a client that has sent nothing."""
        self._control = ffi.gc(ffi.new("struct control *"), lib.control_deinit)
        lib.control_init(self._control)

    def receive(self, data: bytes, power: int) -> tuple[int, Any]:
        """Take one read; return the verdict and the event."""
        lib.control_receive(self._control, data, len(data), ffi.NULL, 0)
        event = ffi.new("struct control_event *")
        return lib.control_next(self._control, power, event), event

    def answer(self, name: str, *arguments: object) -> bytes:
        """Answer with one of the functions; return what is sent."""
        getattr(lib, f"control_answer_{name}")(self._control, *arguments)
        return self.sent()

    def sent(self) -> bytes:
        """Send all that there is, each piece in two steps, and return it."""
        vectors, sent = ffi.new("struct iovec **"), b""
        while lib.control_output(self._control, vectors):
            first = vectors[0][0]
            length = max(1, first.iov_len - 1)
            sent += bytes(ffi.buffer(first.iov_base, length))
            lib.control_sent(self._control, length)
        return sent


def fields_of(request: control.Request) -> dict[str, int | bytes]:
    """Return what C is to say of a request, in its names."""
    names = {"state_type": "type", "blob": "data"}
    fields = dict.fromkeys(
        ("flags", "type", "offset", "locality", "wanted_bytes", "retries", "data_bytes"), 0
    )
    found: dict[str, int | bytes] = {**fields, "data": b"", "number": int(request.command)}
    if not isinstance(request, control.Bare):
        values = request._asdict()
        del values["command"]
        found |= {names.get(name, name): value for name, value in values.items()}
    data = found["data"]
    assert isinstance(data, bytes)
    return found | {"data_bytes": len(data)}


def fields_in(event: Any) -> dict[str, int | bytes]:
    """Return what C says of a request."""
    names = ("number", "flags", "type", "offset", "locality", "wanted_bytes", "retries")
    data = bytes(ffi.buffer(event.data, event.data_bytes)) if event.data else b""
    found: dict[str, int | bytes] = {name: getattr(event, name) for name in names}
    return found | {"data": data, "data_bytes": event.data_bytes}


def refused_for_power(request: control.Request, power: int) -> bool:
    """Whether a command is refused, as docs/control-channel.md says."""
    if isinstance(request, control.SetStateBlob):
        return power == RUNNING
    if isinstance(request, control.SetBufferSize):
        return power == RUNNING and request.wanted_bytes != 0
    running = {4, 6, 7, 8, 9, 10, 11, 12}
    return power == STOPPED and request.command in running


def check_reads(reads: list[bytes], power: int) -> None:
    """Give both codecs the same reads, up to the first event."""
    receiver, codec = Receiver(), Codec()
    for read in reads:
        receiver.receive_data(read)
        expected = receiver.next_event()
        verdict, event = codec.receive(read, power)
        if expected is NEED_DATA:
            assert verdict == lib.CONTROL_NEED_DATA
            continue
        assert not isinstance(expected, control.NeedData)
        if isinstance(expected, ProtocolError):
            assert (verdict, event.result) == (lib.CONTROL_REFUSED, expected.result)
            assert codec.sent() == control.encode_error(expected.number, expected.result)
            closed = codec.receive(b"", power)[0] == lib.CONTROL_CLOSED
            assert closed == expected.close
        elif expected.command is Command.SET_DATAFD:
            # None has come with it; what one does is for tests/c/test_control.c.
            assert (verdict, event.result) == (lib.CONTROL_REFUSED, Result.BAD_PARAMETER)
        elif refused_for_power(expected, power):
            assert (verdict, event.result) == (lib.CONTROL_REFUSED, Result.BAD_ORDINAL)
            assert codec.sent() == control.encode_error(expected.command, Result.BAD_ORDINAL)
        else:
            assert verdict == lib.CONTROL_REQUEST
            assert fields_in(event) == fields_of(expected)
            answer = codec.answer("result", Result.FAIL)
            assert answer == control.encode_error(expected.command, Result.FAIL)
        return


powers = st.sampled_from([STOPPED, RUNNING])
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


@given(st.lists(st.binary(max_size=8), max_size=6), powers)
def test_any_bytes_give_the_same_event(reads: list[bytes], power: int) -> None:
    check_reads([read for read in reads if read], power)


@given(commands | with_data, st.lists(st.integers(1, 30), max_size=4), powers)
def test_a_command_in_any_reads_gives_the_same_event(
    data: bytes, cuts: list[int], power: int
) -> None:
    ends = sorted({cut for cut in cuts if cut < len(data)} | {len(data)})
    check_reads([data[a:b] for a, b in zip([0, *ends], ends, strict=False)], power)


@pytest.mark.parametrize("path", sorted((CORPUS / "control").iterdir()), ids=lambda path: path.name)
def test_the_corpus_gives_the_same_events(path: Path) -> None:
    data = path.read_bytes()[1:]
    for power in (STOPPED, RUNNING):
        check_reads([data] if data else [], power)
        check_reads([bytes([byte]) for byte in data], power)


def asked(data: bytes, power: int = STOPPED) -> Codec:
    """Return a codec whose client has sent a request, and waits."""
    codec = Codec()
    assert codec.receive(data, power)[0] == lib.CONTROL_REQUEST
    return codec


u32 = st.integers(0, 0xFFFFFFFF)


def iovecs(*pieces: bytes) -> tuple[Any, list[Any]]:
    """Return pieces for C, and what must be kept for as long as C has them."""
    kept = [ffi.from_buffer("uint8_t[]", piece) for piece in pieces]
    vectors = [(buffer, len(piece)) for buffer, piece in zip(kept, pieces, strict=True)]
    return ffi.new("struct iovec[]", vectors), kept


@given(
    st.lists(st.binary(max_size=40), max_size=3),
    st.integers(0, 130) | u32,
    st.booleans(),
)
def test_state_blobs_are_answered_alike(pieces: list[bytes], offset: int, encrypted: bool) -> None:
    codec = asked(struct.pack(">IIII", 12, 0, 1, offset), RUNNING)
    vectors, kept = iovecs(*pieces)
    answer = codec.answer("state_blob", vectors, len(pieces), encrypted)
    assert answer == control.encode_state_blob(b"".join(pieces), offset, encrypted=encrypted)
    del kept


@given(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=50), u32)
@example("x" * 4000, 0)
@example("x" * 4000, 3072)
@example("x" * 4000, 3999)
@example("x" * 4000, 4000)
def test_texts_are_answered_alike(text: str, offset: int) -> None:
    for where in (offset, offset % 60):
        codec = asked(struct.pack(">IQII", 18, 1, where, 0))
        kept = ffi.new("char[]", text.encode())
        assert codec.answer("info", kept) == control.encode_info(text.encode(), where)


@given(u32, u32, u32)
def test_numbers_are_answered_alike(size: int, smallest: int, largest: int) -> None:
    codec = asked(struct.pack(">II", 17, 0))
    answer = codec.answer("buffer_size", size, smallest, largest)
    assert answer == control.encode_buffer_size(size, smallest, largest)
    assert asked(struct.pack(">I", 15)).answer("config", size) == control.encode_config(size)


def test_the_rest_is_answered_alike() -> None:
    everything = control.Capability((1 << len(control.Capability)) - 1)
    answer = asked(struct.pack(">I", 1)).answer("capability")
    assert answer == control.encode_capability(everything)
    for bit in (True, False):
        codec = asked(struct.pack(">I", 4), RUNNING)
        assert codec.answer("established", bit) == control.encode_established(bit)
    assert asked(struct.pack(">I", 14)).answer("result", 0) == control.encode_result()


@pytest.mark.parametrize("number", SHAPES)
@pytest.mark.parametrize("result", [Result.FAIL, Result.RETRY, 0x101])
def test_errors_are_answered_alike(number: int, result: int) -> None:
    codec = Codec()
    request = struct.pack(">I", number) + bytes(struct.calcsize(">" + SHAPES[number].fields))
    power = STOPPED if number == Command.SET_STATEBLOB else RUNNING
    if codec.receive(request, power)[0] == lib.CONTROL_REQUEST:
        assert codec.answer("result", result) == control.encode_error(number, result)
    else:
        assert number == Command.SET_DATAFD


KEYS = [None, bytes(range(16)), bytes(range(32))]


def c_key(key: bytes | None) -> Any:
    """Return a key for C."""
    return ffi.NULL if key is None else ffi.new("struct cipher_key *", (len(key), key))


def encode_in_c(state: bytes, key: bytes | None) -> bytes:
    """Have C wrap a state."""
    wrapped = ffi.gc(ffi.new("struct swtpm_wrapped *"), lib.swtpm_wrapped_deinit)
    buffer = ffi.from_buffer("uint8_t[]", state)
    result = lib.swtpm_wrap(lib.SWTPM_BLOB, c_key(key), buffer, len(state), ffi.NULL, wrapped)
    assert result == 0
    pieces = ffi.new("struct iovec[]", lib.SWTPM_PIECES)
    lib.swtpm_wrapped_pieces(wrapped, pieces)
    return b"".join(bytes(ffi.buffer(each.iov_base, each.iov_len)) for each in pieces)


def decode_in_c(blob: bytes, encrypted: bool, key: bytes | None) -> bytes | int:
    """Have C unwrap a blob; return the state, or the result that it is refused with."""
    content = ffi.gc(ffi.new("struct blob_content *"), lib.blob_content_deinit)
    buffer = ffi.from_buffer("uint8_t[]", blob)
    refusal = lib.blob_decode(buffer, len(blob), encrypted, c_key(key), content)
    assert refusal >= 0
    if refusal:
        return int(lib.blob_result(refusal))
    return bytes(ffi.buffer(content.state, content.state_bytes)) if content.state else b""


def decode_in_python(blob: bytes, encrypted: bool, key: bytes | None) -> bytes | int:
    """Do the same with Python's codec, which tells state and lineage apart."""
    try:
        state = swtpm_format.decode_blob(blob, encrypted=encrypted, key=key)
        if blob:
            swtpm_format.read_blob_lineage(blob)
        return state
    except FormatError as error:
        return int(error.result)


@given(st.binary(max_size=100), st.sampled_from(KEYS))
def test_each_takes_the_blobs_of_the_other(state: bytes, key: bytes | None) -> None:
    ours = swtpm_format.encode_blob(state, key=key, iv=bytes(len(key or b"")))
    theirs = encode_in_c(state, key)
    assert len(ours) == len(theirs)
    assert ours == theirs or key is not None
    assert decode_in_c(ours, False, key) == decode_in_python(theirs, False, key) == state


def tlv(tag: int, data: bytes) -> bytes:
    """Write a TLV."""
    return struct.pack(">HI", tag, len(data)) + data


tlvs = st.lists(
    st.builds(
        tlv,
        st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 9, 0x5654]),
        st.sampled_from([0, 15, 16, 31, 32]).map(bytes) | st.binary(max_size=8),
    ),
    max_size=4,
).map(b"".join)
headers = st.tuples(
    st.sampled_from([2, 2, 2, 1, 3]),
    st.sampled_from([1, 1, 1, 2, 3, 255]),
    st.sampled_from([10, 10, 10, 12]),
    st.integers(0, 31) | st.just(0x8004),
    st.sampled_from([0, 0, 0, 1, -1]),
)


@given(
    headers,
    st.builds(lambda inner, more: tlv(4, inner) + more, tlvs, tlvs) | tlvs | st.binary(max_size=9),
    st.booleans(),
    st.sampled_from(KEYS),
)
def test_blobs_of_all_kinds_are_taken_and_refused_alike(
    header: tuple[int, int, int, int, int], body: bytes, encrypted: bool, key: bytes | None
) -> None:
    *first, flags, off = header
    blob = struct.pack(">BBHHI", *first, flags, 10 + len(body) + off) + body
    assert decode_in_c(blob, encrypted, key) == decode_in_python(blob, encrypted, key)


@given(st.binary(max_size=40), st.sampled_from(KEYS), st.sampled_from(KEYS), st.integers(0, 2**20))
def test_altered_blobs_are_taken_and_refused_alike(
    state: bytes, key: bytes | None, other: bytes | None, place: int
) -> None:
    blob = bytearray(encode_in_c(state, key))
    blob[place // 8 % len(blob)] ^= 1 << place % 8
    for altered in (bytes(blob), bytes(blob[: place % len(blob)])):
        for opened_with in (key, other):
            given_by_c = decode_in_c(altered, False, opened_with)
            assert given_by_c == decode_in_python(altered, False, opened_with)


BLOBS = sorted((CORPUS / "blob").glob("decode_*"))


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.name)
def test_the_corpus_of_blobs_is_taken_and_refused_alike(path: Path) -> None:
    blob = path.read_bytes().removeprefix(b"d")[1:]
    for encrypted in (False, True):
        for key in KEYS:
            outcome = decode_in_c(blob, encrypted, key)
            assert outcome == decode_in_python(blob, encrypted, key)
