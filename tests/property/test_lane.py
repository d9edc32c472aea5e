"""The lane against an implementation of its own, and against a network that lies.

C by itself is for tests/c/test_lane.c; arbitrary steps are for tests/fuzz/fuzz_lane.c, too.
"""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import lane as apart
from vtpmd.core.lane import (
    LANE_CONTENT_BYTES,
    LANE_FRAME_BYTES,
    LANE_FRAMES_MAX,
    Lane,
    LaneError,
    LaneFrame,
    LaneKeying,
    LaneKind,
    LaneRefusal,
)

u32 = st.integers(0, 0xFFFFFFFF)
digests = st.binary(min_size=32, max_size=32)
names = st.binary(min_size=16, max_size=16)
keyings = st.builds(
    LaneKeying, names, st.binary(min_size=32, max_size=32), names, names, st.just(False)
)
HELLO = LaneFrame(LaneKind.HELLO)
takes = st.tuples(digests, digests, u32, u32).map(lambda four: LaneFrame(LaneKind.TAKE, 0, *four))
refusals = st.integers(1, 0xFFFFFFFF).map(lambda reason: LaneFrame(LaneKind.REFUSE, reason))
others = st.sampled_from([LaneFrame(LaneKind.GRANT), LaneFrame(LaneKind.GO_ON)])
later_frames = takes | refusals | others
conversations = st.lists(later_frames, max_size=6).map(lambda later: [HELLO, *later])


def sides(keying: LaneKeying) -> dict[bool, Lane]:
    """Return both sides of a lane, by whether they are the source."""
    return {is_source: Lane(keying, is_source=is_source) for is_source in (True, False)}


def sealed(keying: LaneKeying, frames: Sequence[LaneFrame], *, is_source: bool) -> list[bytes]:
    """Return what one side says."""
    side = Lane(keying, is_source=is_source)
    return [side.seal(frame) for frame in frames]


def check_ends(side: Lane, data: bytes, right: bytes, refusal: LaneRefusal) -> None:
    """Check that a side takes no more, also what would have been right, and says no more."""
    for each, expected in ((data, refusal), (right, LaneRefusal.ENDED)):
        with pytest.raises(LaneError) as caught:
            side.open(each)
        assert caught.value.refusal is expected
    with pytest.raises(LaneError):
        side.seal(HELLO)


@given(keyings, conversations, st.booleans())
def test_bytes_are_those_of_the_other_implementation(
    keying: LaneKeying, frames: list[LaneFrame], is_source: bool
) -> None:
    data = sealed(keying, frames, is_source=is_source)
    other = Lane(keying, is_source=not is_source)
    for number, (frame, each) in enumerate(zip(frames, data, strict=True)):
        assert each == apart.seal(keying, number, apart.encode(frame), is_source=is_source)
        assert other.open(each) == frame


@given(
    keyings,
    st.integers(0, LANE_FRAMES_MAX - 1),
    st.one_of(
        st.binary(min_size=LANE_CONTENT_BYTES, max_size=LANE_CONTENT_BYTES),
        st.tuples(later_frames | st.just(HELLO), st.integers(0, LANE_CONTENT_BYTES - 1), u32).map(
            lambda few: _with_byte(apart.encode(few[0]), few[1], few[2] % 256)
        ),
    ),
)
def test_sealed_content_is_taken_only_if_it_is_a_frame(
    keying: LaneKeying, number: int, content: bytes
) -> None:
    """The other side has the key, and may seal anything."""
    destination = Lane(keying, is_source=False)
    frames = [HELLO] + [LaneFrame(LaneKind.GRANT)] * (LANE_FRAMES_MAX - 1)
    for each in sealed(keying, frames[:number], is_source=True):
        destination.open(each)
    data = apart.seal(keying, number, content, is_source=True)
    try:
        frame = destination.open(data)
    except LaneError as error:
        assert error.refusal is LaneRefusal.IMPOSSIBLE
        with pytest.raises(LaneError):
            destination.open(data)
    else:
        assert apart.encode(frame) == content
        assert (frame.kind is LaneKind.HELLO) == (number == 0)


def _with_byte(content: bytes, at: int, byte: int) -> bytes:
    return content[:at] + bytes([byte]) + content[at + 1 :]


@given(keyings, conversations, st.data())
def test_no_altered_bit_opens(
    keying: LaneKeying, frames: list[LaneFrame], data: st.DataObject
) -> None:
    said = sealed(keying, frames, is_source=True)
    number = data.draw(st.integers(0, len(said) - 1))
    bit = data.draw(st.integers(0, 8 * LANE_FRAME_BYTES - 1))
    destination = Lane(keying, is_source=False)
    for each in said[:number]:
        destination.open(each)
    altered = bytearray(said[number])
    altered[bit // 8] ^= 1 << bit % 8
    check_ends(destination, bytes(altered), said[number], LaneRefusal.FORGED)


@given(keyings, conversations, st.lists(st.integers(0, 6), max_size=9), st.booleans())
def test_frames_open_in_order_and_once(
    keying: LaneKeying, frames: list[LaneFrame], order: list[int], is_source: bool
) -> None:
    """Whatever is replayed, left out or put first."""
    said = sealed(keying, frames, is_source=is_source)
    other = Lane(keying, is_source=not is_source)
    for due, number in enumerate(order):
        if number >= len(said):
            return
        if number != due:
            right = said[due] if due < len(said) else bytes(LANE_FRAME_BYTES)
            check_ends(other, said[number], right, LaneRefusal.FORGED)
            return
        assert other.open(said[number]) == frames[number]


@given(keyings, conversations, st.booleans())
def test_nothing_that_is_sent_back_opens(
    keying: LaneKeying, frames: list[LaneFrame], is_source: bool
) -> None:
    side, right = sides(keying)[is_source], sealed(keying, [HELLO], is_source=not is_source)[0]
    said = [side.seal(frame) for frame in frames]
    check_ends(side, said[0], right, LaneRefusal.FORGED)
    later = Lane(keying, is_source=is_source)
    assert later.open(right) == HELLO
    if len(said) > 1:
        check_ends(later, said[1], right, LaneRefusal.FORGED)


@given(keyings, keyings)
def test_nothing_of_another_session_opens(keying: LaneKeying, other: LaneKeying) -> None:
    """Also if it differs in one thing."""
    right = sealed(keying, [HELLO], is_source=True)[0]
    for foreign in (
        keying._replace(session=other.session),
        keying._replace(key=other.key),
        keying._replace(uuid=other.uuid),
        keying._replace(lineage=other.lineage),
    ):
        if foreign != keying:
            forged = sealed(foreign, [HELLO], is_source=True)[0]
            check_ends(Lane(keying, is_source=False), forged, right, LaneRefusal.FORGED)


def test_what_has_a_wrong_length_is_refused() -> None:
    keying = LaneKeying(bytes(16), bytes(32), bytes(16), bytes(16))
    for length in (0, 15, 17, 31, 33):
        for field, wrong in {
            "session": keying._replace(session=bytes(length)),
            "key": keying._replace(key=bytes(length)),
            "uuid": keying._replace(uuid=bytes(length)),
            "lineage": keying._replace(lineage=bytes(length)),
        }.items():
            with pytest.raises(ValueError, match=field):
                Lane(wrong, is_source=True)
    side = Lane(keying, is_source=False)
    hello = sealed(keying, [HELLO], is_source=True)[0]
    for data in (hello[:-1], hello + b"\0"):
        with pytest.raises(ValueError, match="frame"):
            side.open(data)
    with pytest.raises(ValueError, match="digest"):
        side.seal(HELLO._replace(permanent_digest=bytes(31)))
    assert side.open(hello) == HELLO


def test_a_keying_does_not_show_its_key() -> None:
    assert "51" * 32 not in (shown := repr(LaneKeying(b"s" * 16, b"Q" * 32, b"", b"")))
    assert "Q" not in shown
