"""Properties of the control channel's codec, over any client that the model allows.

The properties are those of the fuzz target's oracle; here the inputs are mostly valid commands.
"""

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_control import SHAPES, encode
from tests.fuzz.fuzz_control import test_one_input as check
from vtpmd.wire import control

u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
bare = [number for number, shape in SHAPES.items() if not shape.fields]

requests: st.SearchStrategy[control.Request] = st.one_of(
    st.sampled_from(bare).map(lambda number: control.Bare(control.Command(number))),
    u32.map(control.Init),
    u8.map(control.SetLocality),
    st.binary(max_size=100).map(control.HashData),
    u8.map(control.ResetEstablished),
    st.tuples(u32, u32, u32).map(lambda fields: control.GetStateBlob(*fields)),
    st.tuples(u32, u32, st.binary(max_size=100)).map(lambda fields: control.SetStateBlob(*fields)),
    u32.map(control.SetBufferSize),
    st.tuples(u64, u32).map(lambda fields: control.GetInfo(*fields)),
    u32.map(control.LockStorage),
)


def receive(*reads: bytes) -> object:
    """Return the first event that some reads give."""
    receiver = control.Receiver()
    event: object = control.NEED_DATA
    for read in reads:
        receiver.receive_data(read)
        event = receiver.next_event()
        if event is not control.NEED_DATA:
            break
    return event


@given(requests)
def test_a_request_survives_the_way(request: control.Request) -> None:
    assert receive(encode(request)) == request


@given(requests)
def test_a_command_split_at_every_byte_is_the_same_command(request: control.Request) -> None:
    data = encode(request)
    for split in range(len(data) + 1):
        assert receive(data[:split], data[split:]) == request


@given(requests)
def test_no_truncation_is_a_command(request: control.Request) -> None:
    data = encode(request)
    for length in range(len(data)):
        # GET_INFO's padding is part of it; a bare command cut short is a shorter number.
        assert receive(data[:length]) is control.NEED_DATA


@given(st.integers(0, 255), requests, st.binary(max_size=40))
def test_the_oracle_holds_for_a_command_and_excess(
    seed: int, request: control.Request, excess: bytes
) -> None:
    check(bytes([seed]) + encode(request) + excess)


@given(st.integers(0, 255), st.integers(0, 21), st.binary(max_size=40))
def test_the_oracle_holds_for_any_body(seed: int, number: int, body: bytes) -> None:
    check(struct.pack(">BI", seed, number) + body)


@given(st.binary(max_size=5000), st.integers(0, 6000))
def test_info_can_be_put_together_from_its_pieces(text: bytes, offset: int) -> None:
    pieces, expected = b"", (text + b"\0")[offset:] if offset < len(text) else b""
    while offset < len(text):
        answer = control.encode_info(text, offset)
        result, total, length = struct.unpack_from(">III", answer)
        assert (result, total, len(answer)) == (0, len(text) + 1, 12 + length)
        assert 0 < length <= control.INFO_BYTES_MAX
        pieces += answer[12:]
        offset += length
    assert expected.startswith(pieces)
    assert expected.removesuffix(b"\0") == pieces.removesuffix(b"\0")
