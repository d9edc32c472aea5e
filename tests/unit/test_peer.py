"""The stream between peers: every message comes back, every byte in any pieces, nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpmd.wire import peer
from vtpmd.wire.tpm import GENERATION_GIVEN_MAX

U8, U16, U32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
GENERATIONS = st.integers(0, GENERATION_GIVEN_MAX)
SESSION, DIGEST, UUID = (
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=32, max_size=32),
    (st.binary(min_size=16, max_size=16)),
)
MESSAGES: st.SearchStrategy[peer.Message] = st.one_of(
    st.builds(peer.Hello, U16, U16, SESSION, UUID, UUID, U16, U16, DIGEST, U32),
    st.builds(peer.Welcome, U16, U8),
    st.builds(peer.Refuse, U16, st.text(st.characters(categories=["L", "N", "P"]), max_size=99)),
    st.builds(peer.Key, DIGEST),
    st.builds(peer.Record, st.binary(max_size=2000)),
    st.builds(peer.Commit, U32, GENERATIONS, GENERATIONS, U8, U8),
    st.builds(peer.Ack, U32, GENERATIONS, GENERATIONS),
    st.builds(peer.Running, SESSION, U32, U32),
    st.builds(peer.Receiving, SESSION, U8),
    *(
        st.builds(kind, SESSION)
        for kind in (
            peer.Reclaim,
            peer.Released,
            peer.Kept,
            peer.Disarm,
            peer.Stopped,
            peer.Ping,
            peer.Pong,
            peer.Ask,
            peer.Unknown,
        )
    ),
)


def decode(*pieces: bytes) -> list[peer.Message]:
    decoder, messages = peer.Decoder(), []
    for piece in pieces:
        decoder.receive_data(piece)
        while (message := decoder.next_message()) is not None:
            messages.append(message)
    return messages


def kinds(messages: list[peer.Message]) -> list[tuple[type, peer.Message]]:
    """Tell messages apart: tuples of two kinds may be equal."""
    return [(type(message), message) for message in messages]


@given(st.lists(MESSAGES, max_size=5))
def test_round_trip(messages: list[peer.Message]) -> None:
    """Several in one read."""
    assert kinds(decode(b"".join(map(peer.encode, messages)))) == kinds(messages)


@given(MESSAGES)
def test_pieces_make_no_difference(message: peer.Message) -> None:
    """Byte by byte."""
    frame = peer.encode(message)
    assert decode(*(frame[i : i + 1] for i in range(len(frame)))) == [message]


@given(MESSAGES, st.data())
def test_a_truncation_is_not_a_message(message: peer.Message, data: st.DataObject) -> None:
    """It waits for the rest."""
    frame = peer.encode(message)
    assert decode(frame[: data.draw(st.integers(0, len(frame) - 1))]) == []


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waited_for(data: bytes) -> None:
    """Only StreamError is raised, and nothing is taken after it."""
    decoder = peer.Decoder()
    decoder.receive_data(data)
    try:
        while decoder.next_message() is not None:
            pass
    except peer.StreamError:
        decoder.receive_data(peer.encode(peer.Disarm(bytes(16))))
        with pytest.raises(peer.StreamError, match="before"):
            decoder.next_message()


@pytest.mark.parametrize("length", [0, peer.FRAME_BYTES_MAX + 1, 2**32 - 1])
def test_lengths_past_the_limit_are_refused_at_once(length: int) -> None:
    """Not when so much has come."""
    with pytest.raises(peer.StreamError, match="a frame of"):
        decode(length.to_bytes(4, "big"))


def test_fixed_messages_have_their_length() -> None:
    """A byte more or less is another protocol's."""
    disarm = peer.encode(peer.Disarm(bytes(16)))
    for body in (disarm[5:-1], disarm[5:] + b"\0"):
        frame = (1 + len(body)).to_bytes(4, "big") + disarm[4:5] + body
        with pytest.raises(peer.StreamError, match="Disarm of"):
            decode(frame)


@pytest.mark.parametrize("kind", [peer.Commit, peer.Ack])
def test_invariant_10_generations_that_leave_no_more_are_none(
    kind: type[peer.Commit | peer.Ack],
) -> None:
    rest = (0,) * (len(kind._fields) - 3)
    largest = kind(1, GENERATION_GIVEN_MAX, GENERATION_GIVEN_MAX, *rest)
    decoder = peer.Decoder()
    decoder.receive_data(peer.encode(largest))
    assert decoder.next_message() == largest
    for field in ("permanent_generation", "volatile_generation"):
        decoder = peer.Decoder()
        decoder.receive_data(peer.encode(largest._replace(**{field: GENERATION_GIVEN_MAX + 1})))
        with pytest.raises(peer.StreamError, match="which is none"):
            decoder.next_message()


def test_unknown_types_are_refused() -> None:
    """So a later version has to be agreed on first."""
    with pytest.raises(peer.StreamError, match="type 99"):
        decode(b"\0\0\0\1\x63")


def test_refusals_text_is_fit_for_a_terminal() -> None:
    """A peer cannot write escape sequences into a log."""
    (message,) = decode(peer.encode(peer.Refuse(1, "no\n\x1b[31mred")))
    assert isinstance(message, peer.Refuse)
    assert message.text == "no??[31mred"


def test_invariant_7_key_and_state_are_not_shown() -> None:
    """Not in a log line of a message."""
    assert "6b" not in repr(peer.Key(b"k" * 32)) and "kk" not in repr(peer.Key(b"k" * 32))
    assert "state" not in repr(peer.Record(b"state"))
